"""Eight threads on one Adapter of the digits zoo for a minute: results against the serial ones, and resident memory every 5 seconds.

python bench/embed/threads.py [--seconds 60] prints JSON: calls, wrong, mebibytes.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from pathlib import Path

import torch

from dtta_fast import Adapter, presets, zoo
from dtta_fast.data.corruptions import DIGITS_C, corrupt


def resident() -> float:
    """Mebibytes of this process, now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--threads", type=int, default=8)
    given = parser.parse_args()
    clean, _ = zoo.example("digits")
    kinds = list(DIGITS_C.items())
    images = torch.cat([corrupt(clean[i : i + 1], *kinds[i % len(kinds)], first_id=i) for i in range(40)])
    adapter = Adapter(*zoo.load("digits"), presets.FAST)
    ids = [torch.tensor([i]) for i in range(len(images))]
    serial = [adapter.adapt(images[i : i + 1], image_ids=own) for i, own in enumerate(ids)]
    calls, wrong, end = [0] * given.threads, [0] * given.threads, time.monotonic() + given.seconds

    def work(number: int) -> None:
        i = number
        while time.monotonic() < end:
            k = i % len(ids)
            found = adapter.adapt(images[k : k + 1], image_ids=ids[k])
            wrong[number] += not (torch.equal(found.outputs, serial[k].outputs) and torch.equal(found.evaluations, serial[k].evaluations))
            calls[number] += 1
            i += 7

    threads = [threading.Thread(target=work, args=(number,)) for number in range(given.threads)]
    for thread in threads:
        thread.start()
    mebibytes = []
    while any(thread.is_alive() for thread in threads):
        mebibytes.append(round(resident(), 1))
        time.sleep(5)
    print(json.dumps({"threads": given.threads, "seconds": given.seconds, "calls": calls, "wrong": sum(wrong), "mebibytes": mebibytes}))


if __name__ == "__main__":
    main()
