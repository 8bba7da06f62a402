"""Chooses digits-C: for each corruption the hardest severity at which the source keeps 40 % of the validation split.

    python bench/zoo/severities.py

Families on which the source still exceeds 90 % there are left out: they leave nothing to adapt. Looks at the source alone, never at
an adapted result. Prints the table and the dictionary that stands in dtta_fast/data/corruptions.py.
"""

from __future__ import annotations

import imagecorruptions
import torch

from dtta_fast import zoo
from dtta_fast.data.corruptions import corrupt
from dtta_fast.data.digits import load_digits


@torch.no_grad()
def main() -> None:
    model, _ = zoo.load("digits")
    images, labels = load_digits("validation")
    chosen = {}
    for name in imagecorruptions.get_corruption_names("all"):
        accuracy = {s: float((model(corrupt(images, name, s) * 2 - 1).argmax(1) == labels).float().mean()) for s in range(1, 6)}
        kept = [s for s, value in accuracy.items() if value >= 0.4]
        if kept and accuracy[max(kept)] <= 0.9:
            chosen[name] = max(kept)
        print(f"{name:20}", *(f"{value:6.1%}" for value in accuracy.values()), f"  severity {chosen.get(name, '-')}")
    print(chosen)


if __name__ == "__main__":
    main()
