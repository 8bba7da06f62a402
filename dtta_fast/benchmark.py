"""Latency and throughput of a session. They are defined in dtta_fast.measure.benchmark."""

from dtta_fast.measure.benchmark import latency, throughput

__all__ = ["latency", "throughput"]
