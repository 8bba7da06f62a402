"""The GPU kernels without a GPU: Triton's interpreter runs them in a process of its own, since the switch is read at decoration."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.slow
def test_kernels_under_the_interpreter():
    """Philox's published words; every output and gradient: RMS error against float64 at most twice plain torch's, odd sizes."""
    program = Path(__file__).parent / "triton_interpreted.py"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, str(program)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "held"
