"""The order in which a run meets its images, and their division into batches.

A data set is grouped by corruption and severity. `grouped` keeps that order. The other streams carry one state through all images, and
differ in how the shift, or the mix of classes, changes over time. Every image occurs once. The orders come from Python's own generator, so
a run can be resumed on another machine; if an order should differ there, the run is refused.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path

from dtta_fast.data.base import Images, Maps
from dtta_fast.data.folder import read_lines
from dtta_fast.data.images import corruption_of, subsample, uncorrupted
from dtta_fast.runs.config import RunConfig

CONCENTRATION = 0.1  # of the Dirichlet distribution, as in NOTE and RoTTA


def batches_of(run: RunConfig, data: Images | Maps) -> list[tuple[int, ...]]:
    """Returns the image ids of each batch, in the order of the run's stream:

    - grouped: as the data set has them. All images of a batch have the same corruption and severity.
    - gradual: each corruption from its lowest severity to its highest and back, as in CoTTA (Wang et al. 2022, arXiv 2203.13591), which
      shows the images of a severity twice. Here half of them come on the way up and half on the way down.
    - smooth: as gradual, but each group fades into the next: the share of the next one rises linearly. It is modelled on the
      continuously changing corruptions of CCC (Press et al. 2023, arXiv 2306.05401), which also blends the corruptions within an image.
    - correlated: group by group, each with as many time slots as there are classes. The images of a class are divided among the slots by a
      Dirichlet distribution of concentration 0.1, and a slot shows class after class, as in NOTE (Gong et al. 2022, arXiv 2208.05117).
    - mixed: all images of all groups in random order, as in SAR (Niu et al. 2023, arXiv 2302.12400).

    Raises:
        ValueError: the data set cannot fill the stream, or lacks an image of the subset.
    """
    ids: Sequence[int] = range(len(data)) if run.subset is None else _named(data, Path(run.subset))
    if run.per_class is not None:
        ids = subsample(data, run.per_class, run.adapt.seed, ids)
    if run.stream == "grouped":
        parts = list(_by_group(data, ids).values())
    else:
        generator = random.Random(run.adapt.seed)
        if run.stream == "mixed":
            parts = [_shuffled(ids, generator)]
        elif run.stream == "correlated":
            parts = [[i for group in _by_group(data, ids).values() for i in _correlated(data, group, generator)]]
        else:
            stages = _there_and_back(data, ids, generator)
            parts = [_faded(stages, generator) if run.stream == "smooth" else [i for stage in stages for i in stage]]
    return [tuple(sorted(part[first : first + run.batch])) for part in parts for first in range(0, len(part), run.batch)]


def _by_group(data: Images | Maps, ids: Sequence[int]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for i in ids:
        found.setdefault(data.groups[i], []).append(i)
    return found


def _shuffled(ids: Sequence[int], generator: random.Random) -> list[int]:
    """Returns the ids in random order. Ranks are used because random.shuffle may change between versions of Python."""
    return [i for _, i in sorted((generator.random(), i) for i in ids)]


def _named(data: Images | Maps, subset: Path) -> list[int]:
    """Returns the ids of the images whose name, without corruption and severity, is a line of the file `subset`.

    Raises:
        ValueError: the file is missing or names an image that a group lacks.
    """
    if not os.path.isfile(subset):
        raise ValueError(f"subset is {str(subset)!r}, and there is no such file; give a text file with the name of an image a line")
    wanted = {line.strip() for line in read_lines(subset)} - {""}
    if not wanted:
        raise ValueError(f"subset is {str(subset)!r}, which names no image; write one name a line, such as {data.names[0]!r}")
    found, seen = [], dict[str, set[str]]()
    for i in range(len(data)):
        name = uncorrupted(data.names[i], data.groups[i])
        if name in wanted:
            found.append(i)
            seen.setdefault(data.groups[i], set()).add(name)
    for group in dict.fromkeys(data.groups):
        if lacking := sorted(wanted - seen.get(group, set())):
            raise ValueError(
                f"subset is {str(subset)!r}, and {group} lacks {len(lacking)} of its {len(wanted)} images, such as {lacking[0]!r}; "
                f"the data set's names look like {uncorrupted(data.names[0], data.groups[0])!r}"
            )
    return found


def _correlated(data: Images | Maps, ids: Sequence[int], generator: random.Random) -> list[int]:
    """Orders the images of one group by time slots, in each of which few classes dominate."""
    labels = None if isinstance(data, Maps) else data.labels
    if labels is None:
        raise ValueError("stream is 'correlated', which orders images by their labels, and this data set has none: choose another stream")
    by_class: dict[int, list[int]] = {}
    for i in _shuffled(ids, generator):
        by_class.setdefault(int(labels[i]), []).append(i)
    if len(by_class) < 2:
        raise ValueError(f"stream is 'correlated', and {data.groups[ids[0]]} has images of one class only: choose another stream")
    slots: list[list[list[int]]] = [[] for _ in by_class]
    for label in sorted(by_class):
        own = by_class[label]
        weights = [generator.gammavariate(CONCENTRATION, 1.0) for _ in slots]
        total, reached, first = sum(weights) or 1.0, 0.0, 0
        for k, (slot, weight) in enumerate(zip(slots, weights, strict=True)):
            reached += weight
            last = len(own) if k == len(slots) - 1 else round(reached / total * len(own))
            slot.append(own[first:last])
            first = last
    return [i for slot in slots for k in _shuffled(range(len(slot)), generator) for i in slot[k]]


def _there_and_back(data: Images | Maps, ids: Sequence[int], generator: random.Random) -> list[list[int]]:
    """Returns the stages of a gradual stream: the ids at each corruption's severities, rising and then falling."""
    corruptions: dict[str, dict[str, list[int]]] = {}
    for group, members in _by_group(data, ids).items():
        name = corruption_of(data.names[members[0]], group)
        if name is None:
            raise ValueError(f"streams gradual and smooth need corruptions with severities, and this data set has {group!r}: use 'mixed'")
        corruptions.setdefault(name, {})[group[-1]] = _shuffled(members, generator)
    found: list[list[int]] = []
    for name, severities in corruptions.items():
        if len(severities) < 2:
            only = next(iter(severities))
            raise ValueError(
                f"streams gradual and smooth need at least two severities of each corruption, and {name} has severity {only} alone: name "
                "more, as in --severities 1 3 5"
            )
        *rising, top = sorted(severities)
        found += [severities[s][::2] for s in rising] + [severities[top]] + [severities[s][1::2] for s in reversed(rising)]
    return [stage for stage in found if stage]


def _faded(stages: Sequence[Sequence[int]], generator: random.Random) -> list[int]:
    """Merges stages, so that the share of a stage rises linearly up to its middle in time and then falls."""
    times = []
    for k, stage in enumerate(stages):
        for i in stage:
            times.append((k + generator.random() + generator.random(), i))  # a triangular density, two stages wide
    return [i for _, i in sorted(times)]
