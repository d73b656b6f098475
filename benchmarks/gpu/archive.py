"""What comes back from a machine that is lent: few files, none of them large.

    results.tar.gz            every part's JSON, the report, the tuned table
    triton-cache.tar.gz       Triton's cache without the compiler's texts, in volumes: triton-cache-2.tar.gz and on

The next run takes the volumes along (``--triton-cache``), and compiles nothing that they hold.
"""

from __future__ import annotations

import contextlib
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from benchmarks.gpu import store, tuning

RESULTS = "results.tar.gz"
CACHE = "triton-cache"
FOLDER = "triton"  # of the cache, within the folder of the results
MOST_BYTES = 15 * 2**20  # of a volume
_MOST_VOLUMES = 6
_KEPT = (".json", ".cubin", ".hsaco", ".so")  # of a kernel: what it is, its binary, its launcher
_GROUP = "__grp__"
_RESULTS = (".json", ".md", ".png")


def results(folder: Path, target: Path) -> None:
    """Pack the results into one archive. A table of which a cell was tuned in part only is called so."""
    found = store.read(folder / "tuning.json")
    partly = bool(found and tuning.incomplete(found["results"]))
    with _written(target / RESULTS) as path, tarfile.open(path, "w:gz", compresslevel=6) as made:
        for path in sorted(folder.iterdir()):
            if path.is_file() and path.suffix in _RESULTS and not path.name.startswith("."):
                made.add(path, f"gpu/{'partly-tuned-' if partly and _is_table(path) else ''}{path.name}")


def _is_table(path: Path) -> bool:
    return path.suffix == ".json" and store.read(path) is None


def cache(folder: Path, target: Path) -> list[Path]:
    """Pack Triton's cache, the newest kernels first, into volumes. Returns: these; a cache larger than all is cut."""
    kernels = [path for path in (folder / FOLDER).glob("*") if path.is_dir()]
    waiting, made = sorted(kernels, key=lambda path: path.stat().st_mtime), list[Path]()
    while waiting and len(made) < _MOST_VOLUMES:
        made.append(target / f"{CACHE}{f'-{len(made) + 1}' if made else ''}.tar.gz")
        with _written(made[-1]) as path, path.open("wb") as raw, _packing(raw) as volume:
            while waiting and raw.tell() < MOST_BYTES - 2**20:
                kernel = waiting.pop()
                for file in sorted(kernel.iterdir()):
                    if file.suffix in _KEPT:
                        volume.add(file, f"{kernel.name}/{file.name}")
    if waiting:
        print(f"{len(waiting)} kernels of Triton's cache are not in its {len(made)} archives", flush=True)
    return made


def _packing(raw: BinaryIO) -> tarfile.TarFile:
    return tarfile.open(fileobj=raw, mode="w:gz", compresslevel=6)


@contextlib.contextmanager
def _written(path: Path) -> Iterator[Path]:
    """A file beside ``path`` that takes its place at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def unpack(volumes: Sequence[Path], folder: Path) -> int:
    """Add archived kernels to the cache in ``folder``, wherever they were compiled. Returns: how many there are now."""
    target = folder / FOLDER
    target.mkdir(parents=True, exist_ok=True)
    for volume in volumes:
        with tarfile.open(volume) as packed:
            packed.extractall(target, filter="data")
    groups = list(target.glob(f"*/{_GROUP}*"))
    for group in groups:  # names every file of a kernel by its whole path, and a file that is missing spoils it
        names = json.loads(group.read_text())["child_paths"]
        here = {name: str(group.with_name(name)) for name in names if group.with_name(name).exists()}
        group.write_text(json.dumps({"child_paths": here}))
    return len(groups)
