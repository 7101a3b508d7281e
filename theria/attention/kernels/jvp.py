"""U, the derivative of O along tangents (a, b, c), and the row constants of the second derivative."""

from typing import no_type_check

import triton
import triton.language as tl

from theria.attention.kernels.common import (
    LOG2_E,
    at_head,
    dot,
    edge_tile,
    keys_of_queries,
    load_tile,
    load_vector,
    probabilities,
    product,
    store_tile,
    store_vector,
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
    do,
    u,
    m,
    delta,
    e,
    scale,
    queries,
    keys,
    offset,
    window,
    heads,
    CURVATURE: tl.constexpr,
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
    """U of one tile of queries; with ``CURVATURE`` m = rowsum(P T), D = rowsum(dO O), e = rowsum(dO U)."""
    tiles = tl.cdiv(queries, BLOCK_QUERIES)
    program = tl.program_id(0)
    # under a causal mask the last tiles see most: they start first
    start = (tiles - 1 - program % tiles) * BLOCK_QUERIES
    batch, head = program // tiles // heads, program // tiles % heads
    k_head = at_head(k, batch, head // SHARING)
    v_head = at_head(v, batch, head // SHARING)
    b_head = at_head(b, batch, head // SHARING)
    c_head = at_head(c, batch, head // SHARING)
    rows = start + tl.arange(0, BLOCK_QUERIES)
    q_tile = load_tile(q, at_head(q, batch, head), start, queries, DIM, BLOCK_QUERIES, BLOCK_DIM, False)
    a_tile = load_tile(a, at_head(a, batch, head), start, queries, DIM, BLOCK_QUERIES, BLOCK_DIM, False)
    lse2 = LOG2_E * load_vector(
        lse, at_head(lse, batch, head), start, queries, float("inf"), BLOCK_QUERIES, False
    )
    acc = tl.zeros((BLOCK_QUERIES, BLOCK_VALUE_DIM), tl.float32)
    mean = tl.zeros((BLOCK_QUERIES,), tl.float32)
    begin, left, whole_begin, whole_end, edges = keys_of_queries(
        start, tl.minimum(start + BLOCK_QUERIES, queries), keys, offset, window, CAUSAL, WINDOWED, BLOCK_KEYS
    )
    for index in tl.range(0, edges, num_stages=1):
        first = edge_tile(index, begin, left, whole_end, BLOCK_KEYS)
        acc, mean = _row_tile(
            acc,
            mean,
            q_tile,
            a_tile,
            lse2,
            rows,
            k,
            v,
            b,
            c,
            k_head,
            v_head,
            b_head,
            c_head,
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
        acc, mean = _row_tile(
            acc,
            mean,
            q_tile,
            a_tile,
            lse2,
            rows,
            k,
            v,
            b,
            c,
            k_head,
            v_head,
            b_head,
            c_head,
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
    out_tile = load_tile(
        out, at_head(out, batch, head), start, queries, VALUE_DIM, BLOCK_QUERIES, BLOCK_VALUE_DIM, False
    )
    derivative = acc - mean[:, None] * out_tile.to(tl.float32)
    store_tile(
        u, at_head(u, batch, head), start, queries, derivative, VALUE_DIM, BLOCK_QUERIES, BLOCK_VALUE_DIM
    )
    if CURVATURE:
        do_tile = load_tile(
            do, at_head(do, batch, head), start, queries, VALUE_DIM, BLOCK_QUERIES, BLOCK_VALUE_DIM, False
        )
        do_tile = do_tile.to(tl.float32)
        store_vector(m, at_head(m, batch, head), start, queries, mean, BLOCK_QUERIES)
        store_vector(
            delta,
            at_head(delta, batch, head),
            start,
            queries,
            tl.sum(do_tile * out_tile.to(tl.float32), 1),
            BLOCK_QUERIES,
        )
        store_vector(
            e, at_head(e, batch, head), start, queries, tl.sum(do_tile * derivative, 1), BLOCK_QUERIES
        )


@triton.jit
@no_type_check
def _row_tile(
    acc,
    mean,
    q_tile,
    a_tile,
    lse2,
    rows,
    k,
    v,
    b,
    c,
    k_head,
    v_head,
    b_head,
    c_head,
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
    """The sums [P T] V + P c and P T with the keys from ``first`` on."""
    k_tile = load_tile(k, k_head, first, keys, DIM, BLOCK_KEYS, BLOCK_DIM, INSIDE)
    b_tile = load_tile(b, b_head, first, keys, DIM, BLOCK_KEYS, BLOCK_DIM, INSIDE)
    v_tile = load_tile(v, v_head, first, keys, VALUE_DIM, BLOCK_KEYS, BLOCK_VALUE_DIM, INSIDE)
    c_tile = load_tile(c, c_head, first, keys, VALUE_DIM, BLOCK_KEYS, BLOCK_VALUE_DIM, INSIDE)
    columns = first + tl.arange(0, BLOCK_KEYS)
    p = probabilities(
        product(q_tile, tl.trans(k_tile), PRECISION) * (scale * LOG2_E),
        lse2[:, None],
        rows[:, None],
        columns[None, :],
        keys,
        offset,
        window,
        CAUSAL,
        WINDOWED,
        INSIDE,
    )
    t = product(a_tile, tl.trans(k_tile), PRECISION)
    t = dot(q_tile, tl.trans(b_tile), t, PRECISION) * scale
    pt = p * t
    mean += tl.sum(pt, 1)
    acc = dot(pt.to(v_tile.dtype), v_tile, acc, PRECISION)
    acc = dot(p.to(c_tile.dtype), c_tile, acc, PRECISION)
    return acc, mean
