"""Gradient of <dO, O>: a row pass for dQ, which also leaves D behind, and a column pass for dK and dV."""

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
    queries_of_keys,
    store_tile,
    store_vector,
)


@triton.jit(do_not_specialize=["queries", "keys", "offset", "window", "heads"])
@no_type_check
def vjp_rows(
    q,
    k,
    v,
    out,
    lse,
    do,
    dq,
    delta,
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
    """DQ and D = rowsum(dO O) of one tile of queries."""
    tiles = tl.cdiv(queries, BLOCK_QUERIES)
    program = tl.program_id(0)
    # under a causal mask the last tiles see most: they start first
    start = (tiles - 1 - program % tiles) * BLOCK_QUERIES
    batch, head = program // tiles // heads, program // tiles % heads
    k_head = at_head(k, batch, head // SHARING)
    v_head = at_head(v, batch, head // SHARING)
    rows = start + tl.arange(0, BLOCK_QUERIES)
    q_tile = load_tile(q, at_head(q, batch, head), start, queries, DIM, BLOCK_QUERIES, BLOCK_DIM, False)
    do_tile = load_tile(
        do, at_head(do, batch, head), start, queries, VALUE_DIM, BLOCK_QUERIES, BLOCK_VALUE_DIM, False
    )
    out_tile = load_tile(
        out, at_head(out, batch, head), start, queries, VALUE_DIM, BLOCK_QUERIES, BLOCK_VALUE_DIM, False
    )
    d = tl.sum(do_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    store_vector(delta, at_head(delta, batch, head), start, queries, d, BLOCK_QUERIES)
    lse2 = LOG2_E * load_vector(
        lse, at_head(lse, batch, head), start, queries, float("inf"), BLOCK_QUERIES, False
    )
    acc = tl.zeros((BLOCK_QUERIES, BLOCK_DIM), tl.float32)
    begin, left, whole_begin, whole_end, edges = keys_of_queries(
        start, tl.minimum(start + BLOCK_QUERIES, queries), keys, offset, window, CAUSAL, WINDOWED, BLOCK_KEYS
    )
    for index in tl.range(0, edges, num_stages=1):
        first = edge_tile(index, begin, left, whole_end, BLOCK_KEYS)
        acc = _row_tile(
            acc,
            q_tile,
            do_tile,
            lse2,
            d,
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
        acc = _row_tile(
            acc,
            q_tile,
            do_tile,
            lse2,
            d,
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
    store_tile(dq, at_head(dq, batch, head), start, queries, acc * scale, DIM, BLOCK_QUERIES, BLOCK_DIM)


@triton.jit
@no_type_check
def _row_tile(
    acc,
    q_tile,
    do_tile,
    lse2,
    d,
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
    """The sum dS K with the keys from ``first`` on."""
    k_tile = load_tile(k, k_head, first, keys, DIM, BLOCK_KEYS, BLOCK_DIM, INSIDE)
    v_tile = load_tile(v, v_head, first, keys, VALUE_DIM, BLOCK_KEYS, BLOCK_VALUE_DIM, INSIDE)
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
    ds = p * (product(do_tile, tl.trans(v_tile), PRECISION) - d[:, None])
    return dot(ds.to(k_tile.dtype), k_tile, acc, PRECISION)


@triton.jit(do_not_specialize=["queries", "keys", "offset", "window", "kv_heads"])
@no_type_check
def vjp_columns(
    q,
    k,
    v,
    lse,
    do,
    delta,
    dk,
    dv,
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
):
    """DK and dV of one tile of keys, summed over the heads that share it; scores are (keys, queries)."""
    tiles = tl.cdiv(keys, BLOCK_KEYS)
    program = tl.program_id(0)
    start = program % tiles * BLOCK_KEYS
    batch, kv_head = program // tiles // kv_heads, program // tiles % kv_heads
    rows = start + tl.arange(0, BLOCK_KEYS)
    k_tile = load_tile(k, at_head(k, batch, kv_head), start, keys, DIM, BLOCK_KEYS, BLOCK_DIM, False)
    v_tile = load_tile(
        v, at_head(v, batch, kv_head), start, keys, VALUE_DIM, BLOCK_KEYS, BLOCK_VALUE_DIM, False
    )
    dk_acc = tl.zeros((BLOCK_KEYS, BLOCK_DIM), tl.float32)
    dv_acc = tl.zeros((BLOCK_KEYS, BLOCK_VALUE_DIM), tl.float32)
    begin, left, whole_begin, whole_end, edges = queries_of_keys(
        start, tl.minimum(start + BLOCK_KEYS, keys), queries, offset, window, CAUSAL, WINDOWED, BLOCK_QUERIES
    )
    for head in range(kv_head * SHARING, kv_head * SHARING + SHARING):
        q_head = at_head(q, batch, head)
        lse_head = at_head(lse, batch, head)
        do_head = at_head(do, batch, head)
        delta_head = at_head(delta, batch, head)
        for index in tl.range(0, edges, num_stages=1):
            first = edge_tile(index, begin, left, whole_end, BLOCK_QUERIES)
            dk_acc, dv_acc = _column_tile(
                dk_acc,
                dv_acc,
                k_tile,
                v_tile,
                rows,
                q,
                lse,
                do,
                delta,
                q_head,
                lse_head,
                do_head,
                delta_head,
                first,
                scale,
                queries,
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
        for first in tl.range(whole_begin, whole_end, BLOCK_QUERIES):
            dk_acc, dv_acc = _column_tile(
                dk_acc,
                dv_acc,
                k_tile,
                v_tile,
                rows,
                q,
                lse,
                do,
                delta,
                q_head,
                lse_head,
                do_head,
                delta_head,
                first,
                scale,
                queries,
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
    store_tile(dk, at_head(dk, batch, kv_head), start, keys, dk_acc * scale, DIM, BLOCK_KEYS, BLOCK_DIM)
    store_tile(dv, at_head(dv, batch, kv_head), start, keys, dv_acc, VALUE_DIM, BLOCK_KEYS, BLOCK_VALUE_DIM)


@triton.jit
@no_type_check
def _column_tile(
    dk_acc,
    dv_acc,
    k_tile,
    v_tile,
    rows,
    q,
    lse,
    do,
    delta,
    q_head,
    lse_head,
    do_head,
    delta_head,
    first,
    scale,
    queries,
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
    """The sums dSᵀ Q and Pᵀ dO with the queries from ``first`` on."""
    q_tile = load_tile(q, q_head, first, queries, DIM, BLOCK_QUERIES, BLOCK_DIM, INSIDE)
    do_tile = load_tile(do, do_head, first, queries, VALUE_DIM, BLOCK_QUERIES, BLOCK_VALUE_DIM, INSIDE)
    lse2 = LOG2_E * load_vector(lse, lse_head, first, queries, float("inf"), BLOCK_QUERIES, INSIDE)
    queries_index = first + tl.arange(0, BLOCK_QUERIES)
    p = probabilities(
        product(k_tile, tl.trans(q_tile), PRECISION) * (scale * LOG2_E),
        lse2[None, :],
        queries_index[None, :],
        rows[:, None],
        keys,
        offset,
        window,
        CAUSAL,
        WINDOWED,
        INSIDE,
    )
    dv_acc = dot(p.to(do_tile.dtype), do_tile, dv_acc, PRECISION)
    d = load_vector(delta, delta_head, first, queries, 0.0, BLOCK_QUERIES, INSIDE)
    ds = p * (product(v_tile, tl.trans(do_tile), PRECISION) - d[None, :])
    dk_acc = dot(ds.to(q_tile.dtype), q_tile, dk_acc, PRECISION)
    return dk_acc, dv_acc
