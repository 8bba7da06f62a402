"""Stores the state of an online run in a file: named tensors with a checksum over their bytes, the batch and the run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtta_fast.runtime.files import open_plain

FORMAT = "dtta_fast online state 1"
MOST_BYTES = 2**40  # of a file
MOST_SLOTS = 8  # per optimizer; Adam has 2


def state_bytes(state: Mapping[str, Any], batch: int, config: Mapping[str, Any]) -> bytes:
    """Serialises an adapter's state_dict() after a batch of a run with this config."""
    from safetensors.torch import save

    tensors = _flat(state)
    return save(tensors, {"format": FORMAT, "batch": str(batch), "checksum": _checksum(tensors, batch, config)})


def read_state(path: Path, batch: int, config: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Reads the state that state_bytes() wrote and moves it to a device.

    Raises:
        ValueError: the file is missing, damaged, or from another batch or run; the message names the file.
    """
    from safetensors import safe_open

    try:
        open_plain(path, MOST_BYTES).close()  # opening a pipe would block
        with safe_open(path, "pt") as file:
            found = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # the file is not a mapping
        if found.get("checksum") != _checksum(tensors, batch, config):
            raise ValueError("its checksum is not that of its weights, of this batch and of this run")
        return _nested({name: tensor.to(device) for name, tensor in tensors.items()})
    except Exception as error:  # safetensors raises its own exceptions
        raise ValueError(f"{path}, the state after batch {batch}, cannot be read: {error}; begin again in another folder") from error


def is_state(path: Path) -> bool:
    """Returns whether state_bytes() wrote the file."""
    from safetensors import safe_open

    try:
        open_plain(path, MOST_BYTES).close()
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except Exception:  # safetensors raises its own exceptions
        return False


def _checksum(tensors: Mapping[str, Tensor], batch: int, config: Mapping[str, Any]) -> str:
    found = hashlib.blake2b(json.dumps([batch, config], sort_keys=True).encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _flat(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Flattens an adapter's state into named tensors: weights in order, optimizer state by slot and index, and the step."""
    if not state:  # nothing has been adapted yet
        return {"empty": torch.zeros(0, dtype=torch.float32, device="cpu")}
    found: dict[str, Tensor] = {"step": state["step"]}
    for kind in ("theta", "phi"):
        slots = state[f"{kind}_slots"]
        found[f"{kind}_slots"] = torch.tensor(len(slots), dtype=torch.int64, device="cpu")
        found |= {f"{kind}/{i:06d}/{name}": value.contiguous() for i, (name, value) in enumerate(state[kind].items())}
        found |= {f"{kind}_slots/{i}/{j:06d}": value.contiguous() for i, slot in enumerate(slots) for j, value in enumerate(slot)}
    return found


def _nested(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Rebuilds the state that _flat() flattened.

    Raises:
        ValueError: the tensors do not form a state. The checksum uses no secret key, so a foreign file can carry a valid one.
    """
    if "empty" in tensors:
        return {}
    found: dict[str, Any] = {"step": _number(tensors, "step")}
    for kind in ("theta", "phi"):
        names = sorted(name for name in tensors if name.startswith(f"{kind}/"))
        if any(name.count("/") < 2 for name in names):
            raise ValueError(f"{names[0]!r} names no weight")
        found[kind] = {name.split("/", 2)[2]: tensors[name] for name in names}
        count = int(_number(tensors, f"{kind}_slots"))
        if not 0 <= count <= MOST_SLOTS:
            raise ValueError(f"{kind}_slots is {count}; an optimizer has 0 to {MOST_SLOTS}")
        slots = [[tensors[name] for name in sorted(tensors) if name.startswith(f"{kind}_slots/{i}/")] for i in range(count)]
        if any(len(slot) != len(names) for slot in slots):
            raise ValueError(f"{kind}_slots are of {[len(slot) for slot in slots]} tensors, and {kind} has {len(names)}")
        found[f"{kind}_slots"] = slots
    return found


def _number(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    found = tensors.get(name)
    if found is None or found.ndim or found.dtype != torch.int64:
        raise ValueError(f"it has no whole number {name!r}")
    return found
