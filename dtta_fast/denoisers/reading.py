"""Reads what folders of the ecosystem's formats have in common: JSON, a scheduler, and where a hub id lies once it is here."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn

from dtta_fast.calibration import Calibration
from dtta_fast.files import read_text
from dtta_fast.process import NoiseProcess

CALIBRATION = "calibration.json"
# what the libraries' constructors make of a config's values of other kinds; a RuntimeError is also torch's for sizes beyond memory
OF_VALUES = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, ImportError, RuntimeError, MemoryError)
MOST_TIMESTEPS = 100_000  # of a schedule: a table has a row for each
WEIGHTS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # what a network's weights are stored as


def read_process(folder: Path) -> NoiseProcess:
    """The schedule of folder/scheduler, by whichever diffusers class its config names."""
    import diffusers

    path = folder / "scheduler" / "scheduler_config.json"
    config = read_json(path)
    name = str(config.get("_class_name"))
    if not name.endswith("Scheduler") or not hasattr(diffusers, name):
        raise ValueError(f"{path} names {name}, which is no scheduler of diffusers")
    count = config.get("num_train_timesteps", 1000)
    if type(count) is not int or not 1 <= count <= MOST_TIMESTEPS:
        raise ValueError(f"{path} has num_train_timesteps {str(count)[:40]}; give a whole number from 1 to {MOST_TIMESTEPS}")
    try:
        return NoiseProcess.from_scheduler(getattr(diffusers, name).from_config(config))
    except OF_VALUES as error:
        raise ValueError(f"{path} describes no noise process: {error}") from error


def read_calibration(folder: Path, denoiser: nn.Module) -> Calibration | None:
    """A folder's calibration.json; None where it has none.

    Raises:
        ValueError: it is damaged, or of another denoiser.
    """
    return Calibration.load(folder / CALIBRATION, denoiser) if os.path.isfile(folder / CALIBRATION) else None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object of a file.

    Raises:
        FileNotFoundError: there is none. ValueError: it holds no JSON, or no object.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is missing")
    try:
        config = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON file: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no JSON object")
    return config


def read_model(kind: Any, folder: str | Path, **keywords: Any) -> Any:
    """A diffusers or transformers model of a folder, whole.

    Raises:
        ValueError: it cannot be read, or weights are missing, which the libraries would draw at random.
    """
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


def check_weights(state: Mapping[Any, Any], source: str | Path) -> None:
    """Checks that a state dict holds plain weights, each with memory of its own: then a network of their sizes is no larger than they are.

    Raises:
        ValueError: a name that is no string, or a value that is no dense tensor of floating-point numbers, empty, without values, or
            expanded; tensors that share their memory. The message names the source and the tensor.
    """
    needed, there = 0, {}
    for name, value in state.items():
        wrong = f"its name is a {type(name).__name__}" if not isinstance(name, str) else _misfit(value)
        if wrong:
            raise ValueError(f"{source} is no checkpoint of plain weights: {str(name)[:80]!r} cannot be taken: {wrong}")
        storage = value.untyped_storage()
        needed += value.numel() * value.element_size()
        there[value.device, storage.data_ptr()] = storage.nbytes()
    if needed > sum(there.values()):
        raise ValueError(f"{source} is no checkpoint of plain weights: its tensors take {needed} bytes, and share {sum(there.values())}")


def _misfit(value: Any) -> str:
    """Why a value is no weight, in words; empty where it is one."""
    if type(value) not in (Tensor, nn.Parameter):
        return f"it is a {type(value).__name__}, and no plain tensor"
    if value.is_nested or value.layout != torch.strided:
        return f"it is {'nested' if value.is_nested else f'sparse ({value.layout})'}; save it dense"
    if value.is_quantized or value.dtype not in WEIGHTS:
        return f"it is of {value.dtype}; save {', '.join(str(dtype).removeprefix('torch.') for dtype in WEIGHTS)}"
    if value.is_meta or not value.numel():
        return f"it has shape {list(value.shape)} {'and no values, on the device meta' if value.is_meta else 'and is empty'}"
    expanded = any(size > 1 and not stride for size, stride in zip(value.shape, value.stride(), strict=True))
    if expanded or value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"it has shape {list(value.shape)}, and its values share their memory; save a copy of it"
    return ""


def download(model_id: str, patterns: list[str], without: list[str] | None = None, argument: str = "path") -> Path:
    """The folder of a model of the hub, with the files that match and are not among `without`; `argument` gave the id.

    Raises:
        FileNotFoundError: the hub has no such model, or is out of reach. ValueError: it can be no id of the hub.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(model_id, allow_patterns=patterns, ignore_patterns=without))
        if not any(folder.rglob("*.safetensors")):  # an older model: diffusers reads its .bin by weights_only
            folder = Path(snapshot_download(model_id, allow_patterns=[*patterns, "*.bin"], ignore_patterns=without))
        return folder
    except HFValidationError as error:
        raise ValueError(f"{argument} is {model_id!r}, which is no folder and can be no id of the hub: {error}") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(f"{model_id} is no folder, and the hub gave no model of that id: {error}") from error
