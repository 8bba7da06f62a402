"""`dtta doctor`."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from dtta_fast import presets
from dtta_fast.commands.adapt import files, load_pair_or_clip
from dtta_fast.commands.common import OutFile, check_path, checked_device, holds, names_of, quiet, shown, terminal, write_json
from dtta_fast.measure.suitability import Suitability, examine
from dtta_fast.runs.models import class_names
from dtta_fast.runs.writing import check_name
from dtta_fast.runtime.pictures import read_image


@dataclass(frozen=True)
class Doctor:
    """Tell, without labels, whether adaptation can help on your images, and what it costs.

    Shows how the images are preprocessed, how many of them are unusual to the denoiser, how many answers change and by what, whether the
    denoising loss agrees with the classifier, and what an image costs on this machine; then what to do about it.

    Example: dtta doctor photos --model resnet50.a1_in1k --denoiser models/dit
    """

    images: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE [IMAGE ...]", help_behavior_hint="(required)")]
    """Image files, and folders of them."""
    classes: Annotated[str | None, tyro.conf.arg(metavar="NAMES", help_behavior_hint="(default: those of the classifier)")] = None
    """Class names for CLIP and a text-to-image model: separated by commas, or a file; see dtta adapt."""
    model: Annotated[str, tyro.conf.arg(metavar="MODEL")] = "zoo"
    """A classifier, as for dtta adapt; or a CLIP model with --classes."""
    denoiser: Annotated[str, tyro.conf.arg(metavar="DENOISER")] = "zoo"
    """The diffusion model, as for dtta adapt."""
    most: int = 50
    """Maximum number of images to examine, evenly spaced; at least 1."""
    preset: str = "FAST"
    """FAST, RANK or PAPER."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Device on which the models run."""
    json: OutFile = None
    """Also write the findings to this file."""

    def run(self) -> None:
        """Raises ValueError for bad names, an unknown or online preset, an unreadable model or image, or a bad path."""
        quiet()
        check_path("json", self.json, holds("agreement", "advice"))
        for name, place in (("model", self.model), ("denoiser", self.denoiser)):
            check_name(name, place)
        config = presets.get(self.preset)
        if config.mode != "episodic":
            raise ValueError(f"preset is {self.preset!r}, which adapts to a stream; give FAST, RANK or PAPER")
        if self.most < 1:
            raise ValueError(f"most is {self.most}; give 1 or more")
        device, paths = checked_device(self.device), files(self.images)
        count = min(self.most, len(paths))
        paths = [paths[i * len(paths) // count] for i in range(count)]
        with terminal(stderr=True).status("loading") as status:
            pixels, unreadable = [], list[str]()
            for path in paths:
                try:
                    pixels.append(read_image(path))
                except ValueError as error:
                    unreadable.append(str(error))
            if not pixels:
                raise ValueError(unreadable[0])
            model, denoiser, task = load_pair_or_clip(self.model, self.denoiser, self.classes)
            status.update(f"examining {len(pixels)} images")
            found = examine(model.to(device), denoiser.to(device), pixels, config, task)
        write_json(self.json, {**asdict(found), "advice": found.advice()})
        names = class_names(model, found.classes) if self.classes is None else list(names_of(self.classes))
        for text in unreadable:
            print(shown(f"left out: {text}"), file=sys.stderr)
        whose = "the zoo's " if self.model == "zoo" else ""
        told = f"{whose}{type(model).__name__} of {', '.join(names[:3])}, .."
        print(*(shown(line) for line in _lines(found, told)), sep="\n")


def _lines(found: Suitability, model: str) -> list[str]:
    """Returns the page as lines."""
    sizes = ", ".join(f"{count} of {size}" for size, count in list(found.sizes.items())[:3])
    low, high = (min(1.0, max(0.0, found.agreement + sign * 2 * found.error)) for sign in (-1, 1))
    agreement = f"{found.agreement:.0%} of the images ({low:.0%} to {high:.0%}); chance is 50 %"
    rows = [
        ("images", f"{found.images}: {sizes}{', ..' if len(found.sizes) > 3 else ''}"),
        ("model", f"{model}; {found.classes} classes, {found.parameters / 1e6:.1f} M parameters"),
        ("crop", f"{found.crop[0]} x {found.crop[1]}"),
        ("normalisation", f"mean {_listed(found.mean)}, std {_listed(found.std)}" if found.mean else "its own"),
        ("denoiser", f"{found.denoiser_parameters / 1e6:.1f} M parameters, {'calibrated' if found.calibrated else 'not calibrated'}"),
        ("trust", f"{found.trust:.2f} of 3" if found.calibrated else "not measured"),
        ("loss prefers the model's first choice to its second", agreement),
        ("unusual images", "not known" if found.unusual is None else f"{found.unusual:.0%} (of the denoiser's own clean images, 5 %)"),
        ("adapted images", f"{found.selected:.0%}"),
        ("answers changed by matching", f"{found.by_matching:.0%}"),
        ("answers changed by adaptation", f"{found.by_adaptation:.0%}"),
        ("evaluations an image", f"{found.evaluations:.1f}"),
        ("seconds an image", f"{found.seconds:.3g}, with the first call's start-up"),
    ]
    lines = [f"{name:53}{value}" for name, value in rows]
    return [*lines, "", *(f"- {text}" for text in found.advice())]


def _listed(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.3g}" for value in values)
