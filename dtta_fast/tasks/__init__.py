"""Tasks: how a model's outputs become a condition."""

from typing import TYPE_CHECKING, Any

from dtta_fast.tasks.base import Task
from dtta_fast.tasks.classification import Classification
from dtta_fast.tasks.depth import Depth
from dtta_fast.tasks.segmentation import Segmentation

if TYPE_CHECKING:
    from dtta_fast.tasks.zero_shot import ZeroShot

__all__ = ["Classification", "Depth", "Segmentation", "Task", "ZeroShot"]


def __getattr__(name: str) -> Any:
    if name == "ZeroShot":  # its denoiser's library takes seconds to import
        from dtta_fast.tasks.zero_shot import ZeroShot

        return ZeroShot
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
