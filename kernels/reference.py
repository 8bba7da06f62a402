"""Every op in plain torch: its definition, the reference for its tests and the fallback that runs everywhere.

Arithmetic is float32, or float64 if the inputs are float64; in that case the noise is computed in float64 too. kernels/native.py and
kernels/triton provide the same functions for contiguous float32, bfloat16 and float16 tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dtta_fast.kernels.pairs import Pairs
from dtta_fast.kernels.philox import normal, timestep_words


def _noise(pairs: Pairs, dtype: torch.dtype) -> Tensor:
    """Returns the noise [B, P, C, H, W] of the pairs, as given or drawn."""
    x0, _, timesteps, image_ids, seed, step, pair0, noise = pairs
    if noise is not None:
        return noise.to(dtype)
    numbers = torch.arange(pair0, pair0 + timesteps.shape[1], dtype=torch.int64, device=x0.device)
    return normal(x0[0].numel(), numbers, image_ids, seed, step, dtype).view(*timesteps.shape, *x0.shape[1:])


def _coefficients(table: Tensor, timesteps: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return table[timesteps].to(dtype)[..., None, None, None].unbind(2)  # five tensors [B, P, 1, 1, 1]


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def draw_timesteps(
    image_ids: Tensor, step: Tensor, cumulative: Tensor | None, seed: int, pairs: int, low: int, high: int, stratified: bool
) -> Tensor:
    """Draws timesteps [B, P], int64, low <= t < high, for image_ids [B] and a 0-dim step: in integers, so that all backends agree.

    With a cumulative density [T + 1] (see core.draws.cumulative_density), pair i is drawn from the i-th of P equal parts of it.
    Otherwise pair i is drawn from the i-th of P equal parts of the range if `stratified`, and from the whole range if not.
    """
    words = timestep_words(pairs, image_ids, seed, step)
    pair = torch.arange(pairs, dtype=torch.int64, device=words.device)
    if cumulative is not None:
        position = ((pair << 32) + words) // pairs
        return torch.searchsorted(cumulative[1:], position, right=True)
    span = high - low
    if not stratified:
        return low + ((words * span) >> 32)
    # floor(span · (pair + word / 2³²) / P)
    return low + (pair * span + ((words * span) >> 32)) // pairs


def add_noise(pairs: Pairs, dtype: torch.dtype) -> Tensor:
    """Computes x_t = a·x0 + s·ε: [B, C, H, W] -> [B·P, C, H, W] in `dtype`."""
    compute = _compute_dtype(pairs.x0)
    a, s, *_ = _coefficients(pairs.table, pairs.timesteps, compute)
    return (a * pairs.x0.to(compute)[:, None] + s * _noise(pairs, compute)).flatten(0, 1).to(dtype)


def denoising_loss(prediction: Tensor, pairs: Pairs, l1: bool, upstream: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Computes loss [B, P] = w · mean(|prediction − (u·x0 + v·ε)|^(1 or 2)) and, given upstream [B, P], the gradient of Σ upstream · loss.

    The gradient has the shape and dtype of the prediction; it is zero for the learned-variance half.
    """
    x0, timesteps = pairs.x0, pairs.timesteps
    compute = _compute_dtype(x0)
    _, _, u, v, w = _coefficients(pairs.table, timesteps, compute)
    target = u * x0.to(compute)[:, None] + v * _noise(pairs, compute)
    difference = prediction.view(*timesteps.shape, *prediction.shape[1:])[:, :, : x0.shape[1]].to(compute) - target
    loss = w[..., 0, 0, 0] * (difference.abs() if l1 else difference.square()).flatten(2).mean(2)
    if upstream is None:
        return loss, None
    factor = upstream[..., None, None, None].to(compute) * w / x0[0].numel()
    gradient = torch.zeros_like(prediction)
    sign = torch.where(difference.isnan(), difference, difference.sign())  # torch.sign(NaN) is 0
    gradient[:, : x0.shape[1]] = ((sign if l1 else 2 * difference) * factor).flatten(0, 1)
    return loss, gradient


def mix_condition(
    logits: Tensor, embeddings: Tensor, chosen: Tensor | None, logit_scale: float | None, per_image: bool
) -> tuple[Tensor, Tensor]:
    """Computes c = Σ_k softmax(z)_k l_k, [B, ...], and the weights softmax(z), [B, K].

    logits [B, K], embeddings [K, ...] ([B, K, ...] with per_image). With logit_scale, z = logit_scale · logits / ‖logits‖₂ (the norm
    over all K); with chosen [B, k], only those classes are mixed and the weights of the others are 0.
    """
    compute = _compute_dtype(logits, embeddings)
    z = logits.to(compute)
    if logit_scale is not None:
        z = logit_scale * torch.nn.functional.normalize(z, dim=1)
    images = torch.arange(len(logits), dtype=torch.int64, device=logits.device)[:, None]
    if chosen is None:
        weights = z.softmax(dim=1)
        if not per_image:
            return torch.tensordot(weights, embeddings.to(compute), dims=1).to(embeddings.dtype), weights
        rows, used = embeddings.to(compute), weights
    else:
        used = z.gather(1, chosen).softmax(dim=1)
        weights = torch.zeros_like(z).scatter(1, chosen, used)
        rows = (embeddings[images, chosen] if per_image else embeddings[chosen]).to(compute)
    return torch.einsum("bk,bk...->b...", used, rows).to(embeddings.dtype), weights


def mix_condition_backward(
    upstream: Tensor,
    logits: Tensor,
    embeddings: Tensor,
    chosen: Tensor | None,
    weights: Tensor,
    logit_scale: float | None,
    per_image: bool,
    with_embeddings: bool,
) -> tuple[Tensor, Tensor | None]:
    """Computes the gradients of mix_condition w.r.t. logits and optionally embeddings, from `upstream` [B, ...] and the forward weights."""
    compute = weights.dtype
    flat, table = upstream.flatten(1).to(compute), embeddings.flatten(1 + per_image).to(compute)
    # classes outside the top k have weight 0 and therefore gradient 0 below
    to_weights = torch.einsum("bd,bkd->bk", flat, table) if per_image else flat @ table.T
    to_logits = weights * (to_weights - (weights * to_weights).sum(1, keepdim=True))
    if logit_scale is not None:
        z = logits.to(compute)
        norm = z.norm(dim=1, keepdim=True).clamp_min(1e-12)
        unit = z / norm
        to_logits = (to_logits - unit * (unit * to_logits).sum(1, keepdim=True)) * (logit_scale / norm)
    if not with_embeddings:
        return to_logits.to(logits.dtype), None
    to_table = weights[:, :, None] * flat[:, None] if per_image else weights.T @ flat
    return to_logits.to(logits.dtype), to_table.view_as(embeddings).to(embeddings.dtype)


def gated_norm(x: Tensor, branch: Tensor | None, modulation: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Computes total = x + gate · branch and LN(total) · (1 + scale) + shift, both [N, T, D], from the modulation (gate, shift, scale).

    Each operator rounds to the dtype of x. Without a branch, total is x, and the modulation has no gate.
    """
    *gate, shift, scale = modulation.unflatten(1, (-1, 1, x.shape[2])).unbind(1)
    if branch is not None:
        x = _plus_product(x, gate[0], branch)
    return x, _plus_product(shift, 1 + scale, torch.nn.functional.layer_norm(x, x.shape[2:], eps=eps))


def _plus_product(x: Tensor, factor: Tensor, other: Tensor) -> Tensor:
    """Computes x + factor · other: in one pass without gradients; the backward of addcmul would multiply both factors by 1 first."""
    return x + factor * other if torch.is_grad_enabled() else torch.addcmul(x, factor, other)
