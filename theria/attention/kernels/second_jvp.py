"""The derivative of U along other tangents: one visit of the keys for the means, and one for the sums.

The sums are of slopes less their means, so that what the keys of a row have in common need not cancel between
them, and there is one accumulator where a single visit would take three. Matmuls a tile: 15 in two visits, 14
in one.
"""

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
    store_rows,
    tile_count,
    tile_start,
    times,
    times_transposed,
    visible,
)


@triton.jit(do_not_specialize=["queries", "keys", "offset", "window", "heads"])
@no_type_check
def second_jvp_rows(
    q,
    k,
    v,
    out,
    lse,
    a1,
    b1,
    c1,
    a2,
    b2,
    c2,
    u,
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
    """W V - rowsum(W) O + [P (T1 - m1)] c2 + [P (T2 - m2)] c1 of one tile of queries."""
    start, batch, head = program_of_queries(queries, heads, BLOCK_QUERIES)
    kv_head = head // SHARING
    rows = start + tl.arange(0, BLOCK_QUERIES)
    zeros = tl.zeros((BLOCK_QUERIES, BLOCK_KEYS), tl.float32)
    q_tile = load_rows(q, batch, head, start, queries, DIM, BLOCK_QUERIES, BLOCK_DIM, False)
    a1_tile = load_rows(a1, batch, head, start, queries, DIM, BLOCK_QUERIES, BLOCK_DIM, False)
    a2_tile = load_rows(a2, batch, head, start, queries, DIM, BLOCK_QUERIES, BLOCK_DIM, False)
    lse2 = LOG2_E * load_entries(lse, batch, head, start, queries, float("inf"), BLOCK_QUERIES, False)
    mean1 = tl.zeros((BLOCK_QUERIES,), tl.float32)
    mean2 = tl.zeros((BLOCK_QUERIES,), tl.float32)
    total = tl.zeros((BLOCK_QUERIES,), tl.float32)
    tiles = keys_of_queries(
        start, queries, keys, offset, window, CAUSAL, WINDOWED, BLOCK_QUERIES, BLOCK_KEYS, PASSES
    )
    for INSIDE in tl.static_range(PASSES):
        for index in tl.range(0, tile_count(tiles, INSIDE, BLOCK_KEYS), num_stages=None if INSIDE else 1):
            first = tile_start(tiles, index, INSIDE, BLOCK_KEYS)
            columns = first + tl.arange(0, BLOCK_KEYS)
            k_tile = load_rows(k, batch, kv_head, first, keys, DIM, BLOCK_KEYS, BLOCK_DIM, INSIDE)
            b1_tile = load_rows(b1, batch, kv_head, first, keys, DIM, BLOCK_KEYS, BLOCK_DIM, INSIDE)
            b2_tile = load_rows(b2, batch, kv_head, first, keys, DIM, BLOCK_KEYS, BLOCK_DIM, INSIDE)
            scores = times_transposed(q_tile, k_tile, zeros, PRECISION) * (scale * LOG2_E)
            p = tl.exp2(scores - lse2[:, None])
            if not INSIDE:
                seen = visible(rows[:, None], columns[None, :], keys, offset, window, CAUSAL, WINDOWED)
                p = tl.where(seen, p, 0.0)
            total += tl.sum(p, 1)
            mean1 += tl.sum(p * _two_products(a1_tile, k_tile, q_tile, b1_tile, scale, PRECISION), 1)
            mean2 += tl.sum(p * _two_products(a2_tile, k_tile, q_tile, b2_tile, scale, PRECISION), 1)
    normal = reciprocal(total)
    mean1 = (mean1 * normal)[:, None]
    mean2 = (mean2 * normal)[:, None]
    acc = tl.zeros((BLOCK_QUERIES, BLOCK_VALUE_DIM), tl.float32)
    w_total = tl.zeros((BLOCK_QUERIES,), tl.float32)
    for INSIDE in tl.static_range(PASSES):
        for index in tl.range(0, tile_count(tiles, INSIDE, BLOCK_KEYS), num_stages=None if INSIDE else 1):
            first = tile_start(tiles, index, INSIDE, BLOCK_KEYS)
            columns = first + tl.arange(0, BLOCK_KEYS)
            k_tile = load_rows(k, batch, kv_head, first, keys, DIM, BLOCK_KEYS, BLOCK_DIM, INSIDE)
            b1_tile = load_rows(b1, batch, kv_head, first, keys, DIM, BLOCK_KEYS, BLOCK_DIM, INSIDE)
            b2_tile = load_rows(b2, batch, kv_head, first, keys, DIM, BLOCK_KEYS, BLOCK_DIM, INSIDE)
            scores = times_transposed(q_tile, k_tile, zeros, PRECISION) * (scale * LOG2_E)
            p = tl.exp2(scores - lse2[:, None])
            if not INSIDE:
                seen = visible(rows[:, None], columns[None, :], keys, offset, window, CAUSAL, WINDOWED)
                p = tl.where(seen, p, 0.0)
            t1 = _two_products(a1_tile, k_tile, q_tile, b1_tile, scale, PRECISION) - mean1
            t2 = _two_products(a2_tile, k_tile, q_tile, b2_tile, scale, PRECISION) - mean2
            w = p * (t1 * t2 + _two_products(a1_tile, b2_tile, a2_tile, b1_tile, scale, PRECISION))
            w_total += tl.sum(w, 1)
            # values are loaded once the keys are done with: all together they do not fit on every device
            v_tile = load_rows(v, batch, kv_head, first, keys, VALUE_DIM, BLOCK_KEYS, BLOCK_VALUE_DIM, INSIDE)
            acc = times(w.to(v_tile.dtype), v_tile, acc, PRECISION)
            c2_tile = load_rows(
                c2, batch, kv_head, first, keys, VALUE_DIM, BLOCK_KEYS, BLOCK_VALUE_DIM, INSIDE
            )
            acc = times((p * t1).to(c2_tile.dtype), c2_tile, acc, PRECISION)
            c1_tile = load_rows(
                c1, batch, kv_head, first, keys, VALUE_DIM, BLOCK_KEYS, BLOCK_VALUE_DIM, INSIDE
            )
            acc = times((p * t2).to(c1_tile.dtype), c1_tile, acc, PRECISION)
    out_tile = load_rows(out, batch, head, start, queries, VALUE_DIM, BLOCK_QUERIES, BLOCK_VALUE_DIM, False)
    derivative = (acc - w_total[:, None] * out_tile) * normal[:, None]
    store_rows(u, batch, head, start, queries, derivative, VALUE_DIM, BLOCK_QUERIES, BLOCK_VALUE_DIM)


@triton.jit
@no_type_check
def _two_products(left1, right1, left2, right2, scale, PRECISION: tl.constexpr):
    """S (left1 right1ᵀ + left2 right2ᵀ) of one tile of scores."""
    total = tl.zeros((left1.shape[0], right1.shape[0]), tl.float32)
    total = times_transposed(left1, right1, total, PRECISION)
    return times_transposed(left2, right2, total, PRECISION) * scale
