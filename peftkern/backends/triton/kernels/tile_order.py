"""Plugs for the order in which programs take tiles."""

import triton
import triton.language as tl


@triton.jit
def grouped(program, tiles_m, tiles_p, GROUP_M: tl.constexpr):
    """(tile_m, tile_p): GROUP_M rows of tiles walk along P together, so that a panel of W is read once for them all."""
    group = program // (GROUP_M * tiles_p)
    first = group * GROUP_M
    rows = tl.minimum(tiles_m - first, GROUP_M)
    within = program % (GROUP_M * tiles_p)
    return first + within % rows, within // rows
