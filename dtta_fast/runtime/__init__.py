"""How a step runs here: private copies of the modules, precision, compilation, memory."""
