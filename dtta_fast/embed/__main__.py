"""What a C++ host is built with: torch's folder, the kernels' library and the folder of their headers, as a list for CMake."""

import importlib.util
import sys
from pathlib import Path

from dtta_fast.kernels import native


def main() -> None:
    """Prints them; without a library of the kernels it ends with exit status 1."""
    torch = importlib.util.find_spec("torch")
    library = native.path()
    if library is None or torch is None or torch.origin is None:
        sys.exit(native.missing())
    print(Path(torch.origin).parent, library, _headers(), sep=";")


def _headers() -> Path:
    import dtta_fast.kernels

    return next(Path(folder) / "cpp" for folder in dtta_fast.kernels.__path__ if (Path(folder) / "cpp" / "dtta_ops.h").is_file())


main()
