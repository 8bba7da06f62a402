"""Readers shared by the supported folder formats: JSON files, schedulers, models, and downloads from the Hugging Face Hub."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn

from dtta_fast.denoisers.base import AUTOENCODERS
from dtta_fast.denoisers.calibration import Calibration
from dtta_fast.denoisers.noise_process import NoiseProcess
from dtta_fast.denoisers.weights import check_pointers
from dtta_fast.runtime.files import read_text

CALIBRATION = "calibration.json"
# what the libraries' constructors raise for invalid config values; torch also raises RuntimeError for sizes that do not fit in memory
OF_VALUES = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, ImportError, RuntimeError, MemoryError)
# names of weight files, of which the libraries put the variant before the ending or before the number of the part
OF_WEIGHTS = re.compile(r"(?:model|diffusion_pytorch_model)(?:\.([a-zA-Z]\w*))?(?:-\d+-of-\d+)?\.safetensors")
PRECISIONS = ("fp32", "fp16", "bf16")  # variants of the same weights, those with more digits first
MOST_TIMESTEPS = 100_000  # the most timesteps of a schedule; its table has one row for each


def read_scheduler(folder: Path) -> Any:
    """Reads folder/scheduler as the diffusers scheduler that its config names.

    Raises:
        FileNotFoundError, ValueError: there is none, or its config describes no scheduler.
    """
    import diffusers

    path = folder / "scheduler" / "scheduler_config.json"
    config = read_json(path)
    name = str(config.get("_class_name"))
    if not name.endswith("Scheduler") or not hasattr(diffusers, name):
        raise ValueError(f"{path} names {name}, which is not a scheduler of diffusers")
    count = config.get("num_train_timesteps", 1000)
    if type(count) is not int or not 1 <= count <= MOST_TIMESTEPS:
        raise ValueError(f"{path} has num_train_timesteps {str(count)[:40]}; give a whole number from 1 to {MOST_TIMESTEPS}")
    try:
        return getattr(diffusers, name).from_config(config)
    except OF_VALUES as error:
        raise ValueError(f"{path} describes no noise process: {error}") from error


def read_process(folder: Path) -> NoiseProcess:
    """Reads the noise schedule from folder/scheduler (see read_scheduler)."""
    scheduler = read_scheduler(folder)
    try:
        return NoiseProcess.from_scheduler(scheduler)
    except OF_VALUES as error:
        raise ValueError(f"{folder / 'scheduler' / 'scheduler_config.json'} describes no noise process: {error}") from error


def read_calibration(folder: Path, denoiser: nn.Module) -> Calibration | None:
    """Reads a folder's calibration.json; returns None if there is none.

    Raises:
        ValueError: the file is damaged, or belongs to another denoiser.
    """
    return Calibration.load(folder / CALIBRATION, denoiser) if os.path.isfile(folder / CALIBRATION) else None


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Raises:
        FileNotFoundError: the file does not exist. ValueError: the file is not JSON, or not a JSON object.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is missing")
    try:
        config = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no JSON object")
    return config


def read_model(kind: Any, folder: str | Path, **keywords: Any) -> Any:
    """Loads a complete diffusers or transformers model from a folder.

    If the folder has weights in one variant only, such as fp16, and no variant is asked for, that one is read.

    Raises:
        ValueError: the model cannot be read, or weights are missing, which the libraries would initialise randomly.
    """
    if keywords.get("variant") is None and (variant := only_variant(Path(folder))):
        keywords["variant"] = variant
    check_pointers(folder)
    try:
        model, found = kind.from_pretrained(folder, output_loading_info=True, **keywords)
    except (OSError, SafetensorError, StrictDataclassError, *OF_VALUES) as error:
        raise ValueError(f"{folder} cannot be read as a {kind.__name__}: {error}") from error
    lacking = sorted(map(str, found["missing_keys"]))
    if lacking:
        raise ValueError(
            f"{folder} lacks weights of a {kind.__name__}: {', '.join(lacking[:5])}{' and others' if len(lacking) > 5 else ''}"
        )
    return model


def only_variant(folder: Path) -> str | None:
    """Returns the variant of a folder's weights, such as "fp16", if they exist in no plain form and in one variant, or in PRECISIONS.

    Weights without a moving average ("non_ema") are never chosen by themselves.
    """
    if any(folder.glob("*.bin*")):
        return None
    found = {match[1] for path in folder.glob("*.safetensors") if (match := OF_WEIGHTS.fullmatch(path.name))} - {"non_ema"}
    if len(found) == 1:
        return found.pop()
    return next((name for name in PRECISIONS if name in found), None) if found <= set(PRECISIONS) else None


def autoencoder_kind(folder: Path) -> Any:
    """Returns the diffusers class of the autoencoder in a folder, as its config.json names it.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it names a class that we cannot encode with.
    """
    import diffusers

    name = read_json(folder / "config.json").get("_class_name", "AutoencoderKL")
    if name not in AUTOENCODERS:
        raise ValueError(f"{folder / 'config.json'} names {str(name)[:40]!r}; an autoencoder is one of {', '.join(sorted(AUTOENCODERS))}")
    return getattr(diffusers, name)


def read_networks(folder: Path, kind: Any = None) -> dict[str, Any]:
    """Reads a folder's UNet and, if it has one, its autoencoder, in float32: {"unet": .., "vae": ..}.

    kind: the UNet's class; None is UNet2DModel.

    Raises:
        FileNotFoundError, ValueError: one cannot be read.
    """
    from diffusers import UNet2DModel

    kinds = {"unet": kind or UNet2DModel} | ({"vae": autoencoder_kind(folder / "vae")} if (folder / "vae").is_dir() else {})
    return {name: read_model(kind, folder / name, use_safetensors=True, torch_dtype=torch.float32) for name, kind in kinds.items()}


def read_component(folder: Path, kind: str, variant: str | None, dtype: torch.dtype) -> Any:
    """Reads a network or a tokenizer of a pipeline, by the name of its class in diffusers or transformers.

    Raises:
        FileNotFoundError, ValueError: it is missing or damaged.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing, which holds a {kind}")
    import diffusers
    import transformers

    found: Any = getattr(diffusers, kind, None) or getattr(transformers, kind)
    if "Tokenizer" in kind:
        try:
            return found.from_pretrained(folder)
        except Exception as error:  # the Rust tokenizers raise a plain Exception
            raise ValueError(f"{folder} cannot be read as a {kind}: {error}") from error
    network = read_model(found, folder, variant=variant, use_safetensors=True, dtype=dtype)
    if kind == "UNet2DConditionModel":
        network.to(memory_format=torch.channels_last)  # convolutions run in this format and need no weight conversion
    return network.eval()


def download(model_id: str, patterns: list[str], without: list[str] | None = None, argument: str = "path") -> Path:
    """Downloads a model from the Hugging Face Hub and returns its folder.

    Only files that match `patterns` and not `without` are downloaded. `argument` is the name of the argument that held the id, for errors.

    Raises:
        FileNotFoundError: the Hub has no such model, or cannot be reached. ValueError: the id is a file here, or no valid Hub id.
    """
    if os.path.exists(model_id):
        raise ValueError(f"{argument} is {model_id!r}, a file; give the folder that holds the model's config.json and weights")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(model_id, allow_patterns=patterns, ignore_patterns=without))
        if not any("safetensors" in pattern for pattern in patterns):  # no weights are wanted
            return folder
        if without and not any(folder.rglob("*.safetensors")):  # in variants only
            folder = Path(snapshot_download(model_id, allow_patterns=patterns))
        if not any(folder.rglob("*.safetensors")):  # an older model; diffusers loads its .bin files with weights_only
            folder = Path(snapshot_download(model_id, allow_patterns=[*patterns, "*.bin"], ignore_patterns=without))
        return folder
    except HFValidationError as error:
        raise ValueError(f"{argument} is {model_id!r}: there is no such folder, and it cannot be a hub id ({_line(error)})") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(f"{model_id}: there is no such folder, and the hub gave no model of that id ({_line(error)})") from error


def _line(error: Exception) -> str:
    """Returns an error's message in one line."""
    return " ".join(str(error).split())


def download_pipeline(model_id: str, networks: list[str], variant: str | None) -> Path:
    """Downloads a pipeline of diffusers: its settings, tokenizers, and the weights of these networks in one variant; see download()."""
    kept = ["*"] if variant is None else [f"*.{variant}", f"*.{variant}-*"]  # the second is one part of several
    names = [f"*.{name}{end}*" for name in ("fp16", "bf16", "non_ema") for end in ".-"]
    others = names if variant is None else None  # gigabytes that would not be used
    return download(model_id, ["*.json", "*.txt", "*.model", *(f"{name}/{end}.safetensors" for name in networks for end in kept)], others)
