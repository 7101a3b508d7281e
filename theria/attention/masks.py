"""Which keys a query sees."""

import torch
from jaxtyping import Bool
from torch import Tensor

from theria.attention.call import CausalAlignment


def visible_keys(
    queries: int,
    keys: int,
    *,
    window: int | None,
    causal_alignment: CausalAlignment,
    device: torch.device | None = None,
) -> Bool[Tensor, "{queries} {keys}"]:
    """True where query i sees key j under a causal mask, with p(i) - window < j <= p(i).

    p(i) is the key that stands at the query's own position: i for "upper_left", i + keys - queries for
    "lower_right", where the last query stands at the last key. Without a window only j <= p(i) holds.
    A row may be empty: it sees no key.
    """
    own = torch.arange(queries, device=device).unsqueeze(1)
    if causal_alignment == "lower_right":
        own = own + (keys - queries)
    key = torch.arange(keys, device=device)
    visible = key <= own
    return visible if window is None else visible & (key > own - window)
