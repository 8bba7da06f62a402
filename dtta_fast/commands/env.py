"""`dtta env`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from dtta_fast import environment
from dtta_fast.commands.common import check_path


@dataclass(frozen=True)
class Env:
    """Show versions, devices and which backend serves the ops here."""

    json: Path | None = None
    """Write the result to this file too."""

    def run(self) -> None:
        check_path(self.json)
        result = environment.describe()
        for key, value in result.items():
            print(f"{key:16} {value}")
        if self.json is not None:
            self.json.write_text(json.dumps(result, indent=2) + "\n")
