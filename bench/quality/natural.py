"""Prepares the corrupted CIFAR-10 streams: the 15 common corruptions of Hendrycks & Dietterich (2019, arXiv 1903.12261), and clean images.

    python bench/quality/natural.py --root FOLDER

chooses the severity of each corruption from the classifiers' validation accuracy alone, before any adapted result is seen, and writes
bench/results/cifar_severities.json. streams() reads the choice from that file. CIFAR-10-C has constants of its own; imagecorruptions-imaug
has ImageNet-C's, which are much harsher on 32 pixels, so severities are chosen instead of taken over.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import source_tree

source_tree.use()

from bench import cifar10  # noqa: E402
from bench.zoo import cifar_classifiers  # noqa: E402
from dtta_fast.data.corruptions import corrupt  # noqa: E402
from dtta_fast.runtime import environment  # noqa: E402

CORRUPTIONS = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
SEVERITIES = range(1, 6)
TARGET = 0.6  # accuracy of the source, the same as for digits-C
IMAGES = 1000  # of the validation split
RESULTS = Path(__file__).resolve().parents[1] / "results" / "cifar_severities.json"


def severities() -> dict[str, int]:
    """Returns the chosen severity of each corruption."""
    corruptions = json.loads(RESULTS.read_text())["corruptions"]
    return {name: corruptions[name]["severity"] for name in CORRUPTIONS}


@functools.cache
def streams(root: Path, split: cifar10.Split, images: int) -> tuple[dict[str, Tensor], Tensor]:
    """Returns the first images of a split under each corruption and clean, [N, 3, 32, 32] in [0, 1] by name, and the labels [N].

    Corruptions are seeded by their name and the image's index, so an image looks the same however many are asked for. The result is kept in
    memory and shared by all callers, who must not write into it.
    """
    pixels, labels = (part[:images] for part in cifar10.load(root, split))
    clean = pixels.float() / 255
    return {**{name: corrupt(clean, name, severity) for name, severity in severities().items()}, "clean": clean}, labels


def nearest(accuracy: dict[str, list[float]]) -> int:
    """Returns the severity at which the mean of the classifiers' accuracies is nearest to the target; the lower of two equally near."""
    means = [sum(found) / len(found) for found in zip(*accuracy.values(), strict=True)]
    return min(SEVERITIES, key=lambda severity: abs(means[severity - 1] - TARGET))


def choose(models: dict[str, nn.Module], pixels: Tensor, labels: Tensor) -> dict[str, Any]:
    """Measures every model on images [N, 3, H, W], uint8, clean and at each severity of each corruption, and chooses the severities."""

    def measured(images: Tensor) -> dict[str, float]:
        return {name: cifar_classifiers.accuracy(model, images, labels) for name, model in models.items()}

    corruptions = {}
    for corruption in CORRUPTIONS:
        found = [measured((corrupt(pixels / 255, corruption, s) * 255).round().byte()) for s in SEVERITIES]
        accuracy = {name: [at[name] for at in found] for name in models}
        corruptions[corruption] = {"severity": nearest(accuracy), "accuracy": accuracy}
        rows = "   ".join(f"{name} " + " ".join(f"{value:6.1%}" for value in values) for name, values in accuracy.items())
        print(f"{corruption:18} severity {corruptions[corruption]['severity']}   {rows}", flush=True)
    return {"target": TARGET, "images": len(pixels), "clean": measured(pixels), "corruptions": corruptions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="the folder with CIFAR-10")
    args = parser.parse_args()
    models: dict[str, nn.Module] = {name: cifar_classifiers.load(name) for name in cifar_classifiers.NAMES}
    pixels, labels = (part[:IMAGES] for part in cifar10.load(args.root, "validation"))
    library = {"imagecorruptions-imaug": version("imagecorruptions-imaug")}
    record = {**choose(models, pixels, labels), "environment": environment.describe() | library}
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    print("clean:", ", ".join(f"{name} {value:.1%}" for name, value in record["clean"].items()))


if __name__ == "__main__":
    main()
