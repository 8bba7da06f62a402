"""Adam with 8-bit moments, using the blockwise kernels of bitsandbytes (Dettmers et al. 2022, arXiv 2110.02861)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

BLOCK = 256  # number of values that share a scale
LEAST = 4096  # smaller tensors keep float32 moments, as in bitsandbytes' own optimizer


def require() -> None:
    """Raises ImportError with the install command if bitsandbytes is not installed."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ImportError('optimizer is "adam8bit", which takes bitsandbytes: pip install "dtta-fast[bitsandbytes]"') from error


def fits(parameter: Tensor, images: int) -> bool:
    """Returns whether a parameter [images, ...] gets 8-bit moments."""
    return parameter.dtype == torch.float32 and parameter.numel() // images >= LEAST


def init_scales(parameter: Tensor, images: int) -> Tensor:
    """Initial scales of a moment, [images, blocks]; no block spans two images."""
    blocks = -(-parameter.numel() // images // BLOCK) if fits(parameter, images) else 0
    return torch.zeros(images, blocks, dtype=torch.float32, device=parameter.device)


def update_(parameter: Tensor, gradient: Tensor, moments: list[Tensor], scales: list[Tensor], step: int, lr: float, decay: float) -> None:
    """Updates a parameter once in place; parameter, gradient and moments [images, ...] are contiguous. `step` is 1 at the first call.

    decay: decoupled weight decay, as in AdamW.
    """
    # imported here, since the import takes a second and most sessions do not need it
    from bitsandbytes.functional import optimizer_update_8bit_blockwise

    images = len(scales[0])
    signed, unsigned = _codes(parameter.device)
    tensors = [tensor.view(images, -1) for tensor in (gradient, parameter, *moments)]
    for i in range(images):
        own, first, second = [tensor[i] for tensor in tensors], scales[0][i], scales[1][i]
        optimizer_update_8bit_blockwise(
            "adam", *own, 0.9, 0.999, 0.0, 0.0, 1e-8, step, lr, signed, unsigned, first, second, weight_decay=decay
        )


@lru_cache
def _codes(device: torch.device) -> tuple[Tensor, Tensor]:
    """Tables of the 256 quantized values of the first (signed) and the second (unsigned) moment, as fractions of the block's scale."""
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map(signed=True).to(device), create_dynamic_map(signed=False).to(device)
