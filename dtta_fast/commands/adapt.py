"""`dtta adapt`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dtta_fast import presets, zoo
from dtta_fast.adapter import Adapter
from dtta_fast.calibration import Calibration
from dtta_fast.commands.common import Settings, check_path, checked_device, load_denoiser, names_of, quiet
from dtta_fast.data.folder import read_image


@dataclass(frozen=True)
class Adapt:
    """Adapt CLIP to images by Stable Diffusion, each on its own, and print the classes' probabilities before and after."""

    images: tyro.conf.Positional[tuple[Path, ...]]
    """Files of images."""
    classes: str
    """Their names, separated by commas: "a cat, a dog, a car"."""
    clip: str
    """A transformers CLIP's folder, or its id on the hub; zoo: the one of the digits that ships with the package."""
    diffusion: str
    """A Stable Diffusion's folder, or its id on the hub; zoo: the one of the digits."""
    calibration: Path | None = None
    """Of the diffusion model, as `dtta calibrate` wrote it; calibration.json in the model's folder where it is left out."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where both models run."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the diffusion model's weights."""
    json: Path | None = None
    """Write the result to this file too."""
    preset: str = "FAST"
    """FAST, PAPER, ONLINE or DUSA: what the settings below start from. FAST and ONLINE take a calibration."""
    config: Settings = presets.FAST

    def run(self) -> None:
        """Raises ValueError for bad names, an unknown preset, a model or an image that cannot be read, or a bad path."""
        from dtta_fast.tasks.zero_shot import ZeroShot, load_clip

        quiet()
        config, names = self.config, names_of(self.classes)
        check_path(self.json)
        if not self.images:
            raise ValueError("images are missing: give one file and more")
        device = checked_device(self.device)
        images = [read_image(path) for path in self.images]
        own = zoo.folder("open_vocabulary")
        clip, processor = load_clip(own / "clip" if self.clip == "zoo" else self.clip)
        place = str(own / "diffusion") if self.diffusion == "zoo" else self.diffusion
        denoiser = load_denoiser(place, stable_diffusion=True, dtype=getattr(torch, self.dtype))
        if self.calibration is not None:
            denoiser.calibration = Calibration.load(self.calibration, denoiser)
        adapter = Adapter(clip.to(device), denoiser.to(device), config, ZeroShot(names, processor))
        rows = []
        for number, (path, image) in enumerate(zip(self.images, images, strict=True)):  # one by one: sizes differ
            found = adapter.adapt(image[None].to(device), image_ids=torch.tensor([number], device=device))
            before, after = (outputs[0].softmax(0).tolist() for outputs in (found.outputs_before, found.outputs))
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
        if self.json is not None:
            self.json.write_text(json.dumps({"images": rows, "config": asdict(config)}, indent=2) + "\n")


def _print_probabilities(row: dict[str, Any]) -> None:
    """The ten likeliest classes of an image."""
    table = Table(title=f"{escape(row['path'])}: {row['evaluations']} evaluations, {row['seconds']:.2f} s")
    for head in ("class", "before %", "after %"):
        table.add_column(head, justify="left" if head == "class" else "right")
    for name in sorted(row["after"], key=row["after"].__getitem__, reverse=True)[:10]:
        table.add_row(escape(name), *(f"{100 * row[when][name]:.1f}" for when in ("before", "after")))
    Console().print(table)
