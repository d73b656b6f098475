"""The order in which tiles are taken: item number -> (tile_m, tile_p)."""

import triton
import triton.language as tl


@triton.jit
def grouped(item, tiles_m, tiles_p, GROUP_M: tl.constexpr):
    """GROUP_M rows of tiles walk along P together, so that a panel of W is read once for them all."""
    group = item // (GROUP_M * tiles_p)
    first = group * GROUP_M
    rows = tl.minimum(tiles_m - first, GROUP_M)
    within = item % (GROUP_M * tiles_p)
    return first + within % rows, within // rows


@triton.jit
def producers_first(item, tiles_m, tiles_p, GROUP_M: tl.constexpr):
    """The first tile of every row block, then the others ``grouped``: a producer long precedes its readers."""
    tile_m, tile_p = item, item * 0
    if item >= tiles_m:
        tile_m, tile_p = grouped(item - tiles_m, tiles_m, tiles_p - 1, GROUP_M)
        tile_p += 1
    return tile_m, tile_p
