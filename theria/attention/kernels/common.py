"""What the kernels share: addressing, the band's tiles, and one matrix product."""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl


class Operand(NamedTuple):
    """A (batch, heads, length, width) tensor as one kernel argument."""

    pointer: torch.Tensor
    batch: int
    head: int
    row: int
    column: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Operand":
        """The tensor with its strides."""
        return cls(tensor, *tensor.stride())


class Vector(NamedTuple):
    """A (batch, heads, length) tensor as one kernel argument."""

    pointer: torch.Tensor
    batch: int
    head: int
    row: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Vector":
        """The tensor with its strides."""
        return cls(tensor, *tensor.stride())


INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
@no_type_check
def dot(left, right, accumulator, PRECISION: tl.constexpr):
    """Accumulator + left @ right in float32."""
    if INTERPRETED:
        # the interpreter multiplies the bits of bfloat16 as integers
        return accumulator + tl.dot(left.to(tl.float32), right.to(tl.float32))
    return tl.dot(left, right, accumulator, input_precision=PRECISION)


@triton.jit
@no_type_check
def product(left, right, PRECISION: tl.constexpr):
    """Left @ right in float32."""
    if INTERPRETED:
        return tl.dot(left.to(tl.float32), right.to(tl.float32))
    return tl.dot(left, right, input_precision=PRECISION)


@triton.jit
@no_type_check
def at_head(x, batch, head):
    """Pointer to the first element of a head; a tensor may hold more than 2^31 elements."""
    return x.pointer + tl.cast(batch, tl.int64) * x.batch + tl.cast(head, tl.int64) * x.head


@triton.jit
@no_type_check
def tile_pointers(x, base, start, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Addresses of rows start.. and columns 0.. of a head."""
    rows = (start + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.arange(0, BLOCK).to(tl.int64)
    return base + rows[:, None] * x.row + columns[None, :] * x.column


@triton.jit
@no_type_check
def tile_mask(start, length, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """True for the elements of such a tile that exist."""
    rows = (start + tl.arange(0, ROWS))[:, None] < length
    return rows & (tl.arange(0, BLOCK)[None, :] < WIDTH)


@triton.jit
@no_type_check
def load_tile(
    x,
    base,
    start,
    length,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    INSIDE: tl.constexpr,
):
    """Rows start.. of a head, zero beyond its length and width; ``INSIDE`` says that no row is beyond."""
    pointers = tile_pointers(x, base, start, ROWS, BLOCK)
    if INSIDE:
        if WIDTH == BLOCK:
            return tl.load(pointers)
        return tl.load(pointers, mask=tl.arange(0, BLOCK)[None, :] < WIDTH, other=0.0)
    return tl.load(pointers, mask=tile_mask(start, length, WIDTH, ROWS, BLOCK), other=0.0)


@triton.jit
@no_type_check
def store_tile(x, base, start, length, tile, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Write rows start.. of a head, rounded to its dtype."""
    pointers = tile_pointers(x, base, start, ROWS, BLOCK)
    mask = tile_mask(start, length, WIDTH, ROWS, BLOCK)
    tl.store(pointers, tile.to(x.pointer.dtype.element_ty), mask=mask)


@triton.jit
@no_type_check
def load_vector(x, base, start, length, beyond, ROWS: tl.constexpr, INSIDE: tl.constexpr):
    """Entries start.. of a head's vector, ``beyond`` past its end."""
    rows = start + tl.arange(0, ROWS)
    if INSIDE:
        return tl.load(base + rows.to(tl.int64) * x.row)
    return tl.load(base + rows.to(tl.int64) * x.row, mask=rows < length, other=beyond)


@triton.jit
@no_type_check
def store_vector(x, base, start, length, entries, ROWS: tl.constexpr):
    """Write entries start.. of a head's vector."""
    rows = start + tl.arange(0, ROWS)
    tl.store(base + rows.to(tl.int64) * x.row, entries, mask=rows < length)


@triton.jit
@no_type_check
def visible(rows, columns, keys, offset, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    """True where the query of a row sees the key of a column, from index arrays that broadcast."""
    seen = columns < keys
    if CAUSAL:
        seen = seen & (columns <= rows + offset)
    if WINDOWED:
        seen = seen & (columns > rows + offset - window)
    return seen


@triton.jit
@no_type_check
def probabilities(
    scores,
    lse2,
    rows,
    columns,
    keys,
    offset,
    window,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    INSIDE: tl.constexpr,
):
    """P from scores and lse in base 2, with zeros outside of the band unless the tile lies ``INSIDE``."""
    p = tl.exp2(scores - lse2)
    if INSIDE:
        return p
    return tl.where(visible(rows, columns, keys, offset, window, CAUSAL, WINDOWED), p, 0.0)


@triton.jit
@no_type_check
def keys_of_queries(
    first, last, keys, offset, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, BLOCK: tl.constexpr
):
    """The key tiles that the queries first <= i < last see, as ``_tiles`` gives them."""
    begin, end = 0, keys
    whole_begin, whole_end = 0, keys
    if CAUSAL:
        end = tl.minimum(keys, last + offset)
        whole_end = tl.minimum(keys, first + offset + 1)
    if WINDOWED:
        begin = first + offset - window + 1
        whole_begin = last + offset - window
    return _tiles(begin, end, whole_begin, whole_end, BLOCK)


@triton.jit
@no_type_check
def queries_of_keys(
    first, last, queries, offset, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, BLOCK: tl.constexpr
):
    """The query tiles that see the keys first <= j < last, as ``_tiles`` gives them."""
    begin, end = 0, queries
    whole_begin, whole_end = 0, queries
    if CAUSAL:
        begin = first - offset
        whole_begin = last - 1 - offset
    if WINDOWED:
        end = tl.minimum(queries, last - 1 + window - offset)
        whole_end = tl.minimum(queries, first + window - offset)
    return _tiles(begin, end, whole_begin, whole_end, BLOCK)


@triton.jit
@no_type_check
def _tiles(begin, end, whole_begin, whole_end, BLOCK: tl.constexpr):
    """(begin, left, whole_begin, whole_end, edges) of the tiles that meet begin..end.

    Those from whole_begin to whole_end need no mask. The ``edges`` others are ``left`` tiles from begin on
    and the rest from whole_end on.
    """
    begin = tl.maximum(begin, 0) // BLOCK * BLOCK
    end = tl.maximum(end, 0)
    whole_begin = tl.cdiv(tl.maximum(whole_begin, begin), BLOCK) * BLOCK
    whole_end = tl.maximum(tl.maximum(whole_end, 0) // BLOCK * BLOCK, whole_begin)
    left = tl.cdiv(tl.maximum(tl.minimum(whole_begin, end) - begin, 0), BLOCK)
    right = tl.cdiv(tl.maximum(end - whole_end, 0), BLOCK)
    return begin, left, whole_begin, whole_end, left + right


@triton.jit
@no_type_check
def edge_tile(index, begin, left, whole_end, BLOCK: tl.constexpr):
    """First row or column of an edge tile."""
    return tl.where(index < left, begin + index * BLOCK, whole_end + (index - left) * BLOCK)
