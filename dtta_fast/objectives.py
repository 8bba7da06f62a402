"""What is minimised, with its gradient to the condition and to the denoiser's weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from dtta_fast.denoisers.base import Denoiser
from dtta_fast.kernels import add_noise, denoising_loss
from dtta_fast.parameters import Parameters, call

ROWS_AT_ONCE = 64  # denoiser rows of a forward under chunk="auto"


def pair_losses(
    denoiser: Denoiser,
    phi: Mapping[str, Tensor],
    conditions: Tensor,
    x0: Tensor,
    timesteps: Tensor,
    image_ids: Tensor,
    seed: int,
    step: Tensor,
    pair0: int,
    l1: bool,
    noise: Tensor | None,
    per_image: bool,
) -> Tensor:
    """Denoising losses [B, P] of x0 [B, C, h, w] under conditions [B, ...] at timesteps [B, P]; noise [B, P, C, h, w] or None."""
    images, pairs = timesteps.shape
    x_t = add_noise(x0, denoiser.process.table, timesteps, image_ids, seed, step, pair0, noise=noise)
    shared = conditions[:, None].expand(images, pairs, *conditions.shape[1:])
    if per_image:
        prediction = call(denoiser, phi, x_t.unflatten(0, (images, pairs)), timesteps, shared, per_image=True).flatten(0, 1)
    else:
        prediction = call(denoiser, phi, x_t, timesteps.flatten(), shared.flatten(0, 1), per_image=False)
    return denoising_loss(prediction, x0, denoiser.process.table, timesteps, image_ids, seed, step, pair0, l1, noise)


def embedding_mix(
    denoiser: Denoiser,
    phi: Parameters,
    conditions: Tensor,
    x0: Tensor,
    timesteps: Tensor,
    image_ids: Tensor,
    seed: int,
    step: Tensor,
    chunk: int | Literal["auto"],
    l1: bool,
    noise: Tensor | None,
    per_image: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Diffusion-TTA's loss (arXiv 2311.16102): the denoising loss under the mixed embedding, averaged over the pairs.

    Pairs run in chunks; each leaves only its part of the gradient, so memory is that of one chunk.

    Returns:
        loss [B]; the gradient to `conditions` [B, ...]; the gradients to phi's tensors, in its order. They are gradients of the
        sum of the losses over images where per_image, of their mean otherwise (one set of weights for the batch).
    """
    images, pairs = timesteps.shape
    size = max(1, ROWS_AT_ONCE // images) if chunk == "auto" else chunk
    leaf = conditions.detach().requires_grad_()
    weights = {name: p.detach().requires_grad_() for name, p in phi.items()}
    wanted = [leaf, *weights.values()]
    loss = torch.zeros(images, dtype=torch.promote_types(x0.dtype, torch.float32), device=x0.device)
    gradients = [torch.zeros_like(tensor) for tensor in wanted]
    divisor = pairs if per_image else pairs * images
    for first in range(0, pairs, size):
        here = slice(first, first + size)
        part = pair_losses(
            denoiser, weights, leaf, x0, timesteps[:, here], image_ids, seed, step, first, l1, None if noise is None else noise[:, here], per_image
        )
        gradients = torch._foreach_add(gradients, torch.autograd.grad(part.sum() / divisor, wanted, materialize_grads=True))
        loss = loss + part.detach().sum(1) / pairs
    return loss, gradients[0], gradients[1:]
