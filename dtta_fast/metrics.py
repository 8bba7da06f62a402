"""Metrics of maps and of probabilities, mostly per image so that confidence intervals can be computed, and those intervals."""

from __future__ import annotations

import torch
from torch import Tensor


def confusion(predictions: Tensor, labels: Tensor, classes: int, ignore: int = 255) -> Tensor:
    """Confusion matrix of each image in pixels, [N, K, K], by true class (row) and predicted class (column).

    Args:
        predictions, labels: [N, H, W] of any integer type. classes: K. ignore: the value of pixels without a label.

    Raises:
        ValueError: shapes that differ or are not [N, H, W], or labels or predictions outside the classes.
    """
    if predictions.shape != labels.shape or labels.ndim != 3:
        raise ValueError(f"predictions have shape {tuple(predictions.shape)} and labels {tuple(labels.shape)}; give both as [N, H, W]")
    predictions, labels = predictions.long(), labels.long()  # a byte is too small for a cell index
    known = labels != ignore
    for name, values in (("labels", labels[known]), ("predictions", predictions[known])):
        if values.numel() and (int(values.min()) < 0 or int(values.max()) >= classes):
            raise ValueError(
                f"{name} lie in {int(values.min())} .. {int(values.max())}; there are classes 0 .. {classes - 1}, and {ignore} for none"
            )
    number = torch.arange(len(labels), dtype=torch.int64, device=labels.device)[:, None, None]
    cells = (labels * classes + predictions + number * classes**2)[known]
    return torch.bincount(cells, minlength=len(labels) * classes**2).view(-1, classes, classes)


def mean_iou(counts: Tensor) -> Tensor:
    """Mean intersection over union, over the classes that occur, from pixel counts [..., K, K] (true, predicted)."""
    hits = counts.diagonal(dim1=-2, dim2=-1).double()
    union = counts.sum(-1) + counts.sum(-2) - hits
    return _mean_where(hits / union, union > 0)


def mean_class_accuracy(counts: Tensor) -> Tensor:
    """Mean class accuracy (recall) over the classes that occur in the ground truth, from pixel counts [..., K, K] (true, predicted)."""
    hits, truth = counts.diagonal(dim1=-2, dim2=-1).double(), counts.sum(-1)
    return _mean_where(hits / truth, truth > 0)


def depth_errors(predictions: Tensor, depth: Tensor) -> dict[str, Tensor]:
    """Depth errors of Eigen et al. (2014, arXiv 1406.2283) and SSIM, each [N], of depth maps [N, H, W] in metres.

    The errors cover the pixels whose true depth is above 0. abs_rel: mean of |d - d*| / d*. rmse: in metres. delta1..3: share of pixels
    for which the larger of d / d* and d* / d is below 1.25, 1.25², 1.25³. ssim: structural similarity of the whole maps (Wang et al.
    2004), with the data range of each image's ground truth. The results of an image do not depend on the other images.

    Raises:
        ValueError: shapes that differ or are not [N, H, W], depth that is not finite, or an image without depth above 0.
    """
    if predictions.shape != depth.shape or depth.ndim != 3:
        raise ValueError(f"predictions have shape {tuple(predictions.shape)} and depth {tuple(depth.shape)}; give both as [N, H, W]")
    if not bool(predictions.isfinite().all() and depth.isfinite().all()):
        raise ValueError("predictions or depth holds NaN or infinity")
    known = depth > 0
    if not bool(known.flatten(1).any(1).all()):
        raise ValueError("depth has an image without a value above 0")
    truth, guess = depth.double(), predictions.double().clamp(min=1e-6)
    safe = torch.where(known, truth, 1.0)
    ratio = torch.maximum(guess / safe, safe / guess)
    return {
        "abs_rel": _mean_where(((guess - safe).abs() / safe).flatten(1), known.flatten(1)),
        "rmse": _mean_where((guess - safe).square().flatten(1), known.flatten(1)).sqrt(),
        **{f"delta{k}": _mean_where((ratio < 1.25**k).double().flatten(1), known.flatten(1)) for k in (1, 2, 3)},
        "ssim": torch.cat([_similarity(*pair) for pair in zip(guess, truth, known, strict=True)]),
    }


def _similarity(guess: Tensor, truth: Tensor, known: Tensor) -> Tensor:
    """SSIM of one map [H, W], as a tensor [1]."""
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    span = float(truth[known].max() - truth[known].min())
    found: Tensor = ssim(guess[None, None], truth[None, None], data_range=max(span, 1e-6), reduction="none")
    return found.view(1)


def calibration_error(confidence: Tensor, right: Tensor, bins: int = 15) -> float:
    """Expected calibration error of confidences [N] of right or wrong answers [N], with equal-width bins (Guo 2017, arXiv 1706.04599)."""
    confidence = confidence.double()
    number = (confidence * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64, device=confidence.device).index_add(0, number, confidence - right.double())
    return float(gaps.abs().sum() / len(right))


def bootstrap_interval(values: Tensor) -> list[float]:
    """95 % bootstrap percentile interval of the mean of values [N], one value per image, with a fixed seed.

    Uses 5,000 resamples, and fewer for more than 5,000 images, where the error stays below the printed precision.
    """
    resamples = min(5000, max(1000, 25_000_000 // len(values)))
    generator, means = torch.Generator("cpu").manual_seed(0), []
    together = max(1, 5_000_000 // len(values))  # for 50,000 images, a hundred resamples at once
    for first in range(0, resamples, together):
        shape = min(together, resamples - first), len(values)
        rows = torch.randint(len(values), shape, generator=generator, dtype=torch.int64, device="cpu")
        means.append(values[rows].float().mean(1))
    return torch.quantile(torch.cat(means), torch.tensor([0.025, 0.975], dtype=torch.float32, device="cpu")).tolist()


def _mean_where(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the masked values over the last dimension."""
    return torch.where(mask, values, 0.0).sum(-1) / mask.sum(-1)
