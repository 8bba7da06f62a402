"""Runs a package in Python, with the same calls as an Adapter."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtta_fast.core.guard import Answers
from dtta_fast.embed.manifest import KEEPER, Manifest
from dtta_fast.runtime.archives import check_archive
from dtta_fast.runtime.clock import Clock, Pace
from dtta_fast.runtime.reads import Checks
from dtta_fast.session.adapter import Adapter
from dtta_fast.session.checks import checked_deadline, checked_ids, checked_images
from dtta_fast.session.loop import Batch, Call, Decision, Program, run
from dtta_fast.session.result import AdaptResult, assembled, indices


def load(path: str | Path, adapter: Adapter | None = None) -> Package:
    """Opens a package written by export(). Its code runs in this process, so load packages only from people you trust.

    Args:
        adapter: if given, the package must contain the adapter's weights and match its config.

    Raises:
        FileNotFoundError, ValueError: the package is missing, or it does not fit this machine, this torch version or the adapter; the
            message lists the differences, and no code of the package has run.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"path is {str(path)!r}, and there is no such file; write one by export() or `dtta export`")
    try:
        check_archive(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a package of an adaptation: {error}; export it again") from error
    loader: Any = torch._C._aoti.AOTIModelPackageLoader
    try:
        metadata = loader.load_metadata_from_package(str(path), KEEPER)
    except (RuntimeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a package of an adaptation: {str(error).splitlines()[0]}") from error
    manifest = Manifest.from_metadata(metadata, path)
    wrong = manifest.misfits() or ([] if adapter is None else manifest.differences(adapter.engine))
    if wrong:
        raise ValueError(f"{path} does not fit: {'; '.join(wrong)}. Export it again")
    names = ["state", "start", "step", "finish", *(["losses"] if manifest.guard else []), "decide"]
    try:
        functions = {name: loader(str(path), name, False, 1, -1) for name in names}
        return Package(manifest, functions)
    except RuntimeError as error:
        raise ValueError(f"{path} is damaged, or cannot be loaded here: {str(error).splitlines()[0]}; export it again") from error


class PackageProgram(Program):
    """A program whose calls are the functions of a package. Its state is the list of the state's tensors."""

    def __init__(self, manifest: Manifest, functions: dict[str, Any]) -> None:
        self.manifest, self.functions = manifest, functions

    def run(self, name: str, *tensors: Tensor) -> list[Tensor]:
        """Calls a function of the package."""
        found: list[Tensor] = self.functions[name].run(list(tensors))
        return found

    @property
    def guard(self) -> int:
        return self.manifest.guard

    @property
    def online(self) -> bool:
        return self.manifest.online

    def start(self, crop: Tensor, image_ids: Tensor, state: list[Tensor]) -> Batch:
        """Prepares a batch of crops [batch, 3, height, width]."""
        inputs, x0, before, matched_outputs, asked = self.run("start", crop, *(state if self.online else []))
        return Batch(crop, inputs, crop, image_ids, x0, before=before, matched_outputs=matched_outputs, asked=asked)

    def step(self, state: list[Tensor], batch: Batch, number: int) -> Tensor:
        return self.run("step", *state, batch.inputs, batch.x0, batch.image_ids)[0]

    def finish(self, state: list[Tensor], batch: Batch) -> Answers:
        return Answers(*self.run("finish", *state, batch.inputs, batch.before, batch.matched_outputs, batch.asked))

    def losses(self, state: list[Tensor], batch: Batch, answers: Answers, wanted: list[list[bool]]) -> list[Tensor]:
        found = self._no_losses(batch)
        for i, outputs in enumerate((answers.standing, answers.after, batch.before)):
            if any(wanted[i]):
                (found[i],) = self.run("losses", outputs, batch.x0, batch.image_ids, state[-1])
        return found

    def decide(self, batch: Batch, answers: Answers, losses: list[Tensor]) -> Decision:
        given = batch.before, answers.after, answers.standing, answers.accepted, answers.fresh
        return Decision(*self.run("decide", *given, *(losses or self._no_losses(batch))))

    def _no_losses(self, batch: Batch) -> list[Tensor]:
        return [batch.x0.new_zeros(len(batch.x0), max(1, self.guard)) for _ in range(3)]

    def source_outputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        found = self.start(batch.crop, batch.image_ids, self.run("state"))
        return found.before, found.matched_outputs

    def rehearse(self, state: list[Tensor], batch: Batch) -> list[list[bool]]:
        return [[True] * len(batch.x0)] * 3


class Package:
    """An adaptation compiled ahead of time. adapt() works like that of an Adapter, for one batch shape. Concurrent calls are serialised.

    Attributes:
        manifest: describes what the package was built from.
    """

    def __init__(self, manifest: Manifest, functions: dict[str, Any]) -> None:
        self.manifest = manifest
        self._program = PackageProgram(manifest, functions)
        self._lock = threading.Lock()
        self._pace = Pace()
        with torch.inference_mode(False):  # steps write to these tensors in any mode
            self._initial = [tensor.clone() for tensor in self._program.run("state")]
            self._state = [tensor.clone() for tensor in self._initial]

    def adapt(self, images: Tensor, *, image_ids: Tensor | None = None, deadline_ms: float | None = None) -> AdaptResult:
        """Adapts to a batch and predicts like Adapter.adapt, for images [batch, 3, height, width] with the sizes in the manifest.

        Unlike an Adapter, a package does not check the source model's own outputs.

        Raises:
            ValueError: the input is invalid; the state is unchanged.
        """
        start, images, image_ids = time.perf_counter(), *self._checked(images, image_ids)
        deadline = None if deadline_ms is None else start + checked_deadline(deadline_ms) / 1000
        with self._lock:
            return self._adapt(images, image_ids, Call(Clock(images.device), self._pace, deadline))

    def _checked(self, images: Tensor, image_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        manifest, checks = self.manifest, Checks()
        images = checked_images(images, torch.device("cpu"), checks)
        expected = (manifest.batch, 3, manifest.height, manifest.width)
        if tuple(images.shape) != expected:
            raise ValueError(f"images has shape {tuple(images.shape)}; this package takes {list(expected)}")
        return images.float().contiguous(), checked_ids(image_ids, images, checks).contiguous()

    @torch.no_grad()
    def _adapt(self, images: Tensor, image_ids: Tensor, call: Call) -> AdaptResult:
        """Adapts to a batch. The state of a package changes only if the call succeeds, is not warming, and leaves a usable state."""
        manifest, program = self.manifest, self._program
        with call.clock.phase("encode"):
            if manifest.online:
                # steps write in place, and a failed call must leave no trace; a later call may not run under inference_mode
                with torch.inference_mode(False):
                    state = [tensor.clone() for tensor in self._state]
            else:
                state = self._state
                torch._foreach_copy_(state, self._initial)
            batch = program.start(images, image_ids, state)
        asked = torch.ones_like(batch.asked) if call.warming else batch.asked
        rows = None if bool(asked.all()) else indices(asked.tolist(), asked.device)
        adapted = rows is None or len(rows) > 0
        outcome = run(program, state, batch, call, manifest.steps if adapted else 0)
        if outcome.keep and not call.warming:
            self._state = state
        unadapted = (outcome.outputs, outcome.predictions), (outcome.before, outcome.predictions_before)
        return AdaptResult(**assembled(rows, [outcome] if adapted else [], unadapted, manifest.evaluations), clock=call.clock)

    def warmup(self, images: Tensor) -> dict[str, float]:
        """Runs and times everything that adapt() may run, three times, without changing an online state.

        Returns:
            Seconds of the first run as `cold` and of the last as `warm`.

        Raises:
            ValueError: adapt() would reject the images; nothing has run.
        """
        images, image_ids = self._checked(images, None)
        seconds = []
        with self._lock:
            for _ in range(3):
                start = time.perf_counter()
                self._adapt(images, image_ids, Call(Clock(images.device), self._pace, warming=True))
                seconds.append(time.perf_counter() - start)
        return {"cold": seconds[0], "warm": seconds[-1]}

    def reset(self) -> None:
        """Restores the exported weights and an empty optimizer state."""
        with self._lock, torch.no_grad():
            torch._foreach_copy_(self._state, self._initial)

    def state_dict(self) -> dict[str, Any]:
        """Returns a copy of the online state for a package with the same weights and config: their fingerprint and the state tensors."""
        with self._lock, torch.inference_mode(False):
            return {"weights": self.manifest.weights, "config": self.manifest.config, "state": [tensor.clone() for tensor in self._state]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state returned by state_dict().

        Raises:
            ValueError: the package is episodic, or the state belongs to another package; the current state is unchanged.
        """
        manifest = self.manifest
        if not manifest.online:
            raise ValueError("state belongs to an online package, and this one is episodic")
        wanted = {"weights": manifest.weights, "config": manifest.config}
        if not isinstance(state, dict) or {name: value for name, value in state.items() if name != "state"} != wanted:
            raise ValueError(f"state is not of a package with weights {manifest.weights} and this config; give what state_dict() gave")
        given = state.get("state")
        if not isinstance(given, list) or [*map(_form, given)] != [*map(_form, self._state)]:
            raise ValueError("state holds tensors of other shapes or dtypes than this package's; give what state_dict() gave")
        if not all(bool(tensor.isfinite().all()) for tensor in given):
            raise ValueError("state holds NaN or infinity; give what state_dict() gave")
        with self._lock, torch.no_grad():
            torch._foreach_copy_(self._state, given)


def _form(value: Any) -> Any:
    """Returns the properties that must match for one tensor to be copied into another."""
    plain = isinstance(value, Tensor) and not value.is_nested and value.layout == torch.strided
    return (value.shape, value.dtype, value.device) if plain else type(value)
