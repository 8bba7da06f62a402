"""Small trained models that ship with the package, each saved in its library's own format by a script in bench/zoo."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from dtta_fast.denoisers.base import Denoiser
from dtta_fast.denoisers.dit import DiT

NAMES = ("digits", "fashion")


def load(name: str) -> tuple[nn.Module, Denoiser]:
    """The model and the denoiser of that name, on the CPU, in eval mode: a timm ConvNeXt and a pixel DiT, of "digits" or of "fashion".

    Raises:
        ValueError: there is none of that name.
    """
    return load_classifier(name), DiT.from_pretrained(_folder(name) / "denoiser").eval()


def load_classifier(name: str) -> nn.Module:
    """The model of that name alone."""
    import timm

    return timm.create_model(f"local-dir:{_folder(name) / 'classifier'}", pretrained=True).eval()


def example(name: str) -> tuple[Tensor, Tensor]:
    """Images [N, 3, H, W] in [0, 1] and labels [N] of the test split. "digits" needs the extra `demo`, "fashion" load_fashion's files."""
    from dtta_fast.data.digits import load_digits
    from dtta_fast.data.fashion import load_fashion

    _folder(name)
    return (load_digits if name == "digits" else load_fashion)("test")


def _folder(name: str) -> Path:
    if name not in NAMES:
        raise ValueError(f"name is {name!r}; the zoo has {', '.join(NAMES)}")
    return Path(__file__).parent / name
