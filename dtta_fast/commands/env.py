"""`dtta env`."""

from __future__ import annotations

import json
from dataclasses import dataclass

from dtta_fast import environment
from dtta_fast.commands.common import OutFile, check_path


@dataclass(frozen=True)
class Env:
    """Show versions, devices and which backend serves the ops here.

    Example: dtta env --json env.json
    """

    json: OutFile = None
    """Write the result to this file too."""

    def run(self) -> None:
        check_path("json", self.json)
        result = environment.describe()
        for key, value in result.items():
            print(f"{key:16} {value}")
        if self.json is not None:
            self.json.write_text(json.dumps(result, indent=2) + "\n")
