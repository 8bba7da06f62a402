"""Gives every method the same interface: images and their ids in, logits and the number of denoiser passes out.

Settings of the presets are the library's, the same on every benchmark; learning rates and timesteps of the others were chosen by
bench/quality/choose.py on the validation split of digits-C, and for CIFAR-10 on that of CIFAR-10.

TENT, EATA, SAR, CoTTA and DUSA answer a batch before they update on it, as in their papers. NEO, as in its paper, and ONLINE answer
after the update.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from baselines import Augment, Baseline, BatchStatistics, Cotta, Eata, Memo, Neo, Sar, Source, Tent, fisher_information
from torch import Tensor, nn
from torch.func import functional_call

from dtta_fast import AdaptConfig, Adapter, presets, zoo
from dtta_fast.denoisers.base import Denoiser
from dtta_fast.tasks import Classification, Task, ZeroShot


class Answer(NamedTuple):
    """Logits [B, K], and the denoiser's forward and backward passes, summed over the images."""

    logits: Tensor
    forwards: int
    backwards: int


class Setting(NamedTuple):
    """What a method may use besides the stream."""

    model: nn.Module
    denoiser: Denoiser
    train: Tensor  # clean images of the train split, without labels
    seed: int
    task: Task | None = None  # None is Classification()


Protocol = Literal["single-sample", "online", "continual"]
Run = Callable[[Tensor, Tensor], Answer]


@dataclass(frozen=True)
class Method:
    """A method, and how it is run.

    batch: images per call. family: its curve in the plot. protocol: "single-sample" adapts to every image from the source weights;
    "online" carries the weights on through the images of one corruption; "continual" carries them on through all corruptions, and clean
    images at the end.
    """

    make: Callable[[Setting], tuple[Run, Callable[[], None]]]
    batch: int
    protocol: Protocol
    family: str

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that results depend on, besides the models and images; see described()."""
        return {"batch": self.batch, "protocol": self.protocol, **getattr(self.make, "settings", {})}


def described(function: Any, **settings: object) -> Any:
    """Notes the settings that a function was made with, for the results file."""
    function.settings = settings
    return function


def bound(setting: Setting) -> Setting:
    """Prepares the model and the denoiser for the task."""
    task = setting.task or Classification()
    model, denoiser = task.bind(setting.model, setting.denoiser)
    return setting._replace(model=model, denoiser=denoiser, task=task)


def model_inputs(setting: Setting, images: Tensor, matched: bool = False) -> Tensor:
    """Crops and normalises images [B, 3, H, W] in [0, 1] for a bound setting's model; `matched` applies the calibration first."""
    assert setting.task is not None
    crop = setting.task.crop(setting.model, images)
    if matched:
        assert setting.denoiser.calibration is not None
        crop = setting.denoiser.calibration.match(crop)
    return setting.task.normalise(setting.model, crop)


def by_adapter(config: AdaptConfig, answer_first: bool = False) -> Callable[[Setting], tuple[Run, Callable[[], None]]]:
    """Runs an Adapter. answer_first: answer each batch before the update on it."""

    def make(setting: Setting) -> tuple[Run, Callable[[], None]]:
        adapter = Adapter(setting.model, setting.denoiser, config.replace(seed=setting.seed), setting.task)
        own = bound(setting) if answer_first else setting

        def run(images: Tensor, ids: Tensor) -> Answer:
            theta = adapter.state_dict().get("theta", {})  # empty before the first batch: the source weights
            result = adapter.adapt(images, image_ids=ids)
            logits = result.outputs
            if answer_first and config.match == "both":
                with torch.no_grad():  # outputs_before belong to the unmatched images
                    logits = functional_call(own.model, theta, (model_inputs(own, images, matched=True),))
            elif answer_first:
                logits = result.outputs_before
            trained = int((~result.loss.isnan()).sum()) * config.pairs
            classes = logits.shape[1] if config.top_k is None else config.top_k + config.drawn_classes
            per_pair = 1 if config.null_condition or config.objective == "embedding_mix" else classes
            backward = config.objective == "embedding_mix" or config.denoiser_parameters == "all"
            return Answer(logits, int(result.evaluations.sum()), trained * per_pair * backward)

        return run, adapter.reset

    return described(make, **dataclasses.asdict(config), answer_first=answer_first)


def by_baseline(build: Callable[[Setting], Baseline], matched: bool = False) -> Callable[[Setting], tuple[Run, Callable[[], None]]]:
    """Runs a baseline. matched: on images that the denoiser's calibration has matched."""

    def make(setting: Setting) -> tuple[Run, Callable[[], None]]:
        setting = bound(setting)
        baseline = build(setting)

        def run(images: Tensor, ids: Tensor) -> Answer:
            return Answer(baseline(model_inputs(setting, images, matched)), 0, 0)

        return run, baseline.reset

    return described(make, **getattr(build, "settings", {}), matched=matched)


def zero_shot(method: Callable[[Setting], tuple[Run, Callable[[], None]]], **keywords: object) -> Callable[[Setting], Any]:
    """Runs a method on CLIP and Stable Diffusion with the digits' names; `keywords` go to ZeroShot."""

    def make(setting: Setting) -> tuple[Run, Callable[[], None]]:
        task = ZeroShot(zoo.DIGITS, zoo.load_processor("open_vocabulary"), **keywords)  # type: ignore[arg-type]
        return method(setting._replace(task=task))

    return described(make, **getattr(method, "settings", {}), **{name: str(value) for name, value in keywords.items()})


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shifts images by up to two pixels and adds noise. There are no flips, because they would change a digit's class."""
    shifts = torch.randint(-2, 3, (len(images), 2), generator=generator)
    moved = torch.stack([image.roll((int(y), int(x)), (1, 2)) for image, (y, x) in zip(images, shifts, strict=True)])
    return moved + 0.05 * torch.randn(images.shape, generator=generator)


def mirrored(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shifts images, adds noise, and flips half of them from left to right, as is usual for natural images."""
    flip = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    return augmented(torch.where(flip, images.flip(-1), images), generator)


def source(setting: Setting) -> Baseline:
    return Source(setting.model, 0.0)


def tent(lr: float) -> Callable[[Setting], Baseline]:
    return described(lambda setting: Tent(setting.model, lr), lr=lr)


def eata(lr: float) -> Callable[[Setting], Baseline]:
    return described(
        lambda setting: Eata(setting.model, lr, fisher_information(setting.model, model_inputs(setting, setting.train[:500]))), lr=lr
    )


def sar(lr: float) -> Callable[[Setting], Baseline]:
    return described(lambda setting: Sar(setting.model, lr), lr=lr)


def cotta(lr: float, augment: Augment = augmented) -> Callable[[Setting], Baseline]:
    return described(lambda setting: Cotta(setting.model, lr, augment, setting.seed), lr=lr, augment=augment.__name__)


def memo(lr: float, augment: Augment = augmented) -> Callable[[Setting], Baseline]:
    return described(lambda setting: Memo(setting.model, lr, augment, setting.seed), lr=lr, augment=augment.__name__)


def batch_statistics(setting: Setting) -> Baseline:
    return BatchStatistics(setting.model, 0.0)


def neo(setting: Setting) -> Baseline:
    return Neo(setting.model)


FAST, ONLINE, DUSA, PAPER = presets.FAST, presets.ONLINE, presets.DUSA, presets.PAPER
CLASSIFIER = FAST.replace(method="diffusion_classifier", match="denoiser", precheck="off", guard=0, guard_threshold=0.0)
BATCH, SINGLE = 50, "single-sample"

METHODS: dict[str, Method] = {
    "source": Method(by_baseline(source), BATCH, SINGLE, "source"),
    "matched alone": Method(by_baseline(source, matched=True), BATCH, SINGLE, "matched alone"),
    "FAST": Method(by_adapter(FAST), BATCH, SINGLE, "FAST"),
    "FAST, unmatched": Method(by_adapter(FAST.replace(match="off", precheck="off")), BATCH, SINGLE, "FAST, unmatched"),
    "FAST, guard of 8": Method(by_adapter(FAST.replace(guard=8)), BATCH, SINGLE, "FAST"),
    "FAST, no pre-check": Method(by_adapter(FAST.replace(precheck="off")), BATCH, SINGLE, "FAST, no pre-check"),
    "FAST, timesteps 450-700": Method(
        by_adapter(FAST.replace(timesteps="stratified", timestep_range=(450, 700))), BATCH, SINGLE, "FAST, timesteps 450-700"
    ),
    **{
        f"diffusion classifier, {pairs}": Method(
            by_adapter(CLASSIFIER.replace(steps=1, pairs=pairs)), BATCH, SINGLE, "diffusion classifier"
        )
        for pairs in (1, 2, 4, 8)
    },
    "diffusion classifier, pruned": Method(
        by_adapter(CLASSIFIER.replace(steps=6, pairs=2, guard_threshold=3.0)), BATCH, SINGLE, "diffusion classifier, pruned"
    ),
    "diffusion classifier, unmatched, 2": Method(
        by_adapter(CLASSIFIER.replace(steps=1, pairs=2, match="off")), BATCH, SINGLE, "diffusion classifier, unmatched"
    ),
    "top 3 ranked again": Method(by_adapter(CLASSIFIER.replace(steps=1, pairs=8, top_k=3)), BATCH, SINGLE, "top 3 ranked again"),
    "RANK": Method(by_adapter(presets.RANK), BATCH, SINGLE, "RANK"),
    "ONLINE": Method(by_adapter(ONLINE), 10, "online", "ONLINE"),
    "ONLINE, continual": Method(by_adapter(ONLINE), 10, "continual", "ONLINE, continual"),
    "DUSA": Method(by_adapter(DUSA, answer_first=True), 10, "online", "DUSA"),
    "DUSA, matched": Method(by_adapter(DUSA.replace(match="both"), answer_first=True), 10, "online", "DUSA, matched"),
    "PAPER": Method(by_adapter(PAPER), 4, SINGLE, "PAPER"),
    "TENT": Method(by_baseline(tent(3e-3)), 10, "online", "TENT"),
    "TENT, matched": Method(by_baseline(tent(1e-3), matched=True), 10, "online", "TENT, matched"),
    "EATA": Method(by_baseline(eata(1e-2)), 10, "online", "EATA"),
    "EATA, matched": Method(by_baseline(eata(1e-2), matched=True), 10, "online", "EATA, matched"),
    "SAR": Method(by_baseline(sar(3e-2)), 10, "online", "SAR"),
    "CoTTA": Method(by_baseline(cotta(1e-2)), 10, "online", "CoTTA"),
    "MEMO": Method(by_baseline(memo(1e-3)), BATCH, SINGLE, "MEMO"),
    "NEO": Method(by_baseline(neo), 10, "online", "NEO"),
    "NEO, matched": Method(by_baseline(neo, matched=True), 10, "online", "NEO, matched"),
}

MANY = 50  # images of a batch: batch norm's statistics of ten would be mostly noise


def on_batches(build: Callable[[Setting], Baseline], family: str, matched: bool = False) -> Method:
    return Method(by_baseline(build, matched), MANY, "online", family)


# on CIFAR-10. Learning rates were chosen on the ResNet's validation images: TENT's from 3e-4, 1e-3 and 3e-3, EATA's from 1e-3 and 3e-3;
# SAR's 3e-3 is the only one tried. They differ by 0.2 points at most. CoTTA's from 3e-4 to 1e-2 make no difference, and MEMO's from 1e-4 to
# 3e-3 differ by 0.5 points. At digits-C's rate DUSA gains next to nothing and harms clean images (docs/log.md). PAPER has 36 pairs in place
# of 180.
CIFAR: dict[str, Method] = {
    **METHODS,
    "PAPER": Method(by_adapter(PAPER.replace(pairs=36)), BATCH, SINGLE, "PAPER"),
    "DUSA": Method(by_adapter(DUSA.replace(lr=1e-5), answer_first=True), 10, "online", "DUSA"),
    "DUSA, matched": Method(by_adapter(DUSA.replace(lr=1e-5, match="both"), answer_first=True), 10, "online", "DUSA, matched"),
    "CoTTA": on_batches(cotta(1e-3, mirrored), "CoTTA"),
    "MEMO": Method(by_baseline(memo(1e-3, mirrored)), BATCH, SINGLE, "MEMO"),
    "batch statistics": on_batches(batch_statistics, "batch statistics"),
    "batch statistics, matched": on_batches(batch_statistics, "batch statistics, matched", matched=True),
    "TENT": on_batches(tent(3e-3), "TENT"),
    "TENT, matched": on_batches(tent(3e-4), "TENT, matched", matched=True),
    "EATA": on_batches(eata(1e-3), "EATA"),
    "EATA, matched": on_batches(eata(3e-3), "EATA, matched", matched=True),
    "SAR": on_batches(sar(3e-3), "SAR"),
}

SEEN = {"templates": ("a photo of the number {}.",), "diffusion_template": "a photo of the number {}."}
UNKNOWN = {"templates": ("my drawing: {}",), "diffusion_template": "my drawing: {}"}  # words that no training prompt had
WHOLE = FAST.replace(guard=14)  # at most 20 evaluations per image: more images need a guard here than on digits-C
UNMATCHED: dict[str, Any] = {"match": "off", "precheck": "off"}
LORA = WHOLE.replace(parameters="lora", lr=5e-3)

# on CLIP and Stable Diffusion; "a photo of a {}." is not one of their training templates, but all of its words were seen in training
ZERO_SHOT: dict[str, Method] = {
    "source": Method(zero_shot(METHODS["source"].make), BATCH, SINGLE, "source"),
    "matched alone": Method(zero_shot(METHODS["matched alone"].make), BATCH, SINGLE, "matched alone"),
    "FAST": Method(zero_shot(by_adapter(FAST)), BATCH, SINGLE, "FAST"),
    "guard of 14, whole image tower": Method(zero_shot(by_adapter(WHOLE)), BATCH, SINGLE, "FAST"),
    "guard of 14, LoRA": Method(zero_shot(by_adapter(LORA)), BATCH, SINGLE, "FAST, LoRA"),
    "guard of 14, LoRA on both towers": Method(zero_shot(by_adapter(LORA), towers="both"), BATCH, SINGLE, "FAST, LoRA"),
    "guard of 14, LoRA on CLIP and UNet": Method(
        zero_shot(by_adapter(LORA.replace(denoiser_parameters="lora", denoiser_lr=1e-4))), BATCH, SINGLE, "FAST, LoRA"
    ),
    "guard of 14, unmatched, whole image tower": Method(
        zero_shot(by_adapter(WHOLE.replace(**UNMATCHED))), BATCH, SINGLE, "FAST, unmatched"
    ),
    "guard of 14, unmatched, LoRA": Method(zero_shot(by_adapter(LORA.replace(**UNMATCHED))), BATCH, SINGLE, "FAST, unmatched"),
    "source, prompt of the training": Method(zero_shot(METHODS["source"].make, **SEEN), BATCH, SINGLE, "source"),
    "guard of 14, LoRA, prompt of the training": Method(zero_shot(by_adapter(LORA), **SEEN), BATCH, SINGLE, "FAST, LoRA"),
    "source, unknown words": Method(zero_shot(METHODS["source"].make, **UNKNOWN), BATCH, SINGLE, "source"),
    "guard of 14, LoRA, unknown words": Method(zero_shot(by_adapter(LORA), **UNKNOWN), BATCH, SINGLE, "FAST, LoRA"),
}
