"""GPU kernels for the ops and their launchers, which take contiguous tensors and perform no checks; see schema.py."""
