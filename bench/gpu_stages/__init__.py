"""The stages of bench/gpu.py, one module each. A stage's run() measures and records as it goes; child.py runs it in its own process."""
