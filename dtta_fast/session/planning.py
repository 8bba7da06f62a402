"""Fits the work to memory: how many pairs and images run at once, also after memory has run out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dtta_fast.config import AdaptConfig
from dtta_fast.core.problem import Problem, Schedule
from dtta_fast.runtime.failures import out_of_memory
from dtta_fast.session.memory import Needs

ROWS_AT_ONCE = 64  # rows per denoiser forward without a budget; more did not run faster
GUARD_ROWS = {"cpu": ROWS_AT_ONCE, "cuda": 256}  # the same for a forward without gradient, by device


class Plan(NamedTuple):
    """rows: simultaneous denoiser rows. images: simultaneous images. checkpoint: whether activations are recomputed in the backward."""

    rows: int
    images: int
    checkpoint: bool = False


class Limit:
    """Limits the rows that run at once after memory has run out.

    The limit doubles after a number of successful calls, since the memory may have been freed. Each time memory runs out again, it waits
    for twice as many calls.
    """

    def __init__(self) -> None:
        self._rows: int | None = None
        self._wanted, self._successes, self._patience = 0, 0, 8

    def of(self, rows: int) -> int:
        """Returns how many of the `rows` in the plan may run at once."""
        self._wanted = rows
        return rows if self._rows is None else min(rows, self._rows)

    def lower(self, rows: int) -> None:
        """Lowers the limit to `rows` because more rows did not fit."""
        self._rows, self._successes = rows if self._rows is None else min(rows, self._rows), 0
        self._patience = min(2 * self._patience, 1024)

    def raise_after_successes(self) -> None:
        """Counts a call that succeeded."""
        if self._rows is None:
            return
        self._successes += 1
        if self._successes >= self._patience:
            self._successes, self._rows = 0, 2 * self._rows
            if self._rows >= self._wanted:
                self._rows = None


def plan(budget: int, images: int, pairs: int, row: int, image: int, checkpointed_row: int | None) -> Plan:
    """Plans what fits into `budget` bytes: first as many images as have room for one row each, then as many rows as possible.

    row: bytes per row. image: bytes of an image's own weights, gradients and optimizer state. checkpointed_row: bytes per row if
    activations are recomputed; None if the denoiser does not support that.

    Raises:
        ValueError: not even one row of one image fits.
    """
    for size, checkpoint in ((row, False), (checkpointed_row, True)):
        if size is not None and image + size <= budget:
            together = min(images, budget // (image + size))
            return Plan(min((budget - together * image) // size, together * pairs), together, checkpoint)
    least = image + min(size for size in (row, checkpointed_row) if size is not None)
    remedy = "give more (on a GPU the default is four fifths of what is free)"
    raise ValueError(f"memory_budget is {budget} bytes; one (timestep, noise) pair of one image takes about {least}: {remedy}")


def default_budget(device: torch.device) -> int | None:
    """Returns four fifths of a GPU's free memory, including torch's cache; None on the CPU, where other processes share the free memory."""
    if device.type != "cuda":
        return None
    free: Any = torch.cuda.mem_get_info(device)[0]
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (int(free) + cached) * 4 // 5


class Planner:
    """Plans the schedules of a session."""

    def __init__(self, config: AdaptConfig) -> None:
        self._config, self._budget = config, config.memory_budget
        # rows that run at once, after running out of memory; images in forwards of the model with weights that they share
        self._limits = {"step": Limit(), "guard": Limit(), "model": Limit()}
        self.begin()

    def measure(self, device: torch.device) -> None:
        """Determines the budget, unless the config sets it: once, since free memory changes from call to call, but the chunk should not."""
        self._budget = self._config.memory_budget or default_budget(device)

    def begin(self) -> None:
        """Starts an attempt at a call: before it has a plan, fewer rows would not help."""
        self._running, self._at_once = "step", 1  # which of them is running, and on how many rows
        self._least = 1  # rows of one pair of one image, the minimum for any plan of a step

    def plan(self, problem: Problem, needs: Needs, inputs: Tensor, x0: Tensor, pairs: int) -> Schedule:
        """Returns the schedule for inputs [B, 3, H, W] and latents [B, C, h, w]; `together` is how many images run at once.

        Also switches the denoiser's activation checkpointing.

        Raises:
            ValueError: the budget is too small for one pair of one image.
        """
        config, together = self._config, len(inputs)
        forwards = problem.forwards()
        own = problem.per_image and config.denoiser_parameters != "frozen"  # weights of the denoiser, for each image
        abreast = 1 if own and not problem.batches_denoiser else together
        rows, checkpoint = ROWS_AT_ONCE if config.chunk == "auto" else config.chunk * abreast * forwards, False
        if self._budget is not None:
            most = pairs if config.chunk == "auto" else min(pairs, config.chunk)
            image, (row, checkpointed) = needs.of_image(inputs), needs.of_row(inputs, x0)
            sizes = (row * forwards, image, None if checkpointed is None else checkpointed * forwards)
            rows, together, checkpoint = plan(self._budget, together, most, *sizes)
            rows *= forwards
            if config.chunk == "auto" and inputs.device.type == "cuda":  # more rows cost memory without any gain
                rows = min(rows, max(ROWS_AT_ONCE, forwards * together))
        rows = self._limits["step"].of(rows)
        together = min(max(1, rows // forwards), together)
        abreast = 1 if own and checkpoint else min(abreast, together)
        fitting = max(1, rows // (abreast * forwards))
        chunk = fitting if config.chunk == "auto" else min(config.chunk, fitting)
        self._at_once, self._least = abreast * forwards * min(chunk, pairs), forwards
        problem.denoiser.checkpointing = checkpoint
        return Schedule(chunk, together, self._guard_rows(problem, needs, inputs, x0, together))

    def _guard_rows(self, problem: Problem, needs: Needs, inputs: Tensor, x0: Tensor, together: int) -> int:
        """Returns how many rows a forward pass without gradients runs at once, for `together` images."""
        config = self._config
        rows = GUARD_ROWS.get(inputs.device.type, ROWS_AT_ONCE)
        if config.chunk != "auto":
            rows = min(rows, config.chunk * together)
        if self._budget is not None:
            rows = min(rows, max(1, self._budget // needs.of_forward_row(inputs, x0)))
        rows = self._limits["guard"].of(rows)
        if config.method == "adapt" and problem.row_counts == "one":
            # one shape is compiled: the rows of two answers per image, or of as many as fit
            rows = min(rows // config.guard, 2 * together) * config.guard if rows >= config.guard > 0 else rows
        return rows

    def model_rows(self, images: int) -> int:
        """Returns how many of the images run through the model at once, where they share its weights and no gradient is wanted."""
        return self._limits["model"].of(images)

    @contextmanager
    def forwards(self, rows: int, of: Literal["guard", "model"] = "guard") -> Iterator[None]:
        """Records that forward passes without gradients run on so many rows, so that running out of memory lowers their limit.

        If that happens, the record is left in place for shrink() to read.
        """
        before = self._running, self._at_once
        self._running, self._at_once = of, rows
        yield
        self._running, self._at_once = before

    def shrink(self, error: BaseException) -> bool:
        """Lowers a limit if memory ran out; returns whether another attempt with fewer rows may succeed."""
        least = self._least if self._running == "step" else 1
        if not out_of_memory(error) or self._at_once <= least:
            return False
        rows = max(least, self._at_once // 2)
        self._limits[self._running].lower(rows)
        if self._running == "step":
            self._limits["guard"].lower(2 * rows)  # a row needs less memory there, but memory is short
        return True

    def succeeded(self) -> None:
        """Records a call that had enough memory; after several of them more rows are tried again."""
        for limit in self._limits.values():
            limit.raise_after_successes()
