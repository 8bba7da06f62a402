"""The way from a model's outputs to a condition."""

from typing import TYPE_CHECKING, Any

from dtta_fast.tasks.base import Task
from dtta_fast.tasks.classification import Classification

if TYPE_CHECKING:
    from dtta_fast.tasks.zero_shot import ZeroShot

__all__ = ["Classification", "Task", "ZeroShot"]


def __getattr__(name: str) -> Any:
    if name == "ZeroShot":  # whose denoiser's library takes seconds to import
        from dtta_fast.tasks.zero_shot import ZeroShot

        return ZeroShot
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
