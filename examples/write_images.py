"""Corrupted digits as the file of floats that examples/cpp reads: python examples/write_images.py digits.f32 [--count 12]

Pixels in [0, 1], float32, [count, 3, 32, 32]: image i is digits-C's image i under corruption i, modulo their number.
"""

import argparse
from pathlib import Path

import torch

from dtta_fast import zoo
from dtta_fast.data.corruptions import DIGITS_C, corrupt

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("path", type=Path)
parser.add_argument("--count", type=int, default=12)
given = parser.parse_args()
clean, _ = zoo.example("digits")
kinds = list(DIGITS_C.items())
images = torch.cat([corrupt(clean[i : i + 1], *kinds[i % len(kinds)], first_id=i) for i in range(given.count)])
images.numpy().tofile(given.path)
