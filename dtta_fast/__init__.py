"""Fast test-time adaptation by diffusion feedback."""

import importlib.util
import sys
from pathlib import Path

# The wheel installs the folder kernels/ as dtta_fast.kernels. In a source tree that is not installed, it is next to this folder.
if importlib.util.find_spec("dtta_fast.kernels") is None:
    _folder = Path(__file__).resolve().parents[1] / "kernels"
    _spec = importlib.util.spec_from_file_location("dtta_fast.kernels", _folder / "__init__.py", submodule_search_locations=[str(_folder)])
    if _spec is not None and _spec.loader is not None and (_folder / "schema.py").is_file():
        sys.modules["dtta_fast.kernels"] = kernels = importlib.util.module_from_spec(_spec)
        _spec.loader.exec_module(kernels)

from dtta_fast import presets, zoo
from dtta_fast.config import AdaptConfig
from dtta_fast.core.calibrate import calibrate
from dtta_fast.denoisers.calibration import Calibration
from dtta_fast.session.adapter import Adapter, adapt
from dtta_fast.session.module import AsModule
from dtta_fast.session.result import AdaptResult

__all__ = ["AdaptConfig", "AdaptResult", "Adapter", "AsModule", "Calibration", "adapt", "calibrate", "presets", "zoo"]
__version__ = "0.2.0"
