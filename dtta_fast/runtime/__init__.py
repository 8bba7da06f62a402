"""The runtime of an adaptation step: private copies of the modules, precision, compilation and memory."""
