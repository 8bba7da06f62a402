"""Fast test-time adaptation by diffusion feedback."""

from dtta_fast import presets, zoo
from dtta_fast.adapter import Adapter, adapt
from dtta_fast.calibrating import calibrate
from dtta_fast.calibration import Calibration
from dtta_fast.config import AdaptConfig
from dtta_fast.result import AdaptResult

__all__ = ["AdaptConfig", "AdaptResult", "Adapter", "Calibration", "adapt", "calibrate", "presets", "zoo"]
__version__ = "0.1.0"
