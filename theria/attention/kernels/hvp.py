"""Gradient of <a, dQ> + <b, dK> + <c, dV>: a row pass for gQ and a column pass for gK and gV.

Both start from the row constants m, D, e and 1 / rowsum(P) that ``jvp_rows`` leaves behind, and write W of
`theria.attention.operators` as P (G - e) + dS (T - m).
"""

from typing import no_type_check

import triton
import triton.language as tl

from theria.attention.kernels.common import (
    LOG2_E,
    keys_of_queries,
    load_entries,
    load_rows,
    program_of_keys,
    program_of_queries,
    queries_of_keys,
    store_rows,
    tile_count,
    tile_start,
    times,
    times_transposed,
    visible,
)


@triton.jit(do_not_specialize=["queries", "keys", "offset", "window", "heads"])
@no_type_check
def hvp_rows(
    q,
    k,
    v,
    lse,
    do,
    a,
    b,
    c,
    m,
    delta,
    e,
    rescale,
    gq,
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
    """GQ = s (dS b + W K) of one tile of queries."""
    start, batch, head = program_of_queries(queries, heads, BLOCK_QUERIES)
    kv_head = head // SHARING
    rows = start + tl.arange(0, BLOCK_QUERIES)
    zeros = tl.zeros((BLOCK_QUERIES, BLOCK_KEYS), tl.float32)
    q_tile = load_rows(q, batch, head, start, queries, DIM, BLOCK_QUERIES, BLOCK_DIM, False)
    a_tile = load_rows(a, batch, head, start, queries, DIM, BLOCK_QUERIES, BLOCK_DIM, False)
    do_tile = load_rows(do, batch, head, start, queries, VALUE_DIM, BLOCK_QUERIES, BLOCK_VALUE_DIM, False)
    lse2 = LOG2_E * load_entries(lse, batch, head, start, queries, float("inf"), BLOCK_QUERIES, False)
    mean = load_entries(m, batch, head, start, queries, 0.0, BLOCK_QUERIES, False)
    d = load_entries(delta, batch, head, start, queries, 0.0, BLOCK_QUERIES, False)
    e_row = load_entries(e, batch, head, start, queries, 0.0, BLOCK_QUERIES, False)
    normal = load_entries(rescale, batch, head, start, queries, 0.0, BLOCK_QUERIES, False)
    acc = tl.zeros((BLOCK_QUERIES, BLOCK_DIM), tl.float32)
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
            ds = p * (times_transposed(do_tile, v_tile, zeros, PRECISION) - d[:, None])
            acc = times(ds.to(b_tile.dtype), b_tile, acc, PRECISION)
            t = times_transposed(a_tile, k_tile, zeros, PRECISION)
            t = times_transposed(q_tile, b_tile, t, PRECISION) * scale - mean[:, None]
            w = p * (times_transposed(do_tile, c_tile, zeros, PRECISION) - e_row[:, None]) + ds * t
            acc = times(w.to(k_tile.dtype), k_tile, acc, PRECISION)
    acc = acc * (scale * normal)[:, None]
    store_rows(gq, batch, head, start, queries, acc, DIM, BLOCK_QUERIES, BLOCK_DIM)


@triton.jit(do_not_specialize=["queries", "keys", "offset", "window", "kv_heads"])
@no_type_check
def hvp_columns(
    q,
    k,
    v,
    lse,
    do,
    a,
    b,
    c,
    m,
    delta,
    e,
    rescale,
    gk,
    gv,
    scale,
    queries,
    keys,
    offset,
    window,
    kv_heads,
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
    """GK = s (dSᵀ a + Wᵀ Q) and gV = [P (T - m)]ᵀ dO of a tile of keys, over the heads that share it.

    Scores are transposed, (keys, queries), so that the accumulators' rows are keys.
    """
    start, batch, kv_head = program_of_keys(keys, kv_heads, BLOCK_KEYS)
    columns = start + tl.arange(0, BLOCK_KEYS)
    zeros = tl.zeros((BLOCK_KEYS, BLOCK_QUERIES), tl.float32)
    k_tile = load_rows(k, batch, kv_head, start, keys, DIM, BLOCK_KEYS, BLOCK_DIM, False)
    b_tile = load_rows(b, batch, kv_head, start, keys, DIM, BLOCK_KEYS, BLOCK_DIM, False)
    v_tile = load_rows(v, batch, kv_head, start, keys, VALUE_DIM, BLOCK_KEYS, BLOCK_VALUE_DIM, False)
    c_tile = load_rows(c, batch, kv_head, start, keys, VALUE_DIM, BLOCK_KEYS, BLOCK_VALUE_DIM, False)
    gk_acc = tl.zeros((BLOCK_KEYS, BLOCK_DIM), tl.float32)
    gv_acc = tl.zeros((BLOCK_KEYS, BLOCK_VALUE_DIM), tl.float32)
    tiles = queries_of_keys(
        start, queries, keys, offset, window, CAUSAL, WINDOWED, BLOCK_KEYS, BLOCK_QUERIES, PASSES
    )
    for head in range(kv_head * SHARING, kv_head * SHARING + SHARING):
        for INSIDE in tl.static_range(PASSES):
            for index in tl.range(
                0, tile_count(tiles, INSIDE, BLOCK_QUERIES), num_stages=None if INSIDE else 1
            ):
                first = tile_start(tiles, index, INSIDE, BLOCK_QUERIES)
                rows = first + tl.arange(0, BLOCK_QUERIES)
                q_tile = load_rows(q, batch, head, first, queries, DIM, BLOCK_QUERIES, BLOCK_DIM, INSIDE)
                a_tile = load_rows(a, batch, head, first, queries, DIM, BLOCK_QUERIES, BLOCK_DIM, INSIDE)
                do_tile = load_rows(
                    do, batch, head, first, queries, VALUE_DIM, BLOCK_QUERIES, BLOCK_VALUE_DIM, INSIDE
                )
                lse2 = LOG2_E * load_entries(
                    lse, batch, head, first, queries, float("inf"), BLOCK_QUERIES, INSIDE
                )
                mean = load_entries(m, batch, head, first, queries, 0.0, BLOCK_QUERIES, INSIDE)
                d = load_entries(delta, batch, head, first, queries, 0.0, BLOCK_QUERIES, INSIDE)
                e_row = load_entries(e, batch, head, first, queries, 0.0, BLOCK_QUERIES, INSIDE)
                normal = load_entries(rescale, batch, head, first, queries, 0.0, BLOCK_QUERIES, INSIDE)
                scores = times_transposed(k_tile, q_tile, zeros, PRECISION) * (scale * LOG2_E)
                p = tl.exp2(scores - lse2[None, :]) * normal[None, :]
                if not INSIDE:
                    seen = visible(rows[None, :], columns[:, None], keys, offset, window, CAUSAL, WINDOWED)
                    p = tl.where(seen, p, 0.0)
                t = times_transposed(k_tile, a_tile, zeros, PRECISION)
                t = times_transposed(b_tile, q_tile, t, PRECISION) * scale - mean[None, :]
                gv_acc = times((p * t).to(do_tile.dtype), do_tile, gv_acc, PRECISION)
                ds = p * (times_transposed(v_tile, do_tile, zeros, PRECISION) - d[None, :])
                gk_acc = times(ds.to(a_tile.dtype), a_tile, gk_acc, PRECISION)
                w = p * (times_transposed(c_tile, do_tile, zeros, PRECISION) - e_row[None, :]) + ds * t
                gk_acc = times(w.to(q_tile.dtype), q_tile, gk_acc, PRECISION)
    store_rows(gk, batch, kv_head, start, keys, gk_acc * scale, DIM, BLOCK_KEYS, BLOCK_DIM)
    store_rows(gv, batch, kv_head, start, keys, gv_acc, VALUE_DIM, BLOCK_KEYS, BLOCK_VALUE_DIM)
