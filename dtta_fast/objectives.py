"""What is minimised, with its gradient to the condition and to the denoiser's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dtta_fast.denoisers.base import Denoiser
from dtta_fast.kernels import add_noise, denoising_loss, denoising_loss_and_gradient
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


def _draws(denoiser: Denoiser, drawn: Pairs) -> dict[str, Any]:
    """The arguments that the ops share."""
    names = ("x0", "timesteps", "image_ids", "seed", "step", "pair0", "noise")
    return {"table": denoiser.process.table, **{name: getattr(drawn, name) for name in names}}


def _predictions(denoiser: Denoiser, phi: Mapping[str, Tensor], conditions: Tensor, drawn: Pairs, per_image: bool) -> Tensor:
    """The denoiser's output [B·P, ...] under conditions [B, ...]; `phi` replaces its weights, one set an image with per_image."""
    timesteps, x_t = drawn.timesteps, add_noise(**_draws(denoiser, drawn))
    shared = conditions[:, None].expand(*timesteps.shape, *conditions.shape[1:])
    if per_image:
        return call(denoiser, phi, x_t.unflatten(0, timesteps.shape), timesteps, shared, per_image=True).flatten(0, 1)
    return call(denoiser, phi, x_t, timesteps.flatten(), shared.flatten(0, 1), per_image=False)


@torch.no_grad()
def pair_losses(denoiser: Denoiser, conditions: Tensor, drawn: Pairs, l1: bool) -> Tensor:
    """Denoising losses [B, P] of the source denoiser under conditions [B, ...]."""
    return denoising_loss(_predictions(denoiser, {}, conditions, drawn, per_image=False), **_draws(denoiser, drawn), l1=l1)


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
        prediction = _predictions(denoiser, weights, leaf, part, per_image)
        upstream = torch.full_like(part.timesteps, 1 / divisor, dtype=torch.float64)
        losses, gradient = denoising_loss_and_gradient(prediction.detach(), upstream, **_draws(denoiser, part), l1=l1)
        own = torch.autograd.grad(prediction, wanted, gradient, materialize_grads=True)
        torch._foreach_add_(gradients, own)
        loss += losses.sum(1) / pairs
    return loss, gradients[0], gradients[1:]
