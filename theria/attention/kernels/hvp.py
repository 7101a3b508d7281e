"""Gradient of <a, dQ> + <b, dK> + <c, dV>: a row pass for gQ and a column pass for gK and gV.

Both start from the row constants m, D and e that ``jvp_rows`` leaves behind, and write W of
`theria.attention.operators` as P (G - e) + dS (T - m).
"""

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
):
    """GQ of one tile of queries."""
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
    do_tile = load_tile(
        do, at_head(do, batch, head), start, queries, VALUE_DIM, BLOCK_QUERIES, BLOCK_VALUE_DIM, False
    )
    lse2 = LOG2_E * load_vector(
        lse, at_head(lse, batch, head), start, queries, float("inf"), BLOCK_QUERIES, False
    )
    mean = load_vector(m, at_head(m, batch, head), start, queries, 0.0, BLOCK_QUERIES, False)
    d = load_vector(delta, at_head(delta, batch, head), start, queries, 0.0, BLOCK_QUERIES, False)
    e_row = load_vector(e, at_head(e, batch, head), start, queries, 0.0, BLOCK_QUERIES, False)
    acc = tl.zeros((BLOCK_QUERIES, BLOCK_DIM), tl.float32)
    begin, left, whole_begin, whole_end, edges = keys_of_queries(
        start, tl.minimum(start + BLOCK_QUERIES, queries), keys, offset, window, CAUSAL, WINDOWED, BLOCK_KEYS
    )
    for index in tl.range(0, edges, num_stages=1):
        first = edge_tile(index, begin, left, whole_end, BLOCK_KEYS)
        acc = _row_tile(
            acc,
            q_tile,
            a_tile,
            do_tile,
            lse2,
            mean,
            d,
            e_row,
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
        acc = _row_tile(
            acc,
            q_tile,
            a_tile,
            do_tile,
            lse2,
            mean,
            d,
            e_row,
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
    store_tile(gq, at_head(gq, batch, head), start, queries, acc * scale, DIM, BLOCK_QUERIES, BLOCK_DIM)


@triton.jit
@no_type_check
def _row_tile(
    acc,
    q_tile,
    a_tile,
    do_tile,
    lse2,
    mean,
    d,
    e_row,
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
    """The sum dS b + W K with the keys from ``first`` on."""
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
    ds = p * (product(do_tile, tl.trans(v_tile), PRECISION) - d[:, None])
    acc = dot(ds.to(b_tile.dtype), b_tile, acc, PRECISION)
    t = product(a_tile, tl.trans(k_tile), PRECISION)
    t = dot(q_tile, tl.trans(b_tile), t, PRECISION) * scale - mean[:, None]
    w = p * (product(do_tile, tl.trans(c_tile), PRECISION) - e_row[:, None]) + ds * t
    return dot(w.to(k_tile.dtype), k_tile, acc, PRECISION)


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
):
    """GK and gV of one tile of keys, summed over the heads that share it; scores are (keys, queries)."""
    tiles = tl.cdiv(keys, BLOCK_KEYS)
    program = tl.program_id(0)
    start = program % tiles * BLOCK_KEYS
    batch, kv_head = program // tiles // kv_heads, program // tiles % kv_heads
    rows = start + tl.arange(0, BLOCK_KEYS)
    k_tile = load_tile(k, at_head(k, batch, kv_head), start, keys, DIM, BLOCK_KEYS, BLOCK_DIM, False)
    b_tile = load_tile(b, at_head(b, batch, kv_head), start, keys, DIM, BLOCK_KEYS, BLOCK_DIM, False)
    v_tile = load_tile(
        v, at_head(v, batch, kv_head), start, keys, VALUE_DIM, BLOCK_KEYS, BLOCK_VALUE_DIM, False
    )
    c_tile = load_tile(
        c, at_head(c, batch, kv_head), start, keys, VALUE_DIM, BLOCK_KEYS, BLOCK_VALUE_DIM, False
    )
    gk_acc = tl.zeros((BLOCK_KEYS, BLOCK_DIM), tl.float32)
    gv_acc = tl.zeros((BLOCK_KEYS, BLOCK_VALUE_DIM), tl.float32)
    begin, left, whole_begin, whole_end, edges = queries_of_keys(
        start, tl.minimum(start + BLOCK_KEYS, keys), queries, offset, window, CAUSAL, WINDOWED, BLOCK_QUERIES
    )
    for head in range(kv_head * SHARING, kv_head * SHARING + SHARING):
        q_head = at_head(q, batch, head)
        lse_head = at_head(lse, batch, head)
        do_head = at_head(do, batch, head)
        a_head = at_head(a, batch, head)
        m_head = at_head(m, batch, head)
        delta_head = at_head(delta, batch, head)
        e_head = at_head(e, batch, head)
        for index in tl.range(0, edges, num_stages=1):
            first = edge_tile(index, begin, left, whole_end, BLOCK_QUERIES)
            gk_acc, gv_acc = _column_tile(
                gk_acc,
                gv_acc,
                k_tile,
                b_tile,
                v_tile,
                c_tile,
                rows,
                q,
                lse,
                do,
                a,
                m,
                delta,
                e,
                q_head,
                lse_head,
                do_head,
                a_head,
                m_head,
                delta_head,
                e_head,
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
            gk_acc, gv_acc = _column_tile(
                gk_acc,
                gv_acc,
                k_tile,
                b_tile,
                v_tile,
                c_tile,
                rows,
                q,
                lse,
                do,
                a,
                m,
                delta,
                e,
                q_head,
                lse_head,
                do_head,
                a_head,
                m_head,
                delta_head,
                e_head,
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
    store_tile(gk, at_head(gk, batch, kv_head), start, keys, gk_acc * scale, DIM, BLOCK_KEYS, BLOCK_DIM)
    store_tile(gv, at_head(gv, batch, kv_head), start, keys, gv_acc, VALUE_DIM, BLOCK_KEYS, BLOCK_VALUE_DIM)


@triton.jit
@no_type_check
def _column_tile(
    gk_acc,
    gv_acc,
    k_tile,
    b_tile,
    v_tile,
    c_tile,
    rows,
    q,
    lse,
    do,
    a,
    m,
    delta,
    e,
    q_head,
    lse_head,
    do_head,
    a_head,
    m_head,
    delta_head,
    e_head,
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
    """The sums dSᵀ a + Wᵀ Q and [P (T - m)]ᵀ dO with the queries from ``first`` on."""
    q_tile = load_tile(q, q_head, first, queries, DIM, BLOCK_QUERIES, BLOCK_DIM, INSIDE)
    a_tile = load_tile(a, a_head, first, queries, DIM, BLOCK_QUERIES, BLOCK_DIM, INSIDE)
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
    mean = load_vector(m, m_head, first, queries, 0.0, BLOCK_QUERIES, INSIDE)
    t = product(k_tile, tl.trans(a_tile), PRECISION)
    t = dot(b_tile, tl.trans(q_tile), t, PRECISION) * scale - mean[None, :]
    gv_acc = dot((p * t).to(do_tile.dtype), do_tile, gv_acc, PRECISION)
    d = load_vector(delta, delta_head, first, queries, 0.0, BLOCK_QUERIES, INSIDE)
    ds = p * (product(v_tile, tl.trans(do_tile), PRECISION) - d[None, :])
    gk_acc = dot(ds.to(a_tile.dtype), a_tile, gk_acc, PRECISION)
    e_row = load_vector(e, e_head, first, queries, 0.0, BLOCK_QUERIES, INSIDE)
    w = p * (product(c_tile, tl.trans(do_tile), PRECISION) - e_row[None, :]) + ds * t
    gk_acc = dot(w.to(q_tile.dtype), q_tile, gk_acc, PRECISION)
    return gk_acc, gv_acc
