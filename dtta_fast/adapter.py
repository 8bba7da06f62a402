"""The public calls: adapt() for one batch, Adapter for a session."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dtta_fast import presets
from dtta_fast.config import AdaptConfig
from dtta_fast.denoisers.base import Denoiser
from dtta_fast.parameters import Parameters, call, select, untouched
from dtta_fast.step import Problem, State, adaptation_step, forward, guard, initial_state
from dtta_fast.tasks.base import Task
from dtta_fast.tasks.classification import Classification


@dataclass(frozen=True)
class AdaptResult:
    """What an adaptation gave, image by image.

    Attributes:
        outputs, outputs_before: the model's outputs [B, ...] after and before (logits, for a classifier); where the guard refused
            the change, after is before.
        predictions, predictions_before: the task's answers, [B] class indices for a classifier.
        loss: [B, steps], the denoising loss before each update.
        accepted: [B] bool, whether the adapted answer stands. steps_run: updates made.
        evaluations: [B], an image's forwards of the denoiser for one (timestep, noise, condition), the guard's included.
        seconds: wall time of the batch by phase: encode, adapt, guard.
    """

    outputs: Tensor
    outputs_before: Tensor
    predictions: Tensor
    predictions_before: Tensor
    loss: Tensor
    accepted: Tensor
    steps_run: int
    evaluations: Tensor
    seconds: dict[str, float]


class Adapter:
    """A session: a model and a denoiser, adapted to many batches under one config.

    Adapted weights live beside the caller's modules, which are bit for bit what they were after every call, also one that ends in an
    exception or Ctrl-C. In episodic mode every image starts from the model's weights as they are at the call, and a batch of B
    images is B independent adaptations (B copies of the weights that move). In online mode one set of weights and its optimizer go
    on from call to call, until reset(); where the guard refuses an answer there, the weights have moved all the same, and a batch
    after which they are not finite leaves no trace. During a call the modules are in use: one thread at a time.

    Args:
        model: the model to adapt, e.g. a timm classifier. denoiser: the diffusion model, e.g. a DiT.
        config: a preset, or an AdaptConfig. task: None means Classification().

    Raises:
        TypeError, ValueError: an argument of the wrong kind, or a config that does not fit model or denoiser.
    """

    def __init__(self, model: nn.Module, denoiser: Denoiser, config: AdaptConfig = presets.FAST, task: Task | None = None) -> None:
        if not isinstance(model, nn.Module) or isinstance(model, nn.DataParallel):
            raise TypeError(f"model is a {type(model).__name__}; give a torch.nn.Module (of a DataParallel, its .module)")
        model = getattr(model, "_orig_mod", model)  # of a compiled module, the module itself
        if not isinstance(denoiser, Denoiser):
            raise TypeError(f"denoiser is a {type(denoiser).__name__}; give a Denoiser, such as DiT.from_pretrained(folder)")
        if not isinstance(config, AdaptConfig):
            raise TypeError(f"config is a {type(config).__name__}; give an AdaptConfig, such as presets.FAST")
        rows = len(denoiser.process)
        if config.timestep_range is not None and config.timestep_range[1] > rows:
            raise ValueError(f"timestep_range is {config.timestep_range}, and the denoiser's process has timesteps 0 .. {rows - 1}")
        if task is not None and not hasattr(task, "condition"):
            raise TypeError(f"task is a {type(task).__name__}; give a Task, such as Classification()")
        select(model, config.parameters)
        self.problem = Problem(model, denoiser, task or Classification(), config)
        self._state: State | None = None

    def adapt(
        self,
        images: Tensor,
        *,
        image_ids: Tensor | None = None,
        latents: Tensor | None = None,
        timesteps: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> AdaptResult:
        """Adapts to a batch and predicts.

        Args:
            images: [B, 3, H, W], uint8, or floating point in [0, 1], not normalised.
            image_ids: [B] int64, 0 .. 2^32 - 1, names each image's draws; 0 .. B - 1 by default. An image's result depends on
                (seed, image_id, config) alone in episodic mode.
            latents: [B, C, h, w], x0 where it is encoded already. timesteps [B, steps, P] and noise [B, steps, P, C, h, w]
                replace the drawn ones.

        Raises:
            ValueError: bad input; nothing has changed. RuntimeError: called under torch.inference_mode().
        """
        config, denoiser = self.problem.config, self.problem.denoiser
        if torch.is_inference_mode_enabled():
            raise RuntimeError("adapt() was called under torch.inference_mode(), which forbids gradients; use torch.no_grad(), or neither")
        model = self.problem.model
        anchor = _anchor(model)
        images = _checked_images(images, anchor.device)
        if _anchor(denoiser).device != anchor.device:
            raise ValueError(f"denoiser is on {_anchor(denoiser).device} and model on {anchor.device}; move one of them")
        image_ids = _checked_ids(image_ids, images)
        seconds: dict[str, float] = {}
        with untouched(model, denoiser), torch.enable_grad(), torch.autocast(anchor.device.type, enabled=False):
            with _timed(seconds, "encode"):
                crop = self.problem.task.crop(model, images)
                x0 = denoiser.encode(crop) if latents is None else _checked_latents(latents, images, denoiser)
                inputs = self.problem.task.normalise(model, crop).to(anchor.dtype)
            _check_draws(timesteps, noise, x0, config, len(denoiser.process))
            with _timed(seconds, "adapt"):
                state, before = self._start(inputs)
                losses = []
                for i in range(config.steps):
                    explicit = [None if draw is None else draw[:, i] for draw in (timesteps, noise)]
                    state, loss = adaptation_step(self.problem, state, inputs, x0, image_ids, *explicit)
                    losses.append(loss)
                with torch.no_grad():
                    after = forward(self.problem, state.theta, inputs)
            with _timed(seconds, "guard"):
                accepted, guard_evaluations = guard(self.problem, before, after, x0, image_ids, state.step)
        if config.mode == "online" and all(bool(p.isfinite().all()) for p in (*state.theta.values(), *state.phi.values())):
            self._state = state
        outputs = torch.where(accepted.view(-1, *(1,) * (after.ndim - 1)), after, before)
        pairs = config.pairs if timesteps is None else timesteps.shape[2]
        return AdaptResult(
            outputs=outputs,
            outputs_before=before,
            predictions=self.problem.task.predict(outputs),
            predictions_before=self.problem.task.predict(before),
            loss=torch.stack(losses, dim=1),
            accepted=accepted,
            steps_run=config.steps,
            evaluations=guard_evaluations + config.steps * pairs,
            seconds=seconds,
        )

    def forward(self, images: Tensor) -> Tensor:
        """Adapts and returns the outputs [B, ...]: for code that calls a model."""
        return self.adapt(images).outputs

    __call__ = forward

    def reset(self) -> None:
        """Back to the model's own weights and an empty optimizer."""
        self._state = None

    def state_dict(self) -> dict[str, Any]:
        """The online state: adapted weights by name, optimizer memory and step; empty before the first batch."""
        return {} if self._state is None else self._state._asdict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what state_dict() gave under the same config and models.

        Raises:
            ValueError: the adapter is episodic, or the state holds other weights or another optimizer's memory.
        """
        if not state:
            self._state = None
            return
        if self.problem.config.mode != "online":
            raise ValueError("state belongs to an online adapter, and this one is episodic")
        if set(state) != set(State._fields):
            raise ValueError(f"state has {', '.join(state)}; state_dict() gives {', '.join(State._fields)}")
        new = State(**state)
        expected = initial_state(self.problem, *self._source(), torch.empty(0, device=_anchor(self.problem.model).device))
        for field in ("theta", "phi"):
            shapes = [{name: p.shape for name, p in getattr(s, field).items()} for s in (new, expected)]
            if shapes[0] != shapes[1] or len(getattr(new, f"{field}_slots")) != len(getattr(expected, f"{field}_slots")):
                raise ValueError(f"state's {field} holds other weights, or another optimizer's memory, than this adapter's")
        self._state = new

    def _source(self) -> tuple[Parameters, Parameters]:
        """The source weights that are to move: the model's and the denoiser's."""
        problem = self.problem
        own = dict(problem.denoiser.named_parameters())
        names = problem.denoiser.adaptable() if problem.config.denoiser_parameters == "all" else []
        return select(problem.model, problem.config.parameters), {name: own[name] for name in names}

    def _start(self, inputs: Tensor) -> tuple[State, Tensor]:
        """A state of this call's own to adapt, and the outputs before."""
        problem = self.problem
        with torch.no_grad():
            if self._state is not None:
                state = copy.deepcopy(self._state)  # steps write in place, and a call that fails must leave no trace
                return state, forward(problem, state.theta, inputs)
            theta, phi = self._source()
            outputs = call(problem.model, {}, inputs, per_image=False)
            problem.task.check(outputs, problem.denoiser, problem.config)
            state = initial_state(problem, theta, phi, outputs)
            return state, forward(problem, state.theta, inputs)


def adapt(
    model: nn.Module,
    denoiser: Denoiser,
    images: Tensor,
    *,
    config: AdaptConfig = presets.FAST,
    task: Task | None = None,
    image_ids: Tensor | None = None,
    latents: Tensor | None = None,
    timesteps: Tensor | None = None,
    noise: Tensor | None = None,
) -> AdaptResult:
    """Adapts `model` to `images` by the denoiser's loss, and predicts: Adapter(model, denoiser, config, task).adapt(images, ...).

    model and denoiser are bit for bit what they were, whatever happens.
    """
    return Adapter(model, denoiser, config, task).adapt(images, image_ids=image_ids, latents=latents, timesteps=timesteps, noise=noise)


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - start


def _anchor(model: nn.Module) -> Tensor:
    """A tensor with the model's device and dtype."""
    return next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))


def _checked_tensor(name: str, value: Any, device: torch.device) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; give a tensor")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device} and the model on {device}; move one of them")
    value = value.detach()
    return value.clone() if value.is_inference() else value  # autograd refuses to save a tensor made under inference_mode


def _checked_images(images: Tensor, device: torch.device) -> Tensor:
    images = _checked_tensor("images", images, device)
    if images.ndim != 4 or 0 in images.shape or images.shape[1] != 3:
        raise ValueError(f"images has shape {tuple(images.shape)}; give [B, 3, H, W] with at least one image")
    if images.dtype == torch.uint8:
        return images.float() / 255
    if not images.is_floating_point():
        raise ValueError(f"images has dtype {images.dtype}; give uint8, or floating point in [0, 1]")
    if not images.isfinite().all():
        raise ValueError("images holds NaN or infinity")
    low, high = float(images.min()), float(images.max())
    if low < -1e-3 or high > 1 + 1e-3:
        raise ValueError(f"images lies in [{low:.3g}, {high:.3g}]; give [0, 1], not normalised: that is done as the model's config says")
    return images


def _checked_ids(image_ids: Tensor | None, images: Tensor) -> Tensor:
    if image_ids is None:
        return torch.arange(len(images), device=images.device)
    image_ids = _checked_tensor("image_ids", image_ids, images.device)
    if image_ids.shape != images.shape[:1] or image_ids.dtype != torch.int64:
        raise ValueError(f"image_ids is {image_ids.dtype} {tuple(image_ids.shape)}; give int64 [{len(images)}]")
    if int(image_ids.min()) < 0 or int(image_ids.max()) >= 2**32:
        raise ValueError(f"image_ids lies in {int(image_ids.min())} .. {int(image_ids.max())}; give 0 .. 2^32 - 1")
    return image_ids


def _checked_latents(latents: Tensor, images: Tensor, denoiser: Denoiser) -> Tensor:
    latents = _checked_tensor("latents", latents, images.device)
    expected = (len(images), *denoiser.latent_shape)
    if tuple(latents.shape) != expected:
        raise ValueError(f"latents has shape {tuple(latents.shape)}; give [B, C, h, w] = {list(expected)}")
    if not latents.is_floating_point() or not latents.isfinite().all():
        raise ValueError(f"latents ({latents.dtype}) has to be floating point without NaN or infinity")
    return latents.to(_anchor(denoiser).dtype)


def _check_draws(timesteps: Tensor | None, noise: Tensor | None, x0: Tensor, config: AdaptConfig, rows: int) -> None:
    pairs = config.pairs
    if timesteps is not None:
        timesteps = _checked_tensor("timesteps", timesteps, x0.device)
        fits = timesteps.ndim == 3 and timesteps.shape[:2] == (len(x0), config.steps) and timesteps.shape[2] > 0
        if not fits or timesteps.dtype != torch.int64:
            found = f"{timesteps.dtype} {tuple(timesteps.shape)}"
            raise ValueError(f"timesteps is {found}; give int64 [B, steps, P] with B = {len(x0)} and steps = {config.steps}")
        low, high = int(timesteps.min()), int(timesteps.max())
        if low < 0 or high >= rows:
            raise ValueError(f"timesteps lies in {low} .. {high}; the denoiser's process has 0 .. {rows - 1}")
        pairs = timesteps.shape[2]
    if noise is not None:
        noise = _checked_tensor("noise", noise, x0.device)
        expected = (len(x0), config.steps, pairs, *x0.shape[1:])
        if tuple(noise.shape) != expected or not noise.is_floating_point():
            raise ValueError(f"noise is {noise.dtype} {tuple(noise.shape)}; give floating point [B, steps, P, C, h, w] = {list(expected)}")
        if not noise.isfinite().all():
            raise ValueError("noise holds NaN or infinity")
