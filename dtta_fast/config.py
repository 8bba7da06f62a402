"""Adaptation settings: a frozen dataclass that validates itself. This module imports nothing else of the package."""

from __future__ import annotations

import dataclasses
import functools
import sys
import types
import typing
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

Method = Literal["adapt", "diffusion_classifier", "posterior"]
Objective = Literal["embedding_mix", "noise_mix"]
TimestepDraw = Literal["uniform", "stratified", "calibrated"]
Match = Literal["off", "denoiser", "both"]
Precheck = Literal["off", "answer", "statistics"]
ParameterSet = Literal["all", "norm", "head", "logits", "lora"]
DenoiserParameters = Literal["frozen", "all", "lora"]
Optimizer = Literal["sgd", "adam", "adamw", "adam8bit"]
Precision = Literal["auto", "fp32", "tf32", "bf16", "fp16"]
Compile = Literal["off", "auto", "regional", "step", "graphs", "regional+graphs"]


class AtLeast(NamedTuple):
    """Marks a number's smallest allowed value."""

    low: int


Count = Annotated[int, AtLeast(1)]
CountFromZero = Annotated[int, AtLeast(0)]
Rate = Annotated[float, AtLeast(0)]


def is_whole(value: Any, low: int) -> bool:
    """Returns whether a value is an int of at least `low`, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def is_real(value: Any) -> bool:
    """Returns whether a value is a finite number, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def refuse(config: Any, field: str, allowed: str) -> typing.NoReturn:
    """Raises the ValueError for a field's value."""
    raise ValueError(f"{field} is {getattr(config, field)!r}; allowed: {allowed}")


def check_fields(config: Any) -> None:
    """Checks the fields of a config dataclass against their annotations.

    Checks text, choices (Literal), flags (bool) and numbers with a smallest value (AtLeast), each with or without None. Fields with
    other annotations are left to the caller.

    Raises:
        ValueError: a value does not fit; the message names the field, the value and what is allowed.
    """
    kind_of_config: Any = type(config)
    for field, kinds in _kinds_of_fields(kind_of_config).items():
        value = getattr(config, field)
        if not any(_fits(value, kind) for kind in kinds):
            refuse(config, field, " or ".join(_description(kind, quoted=len(kinds) > 1) for kind in reversed(kinds)))


@functools.cache
def _kinds_of_fields(config: type) -> dict[str, list[Any]]:
    """Returns the alternatives of each field's annotation, for the fields that check_fields() can check."""
    found = {}
    for field, hint in typing.get_type_hints(config, include_extras=True).items():
        if get_origin(hint) is Annotated and _low(hint) is None:  # marked for the command line
            hint = hint.__origin__
        kinds = list(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else [hint]
        if all(kind in (bool, str, types.NoneType) or get_origin(kind) is Literal or _low(kind) is not None for kind in kinds):
            found[field] = kinds
    return found


def _low(kind: Any) -> int | None:
    marks = [mark for mark in getattr(kind, "__metadata__", ()) if isinstance(mark, AtLeast)]
    return marks[0].low if marks else None


def _fits(value: Any, kind: Any) -> bool:
    if kind in (bool, str, types.NoneType):
        return isinstance(value, kind)
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    low = _low(kind) or 0
    return is_whole(value, low) if kind.__origin__ is int else is_real(value) and value >= low


def _description(kind: Any, quoted: bool) -> str:
    if get_origin(kind) is Literal:
        return ", ".join(f'"{choice}"' if quoted else choice for choice in get_args(kind))
    if kind in (bool, str, types.NoneType):
        return {bool: "True, False", str: "text", types.NoneType: "None"}[kind]
    return f"a {'whole' if kind.__origin__ is int else 'finite'} number of {_low(kind)} or more"


@dataclass(frozen=True, kw_only=True)
class AdaptConfig:
    """Settings of an adaptation; an invalid value raises ValueError with the field, the value and the allowed values.

    Attributes:
        method: adapt; diffusion_classifier, which trains nothing and answers with the class that has the lowest denoising loss
            (arXiv 2303.16203); or posterior, which takes the model's probabilities as prior and lowers a class's log probability by
            half of Calibration.trust times the standard errors by which its loss exceeds the lowest. In the last two, steps is the number
            of stages and pairs is the number of pairs per stage, the same for all classes. After each stage, a class is dropped if its loss
            exceeds the lowest by more than guard_threshold standard errors (0: no class is dropped). top_k then limits how many of the
            model's likeliest classes are evaluated.
        steps: number of updates per image (episodic) or per batch (online), at least 1.
        pairs: number of (timestep, noise) pairs per image and step, at least 1; drawn anew in every step unless common_draws is set.
        objective: embedding_mix, the loss under the mixed class embedding (Diffusion-TTA); or noise_mix, the loss of the mixture of the
            per-class predictions (DUSA, NeurIPS 2024). noise_mix takes one forward pass per class, so use top_k and drawn_classes to
            keep the number of classes small.
        null_condition: whether, under noise_mix, an adapting denoiser learns only from a forward pass without a class; the
            class-conditional passes then contribute no gradient to its weights.
        chunk: number of an image's pairs that run through the denoiser at once; auto aims at about 64 rows per forward pass, or at what
            fits into memory_budget. Does not affect the result beyond rounding.
        loss: how prediction and target are compared: mean squared (mse) or mean absolute (l1) difference.
        timesteps: how timesteps are drawn: uniform; stratified, which splits the range into as many equal parts as there are pairs and
            draws one timestep from each; or calibrated, stratified under the density that dtta calibrate measured for this denoiser.
        timestep_range: range of rows of the noise process to draw from, as (lowest, highest + 1); None is the whole process.
        antithetic: whether pairs come in twos that share a timestep and have opposite noise. This noise is held in memory; otherwise
            noise is generated where it is used.
        share_noise: whether all of an image's pairs in a step share one noise, which is held in memory.
        common_draws: whether all steps of an image use the same pairs.
        top_k: number of classes in the condition, the likeliest ones; None means all, and so does a number above the number of classes.
        drawn_classes: number of classes in addition to those of top_k, sampled from the others by their probability, without
            replacement and anew in every step; at most the remaining ones.
        logit_scale: the condition is softmax(logit_scale · logits / ‖logits‖₂); None is softmax(logits).
        match: what gets images matched to the statistics of the denoiser's own images (see Calibration.match): nothing (off), the
            denoiser, or the model as well (both). Takes a calibration of the denoiser, without which nothing is matched.
        precheck: which images are left unadapted, at no denoiser evaluations, because adaptation would do more harm than good
            (docs/log.md): none (off); those for which the source model gives the same answer with and without matching and, if matching
            changes the image, is at least 80 % sure of it (answer, needs match both); or those whose statistics are typical of the
            denoiser's own images (statistics, see Calibration.distance). If the denoiser's loss tells nothing about the class
            (Calibration.trust is 0) and there is a guard, both leave all images unadapted. Compiled code is specialised to one batch size,
            so if any image needs adaptation it runs on the whole batch, and the results of the skipped images are discarded.
        parameters: which of the model's weights are adapted: all, its norm layers, its head, LoRA adapters (its own if it has any, new
            ones otherwise), or the logits themselves. Their requires_grad flags are ignored.
        denoiser_parameters: which of the denoiser's weights are adapted: none (frozen), all, or those of LoRA adapters (lora).
        lora_rank: rank of new LoRA adapters, at least 1.
        lora_targets: name suffixes of the linear layers that get an adapter, such as q_proj and v_proj; None selects the attention
            projections.
        optimizer: sgd, adam, adamw, or adam8bit (bitsandbytes' Adam, whose two moments take one byte each).
        lr: learning rate of the model's weights.
        denoiser_lr: learning rate of the denoiser's weights.
        momentum: momentum of sgd, from 0 to below 1; the other optimizers ignore it.
        weight_decay: weight decay for any optimizer, applied to both the model and the denoiser; decoupled for adamw and adam8bit.
        mode: episodic starts every image from the source weights; online carries the weights and optimizer state through the stream.
        guard: number of pairs on which answers are compared. The unadapted model's answer to the matched image stands (to the image
            itself without match both); the adapted one, and the answer to the unmatched image, replace it only if their loss is lower.
            0 turns the guard off: adapted answers are accepted.
        guard_threshold: how much lower the loss has to be: the mean of the pairs' differences, times Calibration.trust (1 at most), must be
            below minus this many standard errors (a paired test). 3 asks for odds of 20 to 1 that the new answer is the right one of the
            two.
        precision: number format of the denoiser's weights and activations, which account for nearly all of the work. auto is bf16 on a
            GPU (fp16 if it lacks bfloat16) for a float32 denoiser, and the denoiser's own format otherwise. fp32 is full float32
            everywhere: slow on a GPU, and the only setting there that keeps the model and the denoiser off the tensor cores. tf32 keeps
            both in float32, with TF32 matrix products on a GPU. bf16 and fp16 are half precision, with the model's products in TF32 as
            under auto. Losses, the accumulated gradients of the condition, optimizers and adapted weights are always float32; the
            weights are cast for each step. The model keeps its own precision: an update of 1e-5 would be lost in a bfloat16 weight.
        compile: what torch.compile compiles: nothing (off, or False); what suits the device, which is regional on a CPU and regional+graphs
            on a GPU (auto, or True); the denoiser's blocks and the model separately (regional); or the whole step
            as one graph (step), whose compile time is proportional to the number of chunks in a step. With "graphs" and
            "regional+graphs", the model's forwards, the steps and the guard are recorded as CUDA graphs, for each batch size, and
            replayed: this saves the time of launching their kernels. Meant for sessions: see Adapter.warmup.
        memory_budget: bytes for activations, and for the weights, gradients and optimizer state of images that have their own; limits
            first the chunk and then how many images of a batch run at once. None is four fifths of the free memory on a GPU, and
            unlimited on the CPU. Frozen weights are not counted. Does not affect the result beyond rounding.
        seed: seed of the timesteps and the noise, 0 to 2^63 - 1.
    """

    method: Method = "adapt"
    steps: Count = 5
    pairs: Count = 4
    chunk: Count | Literal["auto"] = "auto"
    objective: Objective = "embedding_mix"
    null_condition: bool = False
    loss: Literal["mse", "l1"] = "mse"
    timesteps: TimestepDraw = "stratified"
    timestep_range: tuple[int, int] | None = None
    antithetic: bool = False
    share_noise: bool = False
    common_draws: bool = False
    top_k: Count | None = None
    drawn_classes: CountFromZero = 0
    logit_scale: float | None = None
    match: Match = "off"
    precheck: Precheck = "off"
    parameters: ParameterSet = "all"
    denoiser_parameters: DenoiserParameters = "frozen"
    lora_rank: Count = 8
    lora_targets: tuple[str, ...] | None = None
    optimizer: Optimizer = "adam"
    lr: Rate = 1e-3
    denoiser_lr: Rate = 1e-4
    momentum: float = 0.9
    weight_decay: Rate = 0.0
    mode: Literal["episodic", "online"] = "episodic"
    guard: CountFromZero = 0
    guard_threshold: Rate = 0.0
    precision: Precision = "auto"
    compile: Compile = "off"
    memory_budget: Count | None = None
    seed: CountFromZero = 0

    def __post_init__(self) -> None:
        if isinstance(self.compile, bool):
            object.__setattr__(self, "compile", "auto" if self.compile else "off")
        check_fields(self)
        if self.seed >= 2**63:
            refuse(self, "seed", "up to 2^63 - 1")
        if not is_real(self.momentum) or not 0 <= self.momentum < 1:
            refuse(self, "momentum", "a number from 0 to below 1")
        if self.logit_scale is not None and not (is_real(self.logit_scale) and self.logit_scale > 0):
            refuse(self, "logit_scale", "None or a positive number")
        if self.timestep_range is not None:
            both = isinstance(self.timestep_range, (tuple, list)) and len(self.timestep_range) == 2
            if not (both and all(is_whole(t, 0) for t in self.timestep_range) and self.timestep_range[0] < self.timestep_range[1]):
                refuse(self, "timestep_range", "None or whole numbers (low, high) with 0 <= low < high")
            object.__setattr__(self, "timestep_range", tuple(self.timestep_range))  # hashable, also when read from JSON
        if self.lora_targets is not None:
            names = self.lora_targets
            if not isinstance(names, (tuple, list)) or not names or not all(isinstance(name, str) and name for name in names):
                refuse(self, "lora_targets", "None or names such as ('q_proj', 'v_proj')")
            object.__setattr__(self, "lora_targets", tuple(names))
        if self.guard_threshold and self.guard == 1:
            raise ValueError(f"guard is 1 with guard_threshold {self.guard_threshold}; a standard error takes 2 pairs or more")
        if self.antithetic and self.pairs % 2:
            raise ValueError(f"antithetic with pairs {self.pairs}; opposite noises take an even number of pairs")
        if self.drawn_classes and self.top_k is None:
            raise ValueError(f"drawn_classes is {self.drawn_classes} without top_k; all classes take part already")
        if self.null_condition and (self.objective != "noise_mix" or self.denoiser_parameters == "frozen"):
            found = f"objective {self.objective!r} and denoiser_parameters {self.denoiser_parameters!r}"
            raise ValueError(f"null_condition with {found}; it belongs to noise_mix with a denoiser that adapts")
        if self.precheck != "off" and (self.method == "diffusion_classifier" or self.mode != "episodic"):
            found = f"method {self.method!r} and mode {self.mode!r}"
            raise ValueError(f"precheck is {self.precheck!r} with {found}; it needs method 'adapt' or 'posterior', and mode 'episodic'")
        if self.method == "posterior" and self.steps * self.pairs < 2:
            raise ValueError("method is 'posterior' with 1 pair; a standard error needs at least 2 pairs: give pairs=24")
        if self.precheck == "answer" and self.match != "both":
            raise ValueError(f"precheck is 'answer' with match {self.match!r}, and needs 'both': it compares answers, as is and matched")
        if self.method != "adapt" and self.mode == "online":
            raise ValueError(f"method is {self.method!r} with mode 'online', and nothing is carried on: use episodic")
        if self.optimizer == "adam8bit" and self.compile == "step":
            raise ValueError("optimizer is 'adam8bit' with compile 'step', and bitsandbytes' kernels cannot be traced: use regional")
        if self.optimizer == "adam8bit" and "graphs" in self.compile:
            raise ValueError(
                f"optimizer is 'adam8bit' with compile {self.compile!r}, and bitsandbytes reads the step on the host: use adam"
            )
        if self.mode == "online" and self.parameters == "logits":
            raise ValueError("parameters is 'logits' with mode 'online'; free logits belong to one image: use episodic")

    def replace(self, **changes: Any) -> AdaptConfig:
        """Returns a copy with some fields changed; an unknown field raises ValueError."""
        known = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                raise ValueError(f"AdaptConfig has no field {name!r}; it has {', '.join(known)}")
        return dataclasses.replace(self, **changes)
