"""Loads the models of runs and commands by name: from the zoo, timm, folders or hub ids."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from dtta_fast import zoo
from dtta_fast.data.imagenet import imagenet_classes
from dtta_fast.denoisers.base import Denoiser
from dtta_fast.denoisers.calibration import Calibration
from dtta_fast.denoisers.dit import DiT
from dtta_fast.denoisers.reading import OF_VALUES, download, read_json, read_model
from dtta_fast.denoisers.weights import check_pointers
from dtta_fast.runs.writing import check_name
from dtta_fast.tasks import Classification, Depth, Segmentation, Task
from dtta_fast.tasks.image_classifier import ImageClassifier
from dtta_fast.tasks.transforms import processed_size

if TYPE_CHECKING:
    from dtta_fast.denoisers.diffusers_network import DiffusersDenoiser
    from dtta_fast.denoisers.prompts import PromptDenoiser
    from dtta_fast.runs.config import RunConfig

ZOO = {"classification": "digits", "zero_shot": "open_vocabulary", "segmentation": "segmentation", "depth": "depth"}
# the beginning of a diffusers pipeline's name, the longer ones first, and its denoiser
TEXT_TO_IMAGE = {
    "StableDiffusionXL": "StableDiffusionXL",
    "StableDiffusion3": "StableDiffusion3",
    "StableDiffusion": "StableDiffusion",
    "PixArtAlpha": "PixArt",
    "PixArtSigma": "PixArtSigma",
    "SanaPipeline": "Sana",
}


class Models(NamedTuple):
    """The models of a run. outputs: the model's output for each class of the data set, if their names show it."""

    model: nn.Module
    denoiser: Denoiser
    task: Task
    outputs: list[int] | None = None


def load_models(run: RunConfig, classes: Sequence[str] = (), outputs: Sequence[int] | None = None) -> Models:
    """Loads the model, denoiser and task onto the run's device, in eval mode.

    Args:
        classes: the data set's class names, for zero_shot and Stable Diffusion. outputs: the model's classes that the data set covers.

    Raises:
        ValueError, FileNotFoundError: a model cannot be read, or the task lacks class names.
    """
    names = list(run.classes or classes)
    if outputs is not None and not run.classes and run.task == "classification":
        names = list(imagenet_classes())  # the denoiser has a class for each of the model's outputs, not only for those of the data set
    model, task = _model(run, names, outputs)
    by_name = outputs_by_name(model, run.classes, classes) if run.task in ("classification", "zero_shot") and outputs is None else None
    if by_name is not None and (not run.classes or sorted(run.classes) == sorted(classes)):  # other names are prompts
        names = [name for _, name in sorted(zip(by_name, classes, strict=True))]
    denoiser = _denoiser(run, names)
    if run.calibration is not None:
        denoiser.calibration = Calibration.load(run.calibration, denoiser)
    return Models(model.to(run.device).eval(), denoiser.to(run.device, getattr(torch, run.dtype)).eval(), task, by_name)


def load_classifier(name: str) -> nn.Module:
    """Loads a classifier of timm or transformers on the CPU, in eval mode.

    Args:
        name: a timm model name, hf-hub:ID, local-dir:FOLDER, or just the folder, which must hold config.json and weights in timm's format;
            or a folder or hub id of a transformers image classifier with its preprocessor_config.json.

    Raises:
        ValueError: the classifier cannot be loaded; the message gives the reason.
    """
    import timm

    check_name("model", name)
    local = name.partition("local-dir:")[2]
    if local and not os.path.isdir(local):
        raise ValueError(
            f"model is {name!r}, and there is no folder {local!r}: give one that holds config.json and weights in timm's format"
        )
    if _is_transformers_model(name):
        import transformers

        loaded = read_model(transformers.AutoModelForImageClassification, name, trust_remote_code=False).float()
        return ImageClassifier(loaded.eval(), _image_processor(name)).eval()
    check_pointers(local or name)
    place = f"local-dir:{name}" if os.path.isdir(name) else f"hf-hub:{name}" if _is_hub_id(name) else name
    try:
        model: nn.Module = timm.create_model(place, pretrained=True)
    except Exception as error:  # timm and safetensors raise many exception types for unknown names and damaged files
        remedy = "give a folder in timm's or transformers' format, or a name of timm.list_models(pretrained=True)"
        raise ValueError(f"model is {name!r}, which timm cannot load ({type(error).__name__}: {error}); {remedy}") from error
    return model.eval()


def _is_transformers_model(name: str) -> bool:
    """Returns whether a folder is a transformers model's, or a name can be a transformers model's hub id: OWNER/NAME."""
    if os.path.isdir(name):
        config = _described(name, "config.json")
        return "model_type" in config and "architecture" not in config
    return _is_hub_id(name) and "architecture" not in _described(name, "config.json")


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and ":" not in name and not os.path.exists(name)


def load_pair(model: str | None, denoiser: str | None, *, calibration: bool = True) -> tuple[nn.Module, Denoiser]:
    """Loads a classifier and a denoiser on the CPU, in eval mode.

    Args:
        model: a name as for load_classifier. denoiser: folder or hub id of a DiT or a class-conditional UNet. Without both, the digits
            zoo is loaded. calibration: if False, the denoiser's calibration.json is not read.

    Raises:
        ValueError, OSError: only one of the two is given, or one cannot be read.
    """
    if model is None and denoiser is None:
        return zoo.load_model("digits"), DiT.from_pretrained(zoo.folder("digits") / "denoiser", calibration=calibration).eval()
    if model is None or denoiser is None:
        given, missing = ("model", "denoiser") if denoiser is None else ("denoiser", "model")
        raise ValueError(
            f"{given} is {model or denoiser!r}, and the {missing} is the digits zoo's: the zoo's two models go together, so give your own "
            f"--{missing} too, or neither"
        )
    classifier = load_classifier(model)
    if takes_prompts(denoiser):
        raise ValueError(f"denoiser is {denoiser!r}, which takes prompts, and model {model!r} none: give a DiT of the model's classes")
    return classifier, load_denoiser(denoiser, calibration=calibration).eval()


def load_denoiser(
    place: str, names: Sequence[str] | Mapping[str, Sequence[str]] = (), *, calibration: bool = True
) -> DiT | DiffusersDenoiser:
    """Loads a DiT, a class-conditional UNet, or a text-to-image model with one prompt per name, on the CPU; its files decide which.

    Args:
        place: a folder or a hub id. names: class names, or the prompts of each by name, which a text-to-image model requires.
            calibration: if False, calibration.json is not read.

    Raises:
        ValueError, FileNotFoundError: the denoiser cannot be read, or class names are missing.
    """
    if not takes_prompts(place):
        if not _is_class_unet(place):
            return DiT.from_pretrained(place, calibration=calibration)
        from dtta_fast.denoisers.class_unet import ClassUNet

        return ClassUNet.from_pretrained(place, calibration=calibration)
    from dtta_fast.denoisers.prompts import check_names

    if not names:
        raise ValueError(f"denoiser is {place!r}, which takes prompts, and no classes are named: give --classes")
    check_names("classes", list(names))
    prompts = list(names.values()) if isinstance(names, Mapping) else [f"a photo of a {name}." for name in names]
    return load_text_to_image(place, calibration=calibration).with_classes(prompts)


def load_text_to_image(place: str, *, dtype: torch.dtype = torch.float32, calibration: bool = True) -> PromptDenoiser:
    """Loads a text-to-image model on the CPU, without classes; its model_index.json decides of which kind it is.

    Args: same as for load_denoiser. dtype: of the weights.

    Raises:
        ValueError, FileNotFoundError: the model cannot be read, or is of a kind that is not supported.
    """
    from dtta_fast import denoisers

    check_name("denoiser", place)
    index = _described(place, "model_index.json")
    if not index:
        raise FileNotFoundError(
            f"denoiser is {place!r}, where model_index.json is missing; give the folder that a diffusers pipeline's save_pretrained() wrote"
        )
    name = str(index.get("_class_name"))
    kind = next((kind for prefix, kind in TEXT_TO_IMAGE.items() if name.startswith(prefix)), None)
    if kind is None:
        raise ValueError(
            f"denoiser is {place!r}, a {name[:80]}, which dtta_fast cannot condition on a mixture of classes; it takes pipelines of "
            f"{', '.join(TEXT_TO_IMAGE.values())}"
        )
    own: type[Any] = getattr(denoisers, kind)
    loaded: PromptDenoiser = own.from_pretrained(place, dtype=dtype, calibration=calibration)
    return loaded


def takes_prompts(place: str) -> bool:
    """Returns whether a folder or hub id holds a text-to-image model, according to its model_index.json.

    Raises:
        FileNotFoundError: `place` is not a folder, and the hub has no such model. ValueError: the file is damaged, or `place` cannot be
        a file name.
    """
    check_name("denoiser", place)
    index = _described(place, "model_index.json")
    return "text_encoder" in index or str(index.get("_class_name", "")).startswith(tuple(TEXT_TO_IMAGE))


def _is_class_unet(place: str) -> bool:
    """Returns whether a folder or hub id holds a ClassUNet, or a diffusers pipeline of a UNet2DModel."""
    part = _described(place, "model_index.json").get("unet")
    return part == ["diffusers", "UNet2DModel"] or _described(place, "config.json").get("_class_name") == "ClassUNet"


def _described(place: str, name: str) -> dict[str, Any]:
    """Reads a JSON file of a folder or hub id; empty if it has no such file."""
    folder = Path(place)
    if not folder.is_dir():
        folder = download(place, [name])
    return read_json(folder / name) if (folder / name).is_file() else {}


def outputs_by_name(model: nn.Module, given: Sequence[str], classes: Sequence[str]) -> list[int] | None:
    """Returns the model's output for each of a data set's class names; None if the names do not show it.

    given: the class names in the order of the model's outputs. Without them, the names in the model's timm config are compared.
    """
    config = getattr(model, "pretrained_cfg", None) or {}
    names, told = [str(name) for name in config.get("label_names") or ()], config.get("label_descriptions") or {}
    described = [str(told.get(name, name)) for name in names] if isinstance(told, dict) else []
    for order in (list(given), names, described):
        if len(set(order)) == len(order) and order and sorted(order) == sorted(classes):
            return [order.index(name) for name in classes]
    return None


def class_names(model: nn.Module, classes: int) -> list[str]:
    """Returns readable class names for a timm model: those of its config, else ImageNet's if the number of classes matches, else numbers.

    All names are unique: if several classes share a name, each gets its class number appended.
    """
    from timm.data import ImageNetInfo, infer_imagenet_subset

    config = getattr(model, "pretrained_cfg", None) or {}
    names = [str(name) for name in config.get("label_names") or ()]
    told = config.get("label_descriptions") or {}
    subset = infer_imagenet_subset(model)
    if len(names) == classes:
        names = [str(told.get(name, name)) if isinstance(told, dict) else name for name in names]
    elif subset is not None:
        names = ImageNetInfo(subset).label_descriptions()
    if len(names) != classes:
        return [str(k) for k in range(classes)]
    counts = Counter(names)
    return [name if counts[name] == 1 else f"{name} ({k})" for k, name in enumerate(names)]


def image_size(task: str, model: str) -> int | None:
    """Returns the input side length in pixels of a segmentation or depth model; None for other tasks, which crop the image themselves.

    Raises:
        ValueError: the model's image processor fails on an image, or makes a square image oblong.
    """
    if task not in ("segmentation", "depth"):
        return None
    processor = _processor(task, model)
    try:
        height, width = processed_size(processor)
    except OF_VALUES as error:
        raise ValueError(f"model is {model!r}, whose image processor cannot be used; see preprocessor_config.json: {error}") from error
    if height != width:
        raise ValueError(f"model is {model!r}, whose image processor makes a square image {height}x{width}; images and maps need one side")
    return height


def _model(run: RunConfig, names: list[str], outputs: Sequence[int] | None) -> tuple[nn.Module, Task]:
    own = zoo.folder(ZOO[run.task]) if run.model == "zoo" else None
    if run.task == "classification":
        task = Classification(subset=outputs)
        return (zoo.load_model("digits") if own else load_classifier(run.model)), task
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
    loaded: nn.Module = read_model(getattr(transformers, loader), run.model, trust_remote_code=False).float()
    return loaded, kind(processor)


def _processor(task: str, model: str) -> Any:
    return zoo.load_processor(ZOO[task]) if model == "zoo" else _image_processor(model)


def _image_processor(model: str) -> Any:
    from transformers import AutoImageProcessor

    try:  # without trust_remote_code, transformers would prompt at the terminal
        return AutoImageProcessor.from_pretrained(model, trust_remote_code=False)
    except (OSError, *OF_VALUES) as error:
        raise ValueError(f"model is {model!r}, whose image processor cannot be read: {error}") from error


def _denoiser(run: RunConfig, names: list[str]) -> Denoiser:
    place, read = run.denoiser, run.calibration is None
    if run.task in ("segmentation", "depth"):
        from dtta_fast.denoisers.concat_unet import ConcatUNet

        return ConcatUNet.from_pretrained(zoo.folder(ZOO[run.task]) / "denoiser" if place == "zoo" else place, calibration=read)
    if run.task == "zero_shot":
        return load_text_to_image(str(zoo.folder("open_vocabulary") / "diffusion") if place == "zoo" else place, calibration=read)
    return load_denoiser(str(zoo.folder("digits") / "denoiser") if place == "zoo" else place, names, calibration=read)
