"""What is minimised, with its gradient to the condition and to the denoiser's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dtta_fast.denoisers.base import Denoiser
from dtta_fast.kernels import add_noise, denoising_loss
from dtta_fast.parameters import Parameters, call

ROWS_AT_ONCE = 64  # denoiser rows of a forward under chunk="auto"


class Pairs(NamedTuple):
    """The (timestep, noise) pairs that a batch is noised with.

    x0 [B, C, h, w], timesteps [B, P], image_ids [B], step 0-dim; the noise is drawn from (seed, step, image_id, pair0 + pair)
    unless `noise` [B, P, C, h, w] is given.
    """

    x0: Tensor
    timesteps: Tensor
    image_ids: Tensor
    seed: int
    step: Tensor
    noise: Tensor | None = None
    pair0: int = 0

    def chunks(self, size: int | Literal["auto"]) -> Iterator[Pairs]:
        """Parts of at most `size` pairs an image, with the noise that they have here."""
        images, pairs = self.timesteps.shape
        width = max(1, ROWS_AT_ONCE // images) if size == "auto" else size
        for first in range(0, pairs, width):
            here = slice(first, first + width)
            noise = None if self.noise is None else self.noise[:, here]
            yield self._replace(timesteps=self.timesteps[:, here], noise=noise, pair0=self.pair0 + first)


def pair_losses(denoiser: Denoiser, phi: Mapping[str, Tensor], conditions: Tensor, drawn: Pairs, l1: bool, per_image: bool) -> Tensor:
    """Denoising losses [B, P] under conditions [B, ...]; `phi` replaces the denoiser's weights, one set an image with per_image."""
    table, timesteps = denoiser.process.table, drawn.timesteps
    where = (drawn.image_ids, drawn.seed, drawn.step, drawn.pair0)
    x_t = add_noise(drawn.x0, table, timesteps, *where, noise=drawn.noise)
    shared = conditions[:, None].expand(*timesteps.shape, *conditions.shape[1:])
    if per_image:
        prediction = call(denoiser, phi, x_t.unflatten(0, timesteps.shape), timesteps, shared, per_image=True).flatten(0, 1)
    else:
        prediction = call(denoiser, phi, x_t, timesteps.flatten(), shared.flatten(0, 1), per_image=False)
    return denoising_loss(prediction, drawn.x0, table, timesteps, *where, l1=l1, noise=drawn.noise)


def embedding_mix(
    denoiser: Denoiser,
    phi: Parameters,
    conditions: Tensor,
    drawn: Pairs,
    chunk: int | Literal["auto"],
    l1: bool,
    per_image: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Diffusion-TTA's loss (arXiv 2311.16102): the denoising loss under the mixed embedding, averaged over the pairs.

    Pairs run in chunks; each leaves only its part of the gradient, so memory is that of one chunk.

    Returns:
        loss [B]; the gradient to `conditions` [B, ...]; the gradients to phi's tensors, in its order. They are gradients of the
        sum of the losses over images where per_image, of their mean otherwise (one set of weights for the batch).
    """
    images, pairs = drawn.timesteps.shape
    leaf = conditions.detach().requires_grad_()
    weights = {name: p.detach().requires_grad_() for name, p in phi.items()}
    wanted = [leaf, *weights.values()]
    loss = torch.zeros(images, dtype=torch.promote_types(drawn.x0.dtype, torch.float32), device=drawn.x0.device)
    # float32 at least: adding up chunks in bfloat16 would make the result depend on their size
    gradients = [torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32)) for tensor in wanted]
    divisor = pairs if per_image else pairs * images
    for part in drawn.chunks(chunk):
        losses = pair_losses(denoiser, weights, leaf, part, l1, per_image)
        own = torch.autograd.grad(losses.sum() / divisor, wanted, materialize_grads=True)
        torch._foreach_add_(gradients, own)
        loss += losses.detach().sum(1) / pairs
    return loss, gradients[0], gradients[1:]
