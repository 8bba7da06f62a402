"""`dtta env`."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass

from dtta_fast import environment
from dtta_fast.commands.common import OutFile, check_path, holds, quiet, shown, write_json


@dataclass(frozen=True)
class Env:
    """Show versions, devices and which backend serves the ops here.

    Example: dtta env --check --json env.json
    """

    check: bool = False
    """Adapt to one image on every device, and say in a line each whether it works, how fast, and by what; status 1 where one fails."""
    json: OutFile = None
    """Write the result to this file too."""

    def run(self) -> None:
        """Exits with status 1 where the check fails on a device."""
        check_path("json", self.json, holds("python", "torch"))
        described, found = environment.describe(), []
        if self.check:
            from dtta_fast import device_check

            quiet()
            found = device_check.check()
        write_json(self.json, {**described, "check": [asdict(device) for device in found]} if self.check else described)
        for key, value in described.items():
            print(f"{key:16} {shown(value)}")
        for device in found:
            print(shown(device))
        if any(device.error is not None for device in found):
            sys.exit(1)
