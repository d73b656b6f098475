"""The compiled module, or why there is none.

It exchanges raw addresses with Python and links against nothing of torch, so that one build serves every torch; what it
must fit is the Python, the processor, and the sources of the package that calls it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.util
from pathlib import Path
from typing import Any

from peftkern import _env, _version
from peftkern.backends.cpp import stamp

_PACKAGE = Path(__file__).parents[2]


@functools.cache
def extension() -> tuple[Any, str | None, bool]:
    """(module, None, False), or (None, reason, whether it is there and does not load)."""
    spec = importlib.util.find_spec("peftkern._C")
    if spec is None or spec.origin is None or Path(spec.origin).parent != _PACKAGE:  # another copy's is not ours
        others = [path.name for path in _PACKAGE.glob("_C*") if path.suffix in (".so", ".pyd")]
        if others and not _loadable(others):
            return None, f"the C++ extension is built for another Python or platform: {', '.join(others)}", True
        return None, "the C++ extension is not built (pip install with a compiler builds it)", False
    try:
        reason = stamp.refusal(Path(spec.origin), _version.__version__, _sources(), stamp.processor_features())
        if reason is None:
            module = importlib.import_module("peftkern._C")
            if _env.settings().max_isa != "auto":
                module.limit(_env.settings().max_isa)
            return module, None, False
    except (ImportError, OSError) as error:
        reason = str(error)
    return None, f"the C++ extension does not load: {reason}", True


def _loadable(names: list[str]) -> bool:
    """Whether this Python would take one of the files: then it was hidden on purpose."""
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    return any(name == f"_C{suffix}" for name in names for suffix in suffixes)


def _sources() -> str | None:
    """The digest of the sources where the package lies in its source tree, else None."""
    root = _PACKAGE.parent
    return stamp.digest(root / "csrc") if (root / "setup.py").is_file() and (root / "csrc").is_dir() else None
