"""The stages of bench/gpu.py, a module each, whose run() measures and records as it goes. child.py runs one in a process of its own."""
