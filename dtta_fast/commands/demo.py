"""`dtta demo`."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from PIL.PngImagePlugin import PngInfo
from rich.table import Table
from torchvision.transforms.functional import to_pil_image

from dtta_fast import presets
from dtta_fast.commands import demo_digits as demo
from dtta_fast.commands import demo_maps as demo_dense
from dtta_fast.commands.common import OutFile, check_apart, check_path, holds, is_page, progress_bar, quiet, shown, terminal, write_json
from dtta_fast.data.corruptions import DIGITS_C
from dtta_fast.report import make_page
from dtta_fast.report.measures import number, scale_of
from dtta_fast.runs.writing import write_whole
from dtta_fast.runtime import environment

SIGNED = ("Software", "dtta demo")  # PNG text entry that marks our pictures


@dataclass(frozen=True)
class Demo:
    """Adapt a model to corrupted images one by one and show the gain, on handwritten digits or, for dense maps, generated scenes.

    Example: dtta demo --task segmentation --images 8 --picture maps.png
    """

    task: Literal["classification", "segmentation", "depth"] = "classification"
    """Task of the model."""
    preset: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: as task wants)")] = None
    """FAST, RANK, PAPER, ONLINE, DUSA or DENSE; defaults to DENSE for segmentation and depth, otherwise to FAST."""
    images: int = 40
    """Test images per corruption, at most 500 for digits; the default is a sample that takes about a minute on 2 cores."""
    picture: OutFile = None
    """Write a PNG to this file, for segmentation or depth: inputs, maps before and after, ground truth and changes."""
    html: OutFile = None
    """Write a report of the run to this file, a page for any browser, for classification."""
    open_vocabulary: bool = False
    """Use CLIP and Stable Diffusion with the names of the digits instead of a classifier and a DiT."""
    seed: int = 0
    """Seed for timesteps and noise, 0 to 2^63 - 1."""
    json: OutFile = None
    """Also write the result to this file."""

    def run(self) -> None:
        """Raises ValueError for an unknown preset, a number of images that the split cannot provide, or a bad path."""
        dense = None if self.task == "classification" else self.task
        preset = self.preset or ("DENSE" if dense else "FAST")
        config = presets.get(preset).replace(seed=self.seed)
        check_path("json", self.json, holds("benchmark", "environment"))
        check_path("picture", self.picture, _is_picture)
        check_path("html", self.html, is_page)
        check_apart(json=self.json, picture=self.picture, html=self.html)
        if self.html is not None and dense:
            raise ValueError(f"html shows a classifier's answers, and task is {self.task!r}: for maps, give --picture FILE")
        if dense and self.open_vocabulary:
            raise ValueError(f"open_vocabulary is a way of classification; task is {self.task!r}")
        if self.picture is not None and not dense:
            raise ValueError("picture is of maps: give --task segmentation or --task depth")
        if self.open_vocabulary or dense:
            quiet()
        kept = None if self.html is None else demo.Kept()
        with progress_bar() as progress:
            corruptions = demo_dense.CORRUPTIONS[dense] if dense else DIGITS_C
            bar = progress.add_task("loading", total=self.images * (1 + len(corruptions)))

            def advance(name: str, done: int) -> None:
                progress.update(bar, description=name, advance=done)

            if dense:
                found = demo_dense.run(dense, config, self.images, advance=advance)
            else:
                found = demo.run(config, self.images, open_vocabulary=self.open_vocabulary, advance=advance, keep=kept or demo.nothing)
        result = {
            "benchmark": "scenes-C" if dense else "digits-C",
            "task": self.task,
            "split": "test",
            "preset": preset.upper(),
            "models": "open_vocabulary" if self.open_vocabulary else dense or "digits",
            **found,
            "config": asdict(config),
            "environment": environment.describe(),
        }
        write_json(self.json, result)
        (_print_dense if dense else _print_demo)(result)
        if self.html is not None and kept is not None:
            told = {"data": {"name": "digits-c"}, "task": "classification", "adapt": result["config"]}
            images = kept.images
            page = make_page([kept.as_run(told, result["environment"])], lambda run, i: to_pil_image(images[i]))
            write_whole(self.html, page)
            print(f"{shown(self.html)}: the images that changed most, and the figures")
        if dense and self.picture is not None:
            about, png = PngInfo(), io.BytesIO()
            about.add_text(*SIGNED)
            to_pil_image(demo_dense.picture(dense, config)).save(png, format="PNG", pnginfo=about)
            write_whole(self.picture, png.getvalue())
            print(f"{shown(self.picture)}: input, before, after, ground truth, better (green) and worse (red)")


def _is_picture(path: Path) -> bool:
    """Checks whether a file is a picture written by this command."""
    with path.open("rb") as file:
        return "\0".join(SIGNED).encode() in file.read(4096)


def _print_demo(result: dict[str, Any]) -> None:
    size = result["images"]
    models = {"digits": "ConvNeXt and DiT", "open_vocabulary": "CLIP and Stable Diffusion"}[result["models"]]
    table = Table(title=f"digits-C, {size} test images a row, {models}, preset {result['preset']}")
    table.add_column("corruption (severity)", no_wrap=True)
    for head in ("source %", "adapted %", "gain", "evals/img", "s/img"):
        table.add_column(head, justify="right")

    def add(name: str, row: dict[str, Any]) -> None:
        source, adapted = 100 * row["source_accuracy"], 100 * row["adapted_accuracy"]
        cost = f"{row['evaluations_per_image']:.1f}", f"{row['seconds_per_image']:.3f}"
        table.add_row(name, f"{source:.1f}", f"{adapted:.1f}", f"{adapted - source:+.1f}", *cost)

    for name, row in result["corruptions"].items():
        add(f"{name} ({row['severity']})", row)
    table.add_section()
    add("mean", result)
    add("clean", result["clean"])
    console = terminal()
    console.print(table)
    if size < 500:
        error = 100 * (0.25 / size) ** 0.5  # upper bound on the standard error of a proportion
        console.print(f"A sample of {size} of the 500 test images: a row is good to about {error:.0f} points. --images 500 runs all.")


def _print_dense(result: dict[str, Any]) -> None:
    """Prints the scores before and after, one row per corruption."""
    models = {"segmentation": "SegFormer", "depth": "GLPN"}[result["task"]]
    names = {"segmentation": ("mean_iou", "mean_class_accuracy"), "depth": ("abs_rel", "ssim")}[result["task"]]
    table = Table(title=f"{result['images']} scenes a row, {models} and a UNet that sees its map, preset {result['preset']}")
    table.add_column("corruption (severity)", no_wrap=True)
    for name in names:
        unit = f", {scale_of(name).unit}" if scale_of(name).unit else ""
        for head in (f"{name} before{unit}", f"after{unit}"):
            table.add_column(head, justify="right")
    for head in ("evals/img", "s/img"):
        table.add_column(head, justify="right")

    def add(name: str, row: dict[str, Any]) -> None:
        values = [scale_of(key).shown(row[when][key]) for key in names for when in ("source", "adapted")]
        table.add_row(name, *values, f"{row['evaluations_per_image']:.1f}", f"{row['seconds_per_image']:.3f}")

    for name, row in result["corruptions"].items():
        add(f"{name} ({row['severity']})", row)
    table.add_section()
    add("mean", result)
    add("clean", result["clean"])
    terminal().print(table)
    scale = scale_of(names[0])
    low, high = (number(100 * bound, 2, True) if scale.percent else scale.shown(bound, sign=True) for bound in result["gain_interval"])
    unit, better = " points" if scale.percent else "", "less" if scale.less else "more"
    print(f"{names[0]}: mean change {low} .. {high}{unit} (95 % over scenes); {better} is better.")
