"""The table of docs/models.md, from the results file of bench/support.py."""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "support.json"


def _seconds(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:,.0f}"


def support() -> str:
    """Makes a row per model family: what its tests checked, and the sizes of public models, counted from their configs."""
    records = json.loads(RESULTS.read_text())
    ran = {found["model"]: found for found in records.get("computed", ())}
    lines = [
        "| family | prediction | gradient | adapts | public model, pixels | parameters, M | GFLOP a pair | a pair on 2 cores, s | peak, GB "
        "| real weights |",
        "|---" * 10 + "|",
    ]

    def passed(counts: dict[str, int]) -> str:
        if counts["failed"] or not counts["passed"]:
            return "fails" if counts["failed"] else "no test"
        return f"{counts['passed']} test{'s' if counts['passed'] > 1 else ''}"

    for family, checks in records["checks"].items():
        sizes = [size for size in records["sizes"] if size["family"] == family]
        cells = [
            "<br>".join(f"{size['model']}, {size['pixels']}" for size in sizes),
            "<br>".join(f"{size['parameters'] / 1e6:,.0f}" for size in sizes),
            "<br>".join(f"{(size['forward_flops'] + size['backward_flops']) / 1e9:,.0f}" for size in sizes),
            "<br>".join(_seconds(ran[size["model"]]["seconds"]) if size["model"] in ran else "not run" for size in sizes),
            "<br>".join(f"{ran[size['model']]['peak_bytes'] / 1e9:.1f}" if size["model"] in ran else "" for size in sizes),
        ]
        lines.append(f"| {family} | " + " | ".join([*map(passed, checks.values()), *cells]) + " | never |")
    return "\n".join(lines)
