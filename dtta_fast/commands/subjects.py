"""What `dtta bench`, `dtta profile` and `dtta export` run on: the digits zoo, or models of the user's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dtta_fast import presets, zoo
from dtta_fast.data.folder import read_images
from dtta_fast.denoisers.base import Denoiser
from dtta_fast.runs.models import load_pair

EVERY_IMAGE = presets.FAST.replace(precheck="off")  # an image that is left alone takes no time to measure


@dataclass(frozen=True)
class Subject:
    """Models and images for them.

    Attributes:
        model, denoiser: in eval mode, on one device. images: [N, 3, H, W] in [0, 1], there too. labels: [N], or None where none are
            known. name: for people.
    """

    model: nn.Module
    denoiser: Denoiser
    images: Tensor
    labels: Tensor | None
    name: str


def load_subject(model: str | None, denoiser: str | None, images: Path | None, count: int, device: torch.device) -> Subject:
    """Loads a classifier, a denoiser and `count` images of the size that the classifier looks at.

    Args:
        model, denoiser: as load_pair takes them. images: a folder of images. None means digits-C's test split with its labels, the
            corruptions in turn, for the zoo, and random pixels for other models. Fewer images than `count` are repeated.

    Raises:
        ValueError, OSError: one of the two models is given without the other, or something cannot be read.
        ImportError: the zoo's images need the extra `demo`.
    """
    classifier, diffusion = load_pair(model, denoiser)
    size, labels = _image_size(classifier), None
    if images is not None:
        pixels = read_images(images, size, count)
    elif model is None:
        pixels, labels = _digits_c(count)
    else:
        pixels = torch.rand(count, 3, size, size, generator=torch.Generator("cpu").manual_seed(0), dtype=torch.float32, device="cpu")
    rows = torch.arange(count, dtype=torch.int64, device="cpu") % len(pixels)
    name = "digits zoo" if model is None else f"{model} + {denoiser}"
    return Subject(
        classifier.to(device), diffusion.to(device), pixels[rows].to(device), None if labels is None else labels[rows].to(device), name
    )


def _image_size(model: nn.Module) -> int:
    """Pixels of a side of what a timm model looks at."""
    from timm.data import resolve_model_data_config

    size: int = resolve_model_data_config(model)["input_size"][-1]
    return size


def _digits_c(count: int) -> tuple[Tensor, Tensor]:
    """Image i is digits-C's own image i under corruption i, modulo their number: some that the model errs on, and labels."""
    from dtta_fast.data.corruptions import DIGITS_C, corrupt

    clean, labels = zoo.example("digits")
    kinds = list(DIGITS_C.items())
    found = [corrupt(image[None], *kinds[i % len(kinds)], first_id=i) for i, image in enumerate(clean[:count])]
    return torch.cat(found), labels[:count]
