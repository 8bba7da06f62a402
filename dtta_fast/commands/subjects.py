"""Models and images for `dtta bench`, `dtta profile` and `dtta export`: the digits zoo, or models given by the user."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dtta_fast import presets, zoo
from dtta_fast.data.folder import read_images
from dtta_fast.denoisers.base import Denoiser
from dtta_fast.runs.models import load_pair

EVERY_IMAGE = presets.FAST.replace(precheck="off")  # an image that is not adapted gives no time to measure


@dataclass(frozen=True)
class Subject:
    """Models and images to run them on.

    Attributes:
        model, denoiser: in eval mode, on the same device. images: [N, 3, H, W] in [0, 1], also on that device. labels: [N], or None if
            unknown. name: human-readable name.
    """

    model: nn.Module
    denoiser: Denoiser
    images: Tensor
    labels: Tensor | None
    name: str


def load_subject(model: str | None, denoiser: str | None, images: Path | None, count: int, device: torch.device) -> Subject:
    """Loads a classifier, a denoiser and `count` images of the classifier's input size.

    Args:
        model, denoiser: as for load_pair. images: a folder of images. None means, for the zoo, the test split of digits-C with its
            labels, cycling through the corruptions, and random pixels for other models. If there are fewer images than `count`, they
            are repeated.

    Raises:
        ValueError, OSError: only one of the two models is given, or something cannot be read.
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
    """Returns the side length in pixels of a timm model's input."""
    from timm.data import resolve_model_data_config

    size: int = resolve_model_data_config(model)["input_size"][-1]
    return size


def _digits_c(count: int) -> tuple[Tensor, Tensor]:
    """Returns labeled images of digits-C, image i under corruption i modulo their number, so that the model errs on some of them."""
    from dtta_fast.data.corruptions import DIGITS_C, corrupt

    clean, labels = zoo.example("digits")
    kinds = list(DIGITS_C.items())
    found = [corrupt(image[None], *kinds[i % len(kinds)], first_id=i) for i, image in enumerate(clean[:count])]
    return torch.cat(found), labels[:count]
