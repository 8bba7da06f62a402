"""Chooses a corrupted benchmark: for each corruption the severity at which the source's validation accuracy is nearest to 60 %.

    python bench/zoo/severities.py [digits|fashion]

On the first 300 images. Families on which it still exceeds 90 % there are left out: they leave nothing to adapt. Looks at the source
alone, never at an adapted result. Prints the table and the dictionary that stands in dtta_fast/data/corruptions.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

import imagecorruptions
import torch

from dtta_fast import zoo
from dtta_fast.data.corruptions import corrupt
from dtta_fast.data.digits import load_digits
from dtta_fast.data.fashion import load_fashion

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


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["digits"]))
