"""`dtta adapt`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.table import Table
from torch import nn

from dtta_fast import presets, zoo
from dtta_fast.commands.common import OutFile, Settings, check_path, checked_device, holds, names_of, quiet, shown, terminal, write_json
from dtta_fast.data.folder import image_files
from dtta_fast.denoisers.base import Denoiser
from dtta_fast.denoisers.calibration import Calibration
from dtta_fast.runs.models import class_names, load_pair, load_text_to_image
from dtta_fast.runs.writing import check_name
from dtta_fast.runtime.pictures import read_image
from dtta_fast.session.adapter import Adapter
from dtta_fast.tasks.base import ClassTask
from dtta_fast.tasks.classification import Classification

WRITE_EVERY = 5.0  # seconds between two writes of the result so far
SHOWN = 10  # classes listed in each image's table


@dataclass(frozen=True)
class Adapt:
    """Adapt a classifier to images one by one, and print the class probabilities before and after.

    Adapts a timm classifier with a DiT for the same classes or, with --classes, a CLIP model with Stable Diffusion for those class names.
    By default it uses the handwritten-digit models that ship with the package.

    Example: dtta adapt photo.jpg --model resnet50.a1_in1k --denoiser facebook/DiT-XL-2-256 --preset PAPER
    """

    images: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE [IMAGE ...]", help_behavior_hint="(required)")]
    """Image files, and folders of them; - reads names from the standard input, one per line."""
    classes: Annotated[str | None, tyro.conf.arg(metavar="NAMES", help_behavior_hint="(default: those of the classifier)")] = None
    """Class names for CLIP, separated by commas, such as "a cat, a dog, a car"; a .txt file with one name a line; a .json file with prompts
    for each name; or imagenet. If omitted, the model is a timm classifier."""
    model: Annotated[str, tyro.conf.arg(metavar="MODEL")] = "zoo"
    """Classifier: a timm name, hf-hub:ID, or a folder in timm's format; with --classes, a CLIP folder or hub id. zoo: the digits model."""
    denoiser: Annotated[str, tyro.conf.arg(metavar="DENOISER")] = "zoo"
    """Diffusion model of the model's classes, a DiT or a class-conditional UNet: a folder or a hub id; with --classes, a text-to-image
    model: Stable Diffusion 1 to 3.5, SDXL, PixArt or Sana. zoo: the digits model."""
    calibration: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: the denoiser's own)")] = None
    """Calibration of the denoiser, as written by `dtta calibrate`; defaults to calibration.json in the denoiser's folder."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Device on which both models run."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type of the denoiser's weights."""
    json: OutFile = None
    """Also write the result to this file."""
    preset: str = "FAST"
    """FAST, RANK, PAPER, ONLINE or DUSA: the starting point of the settings below. FAST, RANK and ONLINE need a calibration; ONLINE and
    DUSA keep adapting from one file to the next."""
    config: Settings = presets.FAST
    """Adaptation settings; their defaults come from the preset."""

    def run(self) -> None:
        """Raises ValueError for bad names, an unknown preset, an unreadable model or image, or a bad path.

        Images are read one after the other: those before an unreadable one are in the result.
        """
        quiet()
        check_path("json", self.json, holds("images", "config"))
        for name, place in (("model", self.model), ("denoiser", self.denoiser), ("calibration", self.calibration)):
            if place is not None:
                check_name(name, place)
        device, paths = checked_device(self.device), files(self.images)
        first = read_image(paths[0])
        with terminal(stderr=True).status("loading"):
            dtype, own = getattr(torch, self.dtype), self.calibration is None
            model, denoiser, task = load_pair_or_clip(self.model, self.denoiser, self.classes, dtype, own)
            if self.calibration is not None:
                denoiser.calibration = Calibration.load(self.calibration, denoiser)
            adapter = Adapter(model.to(device), denoiser.to(device), self.config, task)
            config = adapter.config.replace(compile=self.config.compile)  # without a calibration, other than asked for
        given = None if self.classes is None else list(names_of(self.classes))
        if given is None and self.model == self.denoiser == "zoo":
            terminal(stderr=True).print("no --model or --denoiser given: using the digits zoo, which knows handwritten digits only")
        rows: list[dict[str, Any]] = []
        written = time.monotonic()
        try:
            for number, path in enumerate(paths):  # one by one, because sizes differ
                image = read_image(path) if number else first
                found = adapter.adapt(image[None].to(device), image_ids=torch.tensor([number], dtype=torch.int64, device=device))
                before, after = (outputs[0].float().softmax(0).tolist() for outputs in (found.outputs_before, found.outputs))
                names = given or class_names(model, len(after))
                rows.append(
                    {
                        "path": str(path),
                        "before": dict(zip(names, before, strict=True)),
                        "after": dict(zip(names, after, strict=True)),
                        "accepted": bool(found.accepted[0]),
                        "evaluations": int(found.evaluations[0]),
                        "seconds": sum(found.seconds.values()),
                    }
                )
                _print_probabilities(rows[-1])
                if time.monotonic() > written + WRITE_EVERY:
                    write_json(self.json, {"images": rows, "config": asdict(config)})
                    written = time.monotonic()
        finally:
            if rows:
                write_json(self.json, {"images": rows, "config": asdict(config)})


def load_pair_or_clip(
    model: str, denoiser: str, classes: str | None, dtype: torch.dtype = torch.float32, calibration: bool = True
) -> tuple[nn.Module, Denoiser, ClassTask]:
    """Loads a classifier with a denoiser of its classes or, given class names, a CLIP with a text-to-image model; and their task.

    Args:
        model, denoiser: names, hub ids or folders; zoo is the one that ships with the package. classes: as for names_of(). dtype: of the
            denoiser's weights. calibration: if False, the denoiser's calibration.json is not read.

    Raises:
        ValueError, FileNotFoundError: a model cannot be read, or does not fit.
    """
    if classes is None:
        names = (None if name == "zoo" else name for name in (model, denoiser))
        classifier, diffusion = load_pair(*names, calibration=calibration)
        return classifier, diffusion.to(dtype=dtype), Classification()
    from dtta_fast.tasks.zero_shot import ZeroShot, load_clip

    own, prompts = zoo.folder("open_vocabulary"), names_of(classes)
    clip, processor = load_clip(own / "clip" if model == "zoo" else model)
    place = str(own / "diffusion") if denoiser == "zoo" else denoiser
    return clip, load_text_to_image(place, dtype=dtype, calibration=calibration), ZeroShot(prompts, processor)


def files(given: Sequence[Path]) -> list[Path]:
    """Lists the image files that paths stand for: a file itself, a folder's images, and for - the names on the standard input.

    Raises:
        ValueError: a file is missing, a folder has no image, or nothing is given.
    """
    found: list[Path] = []
    for path in given:
        if str(path) == "-":
            found += files([Path(line) for line in sys.stdin.read().removeprefix("\ufeff").splitlines() if line.strip() not in ("", "-")])
        elif path.is_dir():
            names = image_files(path)
            if not names:
                raise ValueError(f"{path} is a folder without images")
            found += [path / name for name in names]
        elif path.exists():
            found.append(path)
        else:
            raise ValueError(f"{path} does not exist")
    if not found:
        raise ValueError("images are missing: give at least one file")
    return found


def _print_probabilities(row: dict[str, Any]) -> None:
    """Prints the most likely classes of an image."""
    table = Table(title=f"{shown(row['path'])}: {row['evaluations']} evaluations, {row['seconds']:.2f} s")
    for head in ("class", "before %", "after %"):
        table.add_column(head, justify="left" if head == "class" else "right")
    for name in sorted(row["after"], key=row["after"].__getitem__, reverse=True)[:SHOWN]:
        table.add_row(shown(name), *(f"{100 * row[when][name]:.1f}" for when in ("before", "after")))
    terminal().print(table)
