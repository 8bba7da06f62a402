"""Measures the engine on a GPU, stage by stage: python bench/gpu.py --out FOLDER [--minutes 9] [--stages 1,3] [--commit HASH] [--tiny]

The most valuable stages run first. Each one runs in its own process and is stopped at its own limit, or when the minutes are used up.
FOLDER/gpu.json is rewritten after each stage, and includes what a failed or stopped stage had measured so far. FOLDER/gpu.log holds the
output of the stages, and two of them also write a trace. You can run this from a source tree, whether or not the package is installed.
--tiny runs the same stages with small models on a CPU. That only tests this program: the figures mean nothing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

BENCH = Path(__file__).resolve().parent
LEAST = 8.0  # seconds; with less time left, a stage is not started
GRACE = 2.0  # seconds between asking a stage to exit and killing it
LOG = 8 * 2**20  # bytes of the log to keep
PATIENCE = 10  # factor on the limits of the stages with --tiny, because the machine may be slow or busy


class Stage(NamedTuple):
    """A stage: `module` of bench/gpu_stages runs it, and it is stopped after `seconds`."""

    module: str
    seconds: float
    what: str


STAGES = (
    Stage("machine", 30, "versions, clocks, code that once broke on a GPU, attention with heads of size 72"),
    Stage("tier", 60, "the tests in tests/gpu"),
    Stage("engine", 150, "FAST and PAPER with DiT-XL/2, by precision and number of images"),
    Stage("against_naive", 60, "the naive engine on the same models and draws"),
    Stage("step", 60, "forwards by number of rows, the step and the guard as CUDA graphs, a trace"),
    Stage("ceilings", 60, "matrix products, attention, normalisation and a copy, each on its own"),
    Stage("ops", 40, "the project's kernels"),
    Stage("compiled", 110, "FAST with CUDA graphs, and compiled"),
    Stage("stable_diffusion", 60, "Stable Diffusion 1.5 and CLIP ViT-L/14 with LoRA"),
)


def run(command: list[str], seconds: float, log: Any) -> str:
    """Runs a command within a time limit and kills every process it started. Returns "done", "failed" or "stopped"."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
    )
    try:
        return "done" if process.wait(timeout=seconds) == 0 else "failed"
    except subprocess.TimeoutExpired:
        return "stopped"
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
                process.wait(timeout=GRACE)
                time.sleep(0.1)  # its children need a moment to exit
            except (ProcessLookupError, subprocess.TimeoutExpired):
                pass


def commit(given: str | None) -> dict[str, Any]:
    """Returns the tree's commit, and whether files differ from it. `given` takes precedence, for a tree that is not a git clone."""
    if given is None and shutil.which("git") is not None:
        git = ["git", "-C", str(BENCH.parent)]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        changes = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=False)
        if head.returncode == 0:
            return {"commit": head.stdout.strip(), "changed since": bool(changes.stdout.strip())}
    return {"commit": given or "unknown", "changed since": None}


def chosen(text: str) -> list[int]:
    """Parses the numbers of stages, which start at 1.

    Raises:
        argparse.ArgumentTypeError: there is no such stage.
    """
    parts = text.split(",")
    if not all(part.isdigit() and 1 <= int(part) <= len(STAGES) for part in parts):
        raise argparse.ArgumentTypeError(f"stages is {text!r}; give numbers from 1 to {len(STAGES)}, such as 1,3")
    return sorted({int(part) for part in parts})


def write(path: Path, results: dict[str, Any]) -> None:
    """Replaces the file atomically, with each list of numbers on one line."""
    text = re.sub(r"\[[-+.e\d,\s]*\]", lambda numbers: " ".join(numbers[0].split()), json.dumps(results, indent=1))
    new = path.with_name(path.name + ".new")
    new.write_text(text + "\n")
    os.replace(new, path)


def errors(found: dict[str, Any]) -> list[str]:
    """Lists the labels of the measurements that raised, with their messages."""
    every = ((group, name, value) for group, own in found.items() for name, value in own.items() if isinstance(value, dict))
    return [f"{group}, {name}: {value['error']}" for group, name, value in every if "error" in value]


def shown(results: dict[str, Any]) -> str:
    """Formats one line per stage, followed by its tests, calls, engine comparisons and graphs."""
    lines = []
    for name, stage in results["stages"].items():
        lines.append(f"{name:17} {stage['status']:8} {stage['seconds']:6.1f} s  {stage.get('error', '')}")
        lines += [f"    failed: {text}" for text in errors(stage["measured"])]
        for group in ("tests", "calls", "turns", "graphs"):
            lines += [f"    {label}: {_shown(found)}" for label, found in stage["measured"].get(group, {}).items()]
    return "\n".join(lines)


def _shown(found: dict[str, Any]) -> str:
    if "passed" in found:
        failures = "".join(f"\n        {failure['name']}" for failure in found["failures"][:20])
        ran = f"{found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped"
        return f"{found['collected']} tests: {ran}{failures}"
    if "evaluations" in found:
        evaluations = statistics.mean(found["evaluations"]) if isinstance(found["evaluations"], list) else found["evaluations"]
        more = f", {found['launches']} launches, GPU busy {found['busy']:.0%}" if isinstance(found.get("busy"), float) else ""
        return f"{1e3 * found['seconds']['median'] / found['images']:.1f} ms an image, {evaluations:.0f} evaluations{more}"
    if "eager" in found:
        same = f", bit for bit the same: {found['bit for bit the same']}" if found.get("capturable") else f" {found.get('reason', '')}"
        times = [f"{1e3 * found[way]['median']:.2f} ms {way}" for way in ("eager", "graph") if "median" in found.get(way, {})]
        return f"{', '.join(times)}{same}"
    return str(found.get("left out", ""))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="stages: " + "; ".join(f"{number}, {stage.what}" for number, stage in enumerate(STAGES, 1)),
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder for the results")
    parser.add_argument("--minutes", type=float, default=9.0, help="time limit for all stages together")
    parser.add_argument("--stages", type=chosen, default=list(range(1, len(STAGES) + 1)), help="numbers of the stages to run, such as 1,3")
    parser.add_argument("--commit", help="the commit of this tree, if it is not a git clone")
    parser.add_argument("--tiny", action="store_true", help="use small models, to test this program on a CPU")
    given = parser.parse_args()
    begun = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the running stage is killed too
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != BENCH]  # or `import kernels` finds bench/kernels
    if not given.tiny:
        import torch

        if not torch.cuda.is_available():
            print("bench/gpu.py: there is no GPU here; --tiny tests the program on a CPU", file=sys.stderr)
            return 2
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "gpu.log").unlink(missing_ok=True)  # left by an earlier run
    results: dict[str, Any] = {
        "tiny": given.tiny,
        **commit(given.commit),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "minutes": given.minutes,
        "device": None,
        "environment": {},
        "stages": {},
    }
    for number in given.stages:
        stage = STAGES[number - 1]
        results["stages"][stage.module] = staged(stage, begun + 60 * given.minutes - time.monotonic(), given.out, given.tiny, results)
        write(given.out / "gpu.json", results)
    print(f"{results['device']}, {given.out / 'gpu.json'}\n{shown(results)}")
    return int(any(stage["status"] == "failed" or errors(stage["measured"]) for stage in results["stages"].values()))


def staged(stage: Stage, left: float, out: Path, tiny: bool, results: dict[str, Any]) -> dict[str, Any]:
    """Runs a stage within the time that is left. Returns what it measured, even if it failed or was stopped."""
    file, log = out / "stage.json", out / "gpu.log"
    file.unlink(missing_ok=True)
    seconds = min(stage.seconds * (PATIENCE if tiny else 1), left - GRACE)
    if seconds < LEAST:
        return {
            "status": "left out",
            "seconds": 0.0,
            "error": f"{max(left, 0):.0f} s were left of {results['minutes']:g} minutes",
            "measured": {},
        }
    print(f"{stage.module}: {stage.what}, at most {seconds:.0f} s", flush=True)
    start = time.monotonic()
    command = [
        sys.executable,
        "-P",
        str(BENCH / "gpu_stages" / "child.py"),
        stage.module,
        str(file),
        str(time.time() + seconds - 1),
        str(out),
    ]
    with log.open("ab") as stream:
        stream.write(f"\n== {stage.module}\n".encode())
        stream.flush()
        status = run([*command, *(["--tiny"] if tiny else [])], seconds, stream)
    found: dict[str, Any] = {"status": status, "seconds": round(time.monotonic() - start, 1), "limit": round(seconds, 1)}
    written = log.read_bytes()
    log.write_bytes(written[-LOG:])
    if status != "done":
        lines = [line for line in written.decode(errors="replace").splitlines() if line.strip()]
        found["error"] = f"stopped after {seconds:.0f} s" if status == "stopped" else lines[-1][:400]
    kept = json.loads(file.read_text()) if file.is_file() else {"about": {}, "measured": {}}
    for leftover in (file, file.with_name(file.name + ".new")):  # the second exists if the stage was stopped while writing
        leftover.unlink(missing_ok=True)
    for name, value in kept["about"].items():
        results[name] = results[name] or value
    return {**found, "measured": kept["measured"]}


if __name__ == "__main__":
    sys.exit(main())
