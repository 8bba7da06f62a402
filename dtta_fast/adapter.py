"""The public API: adapt() for a single batch, Adapter for a session."""

from __future__ import annotations

import copy
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dtta_fast import lora, presets
from dtta_fast.batch import Batch, Request
from dtta_fast.config import AdaptConfig
from dtta_fast.denoisers.base import Denoiser
from dtta_fast.engine import Engine, anchor
from dtta_fast.inputs import (
    Checks,
    check_arguments,
    check_denoiser,
    check_draws,
    check_normalisation,
    check_surroundings,
    checked_deadline,
    checked_ids,
    checked_images,
    checked_latents,
)
from dtta_fast.online import copied, loaded, save_adapters
from dtta_fast.parameters import select
from dtta_fast.result import AdaptResult, Group, assembled
from dtta_fast.runtime.attention import math_attention
from dtta_fast.runtime.clock import Clock, Paces
from dtta_fast.runtime.float32 import float32_products
from dtta_fast.runtime.reads import read
from dtta_fast.runtime.torch_state import TorchState
from dtta_fast.runtime.turns import Turns
from dtta_fast.step import State, usable, where
from dtta_fast.tasks.base import Task
from dtta_fast.tasks.classification import Classification

ATTEMPTS = 20  # running out of memory halves the chunk, a failed compilation falls back to eager mode; neither retries forever


class Adapter:
    """A session that adapts a model and a denoiser to many batches under one config.

    The caller's modules are never written to. The engine works on private copies that share memory with them. The copies are made when
    the session is created, and again when weights have been replaced. Each call uses the current weights; a module's structure and hooks
    are those it had when it was copied.

    In episodic mode every image starts from the model's weights, so a batch of B images is B independent adaptations with B copies of
    the adapted weights. In online mode one set of weights and its optimizer state carry over from call to call until reset(). There, the
    weights keep their update even if the guard rejects an answer, but a batch that leaves them non-finite is discarded without a trace.
    Threads may share an adapter: calls run one at a time, and an online state sees the batches in the order of the calls.

    On a GPU the denoiser runs in bfloat16 and the model's matrix products in TF32 unless config.precision says otherwise. Weights in
    half precision are cast once, and again when torch registers a write to them; writes through `.data` take effect after reset().

    A model that torch.vmap cannot batch runs image by image, and a failed compilation falls back to eager mode; each case emits one
    warning (with DTTA_FAST_STRICT=1 a failed compilation raises). If memory runs out, the call restarts with half the rows.

    Args:
        model: the model to adapt, e.g. a timm classifier.
        denoiser: the diffusion model, e.g. a DiT.
        config: a preset, or an AdaptConfig.
        task: None means Classification().

    Raises:
        TypeError, ValueError: an argument has the wrong type, or the config does not fit the model or the denoiser.
    """

    def __init__(self, model: nn.Module, denoiser: Denoiser, config: AdaptConfig = presets.FAST, task: Task | None = None) -> None:
        check_arguments(model, denoiser, config, task)
        model = model._modules.get("_orig_mod") or model  # unwrap a compiled module
        check_normalisation(model)
        task = task or Classification()
        model, denoiser = task.bind(model, denoiser)
        check_denoiser(denoiser, config)
        if config.parameters == "lora":
            lora.check(model, config.lora_targets, "model")
        else:
            select(model, config.parameters)
        if config.denoiser_parameters == "lora":
            lora.check(denoiser.network_to_adapt(), config.lora_targets, "denoiser")
        self.engine = Engine(model, denoiser, task, config)  # runs the steps; exposed for this package's own tools
        self._turns = Turns()  # a forward pass swaps weights in the private copies, and calls share the state's storage
        self._state: State | None = None
        self._warming = False  # time every step, and run the guard whether or not an answer changed
        self._paces = Paces()

    @property
    def config(self) -> AdaptConfig:
        """The settings this adapter was created with."""
        return self.engine.config

    def adapt(
        self,
        images: Tensor,
        *,
        image_ids: Tensor | None = None,
        latents: Tensor | None = None,
        timesteps: Tensor | None = None,
        noise: Tensor | None = None,
        deadline_ms: float | None = None,
    ) -> AdaptResult:
        """Adapts to a batch and predicts.

        Args:
            images: [B, 3, H, W], uint8, or floating point in [0, 1], not normalised.
            image_ids: [B] int64, 0 .. 2^32 - 1, identifies each image's random draws; 0 .. B - 1 by default. In episodic mode an
                image's result depends only on (seed, image_id, config).
            latents: [B, C, h, w], x0 if it is already encoded. timesteps [B, steps, P] and noise [B, steps, P, C, h, w]
                replace the drawn ones.
            deadline_ms: time budget in milliseconds, counted from the call. No step is started if it is expected to finish too late.
                The estimate is the upper quartile of this session's recent times for batches of this shape. If no time is left for the
                guard, the original answer is kept. The first call has no timings to estimate from: see warmup.

        Raises:
            ValueError: the input is invalid; nothing has changed. RuntimeError: called under torch.inference_mode().
        """
        start, engine, config = time.perf_counter(), self.engine, self.config
        check_surroundings()
        device, checks = anchor(engine.model).device, Checks()
        images = checked_images(images, device, checks)
        if anchor(engine.denoiser).device != device:
            raise ValueError(f"denoiser is on {anchor(engine.denoiser).device} and model on {device}; move one of them")
        image_ids = checked_ids(image_ids, images, checks)
        deadline = None if deadline_ms is None else start + checked_deadline(deadline_ms) / 1000
        if deadline is not None and config.method != "adapt":
            raise ValueError(
                f"deadline_ms is {deadline_ms!r} with method {config.method!r}, which makes no steps to stop after: leave it out"
            )
        for name, draw in (("timesteps", timesteps), ("noise", noise)):
            if draw is not None and config.method != "adapt":
                raise ValueError(f"{name} is given with method {config.method!r}, which draws pairs of its own: leave it out")
        with self._turns.alone() as broken_off:
            if broken_off:  # this process was forked during a call
                self.engine.rebuild()
                self._warming = False
            return self._attempted(Request(images, image_ids, latents, timesteps, noise, deadline, checks))

    def _attempted(self, request: Request) -> AdaptResult:
        """Adapts, retrying if less memory or eager mode may help; stores the new online state at the end."""
        engine, torch_state = self.engine, TorchState.now()
        for attempt in range(ATTEMPTS):
            try:
                with torch.enable_grad(), torch.autocast(engine.device.type, enabled=False), engine.context():
                    engine.refresh()
                    state, result = self._adapt(request)
                engine.check_sources()
                engine.succeeded()
                break
            except BaseException as error:  # Ctrl-C, too, leaves our tensors in the private modules
                torch_state.restore()
                math_attention.leave()
                float32_products.leave()
                with suppress(RuntimeError):  # the original error is more informative
                    engine.check_sources()
                again = engine.failed(error)
                if again or not isinstance(error, Exception):
                    self._paces.clear()  # later runs take a different time
                if not again or attempt + 1 == ATTEMPTS:
                    raise
        if self.config.mode == "online" and state is not None:
            self._state = state
        return result

    def _adapt(self, request: Request) -> tuple[State | None, AdaptResult]:
        """Returns the online state to continue from (None if it does not change) and the result.

        Without a deadline, and if all images run at once, the host waits for the device at most twice: once for the value checks and
        the pre-check, and once to learn what the guard has to compare.
        """
        engine, config = self.engine, self.config
        images, image_ids, latents, timesteps, noise, deadline, checks = request
        problem, clock, count = engine.problem, Clock(images.device), len(images)
        with clock.phase("encode"):
            crop = problem.task.crop(problem.model, images.clone())  # this calls the caller's code, which may write to its input
            calibration = engine.denoiser.calibration
            matched = crop if config.match == "off" or calibration is None else calibration.match(crop)
            dtype = anchor(engine.model).dtype
            original = problem.task.normalise(problem.model, crop.clone()).to(dtype)
            matched_inputs = problem.task.normalise(problem.model, matched.clone()).to(dtype) if config.match == "both" else None
        if latents is not None:
            latents = checked_latents(latents, images, problem.denoiser, checks)
        check_draws(timesteps, noise, images, problem.denoiser.latent_shape, config, len(problem.denoiser.process), checks)
        pairs = config.pairs if timesteps is None else timesteps.shape[2]
        batch = Batch(
            original=original, matched=matched_inputs, crop=matched, image_ids=image_ids,
            x0=latents, timesteps=timesteps, noise=noise, before=None, start=None,
        )  # fmt: skip
        asked = [True] * count
        if self._state is None:
            with clock.phase("adapt"):
                before = engine.source_outputs(original, checks)
                start = before if batch.matched is None else engine.source_outputs(batch.matched, checks)
                batch = batch._replace(before=before, start=start)
                if config.precheck != "off":
                    (asked,) = checks.settle(engine.asked(before, start, crop))
        checks.settle()
        if self._warming:
            asked = [True] * count
        state, groups, rows = None, [], None
        part = batch
        if not all(asked):
            numbers = [i for i, wanted in enumerate(asked) if wanted]
            rows = torch.tensor(numbers, dtype=torch.int64, device="cpu").to(images.device, non_blocking=True)
            # code is compiled for whole batches; what it computes for the other images is dropped from the result
            part = batch if engine.whole_batches() else batch.of(rows)
        if any(asked):
            if part.x0 is None:
                with clock.phase("encode"):
                    part = part._replace(x0=problem.denoiser.encode(part.crop))
            adapted = len(part.image_ids)
            together = engine.plan(part.inputs, part.latents, pairs)
            if not problem.per_image:
                together = adapted  # one update for all of them; the step itself splits them
            if together < adapted and deadline is not None:
                bound, remedy = ("memory", "") if config.memory_budget is None else ("memory_budget", ", or a larger memory_budget")
                raise ValueError(
                    f"images holds {count}, and {bound} has room for {together} at once; deadline_ms takes a batch together: "
                    f"give {together} images and fewer{remedy}"
                )
            for first in range(0, adapted, together):
                groups.append(self._group(part.of(slice(first, first + together)), deadline, clock))
            state = groups[-1].state
        result = assembled(rows, groups, batch.before, pairs * problem.forwards())
        size = crop.shape[-2], crop.shape[-1]
        predictions, predictions_before = (problem.task.predict(found, size) for found in (result["outputs"], result["outputs_before"]))
        return state, AdaptResult(**result, predictions=predictions, predictions_before=predictions_before, clock=clock)

    def _group(self, batch: Batch, deadline: float | None, clock: Clock) -> Group:
        """Adapts a group of images that run at once. The group's state is None if the next batch cannot use it."""
        engine, losses, timed = self.engine, [], self._warming or deadline is not None
        if self.config.method != "adapt":
            return self._classified(batch, clock)
        inputs, x0, image_ids, online = batch.inputs, batch.latents, batch.image_ids, self.config.mode == "online"
        pace = self._paces.of(len(inputs), None if batch.timesteps is None else batch.timesteps.shape[2])
        with clock.phase("adapt"):
            state, start = engine.start(inputs, self._state, batch.start)
            before = batch.before if batch.before is not None else start if batch.matched is None else engine.forward(state, batch.original)
            for i in range(self.config.steps):
                if deadline is not None and clock.now() + pace.step.expected + pace.end.expected + pace.guard.expected > deadline:
                    break
                with pace.step.timed(clock, timed):
                    losses.append(engine.step(state, inputs, x0, image_ids, *batch.draws(i)))
        if not losses:  # there was no time for a step
            sound = not online or all(read(usable(before, before).all()))
            before = before if sound else engine.source_outputs(batch.original, Checks())
            unchanged = torch.zeros_like(image_ids)
            return Group(None, before, before, x0.new_empty(len(inputs), 0), unchanged.bool(), unchanged)
        with clock.phase("adapt"), pace.end.timed(clock, timed):
            candidates = [engine.forward(state, inputs), start]
        if self._warming:
            engine.warm_guard(before, x0, image_ids, state.step)
        fine: list[bool] = []  # [are the online state and its outputs usable, were the previous state's outputs usable]

        def health() -> list[Tensor]:
            return [engine.finite(state) & usable(candidates[0], before).all(), usable(before, before).all()] if online else []

        def wanted(mask: Tensor) -> list[list[bool]]:
            """Reads the guard's mask, and health() in the same transfer."""
            found, *fine[:] = read(mask, *health())
            return found

        begun = clock.now() if timed else 0.0
        with clock.phase("guard"):
            if self._warming:
                engine.run_guard(before, x0, image_ids, state.step)
            in_time = deadline is None or begun + pace.guard.expected <= deadline
            outputs, accepted, evaluations = engine.guard(before, candidates, x0, image_ids, state.step, wanted, in_time)
        if self._warming or (timed and bool(evaluations.any())):  # if no answer changed, there was nothing to time
            pace.guard.note(clock.now() - begun)
        if online and not fine:
            fine = read(*health())
        if online and not fine[1]:  # the state is useless for these images: they get the source model's answers
            source = engine.source_outputs(batch.original, Checks())
            accepted = accepted & usable(outputs, source)
            before, outputs = (where(usable(found, source), found, source) for found in (before, outputs))
        return Group(state if all(fine) else None, before, outputs, torch.stack(losses, dim=1), accepted, evaluations)

    def _classified(self, batch: Batch, clock: Clock) -> Group:
        """Runs a training-free method: there is no state, and every finite answer is accepted."""
        assert batch.before is not None
        assert batch.start is not None
        with clock.phase("adapt"):
            outputs, evaluations = self.engine.classify(batch.start, batch.latents, batch.image_ids)
        accepted = usable(outputs, batch.before)
        outputs = where(accepted, outputs, batch.before.to(outputs.dtype))
        return Group(None, batch.before, outputs, batch.latents.new_empty(len(outputs), 0), accepted, evaluations)

    def crop(self, images: Tensor) -> Tensor:
        """Crops images [B, 3, H, W] in [0, 1] to what the model and denoiser see. adapt() also crops, and leaves a crop unchanged."""
        problem = self.engine.problem
        return problem.task.crop(problem.model, images)

    def warmup(self, images: Tensor, **keywords: Any) -> dict[str, float]:
        """Compiles and times what adapt() needs for batches of this shape, without changing an online adapter's state.

        Args: same as for adapt().

        Returns:
            Seconds taken by the first call, including compilation (`cold`), and by the second (`warm`).
        """
        with self._turns.several():
            online, seconds = self._state, {}
            self._warming = True
            try:
                for name in ("cold", "warm"):
                    start = time.perf_counter()
                    result = self.adapt(images, **keywords)
                    _ = result.seconds  # reading this waits for the device
                    seconds[name] = time.perf_counter() - start
            finally:
                self._warming = False
                self._state = online
            return seconds

    def forward(self, images: Tensor) -> Tensor:
        """Calls adapt(images) and returns only the outputs [B, ...], for code that expects a model. Raises the same errors."""
        return self.adapt(images).outputs

    __call__ = forward

    def __deepcopy__(self, memo: dict[int, Any]) -> Adapter:
        with self._turns.several():  # a call swaps weights in the private copies
            other = memo[id(self)] = type(self).__new__(type(self))
            vars(other).update(copy.deepcopy(vars(self), memo))
            return other

    def reset(self) -> None:
        """Returns to the model's own weights and an empty optimizer state. Picks up weights that were written through `.data`."""
        with self._turns.alone():
            self._state = None
            self.engine.check_copies()
            self.engine.recast()

    def state_dict(self) -> dict[str, Any]:
        """Returns a copy of the online state: adapted weights by name, optimizer state and step; empty before the first batch."""
        return {} if self._state is None else copied(self._state)._asdict()

    def save_lora(self, folder: str | Path) -> None:
        """Saves the online state's LoRA adapters in the peft and diffusers formats.

        The model's adapters are saved as a peft folder, for PeftModel.from_pretrained(model, folder). A UNet's are saved in the same folder
        as pytorch_lora_weights.safetensors, for a diffusers pipeline's load_lora_weights(folder). Existing adapters that were not adapted,
        such as those of a text tower whose features are computed once, are not saved.

        Raises:
            ValueError: nothing has been adapted yet, no adapters are being adapted, or they contain something the formats cannot store
                (several active adapters in a layer, DoRA magnitudes, biases).
        """
        with self._turns.alone():  # the private modules tell which weights are adapters
            save_adapters(self._state, self.engine, Path(folder))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state that state_dict() returned under the same config and models.

        Raises:
            ValueError: the adapter is episodic, or the state holds other weights, another optimizer's state, NaN or infinity.
        """
        if isinstance(state, dict) and not state:
            self.reset()
            return
        with self._turns.alone():
            self._state = loaded(state, self.engine)


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
    """Adapts `model` to `images` with the denoiser's loss and predicts: Adapter(model, denoiser, config, task).adapt(images, ...).

    model and denoiser stay bit-for-bit unchanged, whatever happens.

    Args:
        model: a torch.nn.Module, such as a timm classifier.
        denoiser: the diffusion model, on the same device.
        images: [B, 3, H, W], uint8, or floating point in [0, 1], not normalised.
        config: a preset, or an AdaptConfig.
        task: None means Classification().
        image_ids, latents, timesteps, noise: same as for Adapter.adapt.

    Raises:
        TypeError, ValueError: an argument has the wrong type, or the config does not fit the model, denoiser or task.
        RuntimeError: called under torch.inference_mode().
    """
    return Adapter(model, denoiser, config, task).adapt(images, image_ids=image_ids, latents=latents, timesteps=timesteps, noise=noise)
