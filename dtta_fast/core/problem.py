"""Holds what every step of an adaptation is computed from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

from torch import Tensor, nn

from dtta_fast.config import AdaptConfig
from dtta_fast.core.draws import Draws
from dtta_fast.denoisers.base import Denoiser
from dtta_fast.tasks.base import ClassTask, Task

RowCounts = Literal["any", "few", "one"]


@dataclass(frozen=True)
class Problem:
    """Everything that stays constant from step to step. The modules are private copies.

    lr, denoiser_lr: 0-dim, on the modules' device, in the dtype that optimizers.rate() gives. row_counts: which row counts a forward pass
    of the guard may have, see guard.forward_rows(). loop: whether images with separate weights of the model run one by one.
    denoiser_loop: the same for the denoiser's adapters. forward: the compiled version of step.forward(), if there is one. cumulative: the
    timesteps' cumulative density, if they are calibrated. trust: how far the guard trusts a difference of losses, see Calibration.
    """

    model: nn.Module
    denoiser: Denoiser
    task: Task
    config: AdaptConfig
    lr: Tensor
    denoiser_lr: Tensor
    row_counts: RowCounts = "any"
    loop: bool = False
    denoiser_loop: bool = False
    forward: Callable[..., Tensor] | None = None
    cumulative: Tensor | None = None
    trust: float = 1.0

    @property
    def per_image(self) -> bool:
        return self.config.mode == "episodic"

    @property
    def batches_denoiser(self) -> bool:
        """True if the denoiser's own weights for each image run as one batch. Adapters do, because they are little of the work."""
        return self.config.denoiser_parameters == "lora" and not self.denoiser_loop

    @property
    def class_task(self) -> ClassTask:
        """The task, where the config has one with classes: the others' check() refuses such a config."""
        return cast(ClassTask, self.task)

    def draws(self, pairs: int) -> Draws:
        """Returns the draws for a step."""
        config = self.config
        return dataclasses.replace(
            self.held_out(pairs), antithetic=config.antithetic, share_noise=config.share_noise, common=config.common_draws
        )

    def held_out(self, pairs: int) -> Draws:
        """Returns the draws for the guard or the diffusion classifier, with independent pairs."""
        low, high = self.config.timestep_range or (0, len(self.denoiser.process))
        return Draws(self.config.seed, pairs, self.config.timesteps, low, high, self.cumulative)

    def forwards(self) -> int:
        """Returns the number of denoiser forward passes for one pair of a step."""
        config = self.config
        if config.objective == "embedding_mix":
            return 1
        classes = self.task.class_count(self.denoiser) if config.top_k is None else config.top_k + config.drawn_classes
        return classes + config.null_condition


class Schedule(NamedTuple):
    """How the work is split to fit into memory. It changes results by rounding only.

    chunk: pairs of an image that run at once. together: number of images whose gradients are computed at once, if all share one set of
    weights; None is all of them. guard_rows: maximum rows of a forward pass without gradients.
    """

    chunk: int = 1
    together: int | None = None
    guard_rows: int = 1
