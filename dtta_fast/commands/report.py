"""`dtta report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from dtta_fast.commands.common import check_path
from dtta_fast.data.images import Images, open_images
from dtta_fast.data.maps import Maps
from dtta_fast.report import Run, make_page, read_runs

THUMBNAIL = 96  # pixels that images of maps are read at


@dataclass(frozen=True)
class Report:
    """Write one HTML page about runs of `dtta evaluate`: accuracy, gain, calibration, cost, and the images that changed most.

    Example: dtta report runs/digits runs/other --out report.html
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint="(required)")]
    """Their folders; a run that is still going is shown as far as it is."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")] = Path("report.html")
    """The page: one file that loads nothing, for any browser."""

    def run(self) -> None:
        """Raises ValueError for no run, a folder without records, a damaged file, runs of several tasks, or a bad path."""
        check_path("out", self.out)
        page = make_page(read_runs(self.runs), Pictures())
        self.out.write_text(page, encoding="utf-8", errors="backslashreplace")  # names of files may hold bytes that are no text
        print(f"{self.out}: written")


class Pictures:
    """Reads images from the runs' data sets, which are opened once."""

    def __init__(self) -> None:
        self._opened: dict[Path, Images | Maps] = {}

    def __call__(self, run: Run, image_id: int) -> Image.Image:
        """Raises ValueError, ImportError or OSError where the data set cannot be read, or is not the one that the run was on."""
        if run.folder not in self._opened:
            self._opened[run.folder] = _data_of(run)
        data = self._opened[run.folder]
        return to_pil_image(data[image_id][0] if isinstance(data, Maps) else data.read(image_id))


def _data_of(run: Run) -> Images | Maps:
    described = dict(run.config.get("data", {}))
    if "name" not in described:
        raise ValueError("the run's folder has no config that names its data set")
    data = open_images(
        described["name"],
        None if described.get("root") is None else Path(described["root"]),
        corruptions=described.get("corruptions", ()),
        severities=described.get("severities", ()),
        split=described.get("split"),
        size=None if run.task == "classification" else THUMBNAIL,
    )
    for record in run.records:
        if record["image_id"] >= len(data) or data.names[record["image_id"]] != record["path"]:
            raise ValueError(f"the data set is not the one that the run was on: image {record['image_id']} is not {record['path']!r}")
    return data
