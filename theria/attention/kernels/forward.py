"""O = P V and lse, with the maximum and the sum of each row kept up to date while its keys are visited."""

from typing import no_type_check

import triton
import triton.language as tl

from theria.attention.kernels.common import (
    LN_2,
    LOG2_E,
    keys_of_queries,
    load_rows,
    program_of_queries,
    sees_a_key,
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
def forward_rows(
    q,
    k,
    v,
    out,
    lse,
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
    """O and lse of one tile of queries; scores are in base 2."""
    start, batch, head = program_of_queries(queries, heads, BLOCK_QUERIES)
    kv_head = head // SHARING
    rows = start + tl.arange(0, BLOCK_QUERIES)
    zeros = tl.zeros((BLOCK_QUERIES, BLOCK_KEYS), tl.float32)
    q_tile = load_rows(q, batch, head, start, queries, DIM, BLOCK_QUERIES, BLOCK_DIM, False)
    acc = tl.zeros((BLOCK_QUERIES, BLOCK_VALUE_DIM), tl.float32)
    top = tl.full((BLOCK_QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_QUERIES,), tl.float32)
    weight = tl.zeros((BLOCK_QUERIES,), tl.float32)
    tiles = keys_of_queries(
        start, queries, keys, offset, window, CAUSAL, WINDOWED, BLOCK_QUERIES, BLOCK_KEYS, PASSES
    )
    for INSIDE in tl.static_range(PASSES):
        for index in tl.range(0, tile_count(tiles, INSIDE, BLOCK_KEYS), num_stages=None if INSIDE else 1):
            first = tile_start(tiles, index, INSIDE, BLOCK_KEYS)
            columns = first + tl.arange(0, BLOCK_KEYS)
            k_tile = load_rows(k, batch, kv_head, first, keys, DIM, BLOCK_KEYS, BLOCK_DIM, INSIDE)
            v_tile = load_rows(v, batch, kv_head, first, keys, VALUE_DIM, BLOCK_KEYS, BLOCK_VALUE_DIM, INSIDE)
            scores = times_transposed(q_tile, k_tile, zeros, PRECISION) * (scale * LOG2_E)
            if not INSIDE:
                seen = visible(rows[:, None], columns[None, :], keys, offset, window, CAUSAL, WINDOWED)
                scores = tl.where(seen, scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            # the maximum of a row that has seen no key yet is -inf, and -inf - -inf is NaN
            base = tl.where(higher == float("-inf"), 0.0, higher)
            shrink = tl.exp2(top - base)
            p = tl.exp2(scores - base[:, None])
            total = total * shrink + tl.sum(p, 1)
            p = p.to(v_tile.dtype)
            weight = weight * shrink + tl.sum(p.to(tl.float32), 1)
            acc = times(p, v_tile, acc * shrink[:, None], PRECISION)
            top = higher
    # not a sum of zero: where all scores are -inf the softmax is NaN, and says so
    dead = ~sees_a_key(rows, keys, offset, window, CAUSAL, WINDOWED)
    log_sum = tl.where(dead, float("inf"), top * LN_2 + tl.log(tl.where(dead, 1.0, total)))
    store_entries(lse, batch, head, start, queries, log_sum, BLOCK_QUERIES)
    # a mean under the rounded weights: what is common to all values passes through it exactly
    acc = acc / tl.where(dead, 1.0, weight)[:, None]
    store_rows(out, batch, head, start, queries, acc, VALUE_DIM, BLOCK_QUERIES, BLOCK_VALUE_DIM)
