"""Small trained models that ship with the package, each saved in its library's own format by a script in bench/zoo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dtta_fast.denoisers.base import Denoiser
from dtta_fast.denoisers.dit import DiT

NAMES = ("digits", "open_vocabulary")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")  # names for open_vocabulary's example


def load(name: str | Path) -> tuple[nn.Module, Denoiser]:
    """The model and the denoiser of that name, on the CPU, in eval mode.

    "digits" are a timm ConvNeXt and a pixel DiT; "open_vocabulary" a transformers CLIPModel and a Stable Diffusion of the digits, which
    take a ZeroShot task with load_processor()'s processor. A Path is a folder with a classifier and a denoiser, as bench/zoo writes them.

    Raises:
        ValueError: there is none of that name.
    """
    model = load_classifier(name)
    if name != "open_vocabulary":
        return model, DiT.from_pretrained(folder(name) / "denoiser").eval()
    from dtta_fast.denoisers.stable_diffusion import StableDiffusion

    return model, StableDiffusion.from_pretrained(folder(name) / "diffusion")


def load_classifier(name: str | Path) -> nn.Module:
    """The model alone."""
    if folder(name).name == "open_vocabulary":
        from dtta_fast.tasks.zero_shot import load_clip

        return load_clip(folder(name) / "clip")[0]
    import timm

    return timm.create_model(f"local-dir:{folder(name) / 'classifier'}", pretrained=True).eval()


def load_processor(name: str) -> Any:
    """The transformers CLIPProcessor of "open_vocabulary"."""
    if name != "open_vocabulary":
        raise ValueError(f"name is {name!r}; of the zoo's models only 'open_vocabulary' has a processor")
    from transformers import CLIPProcessor

    return CLIPProcessor.from_pretrained(folder(name) / "clip")


def example(name: str) -> tuple[Tensor, Tensor]:
    """Images [N, 3, H, W] in [0, 1] and labels [N] of the test split: of either name the digits' (extra `demo`)."""
    from dtta_fast.data.digits import load_digits

    folder(name)
    return load_digits("test")


def folder(name: str | Path) -> Path:
    """Where the files of that name lie."""
    if isinstance(name, Path):
        return name
    if name not in NAMES:
        raise ValueError(f"name is {name!r}; the zoo has {', '.join(NAMES)}")
    return Path(__file__).parent / name
