"""Reads what folders of the ecosystem's formats have in common: JSON, a scheduler, and where a hub id lies once it is here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from dtta_fast.calibration import Calibration
from dtta_fast.process import NoiseProcess

CALIBRATION = "calibration.json"
# what the libraries' constructors make of a config's values of other kinds; a RuntimeError is also torch's for sizes beyond memory
OF_VALUES = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, ImportError, RuntimeError, MemoryError)
MOST_TIMESTEPS = 100_000  # of a schedule: a table has a row for each


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
    return Calibration.load(folder / CALIBRATION, denoiser) if (folder / CALIBRATION).is_file() else None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object of a file.

    Raises:
        FileNotFoundError: there is none. ValueError: it holds no JSON, or no object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON file: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no JSON object")
    return config


def read_model(kind: Any, folder: Path, **keywords: Any) -> Any:
    """A diffusers or transformers model of a folder, whole.

    Raises:
        ValueError: it cannot be read, or weights are missing, which the libraries would draw at random.
    """
    try:
        model, found = kind.from_pretrained(folder, output_loading_info=True, **keywords)
    except (OSError, SafetensorError, *OF_VALUES) as error:
        raise ValueError(f"{folder} cannot be read as a {kind.__name__}: {error}") from error
    lacking = sorted(map(str, found["missing_keys"]))
    if lacking:
        raise ValueError(
            f"{folder} lacks weights of a {kind.__name__}: {', '.join(lacking[:5])}{' and others' if len(lacking) > 5 else ''}"
        )
    return model


def download(model_id: str, patterns: list[str], without: list[str] | None = None) -> Path:
    """The folder of a model of the hub, with the files that match and are not among `without`.

    Raises:
        FileNotFoundError: the hub has no such model, or is out of reach.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(model_id, allow_patterns=patterns, ignore_patterns=without))
        if not any(folder.rglob("*.safetensors")):  # an older model: diffusers reads its .bin by weights_only
            folder = Path(snapshot_download(model_id, allow_patterns=[*patterns, "*.bin"], ignore_patterns=without))
        return folder
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(f"{model_id} is no folder, and the hub gave no model of that id: {error}") from error
