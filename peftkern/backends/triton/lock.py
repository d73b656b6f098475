"""A lock between processes around the rewriting of one file.

Where the system has ``flock`` it is the system's: a holder that dies releases it. Elsewhere it is a file that only one
process can create; one that nobody touches for ``_STALE`` seconds was left by a holder that died, and is removed.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_PAUSE = 0.01  # seconds between two tries
_STALE = 10.0  # seconds; a holder needs milliseconds


@contextlib.contextmanager
def locked(path: Path, timeout: float = 30.0) -> Iterator[None]:
    """Hold the lock of ``path``, whose folder exists.

    Raises: TimeoutError if another process holds it for longer than ``timeout`` seconds; OSError if the folder cannot
        be written.
    """
    deadline = time.monotonic() + timeout
    release = None
    if fcntl is not None:
        release = _by_system(path.with_name(f".{path.name}.lock"), deadline)
    if release is None:
        release = _by_file(path.with_name(f".{path.name}.held"), deadline)
    with release:
        yield


def _by_system(lock: Path, deadline: float) -> contextlib.ExitStack | None:
    """flock; None where this file system has none."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # the last holder unlinked it; if that was between our open and our flock, this lock is of no file
            if _same_file(descriptor, lock):
                break
            os.close(descriptor)
        except BlockingIOError:
            os.close(descriptor)
            _wait(lock, deadline)
        except OSError:
            os.close(descriptor)
            return None
    release = contextlib.ExitStack()
    release.callback(os.close, descriptor)
    release.callback(lock.unlink, missing_ok=True)  # runs first
    return release


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _by_file(lock: Path, deadline: float) -> contextlib.ExitStack:
    """A file that only one process can create."""
    seen, since = None, time.monotonic()
    while True:
        try:
            os.close(os.open(lock, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            break
        except FileExistsError:
            found = _identity(lock)
            if found != seen:
                seen, since = found, time.monotonic()
            elif found is not None and time.monotonic() - since > _STALE:
                _remove(lock, found)
                continue
            _wait(lock, deadline)
    release = contextlib.ExitStack()
    release.callback(lock.unlink, missing_ok=True)
    return release


def _identity(lock: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(lock)
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def _remove(lock: Path, abandoned: tuple[int, int]) -> None:
    """Remove an abandoned lock, but never the one that another waiter has just put in its place."""
    aside = lock.with_name(f"{lock.name}.{secrets.token_hex(4)}")
    try:
        os.rename(lock, aside)
    except FileNotFoundError:
        return
    if _identity(aside) != abandoned:
        with contextlib.suppress(OSError):
            os.link(aside, lock)
    aside.unlink()


def _wait(lock: Path, deadline: float) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(f"another process has held {lock} for too long")
    time.sleep(_PAUSE)
