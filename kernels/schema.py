"""The ops in the dtta_fast namespace: schemas, argument checks, fake kernels and autograd. backends.py selects the implementation.

The arguments that describe noise travel as one tuple, Pairs, and are flattened for torch's dispatcher only. A wrong shape, type, device or
(on the CPU) value raises a ValueError that names the argument. On a GPU, reading a value would require a synchronization, so a timestep
outside the table yields NaN instead.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from dtta_fast.kernels import backends, native, reference
from dtta_fast.kernels.pairs import Pairs

LARGEST = 65_535 * 1024  # elements per image: blocks along the second axis of a CUDA grid, 1024 elements each
WORDS = 2**32  # image_ids, steps and pairs are 32-bit counter words; the last pair is reserved for timesteps


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_pairs(pairs: Pairs) -> None:
    x0, table, timesteps, image_ids, seed, step, pair0, noise = pairs
    _check(x0.ndim == 4 and x0.numel() > 0, f"x0 has shape {tuple(x0.shape)}; give a non-empty [B, C, H, W]")
    _check(x0.layout == torch.strided, f"x0 is {x0.layout}; give a dense tensor")
    _check(x0.is_floating_point(), f"x0 has dtype {x0.dtype}; give a floating-point one")
    _check(x0[0].numel() <= LARGEST, f"x0 has shape {tuple(x0.shape)}; an image may have {LARGEST} elements at most")
    _check(table.ndim == 2 and table.shape[1] == 5, f"table has shape {tuple(table.shape)}; give NoiseProcess.table, [T, 5]")
    _check(len(table) > 0, "table has no rows; give NoiseProcess.table, a row a timestep")
    _check(table.dtype == torch.float32, f"table has dtype {table.dtype}; give NoiseProcess.table, float32")
    _check(
        timesteps.ndim == 2 and timesteps.shape[0] == x0.shape[0] and timesteps.shape[1] > 0,
        f"timesteps has shape {tuple(timesteps.shape)}; give [B, P] with B = {x0.shape[0]} and P of 1 or more",
    )
    _check(image_ids.shape == x0.shape[:1], f"image_ids has shape {tuple(image_ids.shape)}; give one an image: [{x0.shape[0]}]")
    for name, value in (("timesteps", timesteps), ("image_ids", image_ids), ("step", step)):
        _check(value.dtype == torch.int64, f"{name} has dtype {value.dtype}; give int64")
    _check(step.ndim == 0, f"step has shape {tuple(step.shape)}; give a 0-dim tensor")
    _check(0 <= seed < 2**63, f"seed is {seed}; give 0 .. 2^63 - 1")
    last = WORDS - 1 - timesteps.shape[1]
    _check(0 <= pair0 <= last, f"pair0 is {pair0}; give 0 .. {last} for {timesteps.shape[1]} pairs")
    expected = (*timesteps.shape, *x0.shape[1:])
    if noise is not None:
        _check(noise.is_floating_point(), f"noise has dtype {noise.dtype}; give a floating-point one")
        _check(tuple(noise.shape) == expected, f"noise has shape {tuple(noise.shape)}; give [B, P, C, H, W] = {list(expected)}")
    named = {"table": table, "timesteps": timesteps, "image_ids": image_ids, "step": step, "noise": noise}
    _check_devices(x0, named)


def _check_devices(first: Tensor, named: dict[str, Tensor | None]) -> None:
    for name, value in named.items():
        _check(value is None or value.device == first.device, f"{name} is on another device than the first argument, {first.device}")
        _check(value is None or value.layout == torch.strided, f"{name} is not a dense tensor; give one of torch.strided layout")


def _check_values(backend: ModuleType, pairs: Pairs) -> None:
    _, table, timesteps, image_ids, _, step, _, _ = pairs
    if timesteps.device.type != "cpu" or backend is native:  # the native kernels check the values themselves, in a tenth of the time
        return
    for name, value, end in (("timesteps", timesteps, len(table)), ("image_ids", image_ids, WORDS), ("step", step, WORDS)):
        low, high = (int(bound) for bound in value.aminmax())
        _check(low >= 0 and high < end, f"{name} has values {low} .. {high}; give 0 .. {end - 1}")


def _check_prediction(prediction: Tensor, pairs: Pairs) -> None:
    x0, timesteps, channels = pairs.x0, pairs.timesteps, pairs.x0.shape[1]
    _check(
        prediction.ndim == 4
        and prediction.shape[0] == timesteps.numel()
        and prediction.shape[1] in (channels, 2 * channels)
        and prediction.shape[2:] == x0.shape[2:],
        f"prediction has shape {tuple(prediction.shape)}; give [{timesteps.numel()}, {channels} or {2 * channels}, *{list(x0.shape[2:])}]",
    )
    _check(prediction.is_floating_point(), f"prediction has dtype {prediction.dtype}; give a floating-point one")
    _check_devices(x0, {"prediction": prediction})


def _check_mixture(logits: Tensor, embeddings: Tensor, top_k: int | None, logit_scale: float | None, per_image: bool) -> None:
    _check(logits.ndim == 2 and logits.numel() > 0, f"logits has shape {tuple(logits.shape)}; give a non-empty [B, K]")
    _check(logits.layout == torch.strided, f"logits is {logits.layout}; give a dense tensor")
    images, classes = logits.shape
    leading = (images, classes) if per_image else (classes,)
    fits = embeddings.ndim > len(leading) and tuple(embeddings.shape[: len(leading)]) == leading and embeddings.numel() > 0
    _check(fits, f"embeddings has shape {tuple(embeddings.shape)}; give [{', '.join(map(str, leading))}, ...]")
    for name, value in (("logits", logits), ("embeddings", embeddings)):
        _check(value.is_floating_point(), f"{name} has dtype {value.dtype}; give a floating-point one")
    _check(top_k is None or 1 <= top_k <= classes, f"top_k is {top_k}; give 1 .. {classes}")
    _check(logit_scale is None or 0 < logit_scale < float("inf"), f"logit_scale is {logit_scale}; give a positive, finite number")
    _check_devices(logits, {"embeddings": embeddings})


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else tensor.detach().contiguous() for tensor in tensors)


def _contiguous_pairs(pairs: Pairs) -> Pairs:
    x0, table, timesteps, image_ids = (tensor.detach().contiguous() for tensor in pairs[:4])
    noise = None if pairs.noise is None else pairs.noise.detach().contiguous()
    return pairs._replace(x0=x0, table=table, timesteps=timesteps, image_ids=image_ids, noise=noise)


def _check_kinds(pairs: Pairs, **tensors: object) -> None:
    """Raises an error that includes the value, for arguments that torch's dispatcher would reject without showing it."""
    if not isinstance(pairs, Pairs):
        raise TypeError(f"pairs is a {type(pairs).__name__}; give Pairs(x0, table, timesteps, image_ids, seed, step)")
    for name in ("x0", "table", "timesteps", "image_ids", "step"):
        tensors[name] = getattr(pairs, name)
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}; give a tensor")
    for name, number, end in (("seed", pairs.seed, 2**63), ("pair0", pairs.pair0, WORDS)):
        if isinstance(number, (float, str)) or (isinstance(number, int) and not 0 <= number < end):
            raise ValueError(f"{name} is {number!r}; give a whole number, 0 .. {end - 1}")


def _check_timestep_draw(image_ids: Tensor, step: Tensor, cumulative: Tensor | None, seed: int, pairs: int, low: int, high: int) -> None:
    _check(
        image_ids.ndim == 1 and image_ids.dtype == torch.int64, f"image_ids is {image_ids.dtype} {tuple(image_ids.shape)}; give int64 [B]"
    )
    _check(step.ndim == 0 and step.dtype == torch.int64, f"step is {step.dtype} {tuple(step.shape)}; give a 0-dim int64 tensor")
    fits = cumulative is None or (cumulative.ndim == 1 and len(cumulative) > 1 and cumulative.dtype == torch.int64)
    _check(fits, "cumulative is not an int64 [T + 1]; give cumulative_density()'s result")
    _check(0 <= seed < 2**63, f"seed is {seed}; give 0 .. 2^63 - 1")
    _check(pairs > 0, f"pairs is {pairs}; give 1 or more")
    _check(0 <= low < high < 2**31, f"low and high are {low} and {high}; give 0 <= low < high")
    _check_devices(image_ids, {"step": step, "cumulative": cumulative})


@torch.library.custom_op("dtta_fast::draw_timesteps", mutates_args=())
def _draw_timesteps(
    image_ids: Tensor, step: Tensor, cumulative: Tensor | None, seed: int, pairs: int, low: int, high: int, stratified: bool
) -> Tensor:
    _check_timestep_draw(image_ids, step, cumulative, seed, pairs, low, high)
    found: Tensor = backends.drawing(image_ids.device.type).draw_timesteps(image_ids, step, cumulative, seed, pairs, low, high, stratified)
    return found


@_draw_timesteps.register_fake
def _(image_ids, step, cumulative, seed, pairs, low, high, stratified):  # type: ignore[no-untyped-def]
    _check_timestep_draw(image_ids, step, cumulative, seed, pairs, low, high)
    return image_ids.new_empty((len(image_ids), pairs))


def draw_timesteps(
    image_ids: Tensor, step: Tensor, cumulative: Tensor | None, seed: int, pairs: int, low: int, high: int, stratified: bool
) -> Tensor:
    """Draws timesteps [B, P]; see reference.draw_timesteps. One kernel on a GPU, instead of about 130 operators.

    On the CPU it runs the plain operators, which cost little there, so that a package for C++ hosts holds them and no op.
    """
    run = reference.draw_timesteps if image_ids.device.type == "cpu" else _draw_timesteps
    found: Tensor = run(image_ids, step, cumulative, seed, pairs, low, high, stratified)
    return found


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
    pairs = Pairs(x0, table, timesteps, image_ids, seed, step, pair0, noise)
    _check_pairs(pairs)
    _check(dtype.is_floating_point, f"dtype is {dtype}; give a floating-point one")
    backend = backends.choose(dtype, x0, noise)
    _check_values(backend, pairs)
    found: Tensor = backend.add_noise(_contiguous_pairs(pairs), dtype)
    return found


@_add_noise.register_fake
def _(x0, table, timesteps, image_ids, seed, step, pair0, dtype, noise):  # type: ignore[no-untyped-def]
    _check_pairs(Pairs(x0, table, timesteps, image_ids, seed, step, pair0, noise))
    return x0.new_empty((timesteps.numel(), *x0.shape[1:]), dtype=dtype)


def add_noise(pairs: Pairs, dtype: torch.dtype | None = None) -> Tensor:
    """Computes x_t = a·x0 + s·ε for P pairs per image: x0 [B, C, H, W] -> [B·P, C, H, W] in `dtype` (by default that of x0).

    No gradient flows to x0, because the method treats the latent as a constant.

    Raises:
        TypeError, ValueError: see the module.
    """
    _check_kinds(pairs)
    *flat, noise = pairs._replace(x0=pairs.x0.detach())
    found: Tensor = _add_noise(*flat, dtype or pairs.x0.dtype, noise)
    return found


def _loss(prediction: Tensor, pairs: Pairs, l1: bool, upstream: Tensor | None) -> tuple[Tensor, Tensor | None]:
    _check_pairs(pairs)
    _check_prediction(prediction, pairs)
    backend = backends.choose(torch.float32, prediction, pairs.x0, pairs.noise)
    _check_values(backend, pairs)
    upstream = None if upstream is None else upstream.to(torch.promote_types(pairs.x0.dtype, torch.float32))
    prediction, upstream = _contiguous(prediction, upstream)  # type: ignore[assignment]
    found: tuple[Tensor, Tensor | None] = backend.denoising_loss(prediction, _contiguous_pairs(pairs), l1, upstream)
    return found


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
    noise: Tensor | None,
) -> Tensor:
    return _loss(prediction, Pairs(x0, table, timesteps, image_ids, seed, step, pair0, noise), l1, None)[0]


@_denoising_loss.register_fake
def _(prediction, x0, table, timesteps, image_ids, seed, step, pair0, l1, noise):  # type: ignore[no-untyped-def]
    pairs = Pairs(x0, table, timesteps, image_ids, seed, step, pair0, noise)
    _check_pairs(pairs)
    _check_prediction(prediction, pairs)
    return x0.new_empty(timesteps.shape, dtype=torch.promote_types(x0.dtype, torch.float32))


@torch.library.custom_op("dtta_fast::denoising_loss_and_gradient", mutates_args=())
def _denoising_loss_and_gradient(
    prediction: Tensor,
    x0: Tensor,
    table: Tensor,
    timesteps: Tensor,
    image_ids: Tensor,
    seed: int,
    step: Tensor,
    pair0: int,
    l1: bool,
    upstream: Tensor,
    noise: Tensor | None,
) -> tuple[Tensor, Tensor]:
    _check_upstream(upstream, timesteps)
    return _loss(prediction, Pairs(x0, table, timesteps, image_ids, seed, step, pair0, noise), l1, upstream)  # type: ignore[return-value]


def _check_upstream(upstream: Tensor, timesteps: Tensor) -> None:
    fits = upstream.shape == timesteps.shape and upstream.is_floating_point()
    _check(fits, f"upstream has shape {tuple(upstream.shape)} and dtype {upstream.dtype}; give floating-point {list(timesteps.shape)}")
    _check_devices(timesteps, {"upstream": upstream})


@_denoising_loss_and_gradient.register_fake
def _(prediction, x0, table, timesteps, image_ids, seed, step, pair0, l1, upstream, noise):  # type: ignore[no-untyped-def]
    pairs = Pairs(x0, table, timesteps, image_ids, seed, step, pair0, noise)
    _check_pairs(pairs)
    _check_prediction(prediction, pairs)
    _check_upstream(upstream, timesteps)
    loss = x0.new_empty(timesteps.shape, dtype=torch.promote_types(x0.dtype, torch.float32))
    return loss, prediction.new_empty(prediction.shape)


def _save_for_loss(ctx, inputs, output):  # type: ignore[no-untyped-def]
    tensors, ctx.others = [], []
    for value in inputs:
        tensors.append(value if isinstance(value, Tensor) else None)
        ctx.others.append(None if isinstance(value, Tensor) else value)
    ctx.save_for_backward(*tensors)


def _loss_backward(ctx, upstream):  # type: ignore[no-untyped-def]
    inputs = [other if tensor is None else tensor for tensor, other in zip(ctx.saved_tensors, ctx.others, strict=True)]
    # one extra pass that regenerates the noise, instead of storing a gradient alongside the prediction
    gradient = _denoising_loss_and_gradient(*inputs[:-1], upstream, inputs[-1])[1]
    return (gradient, *(None,) * 9)


_denoising_loss.register_autograd(_loss_backward, setup_context=_save_for_loss)


def denoising_loss(prediction: Tensor, pairs: Pairs, l1: bool = False) -> Tensor:
    """Computes loss [B, P] = w · mean((prediction − (u·x0 + v·ε))²), or with `l1` the mean absolute difference instead.

    prediction is [B·P, C', H, W] with C' = C or 2C (with learned variance, the second half is ignored). The loss has one value per pair
    because a guard compares pairs. Differentiable once, with respect to the prediction.

    Raises:
        TypeError, ValueError: see the module.
    """
    _check_kinds(pairs, prediction=prediction)
    *flat, noise = pairs._replace(x0=pairs.x0.detach())
    found: Tensor = _denoising_loss(prediction, *flat, l1, noise)
    return found


@torch.no_grad()
def denoising_loss_and_gradient(prediction: Tensor, upstream: Tensor, pairs: Pairs, l1: bool = False) -> tuple[Tensor, Tensor]:
    """Computes denoising_loss [B, P] and, in the same pass, the gradient of Σ upstream · loss w.r.t. the prediction, upstream [B, P].

    Raises:
        TypeError, ValueError: see the module.
    """
    _check_kinds(pairs, prediction=prediction)
    *flat, noise = pairs
    found: tuple[Tensor, Tensor] = _denoising_loss_and_gradient(prediction, *flat, l1, upstream, noise)
    return found


@torch.library.custom_op("dtta_fast::mix_condition", mutates_args=())
def _mix_condition(
    logits: Tensor, embeddings: Tensor, top_k: int | None, logit_scale: float | None, per_image: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _check_mixture(logits, embeddings, top_k, logit_scale, per_image)
    chosen = None if top_k is None else logits.detach().topk(top_k, dim=1).indices
    backend = backends.choose(torch.float32, logits, embeddings)
    logits, embeddings = _contiguous(logits, embeddings)  # type: ignore[assignment]
    mixed, weights = backend.mix_condition(logits, embeddings, chosen, logit_scale, per_image)
    return mixed, weights, logits.new_empty((len(logits), 0), dtype=torch.int64) if chosen is None else chosen


@_mix_condition.register_fake
def _(logits, embeddings, top_k, logit_scale, per_image):  # type: ignore[no-untyped-def]
    _check_mixture(logits, embeddings, top_k, logit_scale, per_image)
    weights = logits.new_empty(logits.shape, dtype=_weight_dtype(logits, embeddings))
    chosen = logits.new_empty((len(logits), top_k or 0), dtype=torch.int64)
    return embeddings.new_empty((len(logits), *embeddings.shape[1 + per_image :])), weights, chosen


def _weight_dtype(logits: Tensor, embeddings: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(logits.dtype, embeddings.dtype), torch.float32)


@torch.library.custom_op("dtta_fast::mix_condition_backward", mutates_args=())
def _mix_condition_backward(
    upstream: Tensor,
    logits: Tensor,
    embeddings: Tensor,
    weights: Tensor,
    chosen: Tensor,
    logit_scale: float | None,
    per_image: bool,
    with_embeddings: bool,
) -> tuple[Tensor, Tensor]:
    _check_mixture(logits, embeddings, None, logit_scale, per_image)
    expected = (len(logits), *embeddings.shape[1 + per_image :])
    _check(
        upstream.shape == expected and upstream.dtype == embeddings.dtype,
        f"upstream is {upstream.dtype} {tuple(upstream.shape)}; give {embeddings.dtype} {expected}, like the mixed embedding",
    )
    computed = _weight_dtype(logits, embeddings)
    _check(
        weights.shape == logits.shape and weights.dtype == computed,
        f"weights is {weights.dtype} {tuple(weights.shape)}; give the forward's, {computed} {tuple(logits.shape)}",
    )
    _check(
        chosen.ndim == 2 and chosen.shape[0] == len(logits) and chosen.dtype == torch.int64,
        f"chosen is {chosen.dtype} {tuple(chosen.shape)}; give the forward's, int64 [{len(logits)}, top_k]",
    )
    backend = backends.choose(torch.float32, logits, embeddings)
    upstream, logits, embeddings, weights, chosen = _contiguous(upstream, logits, embeddings, weights, chosen)  # type: ignore[assignment]
    classes = chosen if chosen.shape[1] else None
    to_logits, to_embeddings = backend.mix_condition_backward(
        upstream, logits, embeddings, classes, weights, logit_scale, per_image, with_embeddings
    )
    return to_logits, embeddings.new_empty(0) if to_embeddings is None else to_embeddings


@_mix_condition_backward.register_fake
def _(upstream, logits, embeddings, weights, chosen, logit_scale, per_image, with_embeddings):  # type: ignore[no-untyped-def]
    return logits.new_empty(logits.shape), embeddings.new_empty(embeddings.shape if with_embeddings else 0)


def _save_for_mixture(ctx, inputs, output):  # type: ignore[no-untyped-def]
    logits, embeddings, _, ctx.logit_scale, ctx.per_image = inputs
    _, weights, chosen = output
    ctx.save_for_backward(logits, embeddings, weights, chosen)
    ctx.mark_non_differentiable(weights, chosen)


def _mixture_backward(ctx, upstream, *_):  # type: ignore[no-untyped-def]
    wanted = ctx.needs_input_grad[1]
    to_logits, to_embeddings = _mix_condition_backward(upstream, *ctx.saved_tensors, ctx.logit_scale, ctx.per_image, wanted)
    return to_logits, to_embeddings if wanted else None, None, None, None


_mix_condition.register_autograd(_mixture_backward, setup_context=_save_for_mixture)


def mix_condition(
    logits: Tensor, embeddings: Tensor, top_k: int | None = None, logit_scale: float | None = None, per_image: bool = False
) -> Tensor:
    """Computes the condition c = Σ_k softmax(z)_k l_k: logits [B, K], embeddings [K, ...] -> [B, ...] in the embeddings' dtype.

    z is the logits, or logit_scale times the L2-normalised logits; with top_k, the softmax runs over the k largest. With per_image,
    the embeddings are [B, K, ...], one table per image. Differentiable once, with respect to the logits and the embeddings.
    """
    return _mix_condition(logits, embeddings, top_k, logit_scale, per_image)[0]
