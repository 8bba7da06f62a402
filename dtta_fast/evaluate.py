"""Runs over whole data sets. They are defined in dtta_fast.runs.evaluate."""

from dtta_fast.runs.evaluate import evaluate

__all__ = ["evaluate"]
