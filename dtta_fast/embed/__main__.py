"""Prints the build inputs of a C++ host as a CMake list: torch's folder, the kernel library and the folder of its headers."""

import importlib.util
import sys
from pathlib import Path

from dtta_fast.kernels import native


def main() -> None:
    """Prints the list, or exits with status 1 if the kernel library or torch is missing."""
    torch = importlib.util.find_spec("torch")
    library = native.path()
    if library is None or torch is None or torch.origin is None:
        sys.exit(native.missing())
    print(Path(torch.origin).parent, library, _headers(), sep=";")


def _headers() -> Path:
    import dtta_fast.kernels

    return next(Path(folder) / "cpp" for folder in dtta_fast.kernels.__path__ if (Path(folder) / "cpp" / "dtta_ops.h").is_file())


main()
