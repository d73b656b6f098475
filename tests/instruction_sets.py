"""The C++ kernels in each instruction set and on both schedules within one test, which makes its truth once."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

from peftkern.backends.cpp import call
from peftkern.backends.cpp.extension import extension

C = extension()[0]
SETS = C.instruction_sets() if C is not None else []


@contextlib.contextmanager
def kernels(name: str, one_pass: bool | None = None) -> Iterator[str]:
    """The kernels of one set; ``one_pass``: the frozen product in them, on top of torch's, or (None) by the rule."""
    before, rule = C.instruction_set(), call.one_pass
    C.use(name)
    if one_pass is not None:
        call.one_pass = lambda *_: one_pass
    try:
        yield name
    except AssertionError as error:
        raise AssertionError(f"{name}, one_pass={one_pass}: {error}") from error
    finally:
        call.one_pass = rule
        C.use(before)


def settings(*, one_pass: tuple[bool | None, ...] = (True, False)) -> list[contextlib.AbstractContextManager[str]]:
    """Every set that this processor runs, each on the given schedules."""
    return [kernels(name, schedule) for name, schedule in itertools.product(SETS, one_pass)]
