"""The configuration of a run over a data set: data, models, protocol and settings, read from flags and YAML."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from dtta_fast import presets
from dtta_fast.config import AdaptConfig, Count, check_fields, refuse
from dtta_fast.runs.writing import check_name
from dtta_fast.runtime.files import read_text

TaskName = Literal["classification", "zero_shot", "segmentation", "depth"]
Protocol = Literal["episodic", "online", "continual"]
Stream = Literal["grouped", "gradual", "smooth", "correlated", "mixed"]
Dtype = Literal["float32", "bfloat16", "float16"]
DATA_FIELDS = ("root", "corruptions", "severities", "split", "per_class", "subset")
DESCRIBED = {"data.name": "data"} | {f"data.{name}": name for name in DATA_FIELDS}  # nested as in described()
PLACES = ("root", "subset", "model", "denoiser", "calibration")  # may be files or folders
MOST_YAML = 1_000_000  # characters; real settings fit on a page


def _all_by_default(value: str) -> str:
    return f"(default: {value if value not in ('', 'None') else 'all'})"


def _usual_by_default(value: str) -> str:
    return f"(default: {value if value not in ('', 'None') else 'its own'})"


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The configuration of a run. An invalid value raises ValueError with the field, the value and the allowed values.

    Attributes:
        data: name of the data set, such as imagenet-c, folder or digits-c; an unknown name raises an error that lists them all.
        root: location of the data set: its folder or, for some data sets, its file or its hub id; omit it for generated data sets.
        corruptions: names of the corruptions to use; all corruptions of the data set by default.
        severities: severities of each corruption to use, 1 to 5; all severities of the data set by default.
        split: split of the data set; by default its test split or, if it has none, its validation split.
        per_class: number of images per class and corruption, at least 1, sampled with the seed; all images by default.
        subset: text file with the names of the images to use, one a line, such as RobustBench's imagenet_test_image_ids.txt; a name
            selects that image under every corruption.
        task: task of the model: classification; zero_shot (with a CLIP model); segmentation; or depth.
        model: name, hub id or folder of the model: a timm classifier, a CLIP model, or a transformers model for segmentation or depth,
            depending on task; zoo selects the small model for the task that ships with the package.
        denoiser: folder or hub id of the diffusion model; zoo selects the small one for the task that ships with the package.
        classes: class names for zero_shot and for Stable Diffusion, each given as a separate argument and without commas, or a .txt
            file with one name a line; by default those of the data set. For classification, the names of the class folders in the order
            of the model's outputs, if that is not the order of the folders.
        calibration: file that dtta calibrate wrote for the denoiser; by default calibration.json in the denoiser's folder.
        protocol: state that each image starts from: episodic resets to the source model for every image; online carries one state
            through the images of a corruption; continual carries it through all images.
        stream: order of the images under protocol continual: grouped by corruption; gradual, each corruption from low severity to high and
            back; smooth, the same with each stage fading into the next; correlated, few classes at a time; or mixed at random.
        batch: number of images adapted in one call, at least 1.
        workers: number of threads that prefetch images, at least 1.
        device: device of both models, such as cpu or cuda; by default a GPU if available.
        dtype: data type of the denoiser's weights.
        adapt: settings of the adaptation; their defaults come from the preset.
    """

    data: Annotated[str, tyro.conf.arg(metavar="NAME")] = "digits-c"
    root: Annotated[str | None, tyro.conf.arg(metavar="PLACE", help_behavior_hint="(default: none)")] = None
    corruptions: Annotated[tuple[str, ...], tyro.conf.arg(help_behavior_hint=_all_by_default)] = ()
    severities: Annotated[tuple[int, ...], tyro.conf.arg(help_behavior_hint=_all_by_default)] = ()
    split: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint=_usual_by_default)] = None
    per_class: Annotated[Count | None, tyro.conf.arg(metavar="INT", help_behavior_hint=_all_by_default)] = None
    subset: Annotated[str | None, tyro.conf.arg(metavar="FILE", help_behavior_hint=_all_by_default)] = None
    task: TaskName = "classification"
    model: Annotated[str, tyro.conf.arg(metavar="MODEL")] = "zoo"
    denoiser: Annotated[str, tyro.conf.arg(metavar="DENOISER")] = "zoo"
    classes: Annotated[tuple[str, ...], tyro.conf.arg(help_behavior_hint=_usual_by_default)] = ()
    calibration: Annotated[str | None, tyro.conf.arg(metavar="FILE", help_behavior_hint=_usual_by_default)] = None
    protocol: Protocol = "episodic"
    stream: Stream = "grouped"
    batch: Count = 16
    workers: Count = 2
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    dtype: Dtype = "float32"
    adapt: Annotated[AdaptConfig, tyro.conf.arg(name="")] = presets.FAST

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("corruptions", "severities", "classes"):
            if not isinstance(getattr(self, name), (list, tuple)):
                refuse(self, name, "a list")
            object.__setattr__(self, name, tuple(getattr(self, name)))  # hashable, also when read from YAML
        if not isinstance(self.adapt, AdaptConfig):
            raise TypeError(f"adapt is a {type(self.adapt).__name__}; give an AdaptConfig, such as presets.FAST")
        for name in PLACES:
            if getattr(self, name) is not None:
                check_name(name, getattr(self, name))
        for name, one in (("corruptions", str), ("severities", int), ("classes", str)):
            if not all(isinstance(value, one) and not isinstance(value, bool) for value in getattr(self, name)):
                quotes = "text; YAML reads yes, no, on and off as true and false unless they are in quotes"
                refuse(self, name, "a list of " + ("whole numbers" if one is int else quotes))
        for name in self.classes:
            if "," in name:
                raise ValueError(f"classes has {name!r}, with a comma in it: give each class an argument of its own, such as cat dog")
        mode = _mode_of(self.protocol)
        if self.adapt.mode != mode:
            fitting = "episodic" if self.adapt.mode == "episodic" else "online, or continual"
            raise ValueError(
                f"mode is {self.adapt.mode!r} with protocol {self.protocol!r}, which takes {mode!r}: "
                f"set protocol to {fitting}, and leave mode out"
            )
        if self.stream != "grouped" and self.protocol != "continual":
            why = "whose images do not depend on each other" if self.protocol == "episodic" else "which starts anew at every corruption"
            raise ValueError(f"stream is {self.stream!r} with protocol {self.protocol!r}, {why}: set protocol to continual")

    def described(self) -> dict[str, Any]:
        """Returns the config as nested plain values, as stored in the run's config.json, without fields that cannot change a result."""
        found = dataclasses.asdict(self)
        data = {"name": found.pop("data"), **{name: found.pop(name) for name in DATA_FIELDS}}
        found.pop("workers")
        for part, name, usual in ((found, "stream", "grouped"), (data, "subset", None)):
            if part[name] == usual:  # configs of older versions lack it
                del part[name]
        plain: dict[str, Any] = _plain({"data": data, **found})
        return plain

    @classmethod
    def from_description(cls, described: Mapping[str, Any]) -> RunConfig:
        """Rebuilds a config from the output of described().

        Raises:
            ValueError: the mapping does not describe a run.
        """
        try:
            found = {name: value for name, value in described.items() if name not in ("data", "adapt", "weights")}
            data = dict(described["data"])
            return cls(data=data.pop("name"), **data, **found, adapt=AdaptConfig(**described["adapt"]))
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"described is not a description of a run: {error!r}; give what described() gave") from error


# settings that may be off, which YAML reads as false
OFF = ("match", "precheck", "compile")


def _plain(value: Any) -> Any:
    """Converts a value to the form in which JSON would return it."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def differences(first: Mapping[str, Any], second: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yields one line per difference between two descriptions: name: value / other value."""
    for name in sorted({*first, *second}):
        here, there = first.get(name), second.get(name)
        if isinstance(here, Mapping) and isinstance(there, Mapping):
            yield from differences(here, there, f"{prefix}{name}.")
        elif here != there:
            yield f"{prefix}{name}: {here!r} / {there!r}"


def with_settings(start: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    """Returns a config with some settings changed.

    A name may be a field of RunConfig, a field of AdaptConfig (adapt.steps or steps), or a name from the reference implementation. Names
    from described() (data.name, data.root) work too, so a run's config.json can serve as settings.

    Raises:
        ValueError: a name is unknown, or a value is not allowed.
    """
    from dtta_fast.runs.reference_names import translated

    own = {item.name for item in dataclasses.fields(RunConfig)} - {"adapt"}
    inner = {item.name for item in dataclasses.fields(AdaptConfig)}
    outer_changes: dict[str, Any] = {}
    changes: dict[str, Any] = {}
    for name, value in translated(flattened(settings)).items():
        if name.startswith("weights."):  # of a run's config.json
            continue
        bare = name.removeprefix("adapt.")
        name = DESCRIBED.get(name, name)
        if name in own:
            outer_changes[name] = value
        elif name == "preset":
            if not isinstance(value, str):
                raise ValueError(f"preset is {value!r}; choose one of {', '.join(presets.ALL)}")
            start = dataclasses.replace(start, adapt=presets.get(value), protocol=_protocol_of(presets.get(value).mode, start.protocol))
        elif bare in inner:
            changes[bare] = "off" if value is False and bare in OFF else value
        else:
            raise ValueError(
                f"{name} is not a setting of a run; there are {', '.join(sorted(own | {f'adapt.{field}' for field in inner}))}"
            )
    if "protocol" in outer_changes:
        changes.setdefault("mode", _mode_of(outer_changes["protocol"]))
    elif changes.get("mode") in ("episodic", "online"):
        outer_changes["protocol"] = _protocol_of(changes["mode"], start.protocol)
    return dataclasses.replace(start, **outer_changes, adapt=start.adapt.replace(**changes))


def _mode_of(protocol: str) -> str:
    return "episodic" if protocol == "episodic" else "online"


def _protocol_of(mode: str, protocol: Protocol) -> Protocol:
    """Returns the protocol for a mode: the requested one if it is compatible with the mode."""
    if mode == "episodic":
        return "episodic"
    return "online" if protocol == "episodic" else protocol


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested settings: {"a": {"b": 1}} becomes {"a.b": 1}."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flattened(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def yaml_value(text: str) -> Any:
    """Parses YAML and reads 5e-3 as a number, as YAML 1.2 and users expect; PyYAML implements YAML 1.1, which requires 5.0e-3.

    Raises:
        ValueError: the text is not valid YAML.
    """
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML is untyped here
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):  # nested aliases can expand to more values than fit in memory
                raise yaml.YAMLError(f"*{self.peek_event().anchor} is an alias: write its value out")
            return super().compose_node(parent, index)

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))
    if len(text) > MOST_YAML:
        raise ValueError(f"it has {len(text)} characters; settings take at most {MOST_YAML}")
    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: from dates such as 2001-99-99
        raise ValueError(f"it cannot be read as YAML: {error}") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads the settings from a YAML file.

    Raises:
        ValueError: the file is missing, is not valid YAML, or does not hold a mapping of names to values.
    """
    try:
        text = read_text(path)
        try:
            found = json.loads(text)  # for a run's config.json: YAML reads each surrogate pair as two characters
        except (ValueError, RecursionError):
            found = yaml_value(text)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{path} holds no settings; give lines such as `data: imagenet-c` and `steps: 5`")
    return found
