"""How the package is laid out once installed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import dtta_fast.kernels
from dtta_fast.kernels import native

ROOT = Path(__file__).parents[1]


def test_kernels_is_not_a_package_of_its_own():
    """Hugging Face's `kernels` package is probed for by diffusers: our folder must never answer to that name."""
    spec = importlib.util.find_spec("kernels")
    assert spec is None or not str(spec.origin or spec.submodule_search_locations).startswith(str(ROOT))


def test_without_the_native_library_the_ops_work_and_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(dtta_fast.kernels, "__path__", [str(tmp_path)])
    native.library.cache_clear()
    try:
        with pytest.raises(RuntimeError, match=r"was not built: install a C\+\+17 compiler"):
            native.philox(np.zeros((1, 4)), np.zeros(2))
        from dtta_fast import environment

        assert environment.describe()["native library"].startswith("not built")
    finally:
        native.library.cache_clear()


def test_importing_the_package_reads_no_data_library():
    code = "import sys, dtta_fast\nassert not {'sklearn', 'imagecorruptions', 'diffusers', 'timm'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_package_carries_the_zoo_and_the_types():
    package = Path(dtta_fast.__file__).parent
    assert (package / "py.typed").is_file()
    size = sum(path.stat().st_size for path in (package / "zoo").rglob("*.safetensors"))
    assert 0 < size < 31e6
