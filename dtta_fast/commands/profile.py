"""`dtta profile`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from dtta_fast.commands.common import (
    Name,
    OutFile,
    Settings,
    check_apart,
    check_path,
    checked_device,
    holds,
    is_page,
    quiet,
    shown,
    terminal,
    write_json,
)
from dtta_fast.commands.subjects import EVERY_IMAGE, load_subject
from dtta_fast.measure.bottleneck import Row
from dtta_fast.runs.writing import write_whole
from dtta_fast.runtime import environment
from dtta_fast.session.adapter import Adapter
from dtta_fast.session.checks import check_calibration

WIDE = 110  # terminal columns needed to show all figures of an operator


@dataclass(frozen=True)
class Profile:
    """Show where the time of one adaptation goes, by phase and by operator, and what bounds it.

    Reports the work, the fraction of the machine's peak performance and the memory of each. By default it runs the digits zoo on digits-C,
    cycling through the corruptions. Regardless of the preset, precheck is off unless a flag sets it, so that every image is adapted.

    Example: dtta profile --images 16 --html profile.html
    """

    model: Name = None
    """Classifier: a timm name, hf-hub:ID, or a folder in timm's format; requires --denoiser. Its inputs are random pixels."""
    denoiser: Name = None
    """DiT for the same classes: a folder or a hub id; requires --model."""
    images: int = 16
    """Images in the call, at least 1; in episodic mode each is adapted independently."""
    trace: OutFile = None
    """Write a Chrome trace that includes the phases to this file, for ui.perfetto.dev or chrome://tracing."""
    html: OutFile = None
    """Write a page with tables and the memory timeline to this file; it loads no external resources."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Device on which both models run."""
    json: OutFile = None
    """Also write the result to this file."""
    preset: str = "FAST"
    """FAST, RANK, PAPER, ONLINE or DUSA: the starting point of the settings below. FAST, RANK and ONLINE need a calibration."""
    config: Settings = EVERY_IMAGE
    """Adaptation settings; their defaults come from the preset."""

    def run(self) -> None:
        """Raises ValueError for bad arguments or models, before measuring anything."""
        os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler logs to standard error
        # imported here because importing the profiler is slow
        from dtta_fast.measure.profiling import profile
        from dtta_fast.report import profile as page

        check_path("trace", self.trace, holds("traceEvents"))
        check_path("html", self.html, is_page)
        check_path("json", self.json, holds("benchmark", "environment"))
        check_apart(trace=self.trace, html=self.html, json=self.json)
        if self.images < 1:
            raise ValueError(f"images is {self.images}; give 1 or more")
        device = checked_device(self.device)
        quiet()
        with terminal(stderr=True).status("loading") as status:
            subject = load_subject(self.model, self.denoiser, None, self.images, device)
            check_calibration(subject.denoiser, self.config)
            adapter = Adapter(subject.model, subject.denoiser, self.config)
            status.update("measuring")
            found = profile(adapter, subject.images, trace=self.trace)
        name = f"{subject.name}, preset {self.preset.upper()}"
        if self.html is not None:
            write_whole(self.html, page.make_profile_page(found, name))
        about = {
            "benchmark": "profile",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "load_average": environment.load_average(),
            "subject": subject.name,
            "preset": self.preset.upper(),
        }
        write_json(self.json, {**about, **asdict(found), "device": environment.device_name(device)})
        console = terminal()
        print(shown(f"{name}: {page.heading(found)}"))
        console.print(_table("phase", found.phases, page.HEADS))
        heads = page.HEADS if console.width >= WIDE else [head for head in page.HEADS if head not in ("GFLOP", "MB")]
        console.print(_table("operator", found.kernels[: page.KERNELS], heads))
        for line in (page.kernels_line(found), page.peak_line(found), *found.notes, page.memory_line(found.memory)):
            print(shown(line))
        console.print(shown(found.bottleneck), style="bold", soft_wrap=True)
        for path in (self.trace, self.html, self.json):
            if path is not None:
                print(f"wrote {shown(path)}")


def _table(what: str, rows: Sequence[Row], heads: Sequence[str]) -> Table:
    from dtta_fast.report.profile import HEADS, cells

    table = Table(box=SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    table.add_column(what, overflow="fold")
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        figures = dict(zip(HEADS, cells(row), strict=True))
        table.add_row(f"{shown(row.name)}\n  {shown(row.kernel)}" if row.kernel else shown(row.name), *(figures[head] for head in heads))
    return table
