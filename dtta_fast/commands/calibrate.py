"""`dtta calibrate`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor, nn

from dtta_fast.commands.common import (
    OutFile,
    check_apart,
    check_path,
    checked_device,
    holds,
    names_of,
    quiet,
    shown,
    terminal,
    write_json,
)
from dtta_fast.core.calibrate import calibrate
from dtta_fast.data.folder import read_images
from dtta_fast.denoisers.base import Denoiser
from dtta_fast.denoisers.calibration import LEAST
from dtta_fast.runs.models import load_classifier, load_denoiser, load_text_to_image, takes_prompts
from dtta_fast.runs.writing import check_name, write_whole
from dtta_fast.tasks.base import Task
from dtta_fast.tasks.classification import Classification


@dataclass(frozen=True)
class Calibrate:
    """Measure a denoiser on clean, unlabeled images: the statistics for matching corrupted images and the timesteps to sample.

    With --model, this takes 4,960 forwards of the denoiser, on 32 of the images. Without it, each image's class has to be searched first,
    in 20 forwards for each class, and how far the loss can be trusted stays unknown. If the command is interrupted, run it again; it goes
    on where it stopped.

    Example: dtta calibrate models/dit clean_images --model convnext_tiny --out calibration.json
    """

    denoiser: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DENOISER", help_behavior_hint="(required)")]
    """Diffusion model: a folder or a hub id; one that takes prompts, such as Stable Diffusion, requires --classes."""
    images: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES", help_behavior_hint="(required)")]
    """Folder of at least 8 clean images similar to the denoiser's training data; subfolders are searched too."""
    classes: Annotated[str | None, tyro.conf.arg(metavar="NAMES", help_behavior_hint="(default: none)")] = None
    """What the images show, for a text-to-image model: at least two names separated by commas, such as "cat, car"; a .txt file with one
    name a line; a .json file with prompts for each name; or imagenet."""
    model: Annotated[str | None, tyro.conf.arg(metavar="MODEL", help_behavior_hint="(default: none)")] = None
    """The model that will be adapted: a classifier or, for a text-to-image model, a CLIP. Its outputs say which classes to compare."""
    most: int = 256
    """Maximum number of images to read, evenly spaced in the order of their names; at least 1."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Device on which the denoiser runs."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: calibration.json in DENOISER)")] = None
    """Output file; defaults to calibration.json in the denoiser's folder."""
    json: OutFile = None
    """Also write the result to this file."""

    def run(self) -> None:
        """Raises ValueError for a bad device, classes or images, or if the denoiser is not a local folder and out is omitted."""
        check_name("denoiser", self.denoiser)
        if self.denoiser == "zoo":
            raise ValueError("denoiser is 'zoo', whose calibration ships with it; give the folder or hub id of another one")
        folder = Path(self.denoiser)
        if self.out is None and not folder.is_dir():
            raise ValueError(f"denoiser is {self.denoiser!r}, which is not a folder here; say where to write by --out FILE")
        path = self.out or folder / "calibration.json"
        if self.out is None and path.is_symlink():
            raise ValueError(f"{shown(path)} is a link, which may lead anywhere; remove it, or say where to write by --out FILE")
        # an existing file of that name in the denoiser's folder is replaced, even if it is damaged
        check_path("out", path, (lambda path: True) if self.out is None else holds("typical", "scatter"))
        check_path("json", self.json, holds("denoiser", "calibration"))
        check_apart(out=path, json=self.json)
        device = checked_device(self.device)
        names = [] if self.classes is None else names_of(self.classes)
        if names and not takes_prompts(self.denoiser):
            raise ValueError(f"classes is {self.classes!r}, and denoiser {self.denoiser!r} has classes of its own: leave --classes out")
        partial = path.with_name(f".{path.name}.part")
        if partial.is_symlink() or partial.is_dir():
            raise ValueError(f"{shown(partial)}, which keeps what has been measured, is a link or a folder; remove it")
        quiet()
        with terminal(stderr=True).status("loading"):
            denoiser: Any  # a Denoiser, whose image_size is a number
            model: nn.Module | None = None
            task: Task = Classification()
            if self.model is not None and names:
                denoiser, model, task = _with_clip(self.denoiser, self.model, names)
            else:
                denoiser = load_denoiser(self.denoiser, names, calibration=False)
                model = None if self.model is None else load_classifier(self.model)
            denoiser.to(device)
            images = read_images(self.images, denoiser.image_size, self.most)
            answers = None if model is None else _outputs(model.to(device), task, denoiser, images.to(device))
        if len(images) < LEAST:
            raise ValueError(f"images is {str(self.images)!r}, which holds {len(images)}; give a folder of {LEAST} or more")
        if partial.exists():
            print(shown(f"goes on from what {partial} holds"), file=sys.stderr)
        try:
            found = calibrate(denoiser, images.to(device), answers, progress=True, partial=partial)
        except KeyboardInterrupt:
            print(shown(f"{partial} keeps what has been measured: repeat the command to go on, or remove it"), file=sys.stderr)
            raise
        write_whole(path, found.to_json())
        partial.unlink(missing_ok=True)
        write_json(self.json, {"denoiser": self.denoiser, "images": len(images), "calibration": asdict(found)})
        print(f"wrote {shown(path)}")


def _with_clip(place: str, clip_place: str, names: Sequence[str] | Mapping[str, Sequence[str]]) -> tuple[Denoiser, nn.Module, Task]:
    """Loads a text-to-image model and a CLIP, both with these class names, and their task."""
    from dtta_fast.tasks.zero_shot import ZeroShot, load_clip

    clip, processor = load_clip(clip_place)
    task = ZeroShot(names, processor)
    model, denoiser = task.bind(clip, load_text_to_image(place, calibration=False))
    return denoiser, model, task


@torch.no_grad()
def _outputs(model: nn.Module, task: Task, denoiser: Denoiser, images: Tensor) -> Tensor:
    """Returns the model's outputs [N, K] for images [N, 3, H, W]; raises ValueError if it has other classes than the denoiser."""
    outputs = torch.cat([model(task.normalise(model, task.crop(model, part))) for part in images.split(64)])
    classes = len(denoiser.class_embeddings({}))
    if outputs.ndim != 2 or outputs.shape[1] != classes:
        raise ValueError(
            f"model gives outputs of shape {tuple(outputs.shape)}, and the denoiser has {classes} classes: name its classifier"
        )
    return outputs
