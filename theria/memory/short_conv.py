"""A short causal convolution that stops at shard boundaries."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from theria.memory.shards import shards_of


class ConvState(NamedTuple):
    """What the next call of a convolution needs of the calls before it.

    Attributes:
        inputs: the last ``taps - 1`` inputs, zeros where there were none or they are of an older shard.
        segment: the segment id of the last token; None (as 0) where none was given yet.
    """

    inputs: Float[Tensor, "batch taps_less_one channels"]
    segment: Int64[Tensor, " batch"] | None = None


class ShortConvolution(nn.Module):
    r"""y_t = \sum_{j < taps} w_j * x_{t-j}, each channel by itself, over the tokens of t's shard.

    It lets the key of a memory name the token before its value, which a key made of one token cannot.

    Args:
        channels: width of input and output.
        taps: tokens a channel sees, its own included.

    Attributes:
        weight: (taps, channels), row j weighs the token j places back; the identity at the start.

    Raises:
        ValueError: for less than one tap.
    """

    def __init__(self, channels: int, *, taps: int = 4) -> None:
        super().__init__()
        if taps < 1:
            raise ValueError(f"taps must be at least 1, received {taps}")
        self.taps = taps
        self.weight = nn.Parameter(torch.zeros(taps, channels))
        nn.init.ones_(self.weight[0])

    def forward(
        self,
        x: Float[Tensor, "batch length channels"],
        *,
        segment_ids: Int64[Tensor, "batch length"] | None = None,
        state: ConvState | None = None,
    ) -> tuple[Float[Tensor, "batch length channels"], ConvState]:
        """The convolved sequence in x's dtype, and the state after it."""
        batch, length, channels = x.shape
        past = self.taps - 1
        if state is None:
            state = ConvState(x.new_zeros(batch, past, channels))
        if length == 0:
            return x, state
        ranks, segment = shards_of(segment_ids, state.segment, batch, length)
        seen = torch.cat((state.inputs, x), dim=1)
        out = x * self.weight[0].to(x.dtype)
        if ranks is None:
            for back in range(1, self.taps):
                out = out + seen[:, past - back : past - back + length] * self.weight[back].to(x.dtype)
            return out, ConvState(seen[:, length:], segment)
        known = torch.cat((ranks.new_zeros(batch, past), ranks), dim=1)
        for back in range(1, self.taps):
            window = slice(past - back, past - back + length)
            foreign = (known[:, window] != ranks).unsqueeze(-1)
            out = out + seen[:, window].masked_fill(foreign, 0) * self.weight[back].to(x.dtype)
        foreign = (known[:, length:] != ranks[:, -1:]).unsqueeze(-1)
        return out, ConvState(seen[:, length:].masked_fill(foreign, 0), segment)
