"""U, the derivative of O along tangents (a, b, c), and the row constants of the second derivative."""

from typing import no_type_check

import triton
import triton.language as tl

from theria.attention.kernels.common import (
    LOG2_E,
    keys_of_queries,
    load_entries,
    load_rows,
    program_of_queries,
    reciprocal,
    store_entries,
    store_rows,
    tile_count,
    tile_start,
    times,
    times_transposed,
    visible,
)


@triton.jit(do_not_specialize=["queries", "keys", "offset", "window", "heads"])
@no_type_check
def jvp_rows(
    q,
    k,
    v,
    out,
    lse,
    a,
    b,
    c,
    u,
    do,
    m,
    delta,
    e,
    rescale,
    scale,
    queries,
    keys,
    offset,
    window,
    heads,
    SHARING: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_VALUE_DIM: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
    PASSES: tl.constexpr,
):
    """U = [P T] V - m O + P c of one tile of queries.

    With a cotangent dO also m = rowsum(P T), D = rowsum(dO O), e = rowsum(dO U) and 1 / rowsum(P).
    """
    start, batch, head = program_of_queries(queries, heads, BLOCK_QUERIES)
    kv_head = head // SHARING
    rows = start + tl.arange(0, BLOCK_QUERIES)
    zeros = tl.zeros((BLOCK_QUERIES, BLOCK_KEYS), tl.float32)
    q_tile = load_rows(q, batch, head, start, queries, DIM, BLOCK_QUERIES, BLOCK_DIM, False)
    a_tile = load_rows(a, batch, head, start, queries, DIM, BLOCK_QUERIES, BLOCK_DIM, False)
    lse2 = LOG2_E * load_entries(lse, batch, head, start, queries, float("inf"), BLOCK_QUERIES, False)
    acc = tl.zeros((BLOCK_QUERIES, BLOCK_VALUE_DIM), tl.float32)
    mean = tl.zeros((BLOCK_QUERIES,), tl.float32)
    total = tl.zeros((BLOCK_QUERIES,), tl.float32)
    tiles = keys_of_queries(
        start, queries, keys, offset, window, CAUSAL, WINDOWED, BLOCK_QUERIES, BLOCK_KEYS, PASSES
    )
    for INSIDE in tl.static_range(PASSES):
        for index in tl.range(0, tile_count(tiles, INSIDE, BLOCK_KEYS), num_stages=None if INSIDE else 1):
            first = tile_start(tiles, index, INSIDE, BLOCK_KEYS)
            columns = first + tl.arange(0, BLOCK_KEYS)
            k_tile = load_rows(k, batch, kv_head, first, keys, DIM, BLOCK_KEYS, BLOCK_DIM, INSIDE)
            b_tile = load_rows(b, batch, kv_head, first, keys, DIM, BLOCK_KEYS, BLOCK_DIM, INSIDE)
            v_tile = load_rows(v, batch, kv_head, first, keys, VALUE_DIM, BLOCK_KEYS, BLOCK_VALUE_DIM, INSIDE)
            c_tile = load_rows(c, batch, kv_head, first, keys, VALUE_DIM, BLOCK_KEYS, BLOCK_VALUE_DIM, INSIDE)
            scores = times_transposed(q_tile, k_tile, zeros, PRECISION) * (scale * LOG2_E)
            p = tl.exp2(scores - lse2[:, None])
            if not INSIDE:
                seen = visible(rows[:, None], columns[None, :], keys, offset, window, CAUSAL, WINDOWED)
                p = tl.where(seen, p, 0.0)
            t = times_transposed(a_tile, k_tile, zeros, PRECISION)
            pt = p * (times_transposed(q_tile, b_tile, t, PRECISION) * scale)
            mean += tl.sum(pt, 1)
            total += tl.sum(p, 1)
            acc = times(pt.to(v_tile.dtype), v_tile, acc, PRECISION)
            acc = times(p.to(c_tile.dtype), c_tile, acc, PRECISION)
    out_tile = load_rows(out, batch, head, start, queries, VALUE_DIM, BLOCK_QUERIES, BLOCK_VALUE_DIM, False)
    normal = reciprocal(total)
    mean = mean * normal
    derivative = acc * normal[:, None] - mean[:, None] * out_tile
    store_rows(u, batch, head, start, queries, derivative, VALUE_DIM, BLOCK_QUERIES, BLOCK_VALUE_DIM)
    if do is not None:
        do_tile = load_rows(do, batch, head, start, queries, VALUE_DIM, BLOCK_QUERIES, BLOCK_VALUE_DIM, False)
        do_tile = do_tile.to(tl.float32)
        d = tl.sum(do_tile * out_tile, 1)
        e_row = tl.sum(do_tile * derivative, 1)
        store_entries(m, batch, head, start, queries, mean, BLOCK_QUERIES)
        store_entries(delta, batch, head, start, queries, d, BLOCK_QUERIES)
        store_entries(e, batch, head, start, queries, e_row, BLOCK_QUERIES)
        store_entries(rescale, batch, head, start, queries, normal, BLOCK_QUERIES)
