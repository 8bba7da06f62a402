"""Small trained models that ship with the package, each saved in its library's own format by a script in bench/zoo."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dtta_fast.data.digits import DIGITS as DIGITS  # names for open_vocabulary's example
from dtta_fast.defaults import float32_on_cpu
from dtta_fast.denoisers.base import Denoiser
from dtta_fast.denoisers.dit import DiT
from dtta_fast.tasks import Classification, Depth, Segmentation, Task

NAMES = ("digits", "open_vocabulary", "segmentation", "depth")
OF_SCENES = ("segmentation", "depth")
EXAMPLES = 64  # generated scenes


@float32_on_cpu()
def load(name: str | Path) -> tuple[nn.Module, Denoiser]:
    """The model and the denoiser of that name, on the CPU, in eval mode; task(name) is the task that they take.

    "digits" are a timm ConvNeXt and a pixel DiT; "open_vocabulary" a transformers CLIPModel and a Stable Diffusion of the digits;
    "segmentation" a transformers SegFormer, "depth" a GLPN depth estimator, each with a UNet that sees its map, of generated scenes. A
    Path is a folder with a classifier and a denoiser, as bench/zoo writes them.

    Raises:
        ValueError: there is none of that name.
    """
    model = load_model(name)
    if name == "open_vocabulary":
        from dtta_fast.denoisers.stable_diffusion import StableDiffusion

        return model, StableDiffusion.from_pretrained(folder(name) / "diffusion")
    if name in OF_SCENES:
        from dtta_fast.denoisers.concat_unet import ConcatUNet

        return model, ConcatUNet.from_pretrained(folder(name) / "denoiser")
    return model, DiT.from_pretrained(folder(name) / "denoiser").eval()


@float32_on_cpu()
def load_model(name: str | Path) -> nn.Module:
    """The model alone.

    Raises:
        ValueError: there is none of that name.
    """
    if name == "open_vocabulary":
        from dtta_fast.tasks.zero_shot import load_clip

        return load_clip(folder(name) / "clip")[0]
    if name in OF_SCENES:
        import transformers

        kind = {"segmentation": "AutoModelForSemanticSegmentation", "depth": "AutoModelForDepthEstimation"}[str(name)]
        loaded: nn.Module = getattr(transformers, kind).from_pretrained(folder(name) / "model", trust_remote_code=False).float().eval()
        return loaded
    import timm

    return timm.create_model(f"local-dir:{folder(name) / 'classifier'}", pretrained=True).eval()


def task(name: str | Path) -> Task:
    """The task of the models of that name; open_vocabulary's with the digits' names for classes.

    Raises:
        ValueError: there is none of that name.
    """
    folder(name)
    if name == "open_vocabulary":
        from dtta_fast.tasks.zero_shot import ZeroShot

        return ZeroShot(DIGITS, load_processor(name))
    if name in OF_SCENES:
        return (Segmentation if name == "segmentation" else Depth)(load_processor(str(name)))
    return Classification()


def load_processor(name: str) -> Any:
    """The transformers processor of "open_vocabulary", "segmentation" or "depth".

    Raises:
        ValueError: name is another one.
    """
    if name == "open_vocabulary":
        from transformers import CLIPProcessor

        return CLIPProcessor.from_pretrained(folder(name) / "clip")
    if name in OF_SCENES:
        from transformers import SegformerImageProcessor

        return SegformerImageProcessor.from_pretrained(folder(name) / "model")
    raise ValueError(f"name is {name!r}; of the zoo's models 'open_vocabulary', 'segmentation' and 'depth' have a processor")


def example(name: str) -> tuple[Tensor, Tensor]:
    """Images [N, 3, H, W] in [0, 1] and the truth of the test split (extra `demo`).

    Labels [N] of the digits, by either name; for "segmentation" labels [N, H, W], for "depth" metres [N, H, W], of 64 generated scenes.

    Raises:
        ValueError: there is none of that name. ImportError: a library of the extra `demo` is missing.
    """
    folder(name)
    if name in OF_SCENES:
        from dtta_fast.data.scenes import scenes

        found = scenes("test", EXAMPLES)
        return found.images, found.labels if name == "segmentation" else found.depth
    from dtta_fast.data.digits import load_digits

    return load_digits("test")


def folder(name: str | Path) -> Path:
    """Where the files of that name lie; a Path is that place itself.

    Raises:
        ValueError: there is none of that name, or no such folder. FileNotFoundError: this installation came without the weights.
    """
    if isinstance(name, Path):
        if not os.path.isdir(name):
            raise ValueError(f"name is {str(name)!r}, which is no folder; give one with a classifier and a denoiser, or a name")
        return name
    if name not in NAMES:
        raise ValueError(f"name is {name!r}; the zoo has {', '.join(NAMES)}")
    found = Path(__file__).parent / name
    if not found.is_dir():
        raise FileNotFoundError(
            f"this installation has no weights for {name!r} (a source distribution leaves them out): install a wheel, or from a clone"
        )
    return found
