"""The mean corruption error of ImageNet-C (Hendrycks & Dietterich 2019, arXiv 1903.12261), which relates a model's errors to AlexNet's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

SEVERITIES = range(1, 6)
# Top-1 error of AlexNet under each corruption, the mean over the severities: published at https://github.com/hendrycks/robustness.
ALEXNET = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
ALEXNET_CLEAN = 0.43478  # of torchvision's weights, 56.522 % right: https://pytorch.org/vision/stable/models.html


class CorruptionError(NamedTuple):
    """Corruption errors, where 1 is AlexNet's.

    Attributes:
        of: by corruption. mean: mCE, their mean. relative: relative mCE, of the errors beyond the clean one; None if that is not known.
    """

    of: dict[str, float]
    mean: float
    relative: float | None


def corruption_errors_of(groups: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the entries of a summary for ImageNet-C: mce, and corruption_errors by corruption, before and after.

    groups: as in summary.json. The entries are empty if a corruption or severity is missing.
    """
    entries: dict[str, Any] = {}
    for suffix in ("_before", ""):
        found = corruption_error({name: 1 - row[f"accuracy{suffix}"] for name, row in groups.items() if f"accuracy{suffix}" in row})
        if found is not None:
            entries |= {f"mce{suffix}": found.mean, f"corruption_errors{suffix}": found.of}
    return entries


def corruption_error(errors: Mapping[str, float], clean: float | None = None) -> CorruptionError | None:
    """Returns the corruption errors of a model on ImageNet-C.

    Args:
        errors: top-1 error of each group, such as gaussian_noise5; other groups are left out. clean: the model's error on clean images.

    Returns:
        None if one of the 15 corruptions or of their five severities is missing: the published constants are means over all of them.
    """
    wanted = {name: [f"{name}{severity}" for severity in SEVERITIES] for name in ALEXNET}
    if not all(group in errors for groups in wanted.values() for group in groups):
        return None
    own = {name: sum(errors[group] for group in groups) / len(groups) for name, groups in wanted.items()}
    of = {name: own[name] / alexnet for name, alexnet in ALEXNET.items()}
    relative = None
    if clean is not None:
        relative = sum((own[name] - clean) / (alexnet - ALEXNET_CLEAN) for name, alexnet in ALEXNET.items()) / len(ALEXNET)
    return CorruptionError(of, sum(of.values()) / len(of), relative)
