"""`dtta profile`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dtta_fast import environment
from dtta_fast.adapter import Adapter
from dtta_fast.bottleneck import Row
from dtta_fast.commands.common import Settings, check_path, checked_device, quiet
from dtta_fast.commands.subjects import EVERY_IMAGE, load_subject

WIDE = 110  # columns of a terminal that have room for all of an operator's figures


@dataclass(frozen=True)
class Profile:
    """Show where the time of one adaptation goes, by phase and by operator: work, share of the machine's peak, memory, and what bounds it.

    By default the digits zoo on digits-C, the corruptions in turn. precheck is off where no flag sets it, whatever the preset says: every
    image is adapted.
    """

    model: str | None = None
    """A classifier: timm's name, hf-hub:ID, or local-dir:FOLDER in timm's format; with --denoiser. It is given random pixels."""
    denoiser: str | None = None
    """A DiT's folder, or its id on the hub, of the same classes; with --model."""
    images: int = 16
    """In the call, each with an adaptation of its own in episodic mode."""
    trace: Path | None = None
    """Write a Chrome trace to this file, with the phases in it, for ui.perfetto.dev or chrome://tracing."""
    html: Path | None = None
    """Write a page with tables and the memory's timeline to this file: it loads nothing."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where both models run."""
    json: Path | None = None
    """Write the result to this file too."""
    preset: str = "FAST"
    """FAST, PAPER, ONLINE or DUSA: what the settings below start from. FAST and ONLINE take a calibration."""
    config: Settings = EVERY_IMAGE

    def run(self) -> None:
        """Raises ValueError for bad arguments or models, before anything is measured."""
        os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler's own log goes to standard error
        # here: the profiler takes long to import
        from dtta_fast.profiling import profile
        from dtta_fast.report import profile as texts
        from dtta_fast.report.profile import HEADS

        for path in (self.trace, self.html, self.json):
            check_path(path)
        if self.images < 1:
            raise ValueError(f"images is {self.images}; give 1 and more")
        device = checked_device(self.device)
        quiet()
        with Console(stderr=True).status("loading") as status:
            subject = load_subject(self.model, self.denoiser, None, self.images, device)
            adapter = Adapter(subject.model, subject.denoiser, self.config)
            status.update("measuring")
            found = profile(adapter, subject.images, trace=self.trace)
        console = Console()
        name = f"{subject.name}, preset {self.preset.upper()}"
        print(f"{name}: {texts.heading(found)}")
        console.print(_table("phase", found.phases, HEADS))
        heads = HEADS if console.width >= WIDE else [head for head in HEADS if head not in ("GFLOP", "MB")]
        console.print(_table("operator", found.kernels[: texts.KERNELS], heads))
        for line in (texts.kernels_line(found), texts.peak_line(found), *found.notes, texts.memory_line(found.memory)):
            print(line)
        console.print(f"[bold]{escape(found.bottleneck)}[/bold]", soft_wrap=True)
        if self.html is not None:
            self.html.write_text(texts.make_profile_page(found, name), encoding="utf-8")
        if self.json is not None:
            about = {
                "benchmark": "profile",
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "load_average": environment.load_average(),
                "subject": subject.name,
                "preset": self.preset.upper(),
            }
            self.json.write_text(json.dumps({**about, **asdict(found)}, indent=2) + "\n")
        for path in (self.trace, self.html, self.json):
            if path is not None:
                print(f"{path}: written")


def _table(what: str, rows: Sequence[Row], heads: Sequence[str]) -> Table:
    from dtta_fast.report.profile import HEADS, texts

    table = Table(box=SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    table.add_column(what, overflow="fold")
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        shown = dict(zip(HEADS, texts(row), strict=True))
        table.add_row(escape(f"{row.name}\n  {row.kernel}" if row.kernel else row.name), *(shown[head] for head in heads))
    return table
