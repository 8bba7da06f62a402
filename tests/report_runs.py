"""Folders of evaluation runs, made up, for the report's tests."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

GROUPS = ("gaussian_noise5", "motion_blur3", "fog2", "clean")
CLASSES = ("zero", "one", "two", "three", "four", "five", "six")


def record_of(i: int, task: str, groups: tuple[str, ...], draw: random.Random) -> dict[str, Any]:
    """An image that becomes better more often than not."""
    group = groups[i % len(groups)]
    record: dict[str, Any] = {"image_id": i, "batch": i // 8, "path": f"{group}/{i:05d}.JPEG", "group": group, "label": None}
    if task == "classification":
        label = draw.randrange(len(CLASSES))
        record["label"] = label
        for suffix, chance in (("_before", 0.5), ("", 0.7)):
            right = draw.random() < chance
            others = [k for k in range(len(CLASSES)) if k != label]
            draw.shuffle(others)
            first = draw.uniform(0.4, 0.99)
            ranked = [label, *others] if right else [*others[:2], label, *others[2:]]
            shares = [first, *((1 - first) * part for part in (0.6, 0.2, 0.15, 0.05))]
            record |= {
                f"prediction{suffix}": ranked[0],
                f"confidence{suffix}": first,
                f"top{suffix}": [[k, p] for k, p in zip(ranked, shares, strict=False)],
            }
    else:
        before = draw.uniform(0.2, 0.6)
        better = before + draw.uniform(-0.05, 0.1)
        if task == "depth":
            record["score_before"] = {"abs_rel": before, "rmse": 4 * before, "delta1": 1 - before, "ssim": 0.5}
            record["score"] = {"abs_rel": 2 * before - better, "rmse": 4 * (2 * before - better), "delta1": 1 - before, "ssim": 0.5}
        else:
            record["score_before"], record["score"] = {"mean_iou": before}, {"mean_iou": better}
    kept = draw.random() < 0.8
    losses = [0.13 - 0.01 * step + draw.uniform(0, 0.05) for step in range(3)]
    return record | {"loss": losses if kept else [None] * 3, "accepted": kept, "evaluations": 36 if kept else 12, "seconds": 0.015}


def write_run(
    folder: Path,
    task: str = "classification",
    images: int = 60,
    *,
    seed: int = 0,
    groups: tuple[str, ...] = GROUPS,
    change: Any = None,
    failed: int = 0,
    finished: bool = True,
    **settings: Any,
) -> list[dict[str, Any]]:
    """change: a function of each record. failed: images at the end that could not be read. settings: of the config."""
    draw = random.Random(seed)
    records = [record_of(i, task, groups, draw) for i in range(images)]
    for record in records:
        if change is not None:
            change(record)
    for record in records[images - failed :]:
        kept = {name: record[name] for name in ("image_id", "batch", "path", "group", "label")}
        record.clear()
        record |= kept | {"error": f"{kept['path']} is truncated"}
    config = {
        "data": {"name": "folder", "root": "nowhere", "corruptions": [], "severities": [], "split": None, "per_class": None},
        "task": task,
        "model": "zoo",
        "protocol": "episodic",
        "adapt": {"steps": 3, "lr": 5e-4, "seed": seed, **settings},
    }
    folder.mkdir()
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "config.json").write_text(json.dumps(config))
    if finished:
        summary = {
            "images": images,
            "errors": failed,
            "config": config,
            "classes": list(CLASSES) if task == "classification" else [],
            "environment": {"torch": "2.9.0", "machine": "Linux x86_64, 2 threads"},
            "seconds": {"load": 1.5, "encode": 2.5, "adapt": 12.25, "guard": 3.0, "write": 0.125},
            "wall_seconds": 20.5,
            "groups": {},
        }
        (folder / "summary.json").write_text(json.dumps(summary))
    return records
