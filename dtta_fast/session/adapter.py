"""The public API: adapt() for a single batch, Adapter for a session."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dtta_fast import presets
from dtta_fast.config import AdaptConfig
from dtta_fast.core import lora
from dtta_fast.core.guard import unchanged
from dtta_fast.core.step import State
from dtta_fast.core.weights import anchor, select
from dtta_fast.denoisers.base import Denoiser
from dtta_fast.runtime.clock import Clock
from dtta_fast.runtime.progress import progress_bar
from dtta_fast.runtime.reads import Checks
from dtta_fast.runtime.turns import Turns
from dtta_fast.runtime.warn import warn
from dtta_fast.session.checks import (
    Request,
    check_arguments,
    check_normalisation,
    check_timestep_range,
    checked,
    checked_pairs,
    fitted_to_classes,
    fitted_to_denoiser,
    settings_that_differ,
    warn_of_unguarded,
)
from dtta_fast.session.engine import Engine
from dtta_fast.session.inputs import Images, to_batch, to_ids
from dtta_fast.session.loop import Call, Outcome, run
from dtta_fast.session.online import copied, loaded, save_adapters
from dtta_fast.session.result import AdaptResult, assembled, indices
from dtta_fast.tasks.base import Task
from dtta_fast.tasks.classification import Classification


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
        config: a preset, or an AdaptConfig. If it needs a calibration that the denoiser lacks, other settings take their place, and a
            warning names them: see `config`.
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
        check_timestep_range(denoiser, config)
        asked, config = config, fitted_to_denoiser(denoiser, config)
        if config != asked:
            of_what = "" if denoiser.calibration is None else "of its timesteps "
            warn(
                f"the denoiser has no calibration {of_what}for these settings, so {settings_that_differ(config, asked)} take their place; "
                "for better answers, set denoiser.calibration = calibrate(denoiser, clean_images, outputs)"
            )
        warn_of_unguarded(denoiser, config)
        config = fitted_to_classes(task.class_count(denoiser), config)
        if config.compile == "auto":
            recorded = anchor(model).device.type == "cuda" and config.optimizer != "adam8bit"
            config = config.replace(compile="regional+graphs" if recorded else "regional")
        if config.parameters == "lora":
            lora.check(model, config.lora_targets, "model")
        else:
            select(model, config.parameters)
        if config.denoiser_parameters == "lora":
            lora.check(denoiser.network_to_adapt(), config.lora_targets, "denoiser")
        self.engine = Engine(model, denoiser, task, config)  # holds the private modules; exposed for this package's own tools
        self._turns = Turns()  # a forward pass swaps weights in the private copies, and calls share the state's storage
        self._state: State | None = None
        self._warming = False  # time every step, and run the guard whether or not an answer changed

    @property
    def config(self) -> AdaptConfig:
        """The settings this adapter runs with. They are those it was created with, with three exceptions: compile "auto" is resolved for
        the model's device; settings that need a calibration are replaced if the denoiser has none; and top_k and drawn_classes are lowered
        if there are fewer classes."""
        return self.engine.config

    def adapt(
        self,
        images: Images,
        *,
        image_ids: Tensor | Sequence[int] | None = None,
        latents: Tensor | None = None,
        timesteps: Tensor | None = None,
        noise: Tensor | None = None,
        deadline_ms: float | None = None,
        cropped: bool = False,
        progress: bool = False,
    ) -> AdaptResult:
        """Adapts to a batch and predicts.

        Args:
            images: [B, 3, H, W], uint8, or floating point in [0, 1], not normalised. Also a PIL image, a numpy array [H, W, 3] or
                [B, H, W, 3], a path, or a list of images of any of these kinds; those of different sizes are cropped one by one.
                A PIL image or a file is rotated as its EXIF data says, so remove that data from a PIL image that you rotated yourself.
            image_ids: [B] int64, 0 .. 2^32 - 1, identifies each image's random draws; 0 .. B - 1 by default. In episodic mode an
                image's result depends only on (seed, image_id, config).
            latents: [B, C, h, w], x0 if it is already encoded. timesteps [B, steps, P] and noise [B, steps, P, C, h, w]
                replace the drawn ones.
            deadline_ms: time budget in milliseconds, counted from the call. No step is started if it is expected to finish too late.
                The estimate is the upper quartile of this session's recent times for batches of this shape. If no time is left for the
                guard, the unadapted model's answer stands. The first call has no timings to estimate from: see warmup.
            cropped: whether images come from crop(). They are not cropped again, since some crops would zoom in twice.
            progress: whether to show a progress bar over the steps, on a terminal or in a notebook.

        Raises:
            TypeError, ValueError: the input is invalid; nothing has changed. RuntimeError: called under torch.inference_mode().
        """
        start, engine, checks = time.perf_counter(), self.engine, Checks()
        device = anchor(engine.model).device
        images, found = to_batch(images, device, self.crop)
        image_ids, cropped = to_ids(image_ids, device), cropped or found
        request = Request(images, image_ids, latents, timesteps, noise, deadline_ms, cropped, progress)
        request = checked(request, start, engine.model, engine.denoiser, self.config, checks)
        with self._turns.alone() as broken_off:
            if broken_off:  # this process was forked during a call
                engine.rebuild()
                self._warming = False
            attempt = engine.attempt()
            while True:
                try:
                    with engine.context():
                        state, result = self._adapt(request, checks)
                    engine.ended()
                    break
                except BaseException as error:  # Ctrl-C too
                    if not engine.recovers(error, attempt):
                        raise
                    attempt = attempt._replace(number=attempt.number + 1)
            if state is not None:
                self._state = state
            return result

    def _adapt(self, request: Request, checks: Checks) -> tuple[State | None, AdaptResult]:
        """Returns the online state to continue from (None if it does not change) and the result.

        Without a deadline, and if all images run at once, the host waits for the device at most twice: once for the value checks and
        the pre-check, and once to learn what the guard has to compare; in the first call once more, to learn about the model.
        """
        program, config, clock = self.engine.program, self.config, Clock(request.images.device)
        problem, outcomes, state = program.problem, list[Outcome](), None
        request = checked_pairs(request, problem.denoiser, config, checks)
        with clock.phase("encode"):
            crop = request.images.clone()  # the caller's code may write to its input
            if not request.cropped:
                crop = problem.task.crop(problem.model, crop)
            batch = program.views(crop, request)
        if self._state is None:
            with clock.phase("adapt"):
                batch = program.answered(batch, crop, checks)
        asked = checks.settle(*([] if batch.asked is None else [batch.asked]))
        rows = None if self._warming or not asked or all(asked[0]) else indices(asked[0], crop.device)
        part = batch if rows is None or program.compiles else batch.of(rows)
        if rows is None or len(rows):
            with clock.phase("encode"):
                part = program.encoded(part)
            with progress_bar(request.progress, len(part.image_ids) * config.steps) as advance:
                for here in program.parts(part, request):
                    with clock.phase("adapt"):
                        state, here = program.start(here, self._state)
                    if state is None:
                        outcomes.append(program.classified(here, clock))
                        advance(len(here.image_ids) * config.steps)
                        continue
                    pace = self.engine.paces.of(len(here.image_ids), None if here.timesteps is None else here.timesteps.shape[2])
                    call = Call(clock, pace, request.deadline, self._warming, advance)
                    outcomes.append(run(program, state, here, call, config.steps))
        program.tell()
        unadapted = None
        if rows is not None:
            standing = unchanged(batch.before, batch.matched_outputs).standing
            if config.method != "adapt":  # as classified() gives them
                standing = standing.to(torch.promote_types(standing.dtype, torch.float32))
            answers = standing, batch.before
            unadapted = tuple((outputs, program.predictions(outputs, batch)) for outputs in answers)
        forwards = problem.forwards() * (config.pairs if request.timesteps is None else request.timesteps.shape[2])
        result = AdaptResult(**assembled(rows, outcomes, unadapted, forwards), clock=clock)
        return program.own(state) if state is not None and outcomes and outcomes[-1].keep else None, result

    def crop(self, images: Tensor) -> Tensor:
        """Crops images [B, 3, H, W] in [0, 1] to what the model and denoiser see. Pass the result to adapt() with cropped=True."""
        problem = self.engine.program.problem
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
        """Returns to the model's own weights and an empty optimizer state. Picks up weights that were written through `.data`.

        A calibration that the denoiser got after this session was made is not picked up: make a new session.
        """
        with self._turns.alone():
            self._state = None
            self.engine.check_copies()
            self.engine.recast()

    def state_dict(self) -> dict[str, Any]:
        """Returns a copy of the online state: adapted weights by name, optimizer state and step; empty before the first batch."""
        state = self._state  # read once: another thread may replace it, but no call writes to it
        return {} if state is None else copied(state)._asdict()

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
    images: Images,
    config: AdaptConfig = presets.FAST,
    task: Task | None = None,
    *,
    image_ids: Tensor | Sequence[int] | None = None,
    latents: Tensor | None = None,
    timesteps: Tensor | None = None,
    noise: Tensor | None = None,
    cropped: bool = False,
    progress: bool = False,
) -> AdaptResult:
    """Adapts `model` to `images` with the denoiser's loss and predicts: Adapter(model, denoiser, config, task).adapt(images, ...).

    model and denoiser stay bit-for-bit unchanged, whatever happens.

    Args:
        model: a torch.nn.Module, such as a timm classifier.
        denoiser: the diffusion model, on the same device.
        images: [B, 3, H, W], uint8, or floating point in [0, 1], not normalised; or PIL images, arrays or paths, as for Adapter.adapt.
        config: a preset, or an AdaptConfig.
        task: None means Classification().
        image_ids, latents, timesteps, noise, cropped, progress: same as for Adapter.adapt.

    Raises:
        TypeError, ValueError: an argument has the wrong type, or the config does not fit the model, denoiser or task.
        RuntimeError: called under torch.inference_mode().
    """
    session = Adapter(model, denoiser, config, task)
    return session.adapt(images, image_ids=image_ids, latents=latents, timesteps=timesteps, noise=noise, cropped=cropped, progress=progress)
