"""`dtta report`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from dtta_fast.commands.common import check_apart, check_path, holds, is_page, shown
from dtta_fast.data.base import Maps
from dtta_fast.data.images import Images, open_images
from dtta_fast.report import Run, make_page, read_runs
from dtta_fast.report.exchange import HEAD, is_clean, latex_table, model_info
from dtta_fast.runs.content import digest, mismatch
from dtta_fast.runs.records import Data, check
from dtta_fast.runs.writing import check_name, write_whole

THUMBNAIL = 96  # image size in pixels at which map images are read


@dataclass(frozen=True)
class Report:
    """Write one HTML page about runs of `dtta evaluate`: accuracy, gain, calibration, cost, and the images that changed most.

    Runs may come from untrusted sources, so nothing that their files refer to is read or downloaded. Thumbnails are read from --root.

    Example: dtta report runs/digits runs/other --out report.html
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint="(required)")]
    """Folders of the runs; an unfinished run is shown as far as it has got."""
    root: Annotated[Path | None, tyro.conf.arg(metavar="PLACE", help_behavior_hint="(default: no thumbnails, but of the digits)")] = None
    """Location of the runs' dataset for thumbnails, as given to `dtta evaluate`."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")] = Path("report.html")
    """Output page for any browser: a single file that loads no external resources."""
    latex: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: none)")] = None
    """Also write a LaTeX table of the errors by corruption."""
    model_info: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="(default: none)")] = None
    """Also write RobustBench's record of each run on ImageNet-C or CIFAR-C, as FOLDER/DATA/corruptions/RUN.json."""

    def run(self) -> None:
        """Raises ValueError if no run is given, or for a folder without records, a damaged file, runs of different tasks, or a bad path."""
        check_path("out", self.out, is_page)
        if self.root is not None:
            check_name("root", self.root)
        check_path("latex", self.latex, _is_table)
        check_apart(out=self.out, latex=self.latex)
        runs = read_runs(self.runs)
        files = {self.out: make_page(runs, Pictures(self.root))}
        if self.latex is not None:
            files[self.latex] = latex_table(runs)
        if self.model_info is not None:
            files |= self._model_infos(runs)
        for path, text in files.items():
            write_whole(path, text)
            print(f"wrote {shown(path)}")

    def _model_infos(self, runs: Sequence[Run]) -> dict[Path, str]:
        """Returns RobustBench's records by path; runs on clean images only contribute their accuracy."""
        assert self.model_info is not None
        found: dict[Path, str] = {}
        for run in runs:
            if is_clean(run):
                continue
            data, info = model_info(run, runs)
            path = self.model_info / data / "corruptions" / f"{run.folder.name}.json"
            if path in found:
                raise ValueError(f"runs has two folders of the name {run.folder.name!r}, and {shown(path)} holds one run: rename one")
            found[path] = json.dumps(info, indent=2) + "\n"
        if not found:
            raise ValueError("model_info is given, and all runs are on clean images: add a run on ImageNet-C or CIFAR-C")
        for path in found:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(f"model_info is {str(self.model_info)!r}, where no folder can be made: {error}") from error
            check_path("model_info", path, holds("corruptions_acc"))
        return found


def _is_table(path: Path) -> bool:
    """Checks whether a file is a table written by this command."""
    with path.open("rb") as file:
        return file.read(len(HEAD)) == HEAD.encode()


class Pictures:
    """Reads the images of runs from the dataset at `root`, opened once per run; the digits are generated and need no root."""

    def __init__(self, root: Path | None = None) -> None:
        self._root = root
        self._opened: dict[Path, Images | Maps] = {}

    def __call__(self, run: Run, image_id: int) -> Image.Image:
        """Raises ValueError, ImportError or OSError if the dataset cannot be read or is not the one that the run used."""
        if run.folder not in self._opened:
            self._opened[run.folder] = _data_of(run, self._root)
        item = self._opened[run.folder][image_id]
        if isinstance(item, tuple):
            return to_pil_image(item[0])
        kept = next(record.get("digest") for record in run.records if record["image_id"] == image_id)
        if kept not in (None, digest(item)):
            raise ValueError(f"image {image_id} has other pixels than the run read")
        return to_pil_image(item)


def _data_of(run: Run, root: Path | None) -> Images | Maps:
    described = run.config.get("data", {})
    if "name" not in described:
        raise ValueError("the run's folder has no config that names its data set")
    data: Data = check(described, Data)
    if data.root is not None and root is None:
        raise ValueError(f"they are read from --root alone, which is where the run's data set, {data.name!r}, lies")
    if data.name == "hf" and not (root and root.is_dir()):
        raise ValueError(f"root is {str(root)!r}, which is not a folder here, and a report asks no hub")
    found = open_images(
        data.name,
        None if data.root is None else root,
        corruptions=data.corruptions,
        severities=data.severities,
        split=data.split,
        size=None if run.task == "classification" else THUMBNAIL,
    )
    for record in run.records:
        why = f"there is no image {record['image_id']}" if record["image_id"] >= len(found) else mismatch(record, found)
        if why:
            raise ValueError(f"the data set is not the one that the run was on: {why}")
    return found
