"""Image classification: softmax(logits) mixes the denoiser's class embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtta_fast.config import AdaptConfig
from dtta_fast.denoisers.base import Denoiser
from dtta_fast.kernels import mix_condition
from dtta_fast.kernels.philox import class_uniforms
from dtta_fast.runtime.constants import numbers
from dtta_fast.runtime.reads import Checks
from dtta_fast.runtime.trial import warn_of_foreign_config
from dtta_fast.runtime.warn import warn
from dtta_fast.tasks.base import ClassTask
from dtta_fast.tasks.image_classifier import ImageClassifier, is_of_transformers
from dtta_fast.tasks.transforms import Transform, timm_transforms

CLASSIFIER = "Classification(AutoImageProcessor.from_pretrained(..)), or crop= and normalise="
TASKS = {  # parts of the names of transformers' models, and the task to give
    "SemanticSegmentation": "Segmentation(AutoImageProcessor.from_pretrained(..))",
    "DepthEstimation": "Depth(AutoImageProcessor.from_pretrained(..))",
    "CLIP": "ZeroShot(class_names, CLIPProcessor.from_pretrained(..))",
    "Siglip": "ZeroShot(class_names, AutoProcessor.from_pretrained(..))",
}


class Classification(ClassTask):
    """Classification with any module that maps images to logits [B, K].

    Size, crop and normalisation come from the model's timm config, or from `processor`. A module with neither gets the images unchanged,
    in [0, 1], unless transforms are given.

    Args:
        processor: the image processor of a transformers classifier, or for a torchvision model its weights.transforms().
        crop: maps images [B, 3, H, W] in [0, 1] to the crop that the model and the denoiser see.
        normalise: maps a crop to the model's input.
        subset: indices of the possible classes, for data known to have only some of the model's and the denoiser's classes, such as
            ImageNet-R with 200. The other classes are ignored and never predicted. None means all classes.

    Raises:
        ValueError: subset has fewer than two indices, or a repeated or negative one.
    """

    def __init__(
        self,
        processor: Any = None,
        *,
        crop: Transform | None = None,
        normalise: Transform | None = None,
        subset: Sequence[int] | None = None,
    ) -> None:
        self._processor, self._crop = processor, crop
        self._looked = False  # whether a first crop was compared with the model's config
        self._normalise = normalise
        if subset is not None and (
            len(subset) < 2 or len(set(subset)) != len(subset) or any(not hasattr(k, "__index__") or k < 0 for k in subset)
        ):
            raise ValueError(f"subset is {list(subset)[:5]}; give at least two different numbers of the model's classes, starting at 0")
        self._subset = None if subset is None else tuple(map(int, subset))

    def bind(self, model: nn.Module, denoiser: Denoiser) -> tuple[nn.Module, Denoiser]:
        """Returns the model, wrapped if it has a processor, and the denoiser.

        Raises:
            ValueError: a transformers model has neither a processor nor transforms.
        """
        if self._processor is not None and not isinstance(model, ImageClassifier):
            return ImageClassifier(model, self._processor), denoiser
        if is_of_transformers(model):
            if self._crop is not None and self._normalise is not None:
                return ImageClassifier(model), denoiser
            name = type(model).__name__
            task = CLASSIFIER if "ImageClassification" in name else next((TASKS[part] for part in TASKS if part in name), CLASSIFIER)
            raise ValueError(f"model is transformers' {name}, which does not hold its preprocessing; give task={task}")
        if self._crop is None and self._normalise is None and not isinstance(model, ImageClassifier):
            _warn_of_raw_images(model)
        return model, denoiser

    def crop(self, model: nn.Module, images: Tensor) -> Tensor:
        crop = (self._crop or _transforms(model)[0])(images)
        if self._crop is None and not self._looked:
            self._looked = True
            warn_of_foreign_config(model, images, crop)
        return crop

    def normalise(self, model: nn.Module, crop: Tensor) -> Tensor:
        return (self._normalise or _transforms(model)[1])(crop)

    def check(self, outputs: Tensor, denoiser: Denoiser, config: AdaptConfig, checks: Checks) -> None:
        """Raises ValueError if outputs are not logits [B, K], or if K does not fit the denoiser's table."""
        classes = len(denoiser.class_embeddings({}))
        if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
            raise ValueError(f"model returns a {type(outputs).__name__}; a classifier returns floating-point logits [B, K]")
        if outputs.layout != torch.strided:
            raise ValueError(f"model returns a {outputs.layout} tensor; a classifier returns dense logits [B, K]")
        if outputs.ndim != 2:
            raise ValueError(f"model returns shape {tuple(outputs.shape)}; a classifier returns logits [B, K]")
        if outputs.shape[1] < 2:
            raise ValueError(
                "model returns 1 logit for each image, and with one class there is nothing to decide; for a yes-or-no logit z, return "
                "[0, z]: torch.cat([torch.zeros_like(z), z], dim=1)"
            )
        if outputs.shape[1] != classes:
            raise ValueError(f"model has {outputs.shape[1]} classes and denoiser has embeddings for {classes}; both need the same classes")
        if self._subset is not None and max(self._subset) >= classes:
            raise ValueError(f"subset names class {max(self._subset)}, and the model has 0 .. {classes - 1}")
        if config.logit_scale is not None:
            error = (
                "model returns logits of -inf, which logit_scale cannot scale: leave it out, or mask classes by Classification(subset=...)"
            )
            checks.require(~outputs.isneginf().any(), lambda: error)

    def choose(self, outputs: Tensor, config: AdaptConfig, image_ids: Tensor, step: Tensor) -> Tensor | None:
        if config.top_k is None:
            return None
        outputs = self._allowed(outputs.detach())
        best = outputs.topk(config.top_k, dim=1).indices
        if not config.drawn_classes:
            return best
        # the top entries of log p + Gumbel noise are a sample without replacement from p (Kool et al. 2019, arXiv 1903.06059)
        uniforms = class_uniforms(outputs.shape[1], image_ids, config.seed, step)
        scores = outputs.double().log_softmax(1) - (-uniforms.log()).log()
        scores = scores.clamp(min=torch.finfo(scores.dtype).min)  # rank masked classes (-inf) last, but above those of `best`
        drawn = scores.scatter(1, best, -torch.inf).topk(config.drawn_classes, dim=1).indices
        return torch.cat([best, drawn], dim=1)

    def class_count(self, denoiser: Denoiser) -> int:
        return len(denoiser.class_embeddings({})) if self._subset is None else len(self._subset)

    def condition(
        self, outputs: Tensor, denoiser: Denoiser, moving: Mapping[str, Tensor], config: AdaptConfig, chosen: Tensor | None = None
    ) -> Tensor:
        outputs, (table, per_image) = self._allowed(outputs), self._table(denoiser, moving)
        if not config.drawn_classes or chosen is None:
            return mix_condition(outputs, table, config.top_k, config.logit_scale, per_image)
        logits = scaled(outputs, config.logit_scale).gather(1, chosen)
        return mix_condition(logits, _gathered(table, chosen, per_image), per_image=True)

    def class_conditions(
        self, outputs: Tensor, denoiser: Denoiser, moving: Mapping[str, Tensor], config: AdaptConfig, chosen: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        outputs, (table, per_image) = self._allowed(outputs), self._table(denoiser, moving)
        if chosen is None:
            chosen = torch.arange(outputs.shape[1], dtype=torch.int64, device=outputs.device).expand(len(outputs), -1)
        return scaled(outputs, config.logit_scale).gather(1, chosen).softmax(1), _gathered(table, chosen, per_image)

    def _table(self, denoiser: Denoiser, moving: Mapping[str, Tensor]) -> tuple[Tensor, bool]:
        """Returns the embeddings of the allowed classes, and whether there is one table per image (the denoiser adapts per image)."""
        table = denoiser.class_embeddings(moving)
        per_image = table.ndim > denoiser.class_embeddings({}).ndim
        if self._subset is not None:
            table = table.index_select(int(per_image), _rows(self._subset, table.device))
        return table, per_image

    def _allowed(self, outputs: Tensor) -> Tensor:
        """Returns the logits of the allowed classes: [B, K], K the number of allowed classes."""
        return outputs if self._subset is None else outputs[:, _rows(self._subset, outputs.device)]

    def possible(self, outputs: Tensor) -> Tensor:
        """Returns a mask [B, K] of the allowed classes."""
        if self._subset is None:
            return torch.ones_like(outputs, dtype=torch.bool)
        return torch.zeros_like(outputs, dtype=torch.bool).index_fill(1, _rows(self._subset, outputs.device), True)

    def decision(self, outputs: Tensor, denoiser: Denoiser) -> Tensor:
        return denoiser.class_embeddings({})[self.predict(outputs, (0, 0))]

    def predict(self, outputs: Tensor, size: tuple[int, int]) -> Tensor:
        answers = self._allowed(outputs).argmax(dim=1)
        return answers if self._subset is None else _rows(self._subset, answers.device)[answers]


def _warn_of_raw_images(model: nn.Module) -> None:
    """Warns if a model gets images that are not normalised, and was probably trained on normalised ones: it is torchvision's, or a part of
    it has a timm config."""
    if getattr(model, "pretrained_cfg", None):
        return
    if type(model).__module__.startswith("torchvision.models"):
        warn(
            f"model is torchvision's {type(model).__name__}, which does not hold its preprocessing: it gets images in [0, 1] as they are, "
            "neither cropped nor normalised; give task=Classification(weights.transforms()), or Classification(crop=..., normalise=...). "
            "If you trained it on images in [0, 1], normalise=lambda crop: crop says so"
        )
    part = next((name for name, part in model.named_modules() if isinstance(getattr(part, "pretrained_cfg", None), dict) and name), None)
    if part is not None:
        warn(
            f"model, a {type(model).__name__}, has no timm config, and its part {part} has: it gets images in [0, 1] as they are, neither "
            f"cropped nor normalised; set model.pretrained_cfg to that of {part}, or give Classification(crop=..., normalise=...). If it "
            "normalises by itself, normalise=lambda crop: crop says so"
        )


def _transforms(model: nn.Module) -> tuple[Transform, Transform]:
    return model.transforms if isinstance(model, ImageClassifier) else timm_transforms(model)


def scaled(outputs: Tensor, logit_scale: float | None) -> Tensor:
    """Scales logits [B, K], or per-pixel logits [B, K, h, w], in the same way as mix_condition."""
    return outputs if logit_scale is None else logit_scale * F.normalize(outputs, dim=1)


def _gathered(table: Tensor, chosen: Tensor, per_image: bool) -> Tensor:
    """Gathers rows [B, M, ...] from one table [K, ...] or from a table per image."""
    return table[torch.arange(len(chosen), dtype=torch.int64, device=chosen.device)[:, None], chosen] if per_image else table[chosen]


def _rows(subset: tuple[int, ...], device: torch.device) -> Tensor:
    return numbers(subset, device, torch.int64)
