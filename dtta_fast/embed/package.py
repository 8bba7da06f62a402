"""Runs a package in Python, with the same calls as an Adapter."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtta_fast.adapter import Adapter
from dtta_fast.archives import check_archive
from dtta_fast.embed.manifest import KEEPER, Manifest
from dtta_fast.inputs import Checks, checked_deadline, checked_ids, checked_images
from dtta_fast.result import AdaptResult
from dtta_fast.runtime.clock import Clock, Pace


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
        raise ValueError(f"{path} is no package of an adaptation: {error}; export it again") from error
    loader: Any = torch._C._aoti.AOTIModelPackageLoader
    try:
        metadata = loader.load_metadata_from_package(str(path), KEEPER)
    except (RuntimeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no package of an adaptation: {str(error).splitlines()[0]}") from error
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


class Package:
    """An adaptation compiled ahead of time. adapt() works like that of an Adapter, for one batch shape. Concurrent calls are serialised.

    Attributes:
        manifest: describes what the package was built from.
    """

    def __init__(self, manifest: Manifest, functions: dict[str, Any]) -> None:
        self.manifest = manifest
        self._functions = functions
        self._lock = threading.Lock()
        self._pace = Pace()
        with torch.inference_mode(False):  # steps write to these tensors in any mode
            self._initial = [tensor.clone() for tensor in self._run("state")]
            self._state = [tensor.clone() for tensor in self._initial]

    def _run(self, name: str, *tensors: Tensor) -> list[Tensor]:
        found: list[Tensor] = self._functions[name].run(list(tensors))
        return found

    def adapt(self, images: Tensor, *, image_ids: Tensor | None = None, deadline_ms: float | None = None) -> AdaptResult:
        """Adapts to a batch and predicts like Adapter.adapt, for images [batch, 3, height, width] with the sizes in the manifest.

        Raises:
            ValueError: the input is invalid; the state is unchanged.
        """
        start, images, image_ids = time.perf_counter(), *self._checked(images, image_ids)
        deadline = None if deadline_ms is None else start + checked_deadline(deadline_ms) / 1000
        with self._lock:
            return self._adapt(images, image_ids, deadline, warming=False)

    def _checked(self, images: Tensor, image_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        manifest, checks = self.manifest, Checks()
        images = checked_images(images, torch.device("cpu"), checks)
        expected = (manifest.batch, 3, manifest.height, manifest.width)
        if tuple(images.shape) != expected:
            raise ValueError(f"images has shape {tuple(images.shape)}; this package takes {list(expected)}")
        return images.float().contiguous(), checked_ids(image_ids, images, checks).contiguous()

    @torch.no_grad()
    def _adapt(self, images: Tensor, image_ids: Tensor, deadline: float | None, warming: bool) -> AdaptResult:
        """With `warming`, runs and times every function, whether or not an image needs it, and leaves an online state unchanged."""
        kept = [tensor.clone() for tensor in self._state] if self.manifest.online else []
        stays = False
        try:
            result = self._attempted(images, image_ids, deadline, warming)
            stays = not warming and all(bool(tensor.isfinite().all()) for tensor in (self._state if kept else []))
        finally:
            if kept and not stays:  # undo a call that fails or leaves non-finite weights
                torch._foreach_copy_(self._state, kept)
        return result

    def _attempted(self, images: Tensor, image_ids: Tensor, deadline: float | None, warming: bool) -> AdaptResult:
        manifest, state, pace, clock = self.manifest, self._state, self._pace, Clock(images.device)
        with clock.phase("encode"):
            if not manifest.online:
                torch._foreach_copy_(state, self._initial)
            inputs, x0, before, first, asked = self._run("start", images, *(state if manifest.online else []))
        losses: list[Tensor] = []
        after, standing, accepted, fresh = first, before, torch.zeros_like(asked), asked.new_zeros((2, len(asked)))
        if warming or bool(asked.any()):
            with clock.phase("adapt"):
                for _ in range(manifest.steps):
                    if deadline is not None and clock.now() + pace.step.expected + pace.end.expected + pace.guard.expected > deadline:
                        break
                    with pace.step.timed(clock, wanted=True):
                        losses += self._run("step", *state, inputs, x0, image_ids)
                with pace.end.timed(clock, wanted=True):
                    after, standing, accepted, fresh = self._run("finish", *state, inputs, before, first, asked)
        begun = clock.now()
        if deadline is not None and begun + pace.guard.expected > deadline:  # a changed answer is never accepted without a comparison
            fresh = torch.zeros_like(fresh)
        with clock.phase("guard"):
            known = [x0.new_zeros(len(x0), max(1, manifest.guard)) for _ in range(3)]
            if manifest.guard and (warming or bool(fresh.any())):
                wanted = (True, warming or bool(fresh[0].any()), warming or bool(fresh[1].any()))
                for i, outputs in enumerate((before, after, first)):
                    if wanted[i]:
                        (known[i],) = self._run("losses", outputs, x0, image_ids, state[-1])
                pace.guard.note(clock.now() - begun)
            outputs, accepted, predictions, predictions_before = self._run(
                "decide", before, after, first, standing, accepted, fresh, *known
            )
        loss = torch.stack(losses, dim=1) if losses else x0.new_empty(len(x0), 0)
        loss = torch.where(asked[:, None], loss, torch.nan)
        spent = asked * (len(losses) * manifest.evaluations) + manifest.guard * (fresh.any(0) + fresh.sum(0))
        return AdaptResult(outputs, before, predictions, predictions_before, loss, accepted, len(losses), spent.to(torch.int64), clock)

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
                self._adapt(images, image_ids, None, warming=True)
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
