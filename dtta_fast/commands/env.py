"""`dtta env`."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from typing import Any

from dtta_fast.commands.common import OutFile, check_path, holds, quiet, shown, write_json
from dtta_fast.runtime import environment


@dataclass(frozen=True)
class Env:
    """Show versions, devices and the backend that runs the ops on this machine.

    Example: dtta env --check --json env.json
    """

    check: bool = False
    """Adapt to one image on the CPU and on every GPU; print for each whether it works, how long it took and which backend ran."""
    json: OutFile = None
    """Also write the result to this file."""

    def run(self) -> None:
        """Exits with status 1 if the check fails on any device."""
        check_path("json", self.json, holds("python", "torch"))
        result: dict[str, Any] = dict(environment.describe())
        lines = [f"{key:16} {shown(value)}" for key, value in result.items()]
        missing: FileNotFoundError | None = None
        if self.check:
            from dtta_fast.measure import device_check

            quiet()
            try:
                found = device_check.check()
            except FileNotFoundError as error:  # the models are missing, but still show the versions
                found, missing = [], error
            lines += [shown(device) for device in found]
            result["check"] = [asdict(device) for device in found]
        write_json(self.json, result)
        print(*lines, sep="\n")
        if missing is not None:
            raise missing
        if any(device["error"] is not None for device in result.get("check", [])):
            sys.exit(1)
