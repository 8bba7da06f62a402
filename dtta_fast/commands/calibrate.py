"""`dtta calibrate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from dtta_fast.calibrating import calibrate
from dtta_fast.commands.common import check_path, load_denoiser, names_of
from dtta_fast.data.folder import read_images


@dataclass(frozen=True)
class Calibrate:
    """Measure a denoiser on clean images, without labels: what adaptation matches corrupted images to, and which timesteps it draws.

    The timesteps take 1,600 forwards of the denoiser and 20 more a class for each of the first 64 images (21,600 for ImageNet's classes):
    a large denoiser wants a GPU, or fewer images by --most.
    """

    denoiser: tyro.conf.Positional[str]
    """A DiT's folder, or its id on the hub; with classes a Stable Diffusion's."""
    images: tyro.conf.Positional[Path]
    """A folder of clean images, 8 and more, like those that the denoiser was trained on; subfolders are searched too."""
    classes: str | None = None
    """Of a Stable Diffusion: what the images show, by names separated by commas, two and more."""
    most: int = 256
    """Images to read at most, in the order of their names."""
    out: Path | None = None
    """Where to write; calibration.json in the denoiser's folder where it is left out."""

    def run(self) -> None:
        """Raises ValueError for a folder without images, and where the denoiser has no folder and out is left out."""
        folder = Path(self.denoiser)
        if self.out is None and not folder.is_dir():
            raise ValueError(f"denoiser is {self.denoiser!r}, which is no folder here; say where to write by --out FILE")
        path = self.out or folder / "calibration.json"
        check_path(path)
        denoiser = load_denoiser(self.denoiser, stable_diffusion=self.classes is not None)
        if self.classes is not None:
            from dtta_fast.denoisers.stable_diffusion import check_names

            names = names_of(self.classes)
            check_names("classes", names)
            denoiser = denoiser.with_classes([f"a photo of a {name}." for name in names])
        calibrate(denoiser, read_images(self.images, denoiser.image_size, self.most)).save(path)
        print(f"{path}: written")
