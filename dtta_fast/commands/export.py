"""`dtta export`."""

from __future__ import annotations

import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from dtta_fast import presets
from dtta_fast.commands.common import Name, OutFile, Settings, check_apart, check_path, holds, quiet, shown, terminal, write_json
from dtta_fast.commands.subjects import load_subject


@dataclass(frozen=True)
class Export:
    """Compile an adaptation ahead of time into a package that Python and C++ hosts load in milliseconds.

    The hosts need neither a compiler nor the models. By default the package contains the digits zoo. It takes images of the model's input
    size, --batch of them per call. The export measures how far its outputs may deviate from those of the engine and records this tolerance
    in the manifest. It takes minutes and requires a C++ compiler.

    Example: dtta export digits.pt2 --batch 4
    """

    package: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PACKAGE", help_behavior_hint="(required)")]
    """Output file, such as digits.pt2."""
    model: Name = None
    """Classifier: a timm name, hf-hub:ID, or a folder in timm's format; requires --denoiser."""
    denoiser: Name = None
    """DiT for the same classes: a folder or a hub id; requires --model."""
    images: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="(default: digits-C, or random pixels)")] = None
    """Folder of images similar to future inputs, for measuring the tolerance; digits-C for the zoo, random pixels for other models."""
    batch: int = 1
    """Images per call, at least 1; the package accepts no other batch size."""
    measured: int = 32
    """Number of images, processed in batches, on which the tolerance is measured."""
    json: OutFile = None
    """Also write the manifest to this file."""
    preset: str = "FAST"
    """FAST, PAPER, ONLINE or DUSA: the starting point of the settings below. FAST and ONLINE need a calibration."""
    config: Settings = presets.FAST
    """Adaptation settings; their defaults come from the preset."""

    def run(self) -> None:
        """Raises ValueError for settings that cannot be exported and for bad models, images or paths, before compiling anything."""
        from dtta_fast.embed.exporting import check_exportable, check_target, export

        check_path("package", self.package, _is_package)
        check_path("json", self.json, holds("format", "capability"))
        check_apart(package=self.package, json=self.json)
        check_target(self.package, self.batch)
        check_exportable(self.config)
        if self.measured < self.batch:
            raise ValueError(f"measured is {self.measured}; give batch = {self.batch} or more")
        quiet()
        subject = load_subject(self.model, self.denoiser, self.images, self.measured, torch.device("cpu"))
        with terminal(stderr=True).status("loading") as status:
            manifest = export(
                subject.model,
                subject.denoiser,
                subject.images.unique(dim=0),  # the images of a smaller folder are repeated
                self.package,
                config=self.config,
                batch=self.batch,
                progress=lambda name: status.update(f"compiling {name}"),
            )
        write_json(self.json, asdict(manifest))
        size = self.package.stat().st_size / 2**20
        print(
            f"wrote {shown(self.package)}, {size:.0f} MiB, for torch {manifest.torch} on {manifest.capability}, weights {manifest.weights}"
        )
        print(
            f"outputs and losses differ from the engine's by {manifest.measured:.1e} at most on {manifest.measured_images} images; "
            f"tolerance {manifest.tolerance:.1e}"
        )


def _is_package(path: Path) -> bool:
    """Checks by its entry names whether a file is a package of compiled functions."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any("/aotinductor/" in name for name in archive.namelist())
    except (OSError, ValueError, zipfile.BadZipFile):
        return False
