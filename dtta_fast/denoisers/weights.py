"""Weights of networks: state dicts, the files that hold them, and the checks that they pass before a network takes them."""

from __future__ import annotations

import argparse
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dtta_fast.runtime.archives import LOCAL, check_archive

ALLOWED = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # dtypes of stored weights
PREFIXES = ("module.", "_orig_mod.")


def read_state(given: str | Path | Mapping[str, Any], argument: str = "path_or_state_dict") -> tuple[Mapping[str, Any], str]:
    """Returns the state dict that an argument is or whose file it names, without prefixes, and how to name it in an error.

    Raises:
        FileNotFoundError, ValueError: the file does not exist, or cannot be read. TypeError: the argument is neither a path nor a
            state dict.
    """
    if isinstance(given, Mapping):
        return without_prefix(given), argument
    if isinstance(given, nn.Module):
        raise TypeError(f"{argument} is a {type(given).__name__}; give its weights, as network.state_dict() returns them")
    if not isinstance(given, (str, os.PathLike)):
        raise TypeError(f"{argument} is a {type(given).__name__}; give a path or a state dict")
    return without_prefix(read_file(Path(given))), str(given)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is missing")
    check_pointers(path)
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    check_weights(state, path)
    return state


def read_file(path: Path) -> Mapping[str, Tensor]:
    return read_safetensors(path) if path.suffix == ".safetensors" else _read_torch_file(path)


def _read_torch_file(path: Path) -> Mapping[str, Tensor]:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is missing")
    check_pointers(path)
    try:
        with open(path, "rb") as file:
            zipped = file.read(4) == LOCAL  # torch uses the same check
        if zipped:
            check_archive(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # training checkpoints store their arguments: plain data
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's own message advises weights_only=False, which would run the file's code
        remedy = "load it in the repository that wrote it, and save network.state_dict()"
        raise ValueError(f"{path} cannot be read as a checkpoint of tensors: it is damaged, or holds other objects; {remedy}") from error
    except Exception as error:  # torch may also raise zip or runtime errors here
        raise ValueError(f"{path} cannot be read as a checkpoint of tensors: {error}") from error
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds a {type(state).__name__}, not a state dict")
    return state


def without_prefix(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Strips what DistributedDataParallel and torch.compile put before every name."""
    while prefix := next((p for p in PREFIXES if state and all(isinstance(name, str) and name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def load(network: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Loads weights into a network.

    A network on the meta device gets float32 copies on the CPU, once all names and shapes fit.

    Raises:
        ValueError: names or shapes do not fit; the message names the source.
    """
    meta = next(network.parameters()).is_meta
    try:
        network.load_state_dict({name: value.to("meta") for name, value in state.items()} if meta else dict(state))
    except RuntimeError as error:
        raise ValueError(f"{source} does not fit the network: {error}") from error
    if meta:
        copies = {name: value.to("cpu", torch.float32, copy=True) for name, value in state.items()}
        network.load_state_dict(copies, assign=True)


def check_pointers(folder: str | Path) -> None:
    """Raises ValueError if a folder's weights, or a file of weights, are pointers that git-lfs has not replaced."""
    place = Path(folder)
    for path in (place.glob("*.safetensors"), place.glob("*.bin")) if place.is_dir() else ([place],):
        for file in path:
            if file.is_file() and file.stat().st_size < 1024 and file.read_bytes().startswith(b"version https://git-lfs"):
                raise ValueError(f"{file} is a pointer of git-lfs, not the weights: run git lfs pull in its repository")


def check_weights(state: Mapping[Any, Any], source: str | Path) -> None:
    """Checks that a state dict holds plain weights that do not share memory, so a network of their sizes is no larger than the weights.

    Raises:
        ValueError: a name is not a string; a value is not a dense floating-point tensor, or is empty, on the meta device, or expanded; or
            tensors share memory. The message names the source, and the tensor if one is at fault.
    """
    needed, there = 0, {}
    for name, value in state.items():
        wrong = f"its name is a {type(name).__name__}" if not isinstance(name, str) else _misfit(value)
        if wrong:
            raise ValueError(f"{source} is not a checkpoint of plain weights: {str(name)[:80]!r} cannot be taken: {wrong}")
        storage = value.untyped_storage()
        needed += value.numel() * value.element_size()
        there[value.device, storage.data_ptr()] = storage.nbytes()
    if needed > sum(there.values()):
        raise ValueError(f"{source} is not a checkpoint of plain weights: its tensors take {needed} bytes, and share {sum(there.values())}")


def _misfit(value: Any) -> str:
    """Explains why a value is not a plain weight; returns an empty string if it is one."""
    if type(value) not in (Tensor, nn.Parameter):
        return f"it is a {type(value).__name__}, and no plain tensor"
    if value.is_nested or value.layout != torch.strided:
        return f"it is {'nested' if value.is_nested else f'sparse ({value.layout})'}; save it dense"
    if value.is_quantized or value.dtype not in ALLOWED:
        return f"it is of {value.dtype}; save {', '.join(str(dtype).removeprefix('torch.') for dtype in ALLOWED)}"
    if value.is_meta or not value.numel():
        return f"it has shape {list(value.shape)} {'and no values, on the device meta' if value.is_meta else 'and is empty'}"
    expanded = any(size > 1 and not stride for size, stride in zip(value.shape, value.stride(), strict=True))
    if expanded or value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"it has shape {list(value.shape)}, and its values share their memory; save a copy of it"
    return ""
