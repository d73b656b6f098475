"""Files that are replaced as a whole: nobody reads half of one."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def beside(path: Path, content: bytes) -> Iterator[Path]:
    """A file of that content in the same folder, flushed to the disk, and gone afterwards unless it has been moved."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:  # "x" follows no link
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
