"""The way from a model's outputs to a condition."""

from dtta_fast.tasks.base import Task
from dtta_fast.tasks.classification import Classification

__all__ = ["Classification", "Task"]
