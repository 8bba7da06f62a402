"""Compiles an adaptation ahead of time with make_fx, torch.export and AOTInductor, and adds a manifest."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dtta_fast import presets
from dtta_fast.config import AdaptConfig
from dtta_fast.core.weights import anchor
from dtta_fast.denoisers.base import Denoiser
from dtta_fast.embed.functions import Function, Functions
from dtta_fast.embed.manifest import FORMAT, KEEPER, Manifest, comparable, instructions, task_of, torch_version, weights_digest
from dtta_fast.embed.package import load
from dtta_fast.runtime import compiling
from dtta_fast.runtime.reads import Checks
from dtta_fast.session.adapter import Adapter
from dtta_fast.session.checks import check_calibration, checked_images
from dtta_fast.session.engine import Engine
from dtta_fast.tasks.base import Task

MARGIN = 4.0  # the tolerance is this multiple of the difference measured on a few images
LEAST = 1e-5  # minimum tolerance, relative to the largest output
MOST_NAME = 255  # maximum length of a file name in bytes
WRONG = 0.25  # relative to the largest output: rounding alone never causes a difference this large


def export(
    model: nn.Module,
    denoiser: Denoiser,
    images: Tensor,
    path: str | Path,
    *,
    config: AdaptConfig = presets.FAST,
    task: Task | None = None,
    batch: int = 1,
    progress: Callable[[str], None] = lambda name: None,
) -> Manifest:
    """Compiles the entire adaptation of `batch` images under `config` into the package `path` and compares it with the engine.

    The package takes images [batch, 3, H, W] at the input size of model and denoiser (Adapter.crop). It contains the weights and needs
    neither the models nor the config: load() runs it in Python, dtta_embed.h in C++. Exporting requires a C++ compiler; running does not.

    Args:
        images: [N, 3, H, W] with N >= `batch`, similar to future inputs; the tolerance is measured on them.
        path: must end in .pt2.
        progress: called with the name of each function before it is compiled.

    Returns:
        The manifest stored in the package.

    Raises:
        TypeError: model, denoiser, config or task has the wrong type.
        ValueError: something cannot be exported, or `images` or `path` is invalid; the message names the problem, and nothing is written.
    """
    path = Path(path)
    check_target(path, batch)
    if not isinstance(images, Tensor) or images.ndim != 4 or len(images) < batch:
        raise ValueError(f"images has shape {tuple(getattr(images, 'shape', ()))}; give [N, 3, H, W] with N of batch = {batch} or more")
    check_exportable(config)
    images = checked_images(images, images.device, Checks()).float()  # as hosts pass them
    check_calibration(denoiser, config)
    adapter = Adapter(model, denoiser, config.replace(compile="off"), task)
    engine = adapter.engine
    device = anchor(engine.model).device
    if device.type != "cpu":
        raise ValueError(f"model is on {device}, and packages are made for the CPU; move model and denoiser there")
    ids = torch.arange(batch, dtype=torch.int64, device="cpu")
    crop = adapter.crop(images[:batch])
    adapter.adapt(crop, image_ids=ids)  # raises if the inputs do not fit
    made = Functions(engine.program, crop, ids).by_name
    manifest = _manifest(engine, crop, made)
    with tempfile.TemporaryDirectory() as folder:
        draft = os.path.join(folder, "draft.pt2")
        files = {name: _compiled(name, function, manifest if name == KEEPER else None, progress) for name, function in made.items()}
        _write(draft, files)
        manifest = _measured(manifest, adapter, draft, images, batch)
        # the tolerance is now known, so recompile the function that stores the manifest, from the cache
        files[KEEPER] = _compiled(KEEPER, made[KEEPER], manifest, progress)
        written = _draft(path)
        try:
            _write(str(written), files)
            os.replace(written, path)
        finally:
            written.unlink(missing_ok=True)
    return manifest


def check_target(path: Path, batch: int) -> None:
    """Raises ValueError if a package cannot be written to `path` or if `batch` is invalid."""
    if path.suffix != ".pt2" or os.path.isdir(path) or not os.path.isdir(path.parent):
        raise ValueError(f"path is {str(path)!r}; give a file ending in .pt2 in a folder that exists")
    if len(os.fsencode(_draft(path).name)) > MOST_NAME:
        raise ValueError(f"path is {str(path)!r}, whose name is too long; give one of up to 200 bytes")
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch is {batch!r}; give a whole number of at least 1")


def _draft(path: Path) -> Path:
    """Returns the temporary path to which a package is written before it is renamed."""
    return path.with_name(f".{path.stem}.{os.getpid()}.pt2")


def check_exportable(config: AdaptConfig) -> None:
    """Raises ValueError if a package does not support this config."""
    reasons = {
        "method": ("adapt", "the diffusion classifier leaves classes out as it goes, which no fixed graph does"),
        "parameters": ("all, norm, head or lora", "free logits start anew from each image's"),
        "optimizer": ("sgd, adam or adamw", "bitsandbytes' kernels cannot be traced"),
    }
    for field, refused in (("method", ("diffusion_classifier", "posterior")), ("parameters", ("logits",)), ("optimizer", ("adam8bit",))):
        if getattr(config, field) in refused:
            allowed, why = reasons[field]
            raise ValueError(f"{field} is {getattr(config, field)!r}, which cannot be exported: {why}; allowed: {allowed}")


def _compiled(name: str, function: Function, manifest: Manifest | None, progress: Callable[[str], None]) -> list[Any]:
    """Compiles one function and returns its files."""
    progress(name)
    from torch._inductor import aot_compile
    from torch.fx.experimental.proxy_tensor import make_fx

    options = {
        "aot_inductor.package": True,
        "aot_inductor.metadata": {} if manifest is None else manifest.to_metadata(),
        "cpp.dynamic_threads": True,  # use as many threads as the host's torch
    }
    compiling.keep_cache()
    example = tuple(tensor.clone() for tensor in function.example)  # tracing would merge a tensor that is passed twice into one argument
    try:
        graph = make_fx(function.call, tracing_mode="real", _allow_non_fake_inputs=True)(*example)
        with torch.no_grad():
            program = torch.export.export(graph, example)
            files: Any = aot_compile(program.module(), example, options=options)
    except Exception as error:  # each of the three stages raises its own exception types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{name!r}, one of the adaptation's functions, cannot be exported: {type(error).__name__}: {reason}") from error
    return list(files)


def _write(path: str, files: dict[str, list[Any]]) -> None:
    from torch._inductor.package.package import package_aoti

    package_aoti(path, files)


def _manifest(engine: Engine, crop: Tensor, made: dict[str, Function]) -> Manifest:
    config, state = engine.config, made["state"].call()
    outputs = made["finish"].example[-3]
    return Manifest(
        format=FORMAT,
        torch=torch_version(),
        device="cpu",
        capability=torch.backends.cpu.get_cpu_capability(),
        instructions=" ".join(sorted(instructions())),
        weights=weights_digest(engine),
        config=json.dumps(comparable(config)),
        task=task_of(engine, [len(crop), *crop.shape[1:]], list(outputs.shape)),
        batch=len(crop),
        height=crop.shape[2],
        width=crop.shape[3],
        outputs=" ".join(map(str, outputs.shape)),
        steps=config.steps,
        guard=config.guard,
        evaluations=config.pairs * engine.program.problem.forwards(),
        online=config.mode == "online",
        state=json.dumps([[str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for tensor in state]),
    )


def _measured(manifest: Manifest, adapter: Adapter, draft: str, images: Tensor, batch: int) -> Manifest:
    """Adds the tolerance to the manifest, from the largest difference of outputs and losses from the engine's."""
    package, farthest, largest, parts = load(draft), 0.0, 0.0, [part for part in images.split(batch) if len(part) == batch]
    for number, part in enumerate(parts):
        adapter.reset()
        package.reset()
        crop, ids = adapter.crop(part), torch.arange(batch, dtype=torch.int64, device="cpu") + number * batch
        expected, found = adapter.adapt(crop, image_ids=ids), package.adapt(crop, image_ids=ids)
        for theirs, ours in ((found.outputs, expected.outputs), (found.loss, expected.loss)):
            if theirs.shape != ours.shape or not torch.equal(theirs.isfinite(), ours.isfinite()):  # an unadapted image has no loss
                raise ValueError("the package's outputs or losses are not finite where the engine's are: AOTInductor compiled it wrongly")
            both = ours.isfinite()
            farthest = max(farthest, float((theirs - ours)[both].abs().max()) if bool(both.any()) else 0.0)
        largest = max(largest, float(expected.outputs.abs().max()))
    if not farthest <= WRONG * largest:
        raise ValueError(
            f"the package's outputs or losses are up to {farthest:.3g} from the engine's, whose largest output is {largest:.3g}: "
            "AOTInductor compiled this adaptation wrongly, or rounding decides its result (a smaller lr, or precision 'fp32', helps)"
        )
    tolerance = max(MARGIN * farthest, LEAST * largest)
    values = {**manifest.__dict__, "tolerance": tolerance, "measured": farthest, "measured_images": len(parts) * batch}
    return Manifest(**values)
