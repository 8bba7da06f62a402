"""The command `dtta`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torchvision.transforms.functional import to_pil_image

from dtta_fast import demo, demo_dense, environment, presets, zoo
from dtta_fast.adapter import Adapter
from dtta_fast.calibrating import calibrate
from dtta_fast.data.corruptions import DIGITS_C
from dtta_fast.data.folder import read_image, read_images
from dtta_fast.denoisers.dit import DiT


@dataclass(frozen=True)
class Demo:
    """Adapt a model to corrupted images, one by one, and show what it gains: handwritten digits, or generated scenes for maps."""

    task: Literal["classification", "segmentation", "depth"] = "classification"
    """What the model does."""
    preset: str | None = None
    """FAST, PAPER, ONLINE, DUSA or DENSE; DENSE for segmentation and depth, else FAST, where none is given."""
    images: int = 40
    """Test images for each corruption, at most 500 digits; the default is a sample that fits about a minute on 2 cores."""
    picture: Path | None = None
    """Of segmentation or depth: write a PNG of inputs, maps before and after, ground truth and what changed."""
    open_vocabulary: bool = False
    """By CLIP and Stable Diffusion, given the digits' names, instead of a classifier and a DiT."""
    seed: int = 0
    """Of timesteps and noise."""
    json: Path | None = None
    """Write the result to this file too."""

    def run(self) -> None:
        """Raises ValueError for an unknown preset, a number of images that the split does not have, or a bad path."""
        dense = None if self.task == "classification" else self.task
        preset = self.preset or ("DENSE" if dense else "FAST")
        config = presets.get(preset).replace(seed=self.seed)
        for path in (self.json, self.picture):
            _check_path(path)
        if dense and self.open_vocabulary:
            raise ValueError(f"open_vocabulary is a way of classification; task is {self.task!r}")
        if self.picture is not None and not dense:
            raise ValueError("picture is of maps: give --task segmentation or --task depth")
        if self.open_vocabulary or dense:
            _quiet()
        terminal = Console(stderr=True)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        progress = Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal)
        with progress:
            corruptions = demo_dense.CORRUPTIONS[dense] if dense else DIGITS_C
            bar = progress.add_task("loading", total=self.images * (1 + len(corruptions)))

            def advance(name: str, done: int) -> None:
                progress.update(bar, description=name, advance=done)

            if dense:
                found = demo_dense.run(dense, config, self.images, advance=advance)
            else:
                found = demo.run(config, self.images, open_vocabulary=self.open_vocabulary, advance=advance)
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
        (_print_dense if dense else _print_demo)(result)
        if dense and self.picture is not None:
            to_pil_image(demo_dense.picture(dense, config)).save(self.picture, format="PNG")
            print(f"{self.picture}: input, before, after, ground truth, better (green) and worse (red)")
        if self.json is not None:
            self.json.write_text(json.dumps(result, indent=2) + "\n")


def _check_path(path: Path | None) -> None:
    """Before the work, not after it."""
    if path is not None and (path.is_dir() or not path.resolve().parent.is_dir()):
        raise ValueError(f"the result cannot be written to {str(path)!r}: give a file in a folder that exists")


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
    console = Console()
    console.print(table)
    if size < 500:
        error = 100 * (0.25 / size) ** 0.5  # a proportion's standard error, at most
        console.print(f"A sample of {size} of the 500 test images: a row is good to about {error:.0f} points. --images 500 runs all.")


def _print_dense(result: dict[str, Any]) -> None:
    """The scores before and after, a row a corruption."""
    models = {"segmentation": "SegFormer", "depth": "GLPN"}[result["task"]]
    names = {"segmentation": ("mean_iou", "mean_class_accuracy"), "depth": ("abs_rel", "ssim")}[result["task"]]
    table = Table(title=f"{result['images']} scenes a row, {models} and a UNet that sees its map, preset {result['preset']}")
    table.add_column("corruption (severity)", no_wrap=True)
    for name in names:
        for head in (f"{name} before, %", "after, %"):
            table.add_column(head, justify="right")
    for head in ("evals/img", "s/img"):
        table.add_column(head, justify="right")

    def add(name: str, row: dict[str, Any]) -> None:
        values = [f"{100 * row[when][key]:.1f}" for key in names for when in ("source", "adapted")]
        table.add_row(name, *values, f"{row['evaluations_per_image']:.1f}", f"{row['seconds_per_image']:.3f}")

    for name, row in result["corruptions"].items():
        add(f"{name} ({row['severity']})", row)
    table.add_section()
    add("mean", result)
    add("clean", result["clean"])
    Console().print(table)
    low, high = (100 * bound for bound in result["gain_interval"])
    better = "less" if names[0] == "abs_rel" else "more"
    print(f"{names[0]}: mean change {low:+.2f} .. {high:+.2f} points (95 % over scenes); {better} is better.")


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
    preset: str = "FAST"
    """FAST, PAPER, ONLINE or DUSA. FAST and ONLINE take a calibrated diffusion model: see `dtta calibrate`."""
    parameters: Literal["all", "norm", "head", "lora"] = "all"
    """Which weights of CLIP's image tower move."""
    seed: int = 0
    """Of timesteps and noise."""
    json: Path | None = None
    """Write the result to this file too."""

    def run(self) -> None:
        """Raises ValueError for bad names, an unknown preset, a model or an image that cannot be read, or a bad path."""
        from dtta_fast.tasks.zero_shot import ZeroShot, load_clip

        _quiet()
        config = presets.get(self.preset).replace(seed=self.seed, parameters=self.parameters)
        names = [name.strip() for name in self.classes.split(",")]
        _check_path(self.json)
        images = [read_image(path) for path in self.images]
        own = zoo.folder("open_vocabulary")
        clip, processor = load_clip(own / "clip" if self.clip == "zoo" else self.clip)
        denoiser = load_denoiser(str(own / "diffusion") if self.diffusion == "zoo" else self.diffusion, stable_diffusion=True)
        adapter = Adapter(clip, denoiser, config, ZeroShot(names, processor))
        rows = []
        for number, (path, image) in enumerate(zip(self.images, images, strict=True)):  # one by one: sizes differ
            found = adapter.adapt(image[None], image_ids=torch.tensor([number]))
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


@dataclass(frozen=True)
class Env:
    """Show versions, devices and which backend serves the ops here."""

    json: Path | None = None
    """Write the result to this file too."""

    def run(self) -> None:
        _check_path(self.json)
        result = environment.describe()
        for key, value in result.items():
            print(f"{key:16} {value}")
        if self.json is not None:
            self.json.write_text(json.dumps(result, indent=2) + "\n")


@dataclass(frozen=True)
class Calibrate:
    """Measure a denoiser on clean images, without labels: what adaptation matches corrupted images to, and which timesteps it draws."""

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
        _check_path(path)
        denoiser = load_denoiser(self.denoiser, stable_diffusion=self.classes is not None)
        if self.classes is not None:
            from dtta_fast.denoisers.stable_diffusion import check_names

            names = [name.strip() for name in self.classes.split(",")]
            check_names("classes", names)
            denoiser = denoiser.with_classes([f"a photo of a {name}." for name in names])
        calibrate(denoiser, read_images(self.images, denoiser.image_size, self.most)).save(path)
        print(f"{path}: written")


def _quiet() -> None:
    """No bars of the libraries' own: what this command prints is for scripts too."""
    from diffusers.utils.logging import disable_progress_bar as quiet_diffusers
    from transformers.utils.logging import disable_progress_bar as quiet_transformers

    quiet_diffusers()
    quiet_transformers()


def load_denoiser(path: str, stable_diffusion: bool) -> Any:
    """A DiT or a Stable Diffusion, from a folder or the hub."""
    if stable_diffusion:
        from dtta_fast.denoisers.stable_diffusion import StableDiffusion

        return StableDiffusion.from_pretrained(path)
    return DiT.from_pretrained(path)


Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Adapt, tyro.conf.subcommand("adapt")]
    | Annotated[Calibrate, tyro.conf.subcommand("calibrate")]
    | Annotated[Env, tyro.conf.subcommand("env")]
)


def main(arguments: list[str] | None = None) -> None:
    """Runs a command; bad input ends it with one line and exit status 2."""
    command: Demo | Adapt | Calibrate | Env = tyro.cli(Command, prog="dtta", args=arguments)
    try:
        command.run()
    except (ValueError, TypeError, ImportError, OSError) as error:
        print(f"dtta {type(command).__name__.lower()}: {error}", file=sys.stderr)
        sys.exit(2)
