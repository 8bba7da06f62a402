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
    """Adapt to one image on the CPU and on every GPU, and print a line for each: whether it works, how long it took, which backend ran."""
    json: OutFile = None
    """Write the result to this file too."""

    def run(self) -> None:
        """Exits with status 1 where the check fails on a device."""
        check_path("json", self.json, holds("python", "torch"))
        described = environment.describe()
        for key, value in described.items():
            print(f"{key:16} {shown(value)}", flush=True)
        if not self.check:
            write_json(self.json, described)
            return
        from dtta_fast import device_check

        quiet()
        found = device_check.check()
        write_json(self.json, {**described, "check": [asdict(device) for device in found]})
        for device in found:
            print(shown(device))
        if any(device.error is not None for device in found):
            sys.exit(1)
