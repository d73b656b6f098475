"""Two processes over gloo, started once for a file of tests; a hang is a failure."""

from __future__ import annotations

import datetime
import os
import pathlib
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable

import pytest

WORLD = 2
SECONDS = 240
SKIPPED = "skipped: "


def run_in_two(script: str, seconds: int = SECONDS) -> dict[str, str]:
    """Run a file of ``check_*`` functions by ``main`` in two ranks; the error of each check, "" where it passed.

    Every rank goes through the checks in order; the first one that fails on any rank ends both, since the other would
    wait for it. What has not run is missing from the result.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PEFTKERN_TEST_STORE": folder}
        environment |= {"WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(pathlib.Path(script).parent.parent), *sys.path])
        said = [pathlib.Path(folder, f"said.{rank}") for rank in range(WORLD)]  # a pipe that is full stops who writes
        ranks = []
        for rank, path in enumerate(said):
            with path.open("w") as file:
                own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                ranks.append(subprocess.Popen([sys.executable, script], env=own, stdout=file, stderr=subprocess.STDOUT))
        for process in ranks:
            try:
                process.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                for other in ranks:
                    other.kill()
                process.wait()
                with said[0].open("a") as file:
                    file.write(f"\nno end after {seconds} s")
        outputs = [path.read_text() for path in said]
        found: dict[str, str] = {}
        for path in sorted(pathlib.Path(folder).glob("check_*")):
            name = path.name.rsplit(".", 1)[0]
            found[name] = found.get(name, "") + path.read_text()
    if not found:
        raise RuntimeError("\n".join(outputs))
    return found


def judge(name: str, outcome: dict[str, str]) -> None:
    """What became of a check: nothing, or the skip or failure that it ended with."""
    assert name in outcome, "an earlier check failed"
    if outcome[name].startswith(SKIPPED):
        pytest.skip(outcome[name])
    assert not outcome[name], outcome[name]


def main(checks: dict[str, Callable[[], None]]) -> None:
    """What a rank does: join the group, go through the checks, leave each one's error in the store."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    folder, rank = os.environ["PEFTKERN_TEST_STORE"], int(os.environ["RANK"])
    store = dist.FileStore(os.path.join(folder, "store"), WORLD)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=WORLD, timeout=datetime.timedelta(seconds=SECONDS)
    )
    for name, check in checks.items():
        torch.manual_seed(0)
        error = ""
        try:
            check()
        except pytest.skip.Exception as reason:  # on both ranks alike
            error = f"{SKIPPED}{reason}"
        except BaseException:
            error = f"rank {rank}: {traceback.format_exc()}"
        pathlib.Path(folder, f"{name}.{rank}").write_text(error)
        if error and not error.startswith(SKIPPED):
            os._exit(1)  # the other rank's collective fails, and it ends too
    dist.destroy_process_group()
