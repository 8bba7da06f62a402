"""Profiles of an adaptation. They are defined in dtta_fast.measure.profiling."""

from dtta_fast.measure.profiling import Profile, profile

__all__ = ["Profile", "profile"]
