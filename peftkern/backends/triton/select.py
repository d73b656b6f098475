"""Which schedule and tile a problem gets: the forced schedule, or the cheapest by ``tiles.estimate``."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from peftkern import _env
from peftkern.backends.triton import tiles
from peftkern.backends.triton.tiles import ARCHES, Arch, Pass, TileConfig
from peftkern.ops.problem import Problem


@dataclass(frozen=True, slots=True)
class Choice:
    """How one direction of a problem is run."""

    launch: Pass
    tile: TileConfig

    @property
    def one_pass(self) -> bool:
        """Whether T is accumulated beside Z."""
        return self.launch.one_pass

    @property
    def schedule(self) -> str:
        """Its name in ``explain``."""
        return "one_pass/recompute" if self.one_pass else "split"


@functools.cache
def arch_of(device: torch.device) -> Arch:
    """The chip behind a device; an unknown one is taken for the nearest known relative."""
    if device.type != "cuda":
        return ARCHES["interpreter"]
    if torch.version.hip:
        return ARCHES["gfx942"]
    major, _ = torch.cuda.get_device_capability(device)
    return ARCHES["sm_100" if major == 10 else "sm_90" if major == 9 else "sm_80"]


def choose(problem: Problem, arch: Arch, backward: bool) -> Choice:
    """The schedule and tile of one direction. Raises: RuntimeError if the forced schedule cannot run the problem."""
    return best(problem, arch, backward, _env.settings().schedule)


@functools.lru_cache(maxsize=4096)
def best(problem: Problem, arch: Arch, backward: bool, schedule: str) -> Choice:
    """``choose`` under a schedule: "auto", "one_pass" or "split"."""
    cheapest, reasons = None, []
    for one_pass in (True, False):
        if schedule not in ("auto", "one_pass" if one_pass else "split"):
            continue
        launch = Pass(problem, backward, one_pass)
        for tile in tiles.shipped(problem.dtype, arch.name):
            reason = tiles.supports(launch, tile, arch)
            if reason is not None:
                reasons.append(reason)
                continue
            cost = tiles.estimate(launch, tile, arch)
            if cheapest is None or cost < cheapest[0]:
                cheapest = cost, Choice(launch, tile)
    if cheapest is None:
        raise RuntimeError(f"PEFTKERN_SCHEDULE={schedule} cannot run this call: {reasons[0]}")
    return cheapest[1]
