"""Chooses the severities of a corrupted benchmark.

    python bench/zoo/severities.py [digits|fashion|segmentation|depth]

For digits and fashion, each corruption gets the severity at which the source's accuracy on the first 300 validation images is closest to
60 %. Corruptions on which it is still above 90 % there are left out, because they leave nothing to adapt. For the generated scenes, the
seven corruptions are fixed, and each gets the severity at which the source's score on 100 scenes is closest to a third worse than its clean
score. Only the source is measured, never an adapted model. Prints the table, and the dictionary for dtta_fast/data/corruptions.py.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import imagecorruptions
import torch
from torch import Tensor

from dtta_fast import zoo
from dtta_fast.commands.demo_maps import CORRUPTIONS, MAIN, scores, truth_of
from dtta_fast.data.corruptions import corrupt
from dtta_fast.data.digits import load_digits
from dtta_fast.data.fashion import load_fashion
from dtta_fast.data.scenes import SIZE, scenes
from dtta_fast.tasks.dense import MapModel

FASHION = Path(__file__).parent / "fashion_weights"


@torch.no_grad()
def main(benchmark: str) -> None:
    model = zoo.load_model(FASHION if benchmark == "fashion" else benchmark)
    images, labels = (part[:300] for part in {"digits": load_digits, "fashion": load_fashion}[benchmark]("validation"))
    chosen = {}
    for name in imagecorruptions.get_corruption_names("all"):
        accuracy = {s: float((model(corrupt(images, name, s) * 2 - 1).argmax(1) == labels).float().mean()) for s in range(1, 6)}
        severity = min(accuracy, key=lambda s: abs(accuracy[s] - 0.6))
        if accuracy[severity] <= 0.9:
            chosen[name] = severity
        print(f"{name:20}", *(f"{value:6.1%}" for value in accuracy.values()), f"  severity {chosen.get(name, '-')}")
    print(chosen)


@torch.no_grad()
def of_scenes(name: Any) -> None:
    data, model, task = scenes("validation", 100), MapModel(zoo.load_model(name)), zoo.task(name)

    def score(images: Tensor) -> float:
        outputs = model(task.normalise(model, task.crop(model, images)))
        return float(scores(name, task.predict(outputs, (SIZE, SIZE)), truth_of(name, data))[MAIN[name]].mean())

    wanted = score(data.images) * {"segmentation": 2 / 3, "depth": 4 / 3}[name]
    chosen = {}
    for corruption in CORRUPTIONS[name]:
        found = {s: score(corrupt(data.images, corruption, s)) for s in range(1, 6)}
        chosen[corruption] = min(found, key=lambda s: abs(found[s] - wanted))
        print(f"{corruption:20}", *(f"{value:6.3f}" for value in found.values()), f"  severity {chosen[corruption]}")
    print(chosen)


if __name__ == "__main__":
    benchmark = (sys.argv[1:] or ["digits"])[0]
    (of_scenes if benchmark in CORRUPTIONS else main)(benchmark)
