"""torch's process-wide state that an adaptation changes for a while, and that an interrupt may leave changed."""

from __future__ import annotations

from typing import NamedTuple

import torch


class TorchState(NamedTuple):
    """Which attention kernels may serve, whether gradients are recorded, how many vmaps are being run.

    Ctrl-C between the lines of a context manager, torch's own too, leaves them changed, and what the process does next would fail.
    """

    attention: tuple[bool, ...]
    grad: bool
    transforms: int

    @classmethod
    def now(cls) -> TorchState:
        cuda = torch.backends.cuda
        attention = (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled())
        depth = torch._C._functorch.get_dynamic_layer_stack_depth()
        return cls(attention, torch.is_grad_enabled(), depth)

    def restore(self) -> None:
        cuda = torch.backends.cuda
        # as torch._dynamo does after a frame: a vmap entered and not left would transform everything that comes after
        torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(self.transforms)
        settings = (cuda.enable_flash_sdp, cuda.enable_mem_efficient_sdp, cuda.enable_math_sdp, cuda.enable_cudnn_sdp)
        for choose, enabled in zip(settings, self.attention, strict=True):
            choose(enabled)
        torch.set_grad_enabled(self.grad)
