"""Small trained models that ship with the package, each saved in its library's own format by a script in bench/zoo."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from dtta_fast.denoisers.base import Denoiser
from dtta_fast.denoisers.dit import DiT

NAMES = ("digits",)


def load(name: str) -> tuple[nn.Module, Denoiser]:
    """The model and the denoiser of that name, on the CPU, in eval mode. "digits": a timm ConvNeXt and a pixel DiT.

    Raises:
        ValueError: there is none of that name.
    """
    import timm

    folder = _folder(name)
    model = timm.create_model(f"local-dir:{folder / 'classifier'}", pretrained=True)
    return model.eval(), DiT.from_pretrained(folder / "denoiser").eval()


def example(name: str) -> tuple[Tensor, Tensor]:
    """Images [N, 3, H, W] in [0, 1] and labels [N] of the test split. "digits" needs the extra `demo`."""
    from dtta_fast.data.digits import load_digits

    _folder(name)
    return load_digits("test")


def _folder(name: str) -> Path:
    if name not in NAMES:
        raise ValueError(f"name is {name!r}; the zoo has {', '.join(NAMES)}")
    return Path(__file__).parent / name
