"""What the kernels share: addressing, the band's tiles, and the matrix products."""

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
        """The tensor with its strides; a negation that it carries as a flag is written out."""
        tensor = tensor.resolve_neg()
        return cls(tensor, *tensor.stride())


class Vector(NamedTuple):
    """A (batch, heads, length) tensor as one kernel argument."""

    pointer: torch.Tensor
    batch: int
    head: int
    row: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Vector":
        """The tensor with its strides; a negation that it carries as a flag is written out."""
        tensor = tensor.resolve_neg()
        return cls(tensor, *tensor.stride())


INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


# --- matrix products --------------------------------------------------------------------------------------


@triton.jit
@no_type_check
def times(left, right, accumulator, PRECISION: tl.constexpr):
    """Accumulator + left @ right, in float32."""
    if INTERPRETED:
        # the interpreter multiplies the bits of bfloat16 as integers
        accumulator += tl.dot(left.to(tl.float32), right.to(tl.float32))
    elif left.dtype != tl.float32:
        accumulator = tl.dot(left, right, accumulator)
    elif PRECISION == "ieee" and left.shape[0] >= 64:
        accumulator += _exact_times(left, right)
    elif PRECISION == "ieee" or PRECISION == "fma":
        # below 64 rows Hopper's units want the thirds of every operand in registers, which do not hold them
        accumulator = tl.dot(left, right, accumulator, input_precision="ieee")
    else:
        accumulator = tl.dot(left, right, accumulator, input_precision=PRECISION)
    return accumulator


@triton.jit
@no_type_check
def _exact_times(left, right):
    """The nine products of thirds, from the least up: matrix units truncate what they add to a larger sum."""
    left_high, left_middle, left_low = thirds(left)
    right_high, right_middle, right_low = thirds(right)
    total = tl.dot(left_low, right_low)
    total = tl.dot(left_low, right_middle, total)
    total = tl.dot(left_middle, right_low, total)
    total = tl.dot(left_low, right_high, total)
    total = tl.dot(left_middle, right_middle, total)
    total = tl.dot(left_high, right_low, total)
    total = tl.dot(left_middle, right_high, total)
    total = tl.dot(left_high, right_middle, total)
    return tl.dot(left_high, right_high, total)


@triton.jit
@no_type_check
def times_transposed(left, right, accumulator, PRECISION: tl.constexpr):
    """Accumulator + left @ rightᵀ, in float32."""
    return times(left, tl.trans(right), accumulator, PRECISION)


@triton.jit
@no_type_check
def thirds(x):
    """Three bfloat16 tiles that add up to the float32 tile x: its first 8 bits, the next 8, and the rest."""
    high = _highest_bits(x)
    middle = _highest_bits(x - high)
    low = x - high - middle
    return high.to(tl.bfloat16), middle.to(tl.bfloat16), low.to(tl.bfloat16)


@triton.jit
@no_type_check
def _highest_bits(x):
    """X with its mantissa cut to what a bfloat16 holds."""
    return (x.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)


# --- tiles of tensors -------------------------------------------------------------------------------------


@triton.jit
@no_type_check
def load_rows(
    x,
    batch,
    head,
    start,
    length,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    INSIDE: tl.constexpr,
):
    """Rows start.. of a head, zero beyond its length and width; ``INSIDE`` says that no row is beyond."""
    pointers = _row_pointers(x, batch, head, start, ROWS, BLOCK)
    if not INSIDE:
        return tl.load(pointers, mask=_existing(start, length, WIDTH, ROWS, BLOCK), other=0.0)
    if WIDTH == BLOCK:
        return tl.load(pointers)
    return tl.load(pointers, mask=tl.arange(0, BLOCK)[None, :] < WIDTH, other=0.0)


@triton.jit
@no_type_check
def store_rows(
    x, batch, head, start, length, tile, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Write rows start.. of a head, rounded to its dtype."""
    pointers = _row_pointers(x, batch, head, start, ROWS, BLOCK)
    mask = _existing(start, length, WIDTH, ROWS, BLOCK)
    tl.store(pointers, tile.to(x.pointer.dtype.element_ty), mask=mask)


@triton.jit
@no_type_check
def load_entries(x, batch, head, start, length, beyond, ROWS: tl.constexpr, INSIDE: tl.constexpr):
    """Entries start.. of a head's vector, ``beyond`` past its end."""
    rows = start + tl.arange(0, ROWS)
    pointers = _at_head(x, batch, head) + rows.to(tl.int64) * x.row
    if INSIDE:
        return tl.load(pointers)
    return tl.load(pointers, mask=rows < length, other=beyond)


@triton.jit
@no_type_check
def store_entries(x, batch, head, start, length, entries, ROWS: tl.constexpr):
    """Write entries start.. of a head's vector."""
    rows = start + tl.arange(0, ROWS)
    tl.store(_at_head(x, batch, head) + rows.to(tl.int64) * x.row, entries, mask=rows < length)


@triton.jit
@no_type_check
def _at_head(x, batch, head):
    """Pointer to the first element of a head; a tensor may hold more than 2^31 elements."""
    return x.pointer + tl.cast(batch, tl.int64) * x.batch + tl.cast(head, tl.int64) * x.head


@triton.jit
@no_type_check
def _row_pointers(x, batch, head, start, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows = (start + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.arange(0, BLOCK).to(tl.int64)
    return _at_head(x, batch, head) + rows[:, None] * x.row + columns[None, :] * x.column


@triton.jit
@no_type_check
def _existing(start, length, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows = (start + tl.arange(0, ROWS))[:, None] < length
    return rows & (tl.arange(0, BLOCK)[None, :] < WIDTH)


@triton.jit
@no_type_check
def reciprocal(total):
    """1 / rowsum(P), and 1 for a row of no keys.

    P = exp(S - lse) of a rounded lse sums to 1 only up to |lse| 2^-24, which would break what cancels between
    the keys of a row in every derivative.
    """
    return 1.0 / tl.where(total == 0.0, 1.0, total)


# --- the band ---------------------------------------------------------------------------------------------


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
def sees_a_key(rows, keys, offset, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    """True where the query of a row sees any key at all."""
    last = tl.zeros_like(rows) + keys - 1
    if CAUSAL:
        last = tl.minimum(last, rows + offset)
    first = tl.zeros_like(rows)
    if WINDOWED:
        first = tl.maximum(first, rows + offset - window + 1)
    return first <= last


@triton.jit
@no_type_check
def program_of_queries(queries, heads, BLOCK: tl.constexpr):
    """(start, batch, head) of the tile of queries that this program owns."""
    tiles = tl.cdiv(queries, BLOCK)
    program = tl.program_id(0)
    # under a causal mask the last tiles see most: they start first
    start = (tiles - 1 - program % tiles) * BLOCK
    return start, program // tiles // heads, program // tiles % heads


@triton.jit
@no_type_check
def program_of_keys(keys, kv_heads, BLOCK: tl.constexpr):
    """(start, batch, head) of the tile of keys that this program owns."""
    tiles = tl.cdiv(keys, BLOCK)
    program = tl.program_id(0)
    return program % tiles * BLOCK, program // tiles // kv_heads, program // tiles % kv_heads


@triton.jit
@no_type_check
def keys_of_queries(
    start,
    queries,
    keys,
    offset,
    window,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK: tl.constexpr,
    PASSES: tl.constexpr,
):
    """The tiles of keys that a tile of queries sees, for ``tile_count`` and ``tile_start``."""
    last = tl.minimum(start + BLOCK_QUERIES, queries)
    begin, end = 0, keys
    whole_begin, whole_end = 0, keys
    if CAUSAL:
        end = tl.minimum(keys, last + offset)
        whole_end = tl.minimum(keys, start + offset + 1)
    if WINDOWED:
        begin = start + offset - window + 1
        whole_begin = last + offset - window
    return _tiles(begin, end, whole_begin, whole_end, BLOCK, PASSES)


@triton.jit
@no_type_check
def queries_of_keys(
    start,
    queries,
    keys,
    offset,
    window,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
    PASSES: tl.constexpr,
):
    """The tiles of queries that see a tile of keys, for ``tile_count`` and ``tile_start``."""
    last = tl.minimum(start + BLOCK_KEYS, keys)
    begin, end = 0, queries
    whole_begin, whole_end = 0, queries
    if CAUSAL:
        begin = start - offset
        whole_begin = last - 1 - offset
    if WINDOWED:
        end = tl.minimum(queries, last - 1 + window - offset)
        whole_end = tl.minimum(queries, start + window - offset)
    return _tiles(begin, end, whole_begin, whole_end, BLOCK, PASSES)


@triton.jit
@no_type_check
def _tiles(begin, end, whole_begin, whole_end, BLOCK: tl.constexpr, PASSES: tl.constexpr):
    """(begin, left, whole_begin, whole_end, edges) of the tiles that meet begin..end.

    Those from whole_begin to whole_end lie inside the band and need no mask: the second of two passes. The
    ``edges`` others are ``left`` tiles from begin on and the rest from whole_end on. One pass masks all.
    """
    begin = tl.maximum(begin, 0) // BLOCK * BLOCK
    end = tl.maximum(end, 0)
    if PASSES == 1:
        whole_begin = tl.maximum(tl.cdiv(end, BLOCK) * BLOCK, begin)
        whole_end = whole_begin
    else:
        whole_begin = tl.cdiv(tl.maximum(whole_begin, begin), BLOCK) * BLOCK
        whole_end = tl.maximum(tl.maximum(whole_end, 0) // BLOCK * BLOCK, whole_begin)
    left = tl.cdiv(tl.maximum(tl.minimum(whole_begin, end) - begin, 0), BLOCK)
    right = tl.cdiv(tl.maximum(end - whole_end, 0), BLOCK)
    return begin, left, whole_begin, whole_end, left + right


@triton.jit
@no_type_check
def tile_count(tiles, INSIDE: tl.constexpr, BLOCK: tl.constexpr):
    """How many tiles lie inside the band, or on its edges."""
    _, _, whole_begin, whole_end, edges = tiles
    return (whole_end - whole_begin) // BLOCK if INSIDE else edges


@triton.jit
@no_type_check
def tile_start(tiles, index, INSIDE: tl.constexpr, BLOCK: tl.constexpr):
    """First row or column of one of these tiles."""
    begin, left, whole_begin, whole_end, _ = tiles
    if INSIDE:
        return whole_begin + index * BLOCK
    return tl.where(index < left, begin + index * BLOCK, whole_end + (index - left) * BLOCK)
