"""What a part is made of."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Result = dict[str, Any]

# What a result's "status" can be. All of them are results: none is tried again, except by --retry.
OK = "ok"
WRONG = "wrong"  # it computes something else; it was not timed
REFUSED = "refused"  # peftkern says that it cannot, with a reason
ERROR = "error"  # an exception
OUT_OF_MEMORY = "out of memory"
HANG = "hang"  # no answer within the task's limit: the process was ended
CRASH = "crash"  # the process ended, or the device is in a state that only a new process mends


_FOLDERS = re.compile(r"(?<![\w.~])(?:/[\w.@+~-]+)+/(?=[\w.@+~-]+/[\w.@+~-])")


def without_folders(text: str) -> str:
    """Text for a record, which says nothing of where things lie on the machine: of a path, its last two names."""
    return _FOLDERS.sub("", text)


@dataclass(frozen=True)
class Task:
    """One thing to measure.

    Args: key: its name in the file; limit: how many seconds it may take; about: what each of its results says, also a
        hang's.
    """

    key: str
    run: Callable[[], Result]
    limit: float = 120.0
    about: Mapping[str, Any] | None = None
