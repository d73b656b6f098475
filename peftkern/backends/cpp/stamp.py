"""Whether a built extension may be loaded: read off its file, since code for another processor dies when it is run.

setup.py runs this file for ``digest``, so it imports nothing of the package.
"""

from __future__ import annotations

import hashlib
import mmap
import re
from collections.abc import Set
from pathlib import Path

_STAMP = re.compile(rb"peftkern build: version=(\S+) sources=(\w+) needs=(\S*);\0")  # csrc/stamp.cpp


def digest(csrc: Path) -> str:
    """A name for the C++ sources: another one after any edit."""
    names = sorted(path for path in csrc.rglob("*") if path.suffix in (".cpp", ".h"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in names)).hexdigest()[:16]


def refusal(file: Path, version: str, sources: str | None, features: Set[str] | None) -> str | None:
    """Why the extension in ``file`` must not be loaded, or None.

    Args:
        file: the shared object, which is read and not run.
        version: of the package that would call it.
        sources: digest of the C++ sources beside the package, or None where it is installed without them.
        features: what this processor has, by Linux's names, or None where that is not known.
    """
    with file.open("rb") as stream:
        try:
            content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            return f"{file.name} is empty: rebuild it"
        with content:
            if content[:6] == b"\x7fELF\2\1" and len(content) < _elf_size(content):
                return f"{file.name} is cut off at {len(content)} of {_elf_size(content)} bytes: rebuild it"
            found = _STAMP.search(content)
            fields = None if found is None else [field.decode() for field in found.groups()]
    if fields is None:
        return f"{file.name} was built from sources that are older than this package: rebuild it"
    if fields[0] != version:
        return f"{file.name} belongs to peftkern {fields[0]}, and this is {version}: rebuild it"
    if sources is not None and fields[1] != sources:
        return f"{file.name} was built from other sources than those in csrc: rebuild it"
    missing = [] if features is None else [name for name in fields[2].split(",") if name and name not in features]
    if missing:
        return (
            f"{file.name} was compiled for a processor with {', '.join(missing)}, and this one lacks them: rebuild it"
        )
    return None


def _elf_size(content: mmap.mmap) -> int:
    """Where a 64-bit little-endian ELF file's section headers end, which linkers put last."""

    def number(at: int, size: int) -> int:
        return int.from_bytes(content[at : at + size], "little")

    return max(64, number(0x28, 8) + number(0x3A, 2) * number(0x3C, 2))


def processor_features() -> frozenset[str] | None:
    """The instruction sets of this processor as Linux names them; None elsewhere."""
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                name, _, value = line.partition(":")
                if name.strip() in ("flags", "Features"):
                    return frozenset(value.split())
    except OSError:
        pass
    return None
