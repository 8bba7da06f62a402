"""torch's process-wide state that an adaptation changes for a while, and that an interrupt may leave changed."""

from __future__ import annotations

from typing import NamedTuple

import torch


class TorchState(NamedTuple):
    """Whether gradients are recorded in this thread, and how many vmaps are being run.

    Ctrl-C between the lines of a context manager, torch's own too, leaves them changed, and what the process does next would fail.
    """

    grad: bool
    transforms: int

    @classmethod
    def now(cls) -> TorchState:
        return cls(torch.is_grad_enabled(), torch._C._functorch.get_dynamic_layer_stack_depth())

    def restore(self) -> None:
        # as torch._dynamo does after a frame: a vmap entered and not left would transform everything that comes after
        torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(self.transforms)
        torch.set_grad_enabled(self.grad)
