"""Makes `import dtta_fast` and `import bench` use the tree that contains this file, for scripts that run without an installation.

The repository's root is not put on sys.path, because `import kernels` would then find our folder, and transformers, diffusers and peft look
for a package with that name.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def use() -> None:
    """Loads dtta_fast from this tree, even if another copy is installed, and makes the folder bench a package.

    An editable install of this tree is imported as usual. If dtta_fast has already been imported, it is left alone.

    Raises:
        RuntimeError: parts of dtta_fast come from an editable install of another tree.
    """
    if "bench" not in sys.modules:
        spec = importlib.machinery.ModuleSpec("bench", None, is_package=True)
        spec.submodule_search_locations = [str(ROOT / "bench")]
        sys.modules["bench"] = importlib.util.module_from_spec(spec)
    if "dtta_fast" in sys.modules:
        return
    own = ROOT / "dtta_fast" / "__init__.py"
    found = importlib.util.find_spec("dtta_fast")
    if found is None or found.origin is None or Path(found.origin).resolve() != own:
        _load("dtta_fast", own)


def _load(name: str, path: Path) -> None:
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=[str(path.parent)])
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(sys.modules[name])
        parts = {part: getattr(module, "__file__", None) for part, module in sys.modules.items() if part.startswith(f"{name}.")}
        for part, file in parts.items():
            if file is not None and not Path(file).resolve().is_relative_to(ROOT):
                raise RuntimeError(f"{part} comes from {file}, not from {ROOT}: uninstall that editable {name}, or install this tree")
    except BaseException:
        del sys.modules[name]
        raise
