"""The ``fused`` body: the frozen product and the low-rank pair in a single pass over X.

    T[M, R] = D_in(X)[M, Q] · F^T                                  F: first low-rank factor, [R, Q]
    Z[M, P] = X[M, Q] · op(W) + c · D_out(T · G^T) + columns       G: second low-rank factor, [P, R]

Forward: P = N, Q = K, op(W) = W^T, (F, G) = (A, B), dropout is D_in.  Backward (dx): P = K, Q = N, op(W) = W,
(F, G) = (B^T, A^T), dropout is D_out (``MASK_OUT``). T leaves without c, in fp32; ``t_scale`` is D_in's scale and c
carries D_out's. ``WGMMA``: how the tile is multiplied. ``SOURCE`` says where a tile has T from:

    "recompute"  accumulated beside Z in every tile; those of the first column store it
    "shared"     accumulated by the first tile of a row block, which publishes it; the others wait in their epilogue
    "ready"      written by ``shrink`` before (``DEPENDENT``: perhaps still being written while the main loop runs);
                 without LOAD_W, X and W are e4m3 codes, and T is that of the rows before ``quantise``
    "onto"       as "ready", and Z holds the frozen product already
    "alone"      as "ready", and Z gets no frozen product, which the vendor's GEMM adds afterwards
    "bank"       rows have adapters of their own, and G is their bank (``lookup``): chunks of every segment's T come
                 first, and a tile, once its product is made, waits for them all. For the i-th row m of segment e

                     Z[m, P] = X[m, Q] · op(W) + c_e · D_out(T_e[i] · G_e^T) + columns
                     T_e[i]  = D_in(X)[m, Q] · F_e^T

                 and a row of no segment has the bits that it has without any bank

``SLICES`` > 1 ("recompute", few rows): Q is cut into slices, T G^T is linear in T, so each slice's tile carries its own
part of both; the slice that arrives last adds them up in their order. In "bank" both tiles and chunks are cut.
"""

import triton
import triton.language as tl

from peftkern.backends.triton.kernels.contract import contract, contract_codes, contract_with_thin
from peftkern.backends.triton.kernels.finish import add_low_rank, finish
from peftkern.backends.triton.kernels.lookup import count_chunks, owners, thin_of_chunk
from peftkern.backends.triton.kernels.matrix import load_block, load_scaling, store_block, sum_slices
from peftkern.backends.triton.kernels.protocol import (
    announce,
    arrived_last,
    await_all,
    await_block,
    publish,
    retire,
    take_ticket,
)
from peftkern.backends.triton.kernels.tile_order import grouped, producers_first


@triton.jit(do_not_specialize=["M"])
def fused(
    X, x_strides, W, w_operands, Z, z_strides, T, F, f_strides, G, g_strides,
    drop_operands, column_operands, counters, PARTIALS, t_scale, scaling, scaling_tensor, M, P, Q, R,
    LOAD_W: tl.constexpr, DROP: tl.constexpr, ADAPTER: tl.constexpr, EPILOGUE: tl.constexpr,
    SOURCE: tl.constexpr, BACKWARD: tl.constexpr, MASK_OUT: tl.constexpr, DEPENDENT: tl.constexpr,
    WGMMA: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr, SUBTILES: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """Tiles of Z: as many as there are tickets for ("shared"), or every num_programs-th."""
    c = load_scaling(scaling, scaling_tensor)
    tiles_m, tiles_p = tl.cdiv(M, BLOCK_M), tl.cdiv(P, BLOCK_P)

    if SOURCE == "shared":
        ticket = take_ticket(counters)
        while ticket < tiles_m * tiles_p:
            tile_m, tile_p = producers_first(ticket, tiles_m, tiles_p, GROUP_M)
            m0, p0 = tile_m * BLOCK_M, tile_p * BLOCK_P
            if tile_p == 0:
                acc, t = contract_with_thin(
                    X, x_strides, W, w_operands, F, f_strides, drop_operands, m0, p0, 0, Q, M, P, Q, R,
                    LOAD_W, DROP, ADAPTER, BACKWARD, not MASK_OUT, WGMMA, DTYPE, PRECISION, BLOCK_M, BLOCK_P, BLOCK_Q,
                    BLOCK_R,
                )  # fmt: skip
                store_block(T, (R, 1), t * t_scale, m0, 0, M, R, BLOCK_M, BLOCK_R)
                publish(counters, tile_m)
            else:
                acc = contract(X, x_strides, W, w_operands, m0, p0, 0, Q, M, P, Q, LOAD_W, BACKWARD, DTYPE, PRECISION,
                               BLOCK_M, BLOCK_P, BLOCK_Q)  # fmt: skip
                await_block(counters, tile_m, tiles_p - 1)
            finish(acc, 0.0, T, Z, z_strides, G, g_strides, drop_operands, column_operands, c, m0, p0, M, P, R,
                   DROP, ADAPTER, EPILOGUE, True, BACKWARD, MASK_OUT, WGMMA, DTYPE, PRECISION,
                   BLOCK_M, BLOCK_P, BLOCK_R, SUBTILES)  # fmt: skip
            ticket = take_ticket(counters)
        retire(counters)
    elif SOURCE == "bank":
        tiles_z = tiles_m * tiles_p
        chunks, elements = count_chunks(G)
        steps = tl.cdiv(tl.cdiv(Q, BLOCK_Q), SLICES) * BLOCK_Q
        ticket = take_ticket(counters)
        while ticket < (chunks + tiles_z) * SLICES:
            unit, part = ticket // SLICES, ticket % SLICES
            begin = part * steps
            end = tl.minimum(begin + steps, Q)
            if unit < chunks:
                done = thin_of_chunk(G, T, PARTIALS, counters, drop_operands, 1 + tiles_z + unit, unit, part, begin,
                                     end, M, Q, DROP, ADAPTER, BACKWARD, not MASK_OUT, DTYPE, PRECISION,
                                     BLOCK_M, BLOCK_Q, BLOCK_R, SLICES)  # fmt: skip
                if (tiles_z > 0) & done:
                    announce(counters, 0)
            else:
                tile_m, tile_p = grouped(unit - chunks, tiles_m, tiles_p, GROUP_M)
                m0, p0 = tile_m * BLOCK_M, tile_p * BLOCK_P
                acc = contract(X, x_strides, W, w_operands, m0, p0, begin, end, M, P, Q, LOAD_W, BACKWARD, DTYPE,
                               PRECISION, BLOCK_M, BLOCK_P, BLOCK_Q)  # fmt: skip
                last = True
                if SLICES > 1:
                    distance = tl.cast(M, tl.int64) * P
                    mine = PARTIALS + elements * SLICES
                    store_block(mine + part * distance, (P, 1), acc, m0, p0, M, P, BLOCK_M, BLOCK_P)
                    last = arrived_last(counters, 1 + unit - chunks, SLICES)
                if last:
                    if SLICES > 1:
                        acc = sum_slices(mine, (P, 1), SLICES, distance, m0, p0, M, P, BLOCK_M, BLOCK_P)
                    if chunks > 0:
                        await_all(counters, 0, chunks, tiles_z)
                    finish(acc, owners(G, m0, M, BLOCK_M), T, Z, z_strides, G, g_strides, drop_operands,
                           column_operands, c, m0, p0, M, P, R, DROP, ADAPTER, EPILOGUE, True, BACKWARD, MASK_OUT,
                           WGMMA, DTYPE, PRECISION, BLOCK_M, BLOCK_P, BLOCK_R, SUBTILES)  # fmt: skip
            ticket = take_ticket(counters)
        retire(counters)
    else:
        for item in tl.range(tl.program_id(0), tiles_m * tiles_p * SLICES, tl.num_programs(0)):
            tile_m, tile_p = grouped(item // SLICES, tiles_m, tiles_p, GROUP_M)
            m0, p0 = tile_m * BLOCK_M, tile_p * BLOCK_P
            if SOURCE == "recompute":
                steps = tl.cdiv(tl.cdiv(Q, BLOCK_Q), SLICES) * BLOCK_Q
                begin = item % SLICES * steps
                acc, t = contract_with_thin(
                    X, x_strides, W, w_operands, F, f_strides, drop_operands, m0, p0,
                    begin, tl.minimum(begin + steps, Q), M, P, Q, R,
                    LOAD_W, DROP, ADAPTER, BACKWARD, not MASK_OUT, WGMMA, DTYPE, PRECISION, BLOCK_M, BLOCK_P, BLOCK_Q,
                    BLOCK_R,
                )  # fmt: skip
                t *= t_scale
                rows_of_t = tl.where(tile_p == 0, M, 0)
            else:
                t = 0.0
                if SOURCE == "onto":
                    acc = load_block(Z, z_strides, m0, p0, M, P, BLOCK_M, BLOCK_P).to(tl.float32)
                elif SOURCE == "alone":
                    acc = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
                elif LOAD_W is None:
                    acc = contract_codes(X, x_strides, W, w_operands, m0, p0, M, P, Q, BACKWARD,
                                         BLOCK_M, BLOCK_P, BLOCK_Q)  # fmt: skip
                else:
                    acc = contract(X, x_strides, W, w_operands, m0, p0, 0, Q, M, P, Q, LOAD_W, BACKWARD, DTYPE,
                                   PRECISION, BLOCK_M, BLOCK_P, BLOCK_Q)  # fmt: skip
                if DEPENDENT:
                    tl.extra.cuda.gdc_wait()

            if SLICES > 1:
                acc = add_low_rank(acc, t, T, G, g_strides, drop_operands, c, m0, p0, M, P, R, DROP, ADAPTER,
                                   False, MASK_OUT, WGMMA, DTYPE, PRECISION, BLOCK_M, BLOCK_P, BLOCK_R)  # fmt: skip
                distance = tl.cast(M, tl.int64) * (P + R)
                mine = PARTIALS + item % SLICES * distance
                store_block(mine, (P + R, 1), acc, m0, p0, M, P, BLOCK_M, BLOCK_P)
                store_block(mine + P, (P + R, 1), t, m0, 0, rows_of_t, R, BLOCK_M, BLOCK_R)
                if arrived_last(counters, item // SLICES, SLICES):
                    acc = sum_slices(PARTIALS, (P + R, 1), SLICES, distance, m0, p0, M, P, BLOCK_M, BLOCK_P)
                    acc = EPILOGUE(column_operands, acc, p0, P, c, BLOCK_P)
                    store_block(Z, z_strides, acc, m0, p0, M, P, BLOCK_M, BLOCK_P)
                    t = sum_slices(PARTIALS + P, (P + R, 1), SLICES, distance, m0, 0, rows_of_t, R, BLOCK_M, BLOCK_R)
                    store_block(T, (R, 1), t, m0, 0, rows_of_t, R, BLOCK_M, BLOCK_R)
            else:
                if SOURCE == "recompute":
                    store_block(T, (R, 1), t, m0, 0, rows_of_t, R, BLOCK_M, BLOCK_R)
                finish(acc, t, T, Z, z_strides, G, g_strides, drop_operands, column_operands, c, m0, p0, M, P, R,
                       DROP, ADAPTER, EPILOGUE, SOURCE != "recompute", BACKWARD, MASK_OUT, WGMMA, DTYPE, PRECISION,
                       BLOCK_M, BLOCK_P, BLOCK_R, SUBTILES)  # fmt: skip
