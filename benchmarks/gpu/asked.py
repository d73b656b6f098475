"""Which parts, tasks and variants a run was asked for: options of the command, which its workers are given too."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.gpu.plan import Plan, dry
from benchmarks.gpu.variants import OTHERS

NAMES = ("environment", "correctness", "compile", "tuning", "products", "models", "tests")
TIMED = ("tuning", "products", "models")
_DEFAULT = tuple(name for name in NAMES if name != "tests")
WHOLE = ("environment", "compile")  # the one is always asked for, the other follows from the timed tasks that are
_SHORT = 15.0  # minutes: a shorter run has none for torch.compile


@dataclass(frozen=True)
class Asked:
    """What was asked for. ``only``: a regular expression, of which each task's key has to have a match."""

    parts: tuple[str, ...] = _DEFAULT
    only: str = ""

    def takes(self, part: str, key: str) -> bool:
        """Whether a task of a part is wanted."""
        return part in WHOLE or re.search(self.only, key) is not None

    @property
    def timed(self) -> tuple[str, ...]:
        """The timed parts that are asked for, or where none is, all: what ``compile`` gets ready for."""
        return tuple(part for part in self.parts if part in TIMED) or TIMED


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give a parser the options that ``Asked`` and the plan are read from."""
    add = parser.add_argument
    add("--parts", type=_parts, default=_DEFAULT, metavar="PART,...",
        help=f"some of {', '.join(NAMES)}; default: all but tests, the repository's own GPU tests")  # fmt: skip
    add("--only", type=_pattern, default="", metavar="REGEX",
        help="only tasks in whose key, as a record has it, this is found; environment is whole, and compile does "
             "what the others need")  # fmt: skip
    add("--without", type=_variants, metavar="VARIANT,...",
        help=f"leave out some of {', '.join(OTHERS)}, or none with ''; default: compiled where --minutes is under "
             f"{_SHORT:g}, none otherwise")  # fmt: skip
    add("--dry-run", action="store_true", help=argparse.SUPPRESS)
    add("--stand-in", metavar="ARCH", help=argparse.SUPPRESS)


def of(options: argparse.Namespace) -> Asked:
    """What the options ask for."""
    return Asked(options.parts, options.only)


def without(options: argparse.Namespace, minutes: float) -> tuple[str, ...]:
    """The variants to leave out in a run of so many minutes."""
    return options.without if options.without is not None else ("compiled",) if minutes < _SHORT else ()


def plan(options: argparse.Namespace, left_out: tuple[str, ...]) -> Plan:
    """The plan that the options choose, without some variants."""
    if options.dry_run:
        return dry(Plan())
    return Plan(without=left_out, **({"device": "cpu", "stand_in": options.stand_in} if options.stand_in else {}))


def words(options: argparse.Namespace, left_out: Sequence[str]) -> list[str]:
    """The same as options of a worker."""
    found = ["--parts", ",".join(options.parts), f"--only={options.only}", f"--without={','.join(left_out)}"]
    found += ["--dry-run"] if options.dry_run else []
    return found + ([f"--stand-in={options.stand_in}"] if options.stand_in else [])


def _names(text: str, known: Sequence[str], what: str) -> tuple[str, ...]:
    found = tuple(word for word in text.split(",") if word)
    unknown = [word for word in found if word not in known]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown {what}: {', '.join(unknown)}; known: {', '.join(known)}")
    return found


def _parts(text: str) -> tuple[str, ...]:
    return _names(text, NAMES, "parts")


def _variants(text: str) -> tuple[str, ...]:
    return _names(text, OTHERS, "variants")


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from error
    return text
