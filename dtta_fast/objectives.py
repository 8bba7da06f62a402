"""What is minimised, with its gradient to the condition and to the denoiser's weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dtta_fast.denoisers.base import Denoiser
from dtta_fast.kernels import add_noise, denoising_loss, denoising_loss_and_gradient
from dtta_fast.parameters import Parameters, call, in_dtypes_of
from dtta_fast.runtime.precision import gradient_scale


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

    def image(self, i: int) -> Pairs:
        """Those of the i-th image alone."""
        noise = None if self.noise is None else self.noise[i : i + 1]
        one = slice(i, i + 1)
        return self._replace(x0=self.x0[one], timesteps=self.timesteps[one], image_ids=self.image_ids[one], noise=noise)

    def chunks(self, size: int) -> Iterator[Pairs]:
        """Parts of at most `size` pairs an image, as even as they come, with the noise that they have here."""
        pairs = self.timesteps.shape[1]
        width = -(-pairs // -(-pairs // size))
        for first in range(0, pairs, width):
            here = slice(first, first + width)
            noise = None if self.noise is None else self.noise[:, here]
            yield self._replace(timesteps=self.timesteps[:, here], noise=noise, pair0=self.pair0 + first)


def _draws(denoiser: Denoiser, drawn: Pairs) -> dict[str, Any]:
    """The arguments that the ops share."""
    names = ("x0", "timesteps", "image_ids", "seed", "step", "pair0", "noise")
    return {"table": denoiser.process.table, **{name: getattr(drawn, name) for name in names}}


@torch.no_grad()
def pair_losses(denoiser: Denoiser, conditions: Tensor, drawn: Pairs, l1: bool, rows: int | None = None) -> Tensor:
    """Denoising losses [B, P] of the source denoiser under conditions [B, ...].

    rows: forwards of exactly that many rows, the last filled up, so that a compiled denoiser meets one shape; None is one forward.
    """
    x_t = add_noise(**_draws(denoiser, drawn), dtype=denoiser.dtype)
    shared = conditions[:, None].expand(*drawn.timesteps.shape, *conditions.shape[1:]).flatten(0, 1)
    inputs = (x_t, drawn.timesteps.flatten(), shared)
    if rows is None:
        prediction = denoiser(*inputs)
    else:
        numbers = torch.arange(-(-len(x_t) // rows) * rows, device=x_t.device).clamp(max=len(x_t) - 1)
        prediction = torch.cat([denoiser(*(x[part] for x in inputs)) for part in numbers.split(rows)])[: len(x_t)]
    return denoising_loss(prediction, **_draws(denoiser, drawn), l1=l1)


def embedding_mix(
    denoiser: Denoiser,
    phi: Parameters,
    conditions: Tensor,
    drawn: Pairs,
    chunk: int,
    l1: bool,
    per_image: bool,
) -> tuple[Tensor, Tensor, list[Tensor], float]:
    """Diffusion-TTA's loss (arXiv 2311.16102): the denoising loss under the mixed embedding, averaged over the pairs.

    Pairs run in chunks of `chunk` an image; each leaves only its part of the gradient, so memory is that of one chunk.

    Returns:
        loss [B]; the gradient to `conditions` [B, ...]; the gradients to phi's tensors, in its order; the scale that the gradients
        are multiplied by. They are gradients of the sum of the losses over images where per_image, of their mean otherwise (one set
        of weights for the batch).
    """
    images, pairs = drawn.timesteps.shape
    if per_image and phi:
        # image by image: a chunk's rows fill the machine, and batched weights were slower (60 pairs: 0.15 s an image, not 0.10)
        each = []
        for i in range(images):
            own = {name: p[i] for name, p in phi.items()}
            each.append(embedding_mix(denoiser, own, conditions[i : i + 1], drawn.image(i), chunk, l1, per_image=False))
        losses, to_condition, to_phi, scales = zip(*each, strict=True)
        return torch.cat(losses), torch.cat(to_condition), [torch.stack(found) for found in zip(*to_phi, strict=True)], scales[0]
    leaf = conditions.detach().requires_grad_()
    # cast once a step, not once a chunk
    weights = {name: p.detach().requires_grad_() for name, p in in_dtypes_of(denoiser, phi).items()} if phi else {}
    wanted = [leaf, *weights.values()]
    loss = torch.zeros(images, dtype=torch.promote_types(drawn.x0.dtype, torch.float32), device=drawn.x0.device)
    # float32 at least: adding up chunks in bfloat16 would make the result depend on their size
    gradients = [torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32)) for tensor in wanted]
    dtype, divisor = denoiser.dtype, pairs if per_image else pairs * images
    scale = gradient_scale(dtype, drawn.x0[0].numel(), divisor)
    for part in drawn.chunks(chunk):
        x_t, timesteps = add_noise(**_draws(denoiser, part), dtype=dtype), part.timesteps
        shared = leaf[:, None].expand(*timesteps.shape, *leaf.shape[1:]).flatten(0, 1)
        prediction = call(denoiser, weights, x_t, timesteps.flatten(), shared, per_image=False)
        upstream = torch.full_like(timesteps, scale / divisor, dtype=torch.float64)
        losses, gradient = denoising_loss_and_gradient(prediction.detach(), upstream, **_draws(denoiser, part), l1=l1)
        torch._foreach_add_(gradients, torch.autograd.grad(prediction, wanted, gradient, materialize_grads=True))
        loss += losses.sum(1) / pairs
    return loss, gradients[0], gradients[1:], scale
