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

    They need no compiler and no models. By default of the digits zoo. The package takes images of the size that the model looks at, and
    --batch of them in a call. How far its outputs may be from those of the engine is measured here, and stands in its manifest. Takes
    minutes, and a C++ compiler.

    Example: dtta export digits.pt2 --batch 4
    """

    package: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PACKAGE", help_behavior_hint="(required)")]
    """The file to write, such as digits.pt2."""
    model: Name = None
    """A classifier: timm's name, hf-hub:ID, or a folder in timm's format; with --denoiser."""
    denoiser: Name = None
    """A DiT's folder, or its id on the hub, of the same classes; with --model."""
    images: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="(default: digits-C, or random pixels)")] = None
    """A folder of images like those to come, to measure the tolerance on; digits-C's for the zoo, random pixels for other models."""
    batch: int = 1
    """Images in a call, 1 and more: the package takes no other number."""
    measured: int = 32
    """Images to measure the tolerance on, in batches."""
    json: OutFile = None
    """Write the manifest to this file too."""
    preset: str = "FAST"
    """FAST, PAPER, ONLINE or DUSA: what the settings below start from. FAST and ONLINE take a calibration."""
    config: Settings = presets.FAST
    """Settings of the adaptation; their defaults are the preset's."""

    def run(self) -> None:
        """Raises ValueError for what cannot be exported, for bad models, images or paths: before anything is compiled."""
        from dtta_fast.embed.exporting import check_exportable, check_target, export

        check_path("package", self.package, _is_package)
        check_path("json", self.json, holds("format", "capability"))
        check_apart(package=self.package, json=self.json)
        check_target(self.package, self.batch)
        check_exportable(self.config)
        if self.measured < self.batch:
            raise ValueError(f"measured is {self.measured}; give batch = {self.batch} and more")
        quiet()
        subject = load_subject(self.model, self.denoiser, self.images, self.measured, torch.device("cpu"))
        with terminal(stderr=True).status("loading") as status:
            manifest = export(
                subject.model,
                subject.denoiser,
                subject.images.unique(dim=0),  # a folder with fewer is repeated
                self.package,
                config=self.config,
                batch=self.batch,
                progress=lambda name: status.update(f"compiling {name}"),
            )
        write_json(self.json, asdict(manifest))
        size = self.package.stat().st_size / 2**20
        print(
            f"{shown(self.package)}: written, {size:.0f} MiB, for torch {manifest.torch} on {manifest.capability}, "
            f"weights {manifest.weights}"
        )
        print(
            f"outputs and losses differ from the engine's by {manifest.measured:.1e} at most on {manifest.measured_images} images; "
            f"tolerance {manifest.tolerance:.1e}"
        )


def _is_package(path: Path) -> bool:
    """Whether a file is a package of compiled functions, by the names in it."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any("/aotinductor/" in name for name in archive.namelist())
    except (OSError, ValueError, zipfile.BadZipFile):
        return False
