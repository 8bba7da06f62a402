"""The ops of namespace dtta_fast: schema, fake, autograd and argument checks.

`table` is NoiseProcess.table [T, 5], float32. Noise is a function of (seed, step, image_id, pair), where the pairs of a call
are pair0 .. pair0 + P − 1; an explicit `noise` [B, P, C, H, W] takes its place. `timesteps` [B, P], `image_ids` [B] and the
0-dim `step` are int64. Wrong shapes and dtypes raise ValueError naming the argument.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dtta_fast.kernels import reference


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_draws(
    x0: Tensor, table: Tensor, timesteps: Tensor, image_ids: Tensor, seed: int, step: Tensor, pair0: int, noise: Tensor | None
) -> None:
    _check(x0.ndim == 4 and x0.numel() > 0, f"x0 has shape {tuple(x0.shape)}; give a non-empty [B, C, H, W]")
    _check(x0.is_floating_point(), f"x0 has dtype {x0.dtype}; give a floating-point one")
    _check(table.ndim == 2 and table.shape[1] == 5, f"table has shape {tuple(table.shape)}; give NoiseProcess.table, [T, 5]")
    _check(
        timesteps.ndim == 2 and timesteps.shape[0] == x0.shape[0] and timesteps.shape[1] > 0,
        f"timesteps has shape {tuple(timesteps.shape)}; give [B, P] with B = {x0.shape[0]} and P of 1 and more",
    )
    _check(image_ids.shape == x0.shape[:1], f"image_ids has shape {tuple(image_ids.shape)}; give one an image: [{x0.shape[0]}]")
    for name, value in (("timesteps", timesteps), ("image_ids", image_ids), ("step", step)):
        _check(value.dtype == torch.int64, f"{name} has dtype {value.dtype}; give int64")
    _check(step.ndim == 0, f"step has shape {tuple(step.shape)}; give a 0-dim tensor")
    _check(0 <= seed < 2**63, f"seed is {seed}; give 0 .. 2^63 - 1")
    _check(pair0 >= 0, f"pair0 is {pair0}; give 0 and more")
    if noise is not None:
        expected = (*timesteps.shape, *x0.shape[1:])
        _check(tuple(noise.shape) == expected, f"noise has shape {tuple(noise.shape)}; give [B, P, C, H, W] = {list(expected)}")


@torch.library.custom_op("dtta_fast::add_noise", mutates_args=())
def _add_noise(
    x0: Tensor,
    table: Tensor,
    timesteps: Tensor,
    image_ids: Tensor,
    seed: int,
    step: Tensor,
    pair0: int,
    dtype: torch.dtype,
    noise: Tensor | None,
) -> Tensor:
    return reference.add_noise(x0, table, timesteps, image_ids, seed, step, pair0, dtype, noise)


@_add_noise.register_fake
def _(x0, table, timesteps, image_ids, seed, step, pair0, dtype, noise):  # type: ignore[no-untyped-def]
    return x0.new_empty((timesteps.numel(), *x0.shape[1:]), dtype=dtype)


def add_noise(
    x0: Tensor,
    table: Tensor,
    timesteps: Tensor,
    image_ids: Tensor,
    seed: int,
    step: Tensor,
    pair0: int = 0,
    dtype: torch.dtype | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """x_t = a·x0 + s·ε for P pairs an image: x0 [B, C, H, W] -> [B·P, C, H, W] in `dtype` (x0's by default).

    No gradient flows to x0: the latent is a constant of the method.
    """
    _check_draws(x0, table, timesteps, image_ids, seed, step, pair0, noise)
    return _add_noise(x0.detach(), table, timesteps, image_ids, seed, step, pair0, dtype or x0.dtype, noise)


@torch.library.custom_op("dtta_fast::denoising_loss", mutates_args=())
def _denoising_loss(
    prediction: Tensor,
    x0: Tensor,
    table: Tensor,
    timesteps: Tensor,
    image_ids: Tensor,
    seed: int,
    step: Tensor,
    pair0: int,
    l1: bool,
    with_gradient: bool,
    noise: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return reference.denoising_loss(prediction, x0, table, timesteps, image_ids, seed, step, pair0, l1, with_gradient, noise)


@_denoising_loss.register_fake
def _(prediction, x0, table, timesteps, image_ids, seed, step, pair0, l1, with_gradient, noise):  # type: ignore[no-untyped-def]
    loss = x0.new_empty(timesteps.shape, dtype=torch.float64 if x0.dtype == torch.float64 else torch.float32)
    return loss, torch.empty_like(prediction) if with_gradient else prediction.new_empty(0)


def _save_gradient(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _loss_backward(ctx, upstream, _):  # type: ignore[no-untyped-def]
    (gradient,) = ctx.saved_tensors
    return (gradient * upstream.reshape(-1, 1, 1, 1).to(gradient.dtype), *(None,) * 10)


_denoising_loss.register_autograd(_loss_backward, setup_context=_save_gradient)


def denoising_loss(
    prediction: Tensor,
    x0: Tensor,
    table: Tensor,
    timesteps: Tensor,
    image_ids: Tensor,
    seed: int,
    step: Tensor,
    pair0: int = 0,
    l1: bool = False,
    noise: Tensor | None = None,
) -> Tensor:
    """loss [B, P] = w · mean((prediction − (u·x0 + v·ε))²), or of the absolute difference with `l1`.

    prediction [B·P, C', H, W] with C' = C or 2C (learned variance: its second half takes no part). A value for each pair, since
    a guard compares pairs. The gradient to the prediction comes from the same pass.
    """
    _check_draws(x0, table, timesteps, image_ids, seed, step, pair0, noise)
    channels = x0.shape[1]
    _check(
        prediction.ndim == 4
        and prediction.shape[0] == timesteps.numel()
        and prediction.shape[1] in (channels, 2 * channels)
        and prediction.shape[2:] == x0.shape[2:],
        f"prediction has shape {tuple(prediction.shape)}; give [{timesteps.numel()}, {channels} or {2 * channels}, *{list(x0.shape[2:])}]",
    )
    with_gradient = torch.is_grad_enabled() and prediction.requires_grad
    return _denoising_loss(prediction, x0, table, timesteps, image_ids, seed, step, pair0, l1, with_gradient, noise)[0]


@torch.library.custom_op("dtta_fast::mix_condition", mutates_args=())
def _mix_condition(logits: Tensor, embeddings: Tensor, top_k: int | None, logit_scale: float | None) -> Tensor:
    return reference.mix_condition(logits, embeddings, top_k, logit_scale)


@_mix_condition.register_fake
def _(logits, embeddings, top_k, logit_scale):  # type: ignore[no-untyped-def]
    return embeddings.new_empty((len(logits), *embeddings.shape[1:]))


@torch.library.custom_op("dtta_fast::mix_condition_backward", mutates_args=())
def _mix_condition_backward(
    upstream: Tensor, logits: Tensor, embeddings: Tensor, top_k: int | None, logit_scale: float | None
) -> tuple[Tensor, Tensor]:
    return reference.mix_condition_backward(upstream, logits, embeddings, top_k, logit_scale)


@_mix_condition_backward.register_fake
def _(upstream, logits, embeddings, top_k, logit_scale):  # type: ignore[no-untyped-def]
    return torch.empty_like(logits), torch.empty_like(embeddings)


def _save_inputs(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:2])
    ctx.options = inputs[2:]


def _mix_backward(ctx, upstream):  # type: ignore[no-untyped-def]
    return (*_mix_condition_backward(upstream, *ctx.saved_tensors, *ctx.options), None, None)


_mix_condition.register_autograd(_mix_backward, setup_context=_save_inputs)


def mix_condition(logits: Tensor, embeddings: Tensor, top_k: int | None = None, logit_scale: float | None = None) -> Tensor:
    """Condition c = Σ_k softmax(z)_k l_k: logits [B, K], embeddings [K, ...] -> [B, ...] in the embeddings' dtype.

    z is the logits, or logit_scale times the L2-normalised logits; with top_k, the softmax runs over the k largest.
    Differentiable in the logits and the embeddings.
    """
    _check(logits.ndim == 2 and logits.numel() > 0, f"logits has shape {tuple(logits.shape)}; give a non-empty [B, K]")
    classes = logits.shape[1]
    fits = embeddings.ndim >= 2 and len(embeddings) == classes
    _check(fits, f"embeddings has shape {tuple(embeddings.shape)}; give [K, ...] with K = {classes}")
    _check(top_k is None or 1 <= top_k <= classes, f"top_k is {top_k}; give 1 .. {classes}")
    _check(logit_scale is None or logit_scale > 0, f"logit_scale is {logit_scale}; give a positive number")
    return _mix_condition(logits, embeddings, top_k, logit_scale)
