"""Adaptation as an artifact: the entire adaptation is compiled ahead of time into a package that Python and C++ hosts load."""

from pathlib import Path

from dtta_fast.embed.exporting import export
from dtta_fast.embed.manifest import Manifest
from dtta_fast.embed.package import Package, load

CMAKE_DIR = str(Path(__file__).parent / "cpp")  # for add_subdirectory() in a C++ host's CMakeLists.txt

__all__ = ["CMAKE_DIR", "Manifest", "Package", "export", "load"]
