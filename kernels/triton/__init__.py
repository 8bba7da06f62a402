"""The ops' GPU kernels and their launchers, which take contiguous tensors and check nothing: see schema.py."""
