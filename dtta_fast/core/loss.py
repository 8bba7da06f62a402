"""Training objectives, with their gradients with respect to the condition and the denoiser's weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dtta_fast.core.weights import Parameters, call, in_dtypes_of, of_image, with_weights
from dtta_fast.denoisers.base import Denoiser
from dtta_fast.kernels import Pairs, add_noise, denoising_loss, denoising_loss_and_gradient
from dtta_fast.runtime.compiling import leaf
from dtta_fast.runtime.phases import phase


@torch.no_grad()
def pair_losses(
    denoiser: Denoiser, conditions: Tensor, drawn: Pairs, l1: bool, forwards: Sequence[int] | None = None, shared: bool = True
) -> Tensor:
    """Returns denoising losses [B, P] of the source denoiser under conditions [B, ...].

    forwards: row count of each forward pass, at least B * P in total; missing rows are padded. None runs a single forward pass.
    shared: whether a forward pass over whole images may get one condition per image instead of one per row; compiled code would see
    these as two different shapes.
    """
    with phase("noising"):
        x_t = add_noise(drawn, denoiser.dtype)
    with phase("denoiser forward"):
        if forwards is None:
            prediction = denoiser(x_t, drawn.timesteps.flatten(), conditions)
        else:
            pairs, timesteps, first, found = drawn.timesteps.shape[1], drawn.timesteps.flatten(), 0, []
            for rows in forwards:
                whole = shared and first % pairs == 0 and rows % pairs == 0 and first + rows <= len(x_t)
                here = slice(first, first + rows)
                if whole:  # the denoiser computes what an image's rows share only once
                    found.append(denoiser(x_t[here], timesteps[here], conditions[first // pairs : (first + rows) // pairs]))
                else:
                    numbers = torch.arange(first, first + rows, dtype=torch.int64, device=x_t.device).clamp(max=len(x_t) - 1)
                    found.append(denoiser(x_t[numbers], timesteps[numbers], conditions[numbers // pairs]))
                first += rows
            prediction = torch.cat(found)[: len(x_t)]
    with phase("loss"):
        return denoising_loss(prediction, drawn, l1)


class Noised(NamedTuple):
    """The rows of a chunk: x_t [N, C, h, w] and timesteps [N], with N = images * pairs.

    own_weights: whether the denoiser's weights have a leading image dimension.
    """

    x_t: Tensor
    timesteps: Tensor
    images: int
    pairs: int
    own_weights: bool = False

    def denoised(self, denoiser: Denoiser, weights: Parameters, conditions: Tensor) -> Tensor:
        """Returns predictions [N, M, C', h, w] for every row under each of its image's conditions [B, M, ...]."""
        images, pairs, count = self.images, self.pairs, conditions.shape[1]
        if count == 1:
            return self._predictions(denoiser, weights, self.x_t, self.timesteps, conditions)[:, None]
        x_t, timesteps = (  # an image's rows, repeated for each condition: what a condition's pairs share is computed once
            rows.unflatten(0, (images, pairs))[:, None].expand(images, count, pairs, *rows.shape[1:]).flatten(0, 2)
            for rows in (self.x_t, self.timesteps)
        )
        found = self._predictions(denoiser, weights, x_t, timesteps, conditions)
        return found.unflatten(0, (images, count, pairs)).transpose(1, 2).flatten(0, 1)

    def _predictions(self, denoiser: Denoiser, weights: Parameters, x_t: Tensor, timesteps: Tensor, conditions: Tensor) -> Tensor:
        if not self.own_weights:
            return call(denoiser, weights, x_t, timesteps, conditions.flatten(0, 1), per_image=False)
        rows, times = (given.unflatten(0, (self.images, -1)) for given in (x_t, timesteps))
        return call(denoiser, weights, rows, times, conditions, per_image=True).flatten(0, 1)


# maps heads, which the task derives from the model's outputs, to predictions [N, C', h, w] to compare with the target; only the first
# prediction's loss is reported
Predict = Callable[[Denoiser, Parameters, list[Tensor], Noised], list[Tensor]]


def embedding_mix(denoiser: Denoiser, weights: Parameters, heads: list[Tensor], rows: Noised) -> list[Tensor]:
    """Returns Diffusion-TTA's prediction (arXiv 2311.16102), under the mixed embedding; heads = [conditions [B, ...]]."""
    return [rows.denoised(denoiser, weights, heads[0][:, None])[:, 0]]


def noise_mix(denoiser: Denoiser, weights: Parameters, heads: list[Tensor], rows: Noised) -> list[Tensor]:
    """Returns DUSA's prediction (NeurIPS 2024), a mixture of the per-class predictions; heads = [probabilities, conditions [B, M, ...]].

    Probabilities are [B, M], or per pixel [B, M, h, w]. If none of the denoiser's weights are adapted, the gradient with respect to the
    probabilities needs no backward pass through the denoiser.
    """
    with torch.set_grad_enabled(bool(weights)):
        each = rows.denoised(denoiser, weights, heads[1])
    return [_mixed(heads[0], each, rows.pairs)]


def noise_mix_null(denoiser: Denoiser, weights: Parameters, heads: list[Tensor], rows: Noised) -> list[Tensor]:
    """Like noise_mix, but without denoiser gradients from the class predictions: it learns only from the null-condition prediction."""
    with torch.no_grad():
        each = rows._replace(x_t=rows.x_t.clone()).denoised(denoiser, weights, heads[1])  # some networks write to their input
    null = denoiser.null_embedding(weights).expand(rows.images, 1, *heads[1].shape[2:])
    return [_mixed(heads[0], each, rows.pairs), rows.denoised(denoiser, weights, null)[:, 0]]


def _mixed(probabilities: Tensor, each: Tensor, pairs: int) -> Tensor:
    """Computes Σ_k p_k · prediction_k: probabilities [B, M], or per pixel [B, M, h, w], each [N, M, C', h, w] -> [N, C', h, w]."""
    shares = probabilities.repeat_interleave(pairs, dim=0).to(each.dtype)
    return torch.einsum("nm,nmchw->nchw" if shares.ndim == 2 else "nmhw,nmchw->nchw", shares, each)


def accumulated_gradients(
    predict: Predict,
    denoiser: Denoiser,
    phi: Parameters,
    heads: list[Tensor],
    drawn: Pairs,
    chunk: int,
    l1: bool,
    per_image: bool,
    batched: bool = False,
    half: bool = False,
) -> tuple[Tensor, list[Tensor], list[Tensor], float]:
    """Computes the loss of `predict`'s predictions, averaged over the pairs, and its gradients.

    Pairs run in chunks of `chunk` per image. A chunk keeps only its contribution to the gradients, so peak memory is that of one chunk.
    If each image has its own weights phi, images run one by one, or all at once if `batched` is set. `half` says that the heads' gradients
    flow on into a float16 model, so they are scaled whatever format the denoiser has.

    Returns:
        loss [B]; the gradients with respect to those `heads` [B, ...] that require one, in order; the gradients with respect to phi's
        tensors, in order; and the scale by which the gradients are multiplied. The gradients are those of the sum of the losses over
        images if per_image is set, and of their mean otherwise (one set of weights for the batch).
    """
    images, pairs = drawn.timesteps.shape
    own_weights = per_image and bool(phi)
    if own_weights and (not batched or denoiser.checkpointing):  # vmap cannot recompute
        return _image_by_image(predict, denoiser, phi, heads, drawn, chunk, l1, half)
    leaves = [leaf(head) if head.requires_grad else head.detach() for head in heads]
    # cast once per step, not once per chunk
    weights = {name: leaf(p) for name, p in in_dtypes_of(denoiser, phi).items()} if phi else {}
    moving = [head for head in leaves if head.requires_grad]
    wanted = [*moving, *weights.values()]
    loss = torch.zeros(images, dtype=torch.promote_types(drawn.x0.dtype, torch.float32), device=drawn.x0.device)
    # at least float32: accumulating chunks in bfloat16 would make the result depend on their size
    gradients = [torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32)) for tensor in wanted]
    dtype, divisor = denoiser.dtype, pairs if per_image else pairs * images
    scale = gradient_scale(torch.float16 if half else dtype, drawn.x0[0].numel(), divisor)

    def run() -> None:
        for part in drawn.chunks(chunk):
            with phase("noising"):
                x_t = add_noise(part, dtype)
            with phase("denoiser forward"):
                predictions = predict(
                    denoiser, weights, leaves, Noised(x_t, part.timesteps.flatten(), images, part.timesteps.shape[1], own_weights)
                )
            with phase("loss"):
                upstream = torch.full_like(part.timesteps, scale / divisor, dtype=torch.float64)
                found = [denoising_loss_and_gradient(p.detach(), upstream, part, l1) for p in predictions]
                loss.add_(found[0][0].sum(1) / pairs)
            with phase("denoiser backward"):
                torch._foreach_add_(gradients, torch.autograd.grad(predictions, wanted, [g for _, g in found], materialize_grads=True))

    if weights and denoiser.checkpointing:  # the backward recomputes parts of the forward, which needs the adapted weights there too
        with_weights(denoiser, weights, run)
    else:
        run()
    return loss, gradients[: len(moving)], gradients[len(moving) :], scale


def _image_by_image(
    predict: Predict, denoiser: Denoiser, phi: Parameters, heads: list[Tensor], drawn: Pairs, chunk: int, l1: bool, half: bool
) -> tuple[Tensor, list[Tensor], list[Tensor], float]:
    """Computes accumulated_gradients() for images whose denoisers have weights of their own.

    One chunk's rows saturate the device, and batched weights were slower (60 pairs: 0.15 s per image instead of 0.10).
    """
    each = []
    for i in range(len(drawn.x0)):
        own, one = of_image(phi, i), [head[i : i + 1] for head in heads]
        its_pairs = drawn.images(slice(i, i + 1))
        each.append(accumulated_gradients(predict, denoiser, own, one, its_pairs, chunk, l1, per_image=False, half=half))
    losses, to_heads, to_phi, scales = zip(*each, strict=True)
    if len(each) == 1:
        return losses[0], to_heads[0], [gradient[None] for gradient in to_phi[0]], scales[0]
    joined = [torch.cat(found) for found in zip(*to_heads, strict=True)]
    return torch.cat(losses), joined, [torch.stack(found) for found in zip(*to_phi, strict=True)], scales[0]


def gradient_scale(dtype: torch.dtype, elements: int, divisor: int) -> float:
    """Returns the loss scale for float16: a power of two near 1 / (weight of one element in the loss), or 1 for other dtypes.

    It brings gradients to the magnitude of the residual, far from float16's limits 6e-8 and 65504. The loss is a mean over the `elements`
    of a latent and `divisor` pairs.
    """
    return 2.0 ** round(math.log2(elements * divisor)) if dtype == torch.float16 else 1.0
