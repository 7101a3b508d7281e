"""O = P V and lse, with the maximum and the sum of each row kept up to date while its keys are visited."""

from typing import no_type_check

import triton
import triton.language as tl

from theria.attention.kernels.common import (
    LN_2,
    LOG2_E,
    at_head,
    dot,
    edge_tile,
    keys_of_queries,
    load_tile,
    product,
    store_tile,
    store_vector,
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
):
    """O and lse of one tile of queries."""
    tiles = tl.cdiv(queries, BLOCK_QUERIES)
    program = tl.program_id(0)
    # under a causal mask the last tiles see most: they start first
    start = (tiles - 1 - program % tiles) * BLOCK_QUERIES
    batch, head = program // tiles // heads, program // tiles % heads
    k_head = at_head(k, batch, head // SHARING)
    v_head = at_head(v, batch, head // SHARING)
    rows = start + tl.arange(0, BLOCK_QUERIES)
    q_tile = load_tile(q, at_head(q, batch, head), start, queries, DIM, BLOCK_QUERIES, BLOCK_DIM, False)
    acc = tl.zeros((BLOCK_QUERIES, BLOCK_VALUE_DIM), tl.float32)
    top = tl.full((BLOCK_QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_QUERIES,), tl.float32)
    begin, left, whole_begin, whole_end, edges = keys_of_queries(
        start, tl.minimum(start + BLOCK_QUERIES, queries), keys, offset, window, CAUSAL, WINDOWED, BLOCK_KEYS
    )
    for index in tl.range(0, edges, num_stages=1):
        first = edge_tile(index, begin, left, whole_end, BLOCK_KEYS)
        acc, top, total = _forward_tile(
            acc,
            top,
            total,
            q_tile,
            rows,
            k,
            v,
            k_head,
            v_head,
            first,
            scale,
            keys,
            offset,
            window,
            CAUSAL,
            WINDOWED,
            DIM,
            VALUE_DIM,
            BLOCK_DIM,
            BLOCK_VALUE_DIM,
            BLOCK_QUERIES,
            BLOCK_KEYS,
            PRECISION,
            False,
        )
    for first in tl.range(whole_begin, whole_end, BLOCK_KEYS):
        acc, top, total = _forward_tile(
            acc,
            top,
            total,
            q_tile,
            rows,
            k,
            v,
            k_head,
            v_head,
            first,
            scale,
            keys,
            offset,
            window,
            CAUSAL,
            WINDOWED,
            DIM,
            VALUE_DIM,
            BLOCK_DIM,
            BLOCK_VALUE_DIM,
            BLOCK_QUERIES,
            BLOCK_KEYS,
            PRECISION,
            True,
        )
    dead = total == 0.0
    total = tl.where(dead, 1.0, total)
    log_sum = tl.where(dead, float("inf"), top * LN_2 + tl.log(total))
    store_vector(lse, at_head(lse, batch, head), start, queries, log_sum, BLOCK_QUERIES)
    store_tile(
        out,
        at_head(out, batch, head),
        start,
        queries,
        acc / total[:, None],
        VALUE_DIM,
        BLOCK_QUERIES,
        BLOCK_VALUE_DIM,
    )


@triton.jit
@no_type_check
def _forward_tile(
    acc,
    top,
    total,
    q_tile,
    rows,
    k,
    v,
    k_head,
    v_head,
    first,
    scale,
    keys,
    offset,
    window,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_VALUE_DIM: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
    INSIDE: tl.constexpr,
):
    """The running sums, in base 2, with the keys from ``first`` on."""
    k_tile = load_tile(k, k_head, first, keys, DIM, BLOCK_KEYS, BLOCK_DIM, INSIDE)
    v_tile = load_tile(v, v_head, first, keys, VALUE_DIM, BLOCK_KEYS, BLOCK_VALUE_DIM, INSIDE)
    scores = product(q_tile, tl.trans(k_tile), PRECISION) * (scale * LOG2_E)
    if not INSIDE:
        columns = first + tl.arange(0, BLOCK_KEYS)
        seen = visible(rows[:, None], columns[None, :], keys, offset, window, CAUSAL, WINDOWED)
        scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    # the maximum of a row that has seen no key yet is -inf, and -inf - -inf is NaN
    base = tl.where(higher == float("-inf"), 0.0, higher)
    shrink = tl.exp2(top - base)
    p = tl.exp2(scores - base[:, None])
    total = total * shrink + tl.sum(p, 1)
    acc = dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None], PRECISION)
    return acc, higher, total
