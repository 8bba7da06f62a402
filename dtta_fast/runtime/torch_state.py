"""torch state that an adaptation changes temporarily and that an interrupt may leave changed."""

from __future__ import annotations

from typing import NamedTuple

import torch


class TorchState(NamedTuple):
    """Captures whether gradients are recorded in this thread, and how many vmaps and function modes are active.

    Ctrl-C inside a context manager, including torch's own, can leave them changed, and later work in the process would then fail.
    """

    grad: bool
    transforms: int
    modes: int

    @classmethod
    def now(cls) -> TorchState:
        depth = torch._C._functorch.get_dynamic_layer_stack_depth()
        return cls(torch.is_grad_enabled(), depth, torch._C._len_torch_function_stack())

    def restore(self) -> None:
        # as torch._dynamo does after a frame: a vmap that was entered but not left would transform everything that follows
        torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(self.transforms)
        while torch._C._len_torch_function_stack() > self.modes:
            torch._C._pop_torch_function_stack()
        torch.set_grad_enabled(self.grad)


def interrupt_behind(error: BaseException, outer: BaseException | None) -> BaseException | None:
    """Returns the Ctrl-C, or another exception that is not an Exception, that an error is or has replaced; None if there is none.

    If it lands in a context manager's __exit__, torch's own may fail over the half-restored state and raise an error in its place.

    outer: the exception that the caller was handling already, which is not part of the error.
    """
    found: BaseException | None = error
    while found is not outer and found is not None and isinstance(found, Exception):
        found = found.__context__
    return None if found is outer else found
