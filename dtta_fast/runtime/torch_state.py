"""torch's process-wide state that an adaptation changes for a while, and that an interrupt may leave changed."""

from __future__ import annotations

from typing import NamedTuple

import torch


class TorchState(NamedTuple):
    """Whether gradients are recorded in this thread, and how many vmaps and function modes are on.

    Ctrl-C between the lines of a context manager, torch's own too, leaves them changed, and what the process does next would fail.
    """

    grad: bool
    transforms: int
    modes: int

    @classmethod
    def now(cls) -> TorchState:
        depth = torch._C._functorch.get_dynamic_layer_stack_depth()
        return cls(torch.is_grad_enabled(), depth, torch._C._len_torch_function_stack())

    def restore(self) -> None:
        # as torch._dynamo does after a frame: a vmap entered and not left would transform everything that comes after
        torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(self.transforms)
        while torch._C._len_torch_function_stack() > self.modes:
            torch._C._pop_torch_function_stack()
        torch.set_grad_enabled(self.grad)
