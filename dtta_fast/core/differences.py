"""The losses that a calibration compares: under an image's own class and under its nearest rivals."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtta_fast.core.draws import Draws
from dtta_fast.core.loss import pair_losses
from dtta_fast.denoisers.base import Denoiser
from dtta_fast.kernels import Pairs
from dtta_fast.runtime.files import read_text
from dtta_fast.runtime.progress import nothing

BINS = 20  # equal parts of the noise process
PAIRS = 2  # pairs per bin and image
GUARD_PAIRS = 24  # pairs of a comparison, as in the preset FAST
RIVALS = 4  # classes that an image's own class is compared with for the trust
FAVOURED = 3  # of a classifier's next classes, so many count that the loss favours, as it favours an adapted answer
GOLDEN = 0.6180339887498949  # its multiples fill an interval evenly, so the images' timesteps differ
ROWS = 64  # rows that the denoiser processes at once
TOGETHER = 4  # images that are measured, and kept, at once
SEARCH, COMPARE, TRUST = 0, 1, 2  # step numbers, which give each purpose random draws of its own
MOST_KEPT = 2**30  # bytes of the file; a search of 1,000 classes keeps 13 MB
Advance = Callable[[int], None]
Measure = Callable[[Tensor, Tensor], Tensor]  # of the latents and numbers of a few images


class Differences:
    """Measures images, and keeps the results in a file, one JSON line per image and purpose, so that an interrupted measurement goes on.

    A result is found again if everything that it depends on is the same: the denoiser, the image, its number, and the conditions.

    Args:
        denoiser: in eval mode. key: identifies the denoiser. images: [n, 3, H, W] in [0, 1]. answers: a classifier's outputs [n, K], or
            classes [n]; without them the loss searches the images' own classes. partial: the file; None keeps nothing.

    Attributes:
        advance: called with the number of evaluations done.

    Raises:
        ValueError: the file holds something else.
    """

    def __init__(self, denoiser: Denoiser, key: str, images: Tensor, answers: Tensor | None, partial: Path | None = None) -> None:
        self._denoiser, self._images, self._answers, self._partial = denoiser, images, answers, partial
        self.advance: Advance = nothing
        self._table = denoiser.class_embeddings({})
        self._kept: dict[str, list[Any]] = {} if partial is None or not os.path.exists(partial) else _read(partial)
        self._keys = [_digest(key, str(i), image) for i, image in enumerate(images)]
        self._latents: dict[int, Tensor] = {}
        self._searches = answers is None or answers.ndim == 1

    def evaluations(self, trusted: int) -> int:
        """Returns how many evaluations there are in all, of which `trusted` images take part in as_the_guard()."""
        of_an_image = 2 * BINS * PAIRS + (BINS * len(self._table) if self._searches else 0)
        return len(self._images) * of_an_image + trusted * (1 + self._rivals) * GUARD_PAIRS

    @property
    def _rivals(self) -> int:
        return min(RIVALS, len(self._table) - 1)

    def classes(self) -> Tensor:
        """Returns each image's own class and then its rivals, the nearest first, [n, 1 + RIVALS] or as many as there are."""
        if self._answers is not None and not self._searches:
            return self._answers.topk(1 + self._rivals, dim=1).indices

        def losses(x0: Tensor, ids: Tensor) -> Tensor:
            return search_losses(self._denoiser, x0, ids, self.advance)

        purpose = f"search {_digest('', '', self._table)}"
        scores = class_scores(self._measured([purpose] * len(self._images), self._everyone, losses, BINS * len(self._table)))
        if self._answers is not None:
            scores = scores.scatter(1, self._answers[:, None].long(), -torch.inf)
        return scores.topk(1 + self._rivals, dim=1, largest=False).indices

    def along_the_process(self, classes: Tensor) -> Tensor:
        """Returns the loss under the nearest rival minus that under the own class, [n, BINS, PAIRS] in float64, from classes()."""

        def margins(x0: Tensor, ids: Tensor) -> Tensor:
            conditions, timesteps = self._table[classes[ids, :2]], pair_timesteps(self._denoiser, ids)
            losses = class_losses(self._denoiser, x0, ids, timesteps, conditions, COMPARE, self.advance)
            return (losses[:, 1] - losses[:, 0]).unflatten(1, (BINS, PAIRS))

        return self._measured(self._purposes("process", classes[:, :2]), self._everyone, margins, 2 * BINS * PAIRS)

    def as_the_guard(self, classes: Tensor, ids: Tensor, draws: Draws) -> Tensor:
        """Returns the losses under the rivals minus that under the own class, [n, rivals, GUARD_PAIRS], on pairs like the guard's.

        Args:
            classes: of all images, from classes(). ids: [n], numbers of the images to measure. draws: of the pairs' timesteps.
        """

        def margins(x0: Tensor, ids: Tensor) -> Tensor:
            step = torch.tensor(TRUST, dtype=torch.int64, device=x0.device)
            losses = class_losses(self._denoiser, x0, ids, draws.timesteps(ids, step), self._table[classes[ids]], TRUST, self.advance)
            found = losses[:, 1:] - losses[:, :1]
            if self._searches:  # these rivals are those that the loss favours
                return found
            favoured = found.mean(2).argsort(1)[:, :FAVOURED, None]
            return found.gather(1, favoured.expand(-1, -1, found.shape[2]))

        density = "" if draws.cumulative is None else _digest("", "", draws.cumulative)
        return self._measured(self._purposes(f"guard {density}", classes), ids, margins, classes.shape[1] * draws.pairs)

    @property
    def _everyone(self) -> Tensor:
        return torch.arange(len(self._images), dtype=torch.int64, device=self._images.device)

    def _purposes(self, name: str, classes: Tensor) -> list[str]:
        """Returns a name for what is measured of each image, which depends on the conditions of its classes [n, M]."""
        return [f"{name} {_digest('', '', self._table[own])}" for own in classes]

    def _measured(self, purposes: list[str], ids: Tensor, measure: Measure, evaluations: int) -> Tensor:
        """Returns the values of the images with these numbers, stacked, in float64; those in the file are not measured again."""
        found: dict[int, Any] = {}
        for part in ids.split(TOGETHER):
            keys = {i: f"{purposes[i]} {self._keys[i]}" for i in part.tolist()}
            missing = [i for i, key in keys.items() if key not in self._kept]
            self.advance(evaluations * (len(keys) - len(missing)))
            if missing:
                here = torch.tensor(missing, dtype=torch.int64, device=self._images.device)
                values = measure(self._encoded(missing), here).double().cpu()
                new = {keys[i]: value.tolist() for i, value in zip(missing, values, strict=True)}
                self._kept |= new
                if self._partial is not None:
                    with self._partial.open("a") as file:
                        file.write("".join(json.dumps({"of": key, "values": values}) + "\n" for key, values in new.items()))
            found |= {i: self._kept[key] for i, key in keys.items()}
        return torch.tensor([found[i] for i in ids.tolist()], dtype=torch.float64, device=self._images.device)

    def _encoded(self, ids: list[int]) -> Tensor:
        """Returns the latents of images, each of which is encoded once."""
        new = [i for i in ids if i not in self._latents]
        if new:
            rows = torch.tensor(new, dtype=torch.int64, device=self._images.device)
            self._latents |= dict(zip(new, self._denoiser.encode(self._images[rows]), strict=True))
        return torch.stack([self._latents[i] for i in ids])


def _digest(key: str, number: str, values: Tensor) -> str:
    hashed = hashlib.blake2b(f"{key} {number} {tuple(values.shape)}".encode(), digest_size=16)
    hashed.update(values.detach().double().cpu().numpy().tobytes())
    return hashed.hexdigest()


def _read(path: Path) -> dict[str, list[Any]]:
    """Reads what Differences kept, and removes a last line that is incomplete.

    Raises:
        ValueError: the file holds something else.
    """
    found: dict[str, list[Any]] = {}
    try:
        lines = read_text(path, MOST_KEPT).splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        for line in whole:
            entry = json.loads(line)
            torch.tensor(entry["values"], dtype=torch.float64, device="cpu")
            found[entry["of"]] = entry["values"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not a file of an interrupted calibration: {error!r}; remove it, or name another") from error
    if len(whole) < len(lines):
        path.write_text("".join(whole))
    return found


@torch.no_grad()
def search_losses(denoiser: Denoiser, x0: Tensor, ids: Tensor, advance: Advance = nothing) -> Tensor:
    """Returns the losses [n, K, BINS] of latents [n, C, h, w] under every class: one pair per bin, which the classes share."""
    table, width = denoiser.class_embeddings({}), len(denoiser.process) / BINS
    middles = ((torch.arange(BINS, dtype=torch.float32, device=x0.device) + 0.5) * width).long().expand(len(x0), BINS)
    return class_losses(denoiser, x0, ids, middles, table.expand(len(x0), *table.shape), SEARCH, advance)


def class_scores(losses: Tensor) -> Tensor:
    """Averages losses [n, K, BINS] over the bins, each of which is scaled by how much the classes differ in it."""
    return (losses / losses.std(1, keepdim=True).mean(0).clamp(min=1e-30)).mean(2)


def pair_timesteps(denoiser: Denoiser, ids: Tensor) -> Tensor:
    """Returns timesteps [n, BINS · PAIRS] of images [n]: PAIRS in equal parts of each bin, at a place that differs between images."""
    steps = len(denoiser.process)
    place = torch.frac((ids.double() + 1) * GOLDEN)[:, None]
    starts = torch.arange(BINS * PAIRS, dtype=torch.float64, device=ids.device)
    return ((starts + place) * (steps / (BINS * PAIRS))).long().clamp(max=steps - 1)


@torch.no_grad()
def class_losses(
    denoiser: Denoiser, x0: Tensor, ids: Tensor, timesteps: Tensor, conditions: Tensor, step: int, advance: Advance = nothing
) -> Tensor:
    """Returns losses [n, M, P] in float64 of latents [n, C, h, w] under conditions [n, M, ...], which share pairs of timesteps [n, P]."""
    drawn = Pairs(x0, denoiser.process.table, timesteps, ids, 0, torch.tensor(step, dtype=torch.int64, device=x0.device))
    rows, of_class = max(1, ROWS // len(x0)), []
    for k in range(conditions.shape[1]):
        of_class.append(torch.cat([pair_losses(denoiser, conditions[:, k], part, l1=False) for part in drawn.chunks(rows)], dim=1))
        advance(timesteps.numel())
    return torch.stack(of_class, dim=1).double()
