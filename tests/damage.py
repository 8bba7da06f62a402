"""Damaged files and values, and what a parser may do with them, for the fuzz tests."""

from __future__ import annotations

import copy
import random
import warnings
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

DEEP = "[" * 100_000
fuzz = settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
few = settings(fuzz, max_examples=25)
plain = st.none() | st.booleans() | st.integers() | st.sampled_from([10**400, -1, 2**63, 10**12]) | st.floats() | st.text(max_size=8)
values = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6
)
seeds = st.integers(0, 2**32)


def damaged(whole: bytes, seed: int) -> bytes:
    """Cut, with bits flipped, with bytes put in, or others altogether."""
    draw = random.Random(seed)
    found = bytearray(whole)
    kind = draw.randrange(5)
    if kind == 0:
        return whole[: draw.randrange(len(whole))]
    if kind == 1:
        return draw.randbytes(draw.randrange(200))
    for _ in range(draw.choice((1, 3, 20))):
        at = draw.randrange(min(len(found), draw.choice((64, 1024, 2**30))))  # beginnings hold the sizes
        if kind == 2:
            found[at : at + draw.randrange(9)] = draw.randbytes(draw.randrange(9))
        else:
            found[at] = draw.choice((found[at] ^ 1 << draw.randrange(8), 0, 255))
        found = found or bytearray(b"\0")
    return bytes(found)


def changed(whole, value, seed: int):
    """JSON with one of its values replaced or removed, at any depth."""
    draw, found = random.Random(seed), copy.deepcopy(whole)
    if not draw.randrange(12):
        return value
    place = found
    while True:
        key = draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if isinstance(place[key], (dict, list)) and place[key] and draw.randrange(3):
            place = place[key]
            continue
        if isinstance(place, dict) and not draw.randrange(4):
            del place[key]
        else:
            place[key] = value
        return found


def listing(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


def held(read, *names: str, root: Path | None = None, errors=(ValueError,)):
    """What read() gives, or None for an error that names one of these; the folder stays as it was."""
    before = listing(root) if root else []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found, told = read(), None
    except errors as error:
        found, told = None, str(error)
    assert told is None or any(name in told for name in names), f"{told!r} names none of {names}"
    assert not root or listing(root) == before
    return found


def sub(place: Path, name: str) -> Path:
    (place / name).mkdir(exist_ok=True)
    return place / name
