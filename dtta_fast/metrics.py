"""What answers are judged by, image by image, so that intervals can be drawn: of maps, and of probabilities; and the intervals."""

from __future__ import annotations

import torch
from torch import Tensor


def confusion(predictions: Tensor, labels: Tensor, classes: int, ignore: int = 255) -> Tensor:
    """Pixels [N, K, K] of each image by true (row) and predicted class.

    Args:
        predictions, labels: [N, H, W] of any integer type. classes: K. ignore: what marks pixels without a label.

    Raises:
        ValueError: maps of two sizes, or labels and predictions outside the classes.
    """
    if predictions.shape != labels.shape or labels.ndim != 3:
        raise ValueError(f"predictions have shape {tuple(predictions.shape)} and labels {tuple(labels.shape)}; give both as [N, H, W]")
    predictions, labels = predictions.long(), labels.long()  # a byte holds no cell's number
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
    """Mean over the classes that occur of intersection over union, of pixel counts [..., K, K] (true, predicted)."""
    hits = counts.diagonal(dim1=-2, dim2=-1).double()
    union = counts.sum(-1) + counts.sum(-2) - hits
    return _mean_where(hits / union, union > 0)


def mean_class_accuracy(counts: Tensor) -> Tensor:
    """Mean over the classes that occur in the truth of the share of their pixels that is found, of counts [..., K, K]."""
    hits, truth = counts.diagonal(dim1=-2, dim2=-1).double(), counts.sum(-1)
    return _mean_where(hits / truth, truth > 0)


def depth_errors(predictions: Tensor, depth: Tensor) -> dict[str, Tensor]:
    """Each [N], of depth [N, H, W] in metres where the truth is above 0: the errors of Eigen et al. (2014, arXiv 1406.2283), and SSIM.

    abs_rel: mean of |d - d*| / d*. rmse: in metres. delta1..3: share of pixels whose ratio to the truth, or the inverse, is under 1.25,
    1.25², 1.25³. ssim: structural similarity of the maps (Wang et al. 2004), each on the range of its own truth. An image's figures do
    not depend on the others.

    Raises:
        ValueError: maps of two sizes, depth that is not finite, or an image without depth above 0.
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
    """SSIM [1] of one map [H, W]."""
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    span = float(truth[known].max() - truth[known].min())
    found: Tensor = ssim(guess[None, None], truth[None, None], data_range=max(span, 1e-6), reduction="none")
    return found.view(1)


def calibration_error(confidence: Tensor, right: Tensor, bins: int = 15) -> float:
    """Expected calibration error of confidence [N] in answers that are right or not [N], in equal bins (Guo 2017, arXiv 1706.04599)."""
    confidence = confidence.double()
    number = (confidence * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64, device=confidence.device).index_add(0, number, confidence - right.double())
    return float(gaps.abs().sum() / len(right))


def bootstrap_interval(values: Tensor) -> list[float]:
    """The 95 % percentile interval of the mean of values [N], one for each image, over resampled images; seeded.

    5,000 resamples; of more than 5,000 images fewer, whose error stays below what is printed.
    """
    resamples = min(5000, max(1000, 25_000_000 // len(values)))
    generator, means = torch.Generator("cpu").manual_seed(0), []
    together = max(1, 5_000_000 // len(values))  # of 50,000 images a hundred at once
    for first in range(0, resamples, together):
        shape = min(together, resamples - first), len(values)
        rows = torch.randint(len(values), shape, generator=generator, dtype=torch.int64, device="cpu")
        means.append(values[rows].float().mean(1))
    return torch.quantile(torch.cat(means), torch.tensor([0.025, 0.975], dtype=torch.float32, device="cpu")).tolist()


def _mean_where(values: Tensor, mask: Tensor) -> Tensor:
    """Over the last dimension."""
    return torch.where(mask, values, 0.0).sum(-1) / mask.sum(-1)
