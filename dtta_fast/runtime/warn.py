"""Warns the caller of this package, at the line of the program that called it."""

from __future__ import annotations

import sys
import warnings

INSIDE = ("dtta_fast", "torch", "contextlib")  # packages whose frames are skipped


def warn(message: str) -> None:
    """Issues a UserWarning that points to the first frame outside this package, torch and contextlib."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in INSIDE:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
