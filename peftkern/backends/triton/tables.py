"""Tables of measured choices: the user's cache and, once somebody has measured a chip, a shipped one.

A table is one JSON file for one chip. "choices" numbers schedules with their tiles (what is left out of a tile has its
default); "entries" says which rows get which, for everything else that a choice depends on:

    "forward P4096 Q4096 R16 bfloat16/float32/base dense dropout": "1-16=04 32-64=00 8192=07"

M and R count by their power of two: 8192 stands for 4097 to 8192 rows. The user's cache holds for one product
("device"); a shipped table for the whole architecture, and its device says where it was measured.

A table that cannot be read, is of another version or for another chip is ignored with one warning; so is what
``supports`` refuses of it. No call ever raises because of a table.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

from peftkern import _env
from peftkern._files import beside
from peftkern.backends.triton.arch import Arch
from peftkern.backends.triton.tiles import Choice, Pass, TileConfig, padded
from peftkern.weights.saved import dtype_name

logger = logging.getLogger("peftkern")

VERSION = 1
SHIPPED_LIMIT = 64 * 1024  # bytes
_RUN = re.compile(r"(\d+)(?:-(\d+))?=(\w+)")
_POWERS = ("BLOCK_M", "BLOCK_P", "BLOCK_Q", "num_warps", "SUBTILES", "SLICES")  # fields that are powers of two


@dataclass(frozen=True)
class Table:
    """One table: arch.name, the product it was measured on, and the fastest choices by key, then bucket of rows."""

    arch: str
    device: str
    triton: str
    entries: dict[str, dict[int, Choice]]
    origin: str = ""

    def lookup(self, launch: Pass) -> Choice | None:
        """The table's choice for a direction, or None."""
        return self.entries.get(key_of(launch), {}).get(bucket_of(launch.problem.M))

    def updated(self, other: Table) -> Table:
        """This table and another's entries, which win. Raises: ValueError: other chips."""
        if (self.arch, self.device) != (other.arch, other.device):
            raise ValueError(
                f"{self.origin or 'the table'} is for {self.arch} {self.device}, not {other.arch} {other.device}"
            )
        entries = {key: dict(buckets) for key, buckets in self.entries.items()}
        for key, buckets in other.entries.items():
            entries.setdefault(key, {}).update(buckets)
        return dataclasses.replace(other, entries=entries, origin=self.origin)


def bucket_of(M: int) -> int:
    """The power of two that a number of rows counts as."""
    return 1 << max(0, M - 1).bit_length()


def key_of(launch: Pass) -> str:
    """A direction's key: everything that a choice depends on except the rows."""
    p = launch.problem
    dtypes = f"{dtype_name(p.dtype)}/{dtype_name(p.adapter_dtype)}/{p.precision}"
    words = ["backward" if launch.backward else "forward", f"P{launch.P}", f"Q{launch.Q}", f"R{padded(p.R)}"]
    return " ".join(
        [*words, dtypes, p.weight_format, *(word for word in ("dropout", "scaled_steps") if getattr(p, word))]
    )


# ----------------------------------------------------------------------------------------------------------- the text


def to_json(table: Table) -> str:
    """A table as text: sorted keys, a choice or an entry a line."""
    used = {choice for buckets in table.entries.values() for choice in buckets.values()}
    texts = sorted((json.dumps(_to_fields(choice), sort_keys=True), choice) for choice in used)
    names = {choice: f"{number:02}" for number, (_, choice) in enumerate(texts)}
    choices = {names[choice]: text for text, choice in texts}
    entries = {key: json.dumps(_to_runs(buckets, names)) for key, buckets in sorted(table.entries.items()) if buckets}
    parts = {
        "arch": json.dumps(table.arch), "choices": _block(choices), "device": json.dumps(table.device),
        "entries": _block(entries), "triton": json.dumps(table.triton), "version": str(VERSION),
    }  # fmt: skip
    return "{\n" + ",\n".join(f" {json.dumps(name)}: {text}" for name, text in parts.items()) + "\n}\n"


def _block(lines: dict[str, str]) -> str:
    return "{\n" + ",\n".join(f"  {json.dumps(name)}: {text}" for name, text in lines.items()) + "\n }"


def _to_fields(choice: Choice) -> dict[str, Any]:
    tile = choice.tile
    differing = {f.name: getattr(tile, f.name) for f in fields(tile) if getattr(tile, f.name) != f.default}
    return {"schedule": choice.schedule, **({"decoded": True} if choice.decoded else {}), **differing}


def _to_runs(buckets: dict[int, Choice], names: dict[Choice, str]) -> str:
    """Neighbouring buckets with one choice are one run."""
    runs: list[tuple[int, int, Choice]] = []
    for bucket, choice in sorted(buckets.items()):
        if runs and runs[-1][1] * 2 == bucket and runs[-1][2] == choice:
            runs[-1] = (runs[-1][0], bucket, choice)
        else:
            runs.append((bucket, bucket, choice))
    return " ".join(f"{first}{f'-{last}' if last > first else ''}={names[choice]}" for first, last, choice in runs)


def parse(text: str, arch: str, device: str | None = None, origin: str = "") -> Table:
    """Read a table.

    Args: arch: the architecture it must be for; device: the product, or None for any; origin: for messages.
    Raises: ValueError saying what is wrong with it.
    """
    content = json.loads(text)
    if not isinstance(content, dict) or content.get("version") != VERSION:
        found = content.get("version") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"it is of version {found!r}, not {VERSION}")
    if content.get("arch") != arch:
        raise ValueError(f"it is for {content.get('arch')!r}, not for {arch!r}")
    if device is not None and content.get("device") != device:
        raise ValueError(f"it was measured on {content.get('device')!r}, this is {device!r}")
    choices, entries = content.get("choices"), content.get("entries")
    if not isinstance(choices, dict) or not isinstance(entries, dict):
        raise ValueError("it has no choices or no entries")
    named = {name: _from_fields(name, value) for name, value in choices.items()}
    found = {key: dict(_from_runs(key, value, named)) for key, value in entries.items()}
    return Table(arch, str(content.get("device")), str(content.get("triton")), found, origin)


def _from_fields(name: str, value: Any) -> Choice:
    numbers = dict(value) if isinstance(value, dict) else {}
    schedule, decoded = numbers.pop("schedule", None), numbers.pop("decoded", False)
    if schedule not in _env.SCHEDULES:
        raise ValueError(f"choice {name} has no known schedule: {value!r}")
    known = {f.name: f for f in fields(TileConfig)}
    for field, number in numbers.items():
        fits = type(number) is (bool if field == "tma" else int) and number >= (
            0 if field in ("tma", "resident") else 1
        )
        if field not in known or not fits or (field in _POWERS and number & (number - 1)):
            raise ValueError(f"choice {name} has no tile: {field}={number!r}")
    missing = [f.name for f in known.values() if f.default is dataclasses.MISSING and f.name not in numbers]
    if missing or numbers["num_warps"] > 32 or numbers["num_stages"] > 16:
        raise ValueError(f"choice {name} has no tile: {value!r}")
    return Choice(schedule, TileConfig(**numbers), decoded is True)


def _from_runs(key: str, value: Any, named: dict[str, Choice]) -> Iterator[tuple[int, Choice]]:
    for word in value.split(" ") if isinstance(value, str) else [""]:
        run = _RUN.fullmatch(word)
        if run is None or run[3] not in named:
            raise ValueError(f"entry {key!r} is not a list of rows and choices: {value!r}")
        bucket, last = int(run[1]), int(run[2] or run[1])
        if bucket != bucket_of(bucket) or last != bucket_of(last) or not bucket <= last <= 2**40:
            raise ValueError(f"entry {key!r} has rows that are no powers of two in order: {value!r}")
        while bucket <= last:
            yield bucket, named[run[3]]
            bucket *= 2


# ---------------------------------------------------------------------------------------------------------- the files


def cache_path(arch: Arch) -> Path:
    """The file of the user's own measurements for a product."""
    product = re.sub(r"[^a-z0-9]+", "-", arch.product.lower()).strip("-")
    return _env.cache_folder() / f"{arch.name}{'-' if product else ''}{product}.json"


def shipped(arch: str) -> Any:
    """The shipped table's file, which need not exist."""
    return resources.files("peftkern.backends.triton") / "tuned" / f"{arch}.json"


_loading = threading.Lock()
_loaded: dict[tuple[str, str], tuple[Table, ...]] = {}
_complained: set[str] = set()


def tables(arch: Arch) -> tuple[Table, ...]:
    """The tables for a chip, the user's first; read once, by one thread. Never raises."""
    key = arch.name, arch.product
    with _loading:
        if key not in _loaded:
            _loaded[key] = tuple(_load(arch))
        return _loaded[key]


def _load(arch: Arch) -> Iterator[Table]:
    for find, device in ((lambda: cache_path(arch), arch.product), (lambda: shipped(arch.name), None)):
        source = None
        try:
            source = find()
            yield parse(source.read_text(encoding="utf-8"), arch.name, device, str(source))
        except FileNotFoundError:
            continue
        except Exception as error:  # noqa: BLE001 - a bad file costs speed, never a call
            logger.warning("peftkern: %s is ignored: %s", source or "the cache of tuned tables", error)


def complain(table: Table, reason: str) -> None:
    """One warning a file about entries that cannot be used."""
    with _loading:
        new = table.origin not in _complained
        _complained.add(table.origin)
    if new:
        logger.warning("peftkern: %s has entries that are ignored: %s", table.origin, reason)


def forget() -> None:
    """Read the files again when a table is next asked for."""
    with _loading:
        _loaded.clear()
        _complained.clear()


def merge(path: Path, update: Table, to_ship: bool = False) -> None:
    """Add a table's entries to a file: one is written beside it and takes its place, so that no reader sees half of it.

    No lock is held. Where another process has changed the file since it was read, it is read once more; what is written
    in the moment between that look and the replacement is lost, and is tuned again.

    Args:
        path: the file; its folder is made.
        update: what is added.
        to_ship: the file is a table to be shipped: what is there must be readable and of the update's product, and
            the size is limited. In the user's cache a file that cannot be used is replaced, with a warning.
    Raises: OSError if it cannot be written; ValueError for a shipped file that is bad, another chip's or too large.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for last in (False, True):
        held = _content(path)
        with beside(path, _merged(path, held, update, to_ship).encode()) as temporary:
            if last or _content(path) == held:
                os.replace(temporary, path)
                return


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _merged(path: Path, held: bytes | None, update: Table, to_ship: bool) -> str:
    """The text of a file that has held ``held``, with the update's entries."""
    table = dataclasses.replace(update, entries={})
    if held is not None:
        try:
            table = parse(held.decode(), update.arch, None if to_ship else update.device, str(path))
        except ValueError as error:
            if to_ship:
                raise ValueError(f"{path}: {error}") from error
            logger.warning("peftkern: %s is replaced: %s", path, error)
    text = to_json(table.updated(update))
    if to_ship and len(text.encode()) > SHIPPED_LIMIT:
        raise ValueError(f"{path} would have {len(text.encode())} bytes; a shipped table has {SHIPPED_LIMIT} at most")
    return text
