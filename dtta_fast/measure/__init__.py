"""Measures what a machine delivers: speed, time per phase, FLOPs and bytes."""
