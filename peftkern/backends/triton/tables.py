"""Tables of measured, or estimated, choices: the user's cache and those that are shipped.

A table is JSON: {"version", "gpu", "triton", "source", "entries"}; an entry's key is ``key_of`` a direction, its value the
schedule and the tile. A table that cannot be read, is of another version or for another chip is ignored with one warning.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from dataclasses import asdict, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

from peftkern.backends.triton.tiles import Choice, Pass, TileConfig, padded

logger = logging.getLogger("peftkern")

VERSION = 1


@dataclass(frozen=True)
class Table:
    """One table. ``source`` is "measured" or "estimate"."""

    gpu: str
    source: str
    entries: dict[str, Choice]

    def lookup(self, launch: Pass) -> Choice | None:
        """What the table says for a direction; M counts by its power of two."""
        return self.entries.get(key_of(launch))


def key_of(launch: Pass) -> str:
    """A direction's key: everything that a choice depends on, M and R rounded up to powers of two."""
    p = launch.problem
    bucket = 1 << max(0, p.M - 1).bit_length()
    dtypes = f"{_short(p.dtype)}/{_short(p.adapter_dtype)}/{p.precision}"
    words = [
        "backward" if launch.backward else "forward",
        f"M{bucket}",
        f"P{launch.P}",
        f"Q{launch.Q}",
        f"R{padded(p.R)}",
    ]
    return " ".join([*words, dtypes, p.weight_format, *(["dropout"] if p.dropout else [])])


def _short(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def to_json(gpu: str, triton: str, source: str, entries: dict[str, Choice]) -> str:
    """A table as text, with sorted keys, one entry a line."""
    lines = [f"  {json.dumps(key)}: {json.dumps(_entry(choice))}" for key, choice in sorted(entries.items())]
    head = {"version": VERSION, "gpu": gpu, "triton": triton, "source": source}
    start = ",\n".join(f" {json.dumps(name)}: {json.dumps(value)}" for name, value in head.items())
    return "{\n" + start + ',\n "entries": {\n' + ",\n".join(lines) + "\n }\n}\n"


def _entry(choice: Choice) -> list[Any]:
    return [choice.schedule, *asdict(choice.tile).values()]


def parse(text: str, gpu: str) -> Table:
    """Read a table. Raises: ValueError saying what is wrong with it."""
    content = json.loads(text)
    if not isinstance(content, dict) or content.get("version") != VERSION:
        found = content.get("version") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"it is of version {found!r}, not {VERSION}")
    if content.get("gpu") != gpu:
        raise ValueError(f"it is for {content.get('gpu')!r}, not for {gpu!r}")
    entries = {}
    for key, value in content["entries"].items():
        schedule, *numbers = value
        if len(numbers) != len(fields(TileConfig)) or not all(isinstance(number, int) for number in numbers):
            raise ValueError(f"entry {key!r} is not a schedule and a tile: {value!r}")
        entries[key] = Choice(schedule, TileConfig(*numbers[:-1], tma=bool(numbers[-1])))
    return Table(gpu, str(content.get("source")), entries)


def cache_path(gpu: str) -> Path:
    """Where the user's own measurements for a chip are: below PEFTKERN_CACHE, XDG_CACHE_HOME or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("PEFTKERN_CACHE") or Path(base) / "peftkern") / f"{gpu}.json"


@functools.cache
def tables(gpu: str) -> tuple[Table, ...]:
    """The tables for a chip, the user's first. Never raises."""
    shipped = resources.files("peftkern.backends.triton") / "tuned" / f"{gpu}.json"
    found = []
    for source in (cache_path(gpu), shipped):
        try:
            found.append(parse(source.read_text(), gpu))
        except FileNotFoundError:
            continue
        except Exception as error:  # noqa: BLE001 - a bad file costs speed, never a call
            logger.warning("peftkern: %s is ignored: %s", source, error)
    return tuple(found)
