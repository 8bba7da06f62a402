"""`dtta env`."""

from __future__ import annotations

from dataclasses import dataclass

from dtta_fast import environment
from dtta_fast.commands.common import OutFile, check_path, holds, shown, write_json


@dataclass(frozen=True)
class Env:
    """Show versions, devices and which backend serves the ops here.

    Example: dtta env --json env.json
    """

    json: OutFile = None
    """Write the result to this file too."""

    def run(self) -> None:
        check_path("json", self.json, holds("python", "torch"))
        result = environment.describe()
        write_json(self.json, result)
        for key, value in result.items():
            print(f"{key:16} {shown(value)}")
