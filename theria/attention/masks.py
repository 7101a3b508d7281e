"""Which keys a query sees."""

import torch
from jaxtyping import Bool
from torch import Tensor


def visible_keys(
    queries: int,
    keys: int,
    *,
    window: int | None,
    offset: int,
    device: torch.device | None = None,
) -> Bool[Tensor, "{queries} {keys}"]:
    """True where query i sees key j under a causal mask: i + offset - window < j <= i + offset.

    Query i stands at key i + offset. Without a window only j <= i + offset holds. A row may be empty: it sees
    no key.
    """
    own = torch.arange(queries, device=device).unsqueeze(1) + offset
    key = torch.arange(keys, device=device)
    visible = key <= own
    return visible if window is None else visible & (key > own - window)
