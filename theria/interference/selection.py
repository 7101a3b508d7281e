"""Which layers, blocks and heads of a layout a computation looks at."""

from collections.abc import Sequence
from typing import NamedTuple

from theria.interference.layout import BLOCKS, AttentionLayer
from theria.interference.result import Head


def select_layers(
    layout: Sequence[AttentionLayer], layers: Sequence[int] | None, blocks: str | None
) -> tuple[tuple[int, ...], tuple[AttentionLayer, ...], str]:
    """Numbers of the chosen layers, these layers with the chosen blocks alone, and the blocks.

    Raises:
        ValueError: for layers or blocks that are not there, named twice or none, or layers of which some have
            an output projection and some not while ``blocks`` is None.
    """
    numbers = tuple(range(len(layout))) if layers is None else tuple(layers)
    if not numbers or len(set(numbers)) < len(numbers) or not set(numbers) <= set(range(len(layout))):
        raise ValueError(f"layers must be distinct numbers below {len(layout)}, received {layers}")
    chosen = [layout[number] for number in numbers]
    present = {"".join(b for b in BLOCKS if b in layer.projections) for layer in chosen}
    if blocks is None:
        if len(present) > 1:
            raise ValueError(f"layers differ in their blocks, {sorted(present)}: name blocks or layers")
        blocks = present.pop()
    if not blocks or len(set(blocks)) < len(blocks) or any(set(blocks) - set(p) for p in present):
        raise ValueError(f"blocks must be distinct letters among {sorted(present)}, received {blocks!r}")
    letters = "".join(b for b in BLOCKS if b in blocks)
    reduced = (AttentionLayer(x.name, {b: x.projections[b] for b in letters}, x.heads) for x in chosen)
    return numbers, tuple(reduced), letters


class Selection(NamedTuple):
    """Heads of one block: how to take them from all, and how the result calls them."""

    places: slice | list[int]
    names: tuple[Head, ...]


def select_heads(
    layout: Sequence[AttentionLayer], heads: Sequence[int] | None, *, per_head: bool
) -> dict[str, Selection]:
    """By block, the heads to look at: query heads as given, and the key-value heads that serve them.

    Raises:
        ValueError: for layers of different numbers of heads, whose arrays would not stack, or heads that are
            not there, named twice or none.
    """
    blocks = layout[0].projections
    if heads is None and not per_head:
        return {block: Selection(slice(None), ("all",)) for block in blocks}
    counts = {block: sorted({x.projections[block].heads for x in layout}) for block in blocks}
    uneven = {block: found for block, found in counts.items() if len(found) > 1}
    if uneven:
        raise ValueError(f"layers have different numbers of heads, {uneven}: choose layers that agree")
    queries = layout[0].heads
    wanted = tuple(range(queries)) if heads is None else tuple(heads)
    if not wanted or len(set(wanted)) < len(wanted) or not set(wanted) <= set(range(queries)):
        raise ValueError(f"heads must be distinct numbers below {queries}, received {heads}")
    found = {}
    for block, (size,) in counts.items():
        places = list(dict.fromkeys(head * size // queries for head in wanted))
        found[block] = Selection(places, tuple(places) if per_head else ("all",))
    return found
