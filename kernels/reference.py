"""Every op in plain torch: its definition, the oracle of its tests and the path that runs everywhere.

Arithmetic is float32, or float64 where x0 is float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dtta_fast.kernels.philox import normal


def _noise(x0: Tensor, timesteps: Tensor, image_ids: Tensor, seed: int, step: Tensor, pair0: int) -> Tensor:
    pairs = torch.arange(pair0, pair0 + timesteps.shape[1], device=x0.device)
    return normal(x0[0].numel(), pairs, image_ids, seed, step).view(*timesteps.shape, *x0.shape[1:])


def _coefficients(table: Tensor, timesteps: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return table[timesteps].to(dtype)[..., None, None, None].unbind(2)  # five of [B, P, 1, 1, 1]


def _compute_dtype(x0: Tensor) -> torch.dtype:
    return torch.float64 if x0.dtype == torch.float64 else torch.float32


def add_noise(
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
    """x_t = a·x0 + s·ε: [B, C, H, W] -> [B·P, C, H, W] in `dtype`."""
    compute = _compute_dtype(x0)
    if noise is None:
        noise = _noise(x0, timesteps, image_ids, seed, step, pair0)
    a, s, *_ = _coefficients(table, timesteps, compute)
    return (a * x0.to(compute)[:, None] + s * noise.to(compute)).flatten(0, 1).to(dtype)


def denoising_loss(
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
    """loss [B, P] = w · mean(|prediction − (u·x0 + v·ε)|^(1 or 2)) and its gradient to the prediction.

    The gradient has the prediction's shape (the learned-variance half is zero), or no element without `with_gradient`.
    """
    compute = _compute_dtype(x0)
    if noise is None:
        noise = _noise(x0, timesteps, image_ids, seed, step, pair0)
    _, _, u, v, w = _coefficients(table, timesteps, compute)
    target = u * x0.to(compute)[:, None] + v * noise.to(compute)
    difference = prediction.view(*timesteps.shape, *prediction.shape[1:])[:, :, : x0.shape[1]].to(compute) - target
    loss = w[..., 0, 0, 0] * (difference.abs() if l1 else difference.square()).flatten(2).mean(2)
    if not with_gradient:
        return loss, prediction.new_empty(0)
    slope = (difference.sign() if l1 else 2 * difference) * (w / x0[0].numel())
    gradient = torch.zeros_like(prediction)
    gradient[:, : x0.shape[1]] = slope.flatten(0, 1)
    return loss, gradient


def _class_weights(logits: Tensor, top_k: int | None, logit_scale: float | None) -> tuple[Tensor, Tensor | None]:
    """The softmax weights in the compute dtype, [B, K] or [B, top_k], and the classes that they belong to."""
    z = logits.to(_compute_dtype(logits))
    if logit_scale is not None:
        z = logit_scale * torch.nn.functional.normalize(z, dim=1)
    if top_k is None:
        return z.softmax(dim=1), None
    chosen, classes = z.topk(top_k, dim=1)
    return chosen.softmax(dim=1), classes


def mix_condition(logits: Tensor, embeddings: Tensor, top_k: int | None, logit_scale: float | None) -> Tensor:
    """c = Σ_k softmax(z)_k l_k: logits [B, K], embeddings [K, ...] -> [B, ...].

    With logit_scale, z = logit_scale · logits / ‖logits‖₂ (the norm over all K); with top_k, only the k largest take part.
    """
    weights, classes = _class_weights(logits, top_k, logit_scale)
    if classes is None:
        return torch.tensordot(weights, embeddings.to(weights.dtype), dims=1).to(embeddings.dtype)
    rows = embeddings[classes].to(weights.dtype)
    return torch.einsum("bk,bk...->b...", weights, rows).to(embeddings.dtype)


def mix_condition_backward(
    upstream: Tensor, logits: Tensor, embeddings: Tensor, top_k: int | None, logit_scale: float | None
) -> tuple[Tensor, Tensor]:
    """Gradients of mix_condition to logits and embeddings for `upstream` [B, ...]."""
    weights, classes = _class_weights(logits, top_k, logit_scale)
    flat, table = upstream.flatten(1).to(weights.dtype), embeddings.flatten(1).to(weights.dtype)
    full = weights if classes is None else torch.zeros_like(logits, dtype=weights.dtype).scatter(1, classes, weights)
    to_table = (full.T @ flat).view_as(embeddings).to(embeddings.dtype)
    to_weights = flat @ table.T  # classes outside the top k have weight 0, hence gradient 0 below
    to_logits = full * (to_weights - (full * to_weights).sum(1, keepdim=True))
    if logit_scale is not None:
        z = logits.to(weights.dtype)
        norm = z.norm(dim=1, keepdim=True).clamp_min(1e-12)
        unit = z / norm
        to_logits = (to_logits - unit * (unit * to_logits).sum(1, keepdim=True)) * (logit_scale / norm)
    return to_logits.to(logits.dtype), to_table
