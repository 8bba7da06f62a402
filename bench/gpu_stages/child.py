"""Runs one stage for bench/gpu.py: python -P bench/gpu_stages/child.py MODULE FILE END FOLDER [--tiny]"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
from pathlib import Path

BENCH = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("module")
    parser.add_argument("file", type=Path, help="the file for the measurements, rewritten after each one")
    parser.add_argument("end", type=float, help="when the stage ends, in the seconds of time.time()")
    parser.add_argument("out", type=Path, help="the folder for traces")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    if given.tiny:
        os.environ["OMP_NUM_THREADS"] = "1"  # such small models are no faster with more, and other jobs may be running
    spec = importlib.util.spec_from_file_location("source_tree", BENCH / "source_tree.py")
    source_tree = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(source_tree)
    source_tree.use()
    import torch

    from bench.gpu_stages.recording import Record, Setting
    from dtta_fast.runtime.environment import describe, device_name

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        os.environ["DTTA_FAST_STRICT"] = "1"  # fail instead of measuring a fallback; a CPU without a compiler has only those
    record = Record(given.file, given.end, {"device": device_name(device), "environment": describe()})
    importlib.import_module(f"bench.gpu_stages.{given.module}").run(Setting(device, given.tiny, given.out), record)


if __name__ == "__main__":
    main()
