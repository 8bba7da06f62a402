"""The models of a run, from the zoo, folders or hub ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from dtta_fast import zoo
from dtta_fast.calibration import Calibration
from dtta_fast.denoisers.base import Denoiser
from dtta_fast.denoisers.reading import download, read_json
from dtta_fast.runs.config import RunConfig
from dtta_fast.tasks import Classification, Depth, Segmentation, Task

ZOO = {"classification": "digits", "zero_shot": "open_vocabulary", "segmentation": "segmentation", "depth": "depth"}


class Models(NamedTuple):
    model: nn.Module
    denoiser: Denoiser
    task: Task


def load_models(run: RunConfig, classes: Sequence[str] = (), outputs: Sequence[int] | None = None) -> Models:
    """Model, denoiser and task on the run's device, in eval mode.

    Args:
        classes: the data set's names, for zero_shot and for a Stable Diffusion. outputs: the model's classes that the data set covers.

    Raises:
        ValueError, FileNotFoundError: a model cannot be read, or the task lacks names.
    """
    names = list(run.classes or classes)
    model, task = _model(run, names, outputs)
    denoiser = _denoiser(run, names)
    if run.calibration is not None:
        denoiser.calibration = Calibration.load(run.calibration, denoiser)
    return Models(model.to(run.device).eval(), denoiser.to(run.device, getattr(torch, run.dtype)).eval(), task)


def image_size(task: str, model: str) -> int | None:
    """Pixels of a side of what a model of maps looks at; None for others, whose task crops."""
    if task not in ("segmentation", "depth"):
        return None
    processor = _processor(task, model)
    size = processor.size
    found: int = size["height"] if "height" in size else size["shortest_edge"]
    return found


def _model(run: RunConfig, names: list[str], outputs: Sequence[int] | None) -> tuple[nn.Module, Task]:
    own = zoo.folder(ZOO[run.task]) if run.model == "zoo" else None
    if run.task == "classification":
        task = Classification(subset=outputs)
        return (zoo.load_model("digits") if own else _timm(run.model)), task
    if run.task == "zero_shot":
        from dtta_fast.tasks.zero_shot import ZeroShot, load_clip

        if not names:
            raise ValueError("task is 'zero_shot', and neither the run nor the data set names classes: give --classes")
        clip, processor = load_clip(own / "clip" if own else run.model)
        return clip, ZeroShot(names, processor)
    kind = Segmentation if run.task == "segmentation" else Depth
    processor = _processor(run.task, run.model)
    if own:
        return zoo.load_model(ZOO[run.task]), kind(processor)
    import transformers

    loader = {"segmentation": "AutoModelForSemanticSegmentation", "depth": "AutoModelForDepthEstimation"}[run.task]
    loaded: nn.Module = getattr(transformers, loader).from_pretrained(run.model, trust_remote_code=False).float()
    return loaded, kind(processor)


def _timm(name: str) -> nn.Module:
    """By timm's name, hf-hub id, or a folder in timm's format."""
    import timm

    try:
        model: nn.Module = timm.create_model(f"local-dir:{name}" if Path(name).is_dir() else name, pretrained=True)
    except RuntimeError as error:  # timm's word for an unknown name
        raise ValueError(f"model is {name!r}: {error}; `timm.list_models(pretrained=True)` names those that there are") from error
    return model


def _kind(place: str) -> str:
    """What a pipeline's folder or hub id says that it is; "" where it is none."""
    folder = Path(place)
    if not folder.is_dir():
        folder = download(place, ["model_index.json"])
    return str(read_json(folder / "model_index.json").get("_class_name", "")) if (folder / "model_index.json").is_file() else ""


def _processor(task: str, model: str) -> Any:
    if model == "zoo":
        return zoo.load_processor(ZOO[task])
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(model, trust_remote_code=False)  # left out, transformers asks at the terminal


def _denoiser(run: RunConfig, names: list[str]) -> Denoiser:
    place = run.denoiser
    if run.task in ("segmentation", "depth"):
        from dtta_fast.denoisers.concat_unet import ConcatUNet

        return ConcatUNet.from_pretrained(zoo.folder(ZOO[run.task]) / "denoiser" if place == "zoo" else place)
    if run.task == "zero_shot" or (place != "zoo" and _kind(place).startswith("StableDiffusion")):
        from dtta_fast.denoisers.stable_diffusion import StableDiffusion

        pipeline = StableDiffusion.from_pretrained(zoo.folder("open_vocabulary") / "diffusion" if place == "zoo" else place)
        if run.task == "zero_shot":
            return pipeline
        if not names:
            raise ValueError(f"denoiser {place!r} takes prompts, and neither the run nor the data set names classes: give --classes")
        return pipeline.with_classes([f"a photo of a {name}." for name in names])
    from dtta_fast.denoisers.dit import DiT

    return DiT.from_pretrained(zoo.folder("digits") / "denoiser" if place == "zoo" else place)
