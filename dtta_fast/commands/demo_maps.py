"""Demo of segmentation and depth on generated scenes, clean and corrupted, adapted with zoo models; also draws pictures of the results."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dtta_fast import zoo
from dtta_fast.commands.demo_digits import CLEAN
from dtta_fast.config import AdaptConfig
from dtta_fast.data.corruptions import DEPTH_C, SEGMENTATION_C, corrupt
from dtta_fast.data.scenes import CLASSES, FARTHEST, NEAREST, Scenes, scenes
from dtta_fast.metrics import bootstrap_interval, confusion, depth_errors, mean_class_accuracy, mean_iou
from dtta_fast.session.adapter import Adapter

DenseName = Literal["segmentation", "depth"]
BATCH = 8
CORRUPTIONS = {"segmentation": SEGMENTATION_C, "depth": DEPTH_C}
MAIN = {"segmentation": "mean_iou", "depth": "abs_rel"}  # the score in which the gain is reported
COLOURS = torch.tensor(
    [[0.35, 0.27, 0.20], [0.75, 0.75, 0.72], [0.85, 0.20, 0.20], [0.20, 0.60, 0.25], [0.20, 0.35, 0.80], [0.95, 0.80, 0.20]],
    dtype=torch.float32,
    device="cpu",
)


def truth_of(name: DenseName, data: Scenes) -> Tensor:
    return data.labels if name == "segmentation" else data.depth


def scores(name: DenseName, predictions: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Scores of each image, each a tensor [N]."""
    if name == "depth":
        return depth_errors(predictions, truth)
    counts = confusion(predictions, truth, len(CLASSES))
    return {"mean_iou": mean_iou(counts), "mean_class_accuracy": mean_class_accuracy(counts)}


def run(
    name: DenseName, config: AdaptConfig, images: int, *, advance: Callable[[str, int], None] = lambda name, done: None
) -> dict[str, Any]:
    """Adapts to the first `images` scenes of the test split, clean and under every corruption.

    Returns:
        At the top, means over the corruptions (each score before and after, evaluations and seconds per image), with the 95 % interval of
        the mean gain over images; then one entry per corruption and one for the clean scenes. Scores are means of per-image scores.

    Raises:
        ValueError: `images` is below 1.
    """
    if images < 1:
        raise ValueError(f"images is {images}; give 1 or more")
    data = scenes("test", images)
    truth = truth_of(name, data)
    model, denoiser = zoo.load(name)
    adapter = Adapter(model, denoiser, config, zoo.task(name))
    rows: dict[str, dict[str, Any]] = {}
    gains = {}
    for corruption, severity in {CLEAN: None, **CORRUPTIONS[name]}.items():
        inputs = data.images if severity is None else corrupt(data.images, corruption, severity)
        adapter.reset()
        start, parts = time.perf_counter(), []
        for part in torch.arange(images, dtype=torch.int64, device="cpu").split(BATCH):
            parts.append(adapter.adapt(inputs[part], image_ids=part))
            advance(corruption, len(part))
        seconds = (time.perf_counter() - start) / images
        before, after = (scores(name, torch.cat([getattr(r, k) for r in parts]), truth) for k in ("predictions_before", "predictions"))
        rows[corruption] = {
            "severity": severity,
            "source": {key: float(values.mean()) for key, values in before.items()},
            "adapted": {key: float(values.mean()) for key, values in after.items()},
            "evaluations_per_image": float(torch.cat([r.evaluations for r in parts]).double().mean()),
            "seconds_per_image": seconds,
        }
        gains[corruption] = after[MAIN[name]] - before[MAIN[name]]
    corrupted = [rows[corruption] for corruption in CORRUPTIONS[name]]
    means: dict[str, Any] = {
        when: {key: sum(row[when][key] for row in corrupted) / len(corrupted) for key in corrupted[0][when]}
        for when in ("source", "adapted")
    }
    means |= {key: sum(row[key] for row in corrupted) / len(corrupted) for key in ("evaluations_per_image", "seconds_per_image")}
    interval = bootstrap_interval(torch.stack([gains[corruption] for corruption in CORRUPTIONS[name]]).mean(0))
    return {"images": images, "score": MAIN[name], **means, "gain_interval": interval, CLEAN: rows.pop(CLEAN), "corruptions": rows}


def picture(name: DenseName, config: AdaptConfig) -> Tensor:
    """Draws a picture [3, H, W] in [0, 1] with one row per corruption, each of one scene.

    The columns are input, before, after, ground truth, and the change from before to after: green is better, red is worse.
    """
    import torchvision.utils

    cases = CORRUPTIONS[name]
    data = scenes("test", len(cases))
    truth = truth_of(name, data)
    inputs = torch.cat([corrupt(data.images[i : i + 1], corruption, cases[corruption], i) for i, corruption in enumerate(cases)])
    model, denoiser = zoo.load(name)
    result = Adapter(model, denoiser, config, zoo.task(name)).adapt(inputs)
    before, after = result.predictions_before, result.predictions
    columns = [inputs, *(_coloured(name, maps) for maps in (before, after, truth)), _difference(name, before, after, truth)]
    grid = torch.stack(columns, dim=1).flatten(0, 1)
    found: Tensor = torchvision.utils.make_grid(F.interpolate(grid, scale_factor=2.0), nrow=len(columns), padding=4, pad_value=1.0)
    return found


def _coloured(name: DenseName, maps: Tensor) -> Tensor:
    """Renders maps as [N, 3, H, W]: labels as colours, or depth as brightness, where near is light."""
    if name == "segmentation":
        return COLOURS[maps].movedim(-1, 1)
    return (1 - (maps - NEAREST) / (FARTHEST - NEAREST)).clamp(0, 1)[:, None].expand(-1, 3, -1, -1)


def _difference(name: DenseName, before: Tensor, after: Tensor, truth: Tensor) -> Tensor:
    """Renders where the maps became better (green) or worse (red), [N, 3, H, W]."""
    if name == "segmentation":
        better = ((after == truth).float() - (before == truth).float())[:, None]
    else:
        better = (((before - truth).abs() - (after - truth).abs()) / truth * 5).clamp(-1, 1)[:, None]
    white = torch.ones_like(better)
    return torch.cat([white - better.clamp(min=0), white + better.clamp(max=0), white - better.abs()], dim=1)
