"""Stage 8, graphs and compilation: measures FAST in bfloat16 with compile="graphs", "regional" and both. Stage 3 measures it without."""

from __future__ import annotations

from bench.gpu_stages.recording import Record, Setting

# compile, images, seconds of timed calls, least seconds in total; graphs gain most with one image, compilation with several
FORMS = (
    ("graphs", 1, 6.0, 0.0),
    ("graphs", 16, 4.0, 0.0),
    ("regional", 16, 5.0, 0.0),
    ("regional", 1, 6.0, 20.0),
    ("regional+graphs", 1, 6.0, 12.0),  # its kernels are already in the cache
    ("regional", 64, 5.0, 20.0),
)


def run(setting: Setting, record: Record) -> None:
    """Measures in the order of FORMS. Each number of images is compiled separately, and the time is part of the first call."""
    if setting.tiny and setting.device.type == "cpu":
        record.put("calls", "FAST", {"left out": "compiling takes a minute on a CPU, where tests/test_compile.py does it"})
        return
    from bench.gpu_stages.engine import LATENCY, Calls, fast  # here, because its libraries take seconds to import

    calls = Calls(setting, record, max(images for _, images, *_ in FORMS))
    calls.peak("bf16")
    for form, images, seconds, takes in FORMS:
        calls.measure("FAST", fast("bf16", form), images, LATENCY, seconds, takes=takes)
