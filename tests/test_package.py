"""How the package is laid out once installed."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest

import dtta_fast.kernels
from dtta_fast import adapt, presets
from dtta_fast.core import loss as loss_module
from dtta_fast.kernels import native

ROOT = Path(__file__).parents[1]


def test_kernels_is_not_a_package_of_its_own():
    """Hugging Face's `kernels` package is probed for by diffusers: our folder must never answer to that name."""
    spec = importlib.util.find_spec("kernels")
    assert spec is None or not str(spec.origin or spec.submodule_search_locations).startswith(str(ROOT))


def test_without_the_native_library_the_ops_work_and_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(dtta_fast.kernels, "__path__", [str(tmp_path)])
    native.library.cache_clear()
    try:
        with pytest.raises(RuntimeError, match=r"was not built: install a C\+\+17 compiler"):
            native.philox(np.zeros((1, 4)), np.zeros(2))
        from dtta_fast.runtime import environment

        assert environment.describe()["native library"].startswith("not built")
    finally:
        native.library.cache_clear()


def test_importing_the_package_imports_no_heavy_library():
    heavy = {"sklearn", "imagecorruptions", "diffusers", "timm", "transformers", "torchvision", "peft", "rich", "tyro", "jinja2", "ray"}
    code = f"import sys, torch\nbefore = set(sys.modules)\nimport dtta_fast\nprint(sorted({heavy} & (set(sys.modules) - before)))"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "[]"


OTHER_SYSTEM = """
import importlib, os, pkgutil, sys
import diffusers, imagecorruptions, jinja2, msgspec, PIL.Image, portalocker, rich.progress, skimage, sklearn.datasets, timm, torch
import torchvision, transformers, tyro, yaml

modules, names = (), ("sched_getaffinity",)  # that macOS lacks
if sys.argv[1] == "win32":
    modules = ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog")
    names += ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_DIRECTORY", "fork", "register_at_fork", "getloadavg")
    names += ("getuid", "geteuid", "mkfifo", "uname", "sysconf")
for name in modules:
    sys.modules[name] = None  # an import of it raises ImportError
for name in names:
    delattr(os, name)
sys.platform = sys.argv[1]

import dtta_fast

for module in pkgutil.walk_packages(dtta_fast.__path__, "dtta_fast."):
    if not any(part in module.name for part in ("triton", "__main__", "libdtta_kernels")):
        importlib.import_module(module.name)
        print(module.name)

from dtta_fast.commands.cli import main

replace = os.replace


def replaced(source, target):  # Windows replaces no file that is open
    opened = {os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")}
    assert os.path.realpath(target) not in opened, f"{target} is open"
    replace(source, target)


if sys.argv[1] == "win32":
    os.replace = replaced
main(["env"])
main(["evaluate", sys.argv[2], "--per-class", "1", "--corruptions", "contrast", "--steps", "1", "--guard", "0"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_modules_import_without_what_only_linux_has(tmp_path, platform):
    """Windows has neither fcntl nor O_NOFOLLOW, and replaces no file that is open. A run over a data set works all the same."""
    command = [sys.executable, "-c", OTHER_SYSTEM, platform, str(tmp_path / "run")]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "dtta_fast.runs.folder" in run.stdout.splitlines()
    assert (tmp_path / "run" / "summary.json").is_file()


REEXPORTS = {  # documented paths, which hold no code of their own
    "draws": ("core.draws", {"Draws", "cumulative_density"}),
    "process": ("denoisers.noise_process", {"NoiseProcess"}),
    "evaluate": ("runs.evaluate", {"evaluate"}),
    "profiling": ("measure.profiling", {"Profile", "profile"}),
    "benchmark": ("measure.benchmark", {"latency", "throughput"}),
}
UPSTAIRS = ("commands", "report", "measure", "runs", "embed", "data", "zoo")


def imports():
    """Of every module of the package, the modules of the package that it imports, wherever in it."""
    files = {}
    for base, prefix in ((ROOT / "dtta_fast", "dtta_fast"), (ROOT / "kernels", "dtta_fast.kernels")):
        for path in base.rglob("*.py"):
            parts = [part for part in path.relative_to(base).with_suffix("").parts if part != "__init__"]
            files[".".join([prefix, *parts])] = path
    found = {}
    for name, path in files.items():
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom) and node.module]
        named = [(node.module, f"{node.module}.{alias.name}") for node in nodes for alias in node.names]
        found[name] = {full if full in files else module for module, full in named if module.startswith("dtta_fast")} - {name}
    return found


def rooms():
    """The floor of each room, from docs/design.md; a module may import from its own room and from lower floors."""
    rows = re.findall(r"^\| (\d+) \| (`.*?`) \|", (ROOT / "docs" / "design.md").read_text(), re.MULTILINE)
    return {room.strip("/"): int(floor) for floor, names in rows for room in re.findall(r"`(\S+?)`", names)}


def room_of(module):
    return [*module.split("."), "dtta_fast"][1]


def test_imports_run_downward():
    """Lazy imports and those of types alone count too."""
    graph, floors = imports(), rooms()
    assert len(graph) > 80
    assert len(floors) - len(REEXPORTS) <= 20
    assert {room_of(module) for module in graph if module != "dtta_fast"} == set(floors)
    for module, imported in graph.items():
        for other in imported - {"dtta_fast"}:
            if module != "dtta_fast" and room_of(other) != room_of(module):
                assert floors[room_of(module)] < floors[room_of(other)], f"{module} imports {other}, which is not below it"


def test_no_circle_of_imports():
    graph, done = imports(), []
    for module in graph:
        walk(graph, module, [], done)


def walk(graph, module, path, done):
    assert module not in path, f"{' -> '.join([*path, module])} is a circle"
    if module not in done:
        for other in graph.get(module, ()):
            walk(graph, other, [*path, module], done)
        done.append(module)


def test_nothing_below_adapt_knows_a_data_set_or_a_screen():
    graph = imports()
    seen, left = set(), ["dtta_fast.session.adapter"]
    while left:
        found = graph.get(left.pop(), set()) - seen
        seen |= found
        left += found
    assert "dtta_fast.kernels.native" in seen
    assert not [module for module in seen if room_of(module) in UPSTAIRS]


def test_from_adapt_to_an_op_are_nine_frames(model, denoiser, images, monkeypatch):
    """Of functions of this package, adapt() included and the op not."""
    depths, folders = [], (str(ROOT / "dtta_fast"), str(ROOT / "kernels"))

    def op(*given, whole=loss_module.denoising_loss_and_gradient, **named):
        ours = [frame for frame in traceback.extract_stack() if frame.filename.startswith(folders) and not frame.name.startswith("<")]
        depths.append(len(ours))
        return whole(*given, **named)

    monkeypatch.setattr(loss_module, "denoising_loss_and_gradient", op)
    adapt(model, denoiser, images, config=presets.FAST.replace(steps=1, timesteps="stratified", match="off", precheck="off", guard=0))
    assert set(depths) == {9}


@pytest.mark.quick
def test_documented_paths_lead_to_the_same_objects():
    for name, (where, objects) in REEXPORTS.items():
        here, there = (importlib.import_module(f"dtta_fast.{module}") for module in (name, where))
        assert set(here.__all__) == objects
        assert all(getattr(here, thing) is getattr(there, thing) for thing in objects)
    for name in ("presets", "denoisers", "tasks", "data", "zoo", "metrics"):
        assert importlib.util.find_spec(f"dtta_fast.{name}") is not None


def test_versions_agree():
    assert importlib.metadata.version("dtta-fast") == dtta_fast.__version__
    assert f"\nversion: {dtta_fast.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert (ROOT / "CHANGELOG.md").read_text().startswith(f"# Changelog\n\n## {dtta_fast.__version__}, ")


def test_package_carries_the_zoo_and_the_types():
    package = Path(dtta_fast.__file__).parent
    assert (package / "py.typed").is_file()
    size = sum(path.stat().st_size for path in (package / "zoo").rglob("*.safetensors"))
    assert 0 < size < 31e6
