"""Stage 8, compiled code: FAST in bfloat16 with compile="regional", as stage 3 measures it without."""

from __future__ import annotations

from bench.gpu_stages.recording import Record, Setting

SECONDS = {16: 5.0, 1: 8.0, 64: 5.0}  # by images; compilation gains most where there are several


def run(setting: Setting, record: Record) -> None:
    """Each number of images is a compilation of its own, whose seconds are in the first call's."""
    if setting.tiny and setting.device.type == "cpu":
        record.put("calls", "FAST", {"left out": "compiling takes a minute on a CPU, where tests/test_compile.py does it"})
        return
    from bench.gpu_stages.engine import LATENCY, Calls, fast  # here, since its libraries take seconds to import

    calls = Calls(setting, record, max(SECONDS))
    calls.peak("bf16")
    for images, seconds in SECONDS.items():
        calls.measure("FAST", fast("bf16", "regional"), images, LATENCY, seconds, takes=0.0 if images == 16 else 20.0)
