"""Logs the metrics of a run to TensorBoard, trackio or wandb, in addition to its folder; each needs an extra."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol


class Tracker(Protocol):
    def log(self, images: int, values: Mapping[str, float]) -> None:
        """Logs means over the images so far."""

    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))
        self._writer.add_text("config", f"```\n{config}\n```")

    def log(self, images: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, images)

    def close(self) -> None:
        self._writer.close()


class _Run:
    """Tracker for trackio and wandb, which share one interface."""

    def __init__(self, module: Any, folder: Path, config: Mapping[str, Any]) -> None:
        self._module = module
        module.init(project="dtta_fast", name=folder.name, config=dict(config))

    def log(self, images: int, values: Mapping[str, float]) -> None:
        self._module.log(dict(values), step=images)

    def close(self) -> None:
        self._module.finish()


def _trackio(folder: Path, config: Mapping[str, Any]) -> Tracker:
    import trackio

    return _Run(trackio, folder, config)


def _wandb(folder: Path, config: Mapping[str, Any]) -> Tracker:
    import wandb

    return _Run(wandb, folder, config)


KINDS: dict[str, Callable[[Path, Mapping[str, Any]], Tracker]] = {"tensorboard": _TensorBoard, "trackio": _trackio, "wandb": _wandb}


def require(kind: str) -> None:
    """Raises ImportError if the library of that kind is missing, so that a run fails at the start and not at its first batch."""
    if find_spec(kind) is None:
        raise ImportError(f"track is {kind!r}, which needs its library: pip install 'dtta-fast[{kind}]'")


def tracker(kind: str, folder: Path, config: Mapping[str, Any]) -> Tracker:
    """Creates a tracker of that kind for the folder of a run.

    Raises:
        ValueError: the kind does not exist. ImportError: its library is missing; require() checks this in advance.
    """
    if kind not in KINDS:
        raise ValueError(f"track is {kind!r}; there are {', '.join(KINDS)}")
    return KINDS[kind](folder, config)
