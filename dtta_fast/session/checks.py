"""Checks of a call's arguments: each raises an error that names the argument, and changes nothing.

Shape and dtype checks raise immediately. On a GPU, value checks are deferred until Checks.settle(), which reads them all together.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dtta_fast.config import AdaptConfig
from dtta_fast.core.weights import anchor
from dtta_fast.denoisers.base import Denoiser
from dtta_fast.runtime.pictures import check_size
from dtta_fast.runtime.reads import Checks
from dtta_fast.runtime.warn import warn

# What ONLINE, which has no guard, gains over matched alone on validation images: +3.0 points on CIFAR-10 (trust 0.50), +0.4 on
# Fashion-MNIST-C (0.42), +0.3 on digits-C (3); with the denoisers' weights shuffled (0), -0.5 and -0.3 on the last two
UNGUARDED_TRUST = 0.2
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Request(NamedTuple):
    """The arguments of a call, as in Adapter.adapt; after checked(), with floating-point images [B, 3, H, W] and all ids.

    deadline: in milliseconds from the call as it is given; after checked(), seconds on the clock of time.perf_counter().
    """

    images: Tensor
    image_ids: Any
    latents: Tensor | None = None
    timesteps: Tensor | None = None
    noise: Tensor | None = None
    deadline: float | None = None
    cropped: bool = False
    progress: bool = False


def check_arguments(model: Any, denoiser: Any, config: Any, task: Any) -> None:
    """Raises TypeError if a session's arguments have the wrong type."""
    if not isinstance(model, nn.Module) or isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise TypeError(
            f"model is a {type(model).__name__}; give a torch.nn.Module (of a DataParallel or DistributedDataParallel, its .module)"
        )
    inner = [type(part).__name__ for part in model.modules() if isinstance(part, (nn.DataParallel, nn.parallel.DistributedDataParallel))]
    if inner:
        raise TypeError(f"model, a {type(model).__name__}, holds a {inner[0]}, which runs replicas; put its .module in its place")
    if any(isinstance(part, torch.jit.ScriptModule) for part in model.modules()):
        raise TypeError(
            f"model, a {type(model).__name__}, holds a ScriptModule, whose weights cannot be exchanged; give what it was made of"
        )
    if not isinstance(denoiser, Denoiser):
        raise TypeError(f"denoiser is a {type(denoiser).__name__}; give a Denoiser, such as DiT.from_pretrained(folder)")
    if not isinstance(config, AdaptConfig):
        raise TypeError(f"config is a {type(config).__name__}; give an AdaptConfig, such as presets.FAST")
    if task is not None and (isinstance(task, type) or not hasattr(task, "bind")):
        raise TypeError(f"task is {task!r}; give a Task, such as Classification()")


def check_surroundings() -> None:
    """Raises RuntimeError inside a torch context in which an adaptation would fail or give different numbers."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError("adapt() was called under torch.inference_mode(), which forbids gradients; use torch.no_grad(), or neither")
    if torch.nn.utils.parametrize._cache_enabled:
        raise RuntimeError("adapt() was called under torch.nn.utils.parametrize.cached(), which keeps weights that move; leave it first")


def check_normalisation(model: nn.Module) -> None:
    """Raises ValueError if a layer normalises by batch statistics: an image's answer would depend on the other images in the batch."""
    for name, part in model.named_modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is None and part.running_var is None:
            raise ValueError(
                f"model's {name or type(part).__name__} normalises by the statistics of the batch (track_running_stats=False), so an "
                "answer would depend on the other images in the batch; give it running statistics, or use GroupNorm or LayerNorm"
            )


def check_timestep_range(denoiser: Denoiser, config: AdaptConfig) -> None:
    """Raises ValueError if the denoiser's noise process has fewer timesteps than the config names."""
    rows = len(denoiser.process)
    if config.timestep_range is not None and config.timestep_range[1] > rows:
        raise ValueError(f"timestep_range is {config.timestep_range}, and the denoiser's process has timesteps 0 .. {rows - 1}")


def fitted_to_denoiser(denoiser: Denoiser, config: AdaptConfig) -> AdaptConfig:
    """Returns the settings that take the place of those that need a calibration which the denoiser lacks.

    Without one, nothing is matched and no image is skipped. Without a calibration of its timesteps, they are stratified over the
    informative range of the noise process, also if the calibration found none at which the loss told classes apart.
    """
    changes: dict[str, Any] = {}
    if denoiser.calibration is None:
        changes |= {"match": "off"} if config.match != "off" else {}
        changes |= {"precheck": "off"} if config.precheck != "off" else {}
    if config.timesteps == "calibrated" and (denoiser.calibration is None or max(denoiser.calibration.signal, default=0.0) <= 0):
        changes["timesteps"] = "stratified"
        if config.timestep_range is None:
            changes["timestep_range"] = denoiser.process.informative_range()
    return config.replace(**changes)


def fitted_to_classes(classes: int, config: AdaptConfig) -> AdaptConfig:
    """Limits top_k and drawn_classes to the number of classes; a task without classes, which has 1, refuses them later."""
    if config.top_k is None or config.top_k + config.drawn_classes <= classes or classes < 2:
        return config
    top_k = min(config.top_k, classes)
    return config.replace(top_k=top_k, drawn_classes=min(config.drawn_classes, classes - top_k))


def warn_of_unguarded(denoiser: Denoiser, config: AdaptConfig) -> None:
    """Warns if a stream's updates, without a guard, follow a loss that separates the classes poorly according to the calibration."""
    found = denoiser.calibration
    if found is not None and found.trust < UNGUARDED_TRUST and config.mode == "online" and not config.guard:
        warn(
            f"denoiser.calibration has trust {found.trust:.2f}: its loss separates the classes poorly, and with guard 0 nothing rejects "
            "bad updates of a stream; measure on labelled images first, or use a preset with a guard, such as FAST"
        )


def check_calibration(denoiser: Denoiser, config: AdaptConfig) -> None:
    """Raises ValueError if the config needs a calibration that the denoiser lacks, for results that are kept under the config's name."""
    instead = fitted_to_denoiser(denoiser, config)
    if instead != config:
        raise ValueError(
            f"the denoiser has no calibration for {settings_that_differ(config, instead)}: measure one by `dtta calibrate` or calibrate(), "
            f"or set {settings_that_differ(instead, config)}"
        )


def settings_that_differ(config: AdaptConfig, other: AdaptConfig) -> str:
    """Returns the settings of `config` that differ from those of `other`, such as "match='off', pairs=4"."""
    names = (field.name for field in dataclasses.fields(config))
    return ", ".join(f"{name}={getattr(config, name)!r}" for name in names if getattr(config, name) != getattr(other, name))


def checked_tensor(name: str, value: Any, device: torch.device) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; give a tensor")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device} and the model on {device}; move one of them")
    if value.layout != torch.strided or value.is_nested or (value.is_floating_point() and value.dtype not in FLOATS):
        raise ValueError(f"{name} is {value.layout} {value.dtype}; give a dense tensor of float16, bfloat16, float32, float64, or integers")
    value = value.detach()
    return value.clone() if value.is_inference() else value  # autograd refuses to save a tensor made under inference_mode


def checked_images(images: Tensor, device: torch.device, checks: Checks) -> Tensor:
    images = checked_tensor("images", images, device)
    if images.ndim != 4 or 0 in images.shape or images.shape[1] != 3:
        raise ValueError(f"images has shape {tuple(images.shape)}; give [B, 3, H, W] with at least one image")
    check_size(images.shape[-1], images.shape[-2], "an image ")
    if images.dtype == torch.uint8:
        return images.float() / 255
    if not images.is_floating_point():
        raise ValueError(f"images has dtype {images.dtype}; give uint8, or floating point in [0, 1]")
    low, high = images.aminmax()  # NaN if any value is NaN

    def wrong() -> str:
        if not images.isfinite().all():
            return "images holds NaN or infinity"
        return f"images has values from {low:.3g} to {high:.3g}; give [0, 1], not normalised: the task normalises as the model needs it"

    checks.require((low >= -1e-3) & (high <= 1 + 1e-3), wrong)
    return images


def checked_ids(image_ids: Tensor | None, images: Tensor, checks: Checks) -> Tensor:
    if image_ids is None:
        return torch.arange(len(images), dtype=torch.int64, device=images.device)
    image_ids = checked_tensor("image_ids", image_ids, images.device)
    if image_ids.shape != images.shape[:1] or image_ids.dtype != torch.int64:
        raise ValueError(f"image_ids is {image_ids.dtype} {tuple(image_ids.shape)}; give int64 [{len(images)}]")
    low, high = image_ids.aminmax()
    checks.require((low >= 0) & (high < 2**32), lambda: f"image_ids lies in {int(low)} .. {int(high)}; give 0 .. 2^32 - 1")
    return image_ids


def checked(request: Request, start: float, model: nn.Module, denoiser: nn.Module, config: AdaptConfig, checks: Checks) -> Request:
    """Checks all of a call's arguments that need no denoiser. start: time of the call on the clock of time.perf_counter().

    Raises:
        TypeError, ValueError: an argument is invalid. RuntimeError: see check_surroundings().
    """
    check_surroundings()
    device, other = anchor(model).device, anchor(denoiser).device
    for name, found in (("model", device), ("denoiser", other)):
        if found.type == "meta":
            raise ValueError(f"{name} is on the meta device: its weights are offloaded or were never loaded; load it without device_map")
    images = checked_images(request.images, device, checks)
    if other != device:
        raise ValueError(f"denoiser is on {other} and model on {device}; move one of them")
    image_ids = checked_ids(request.image_ids, images, checks)
    deadline = None if request.deadline is None else start + checked_deadline(request.deadline) / 1000
    if deadline is not None and config.method != "adapt":
        raise ValueError(
            f"deadline_ms is {request.deadline!r} with method {config.method!r}, which makes no steps to stop after: leave it out"
        )
    for name in ("timesteps", "noise"):
        if getattr(request, name) is not None and config.method != "adapt":
            raise ValueError(f"{name} is given with method {config.method!r}, which draws pairs of its own: leave it out")
    return request._replace(images=images, image_ids=image_ids, deadline=deadline)


def checked_pairs(request: Request, denoiser: Denoiser, config: AdaptConfig, checks: Checks) -> Request:
    """Checks a request's latents, timesteps and noise against the denoiser, and returns the latents in the dtype of its losses.

    Raises:
        TypeError, ValueError: one of them is invalid.
    """
    images, latents, timesteps, noise = request.images, request.latents, request.timesteps, request.noise
    if latents is not None:
        latents = checked_latents(latents, images, denoiser, checks)
    if timesteps is not None:
        check_timesteps(timesteps, images, len(denoiser.process), config, checks)
        if config.antithetic and noise is None and timesteps.shape[2] % 2:
            raise ValueError(f"timesteps has {timesteps.shape[2]} pairs with antithetic; opposite noises take an even number of pairs")
    if noise is not None:
        noise = checked_tensor("noise", noise, images.device)
        expected = (len(images), config.steps, config.pairs if timesteps is None else timesteps.shape[2], *denoiser.latent_shape)
        if tuple(noise.shape) != expected or not noise.is_floating_point():
            raise ValueError(f"noise is {noise.dtype} {tuple(noise.shape)}; give floating point [B, steps, P, C, h, w] = {list(expected)}")
        checks.require(noise.isfinite().all(), lambda: "noise holds NaN or infinity")
    return request._replace(latents=latents)


def checked_latents(latents: Tensor, images: Tensor, denoiser: Denoiser, checks: Checks) -> Tensor:
    latents = checked_tensor("latents", latents, images.device)
    expected = (len(images), *denoiser.latent_shape)
    if tuple(latents.shape) != expected:
        raise ValueError(f"latents has shape {tuple(latents.shape)}; give [B, C, h, w] = {list(expected)}")
    wrong = f"latents ({latents.dtype}) has to be floating point without NaN or infinity"
    if not latents.is_floating_point():
        raise ValueError(wrong)
    checks.require(latents.isfinite().all(), lambda: wrong)
    return latents.to(torch.promote_types(denoiser.dtype, torch.float32))


def check_timesteps(timesteps: Tensor, images: Tensor, rows: int, config: AdaptConfig, checks: Checks) -> None:
    timesteps = checked_tensor("timesteps", timesteps, images.device)
    count = len(images)
    fits = timesteps.ndim == 3 and timesteps.shape[:2] == (count, config.steps) and timesteps.shape[2] > 0
    if not fits or timesteps.dtype != torch.int64:
        found = f"{timesteps.dtype} {tuple(timesteps.shape)}"
        raise ValueError(f"timesteps is {found}; give int64 [B, steps, P] with B = {count} and steps = {config.steps}")
    low, high = timesteps.aminmax()
    checks.require(
        (low >= 0) & (high < rows), lambda: f"timesteps lies in {int(low)} .. {int(high)}; the denoiser's process has 0 .. {rows - 1}"
    )


def checked_deadline(deadline_ms: float) -> float:
    if isinstance(deadline_ms, bool) or not isinstance(deadline_ms, (int, float)) or not 0 < deadline_ms < 1e300:
        raise ValueError(f"deadline_ms is {deadline_ms!r}; give a positive number of milliseconds, counted from the call")
    return float(deadline_ms)
