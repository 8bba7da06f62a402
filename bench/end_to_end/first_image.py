"""From the start of the process to the first adapted digit: python bench/end_to_end/first_image.py off|regional|step prints seconds.

Printed: since the process was created, imports included; and the adaptation itself.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

_ticks = int(Path("/proc/self/stat").read_text().split()[21])  # when the process was created, since boot
START = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + _ticks / os.sysconf("SC_CLK_TCK")

if __name__ == "__main__":
    from dtta_fast import Adapter, presets, zoo

    model, denoiser = zoo.load("digits")
    images, _ = zoo.example("digits")
    adapter = Adapter(model, denoiser, presets.FAST.replace(compile=sys.argv[1], precheck="off"))
    begun = time.time()
    adapter.adapt(images[:1])
    print(round(time.time() - START, 2), round(time.time() - begun, 2))
