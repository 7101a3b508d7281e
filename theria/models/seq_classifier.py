"""The sequence classifier of the meta-learning study: one attention head, read from the first token."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from theria.attention import check_backend_name, scaled_dot_product_attention


class SeqClassifier(nn.Module):
    """Classify a sequence by what its first token attends to.

    With x_0 the first token and X (length, width) the sequence, one head, no position code:

        logits = W_head (softmax(q Kᵀ / sqrt(width)) V) + b_head,  q = x_0 W_qᵀ,  K = X W_kᵀ,  V = X W_vᵀ

    ``absorb_projections`` computes the same logits as attention(q W_k, X, X) W_vᵀ at the same scale, which
    holds because q (X W_kᵀ)ᵀ = (q W_k) Xᵀ and P (X W_vᵀ) = (P X) W_vᵀ. With a single query per sequence
    this spares the projections of all other tokens. Parameters are the same, outputs and derivatives of
    every order too, up to rounding; but the backend then sees q W_k, X and X in place of q, K and V.

    Parameters are initialised as ``nn.Linear`` does it, uniform in ±1/sqrt(width).

    Args:
        width: width of the tokens and of every projection.
        num_classes: number of logits.
        backend: attention backend, see ``theria.attention.scaled_dot_product_attention``.
        absorb_projections: leave keys and values unprojected, as above.

    Raises:
        ValueError: for a width or num_classes that is not a positive integer, or an unknown backend.
        NotImplementedError: for a backend that is not available in this build.
    """

    def __init__(
        self, width: int, num_classes: int, *, backend: str = "auto", absorb_projections: bool = False
    ) -> None:
        super().__init__()
        for name, size in (("width", width), ("num_classes", num_classes)):
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"{name} must be a positive integer, received {size!r}")
        check_backend_name(backend)
        self.width = width
        self.num_classes = num_classes
        self.backend = backend
        self.absorb_projections = absorb_projections
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.head = nn.Linear(width, num_classes)

    # No jaxtyping shape on x: a wrong one is refused below, in words.
    def forward(self, x: Tensor) -> Float[Tensor, "batch num_classes"]:
        """Logits (batch, num_classes) of sequences x (batch, length, width).

        Raises:
            ValueError: if x is not of rank 3, not ``width`` wide, or has no token.
        """
        if x.ndim != 3 or x.shape[-1] != self.width or x.shape[1] < 1:
            raise ValueError(
                f"SeqClassifier expects x of shape (batch, length >= 1, width={self.width}), "
                f"received {tuple(x.shape)}"
            )
        query = self.q_proj(x[:, 0])
        tokens = x.unsqueeze(1)  # the one head
        if self.absorb_projections:
            return self.head(self.v_proj(self._attend(query @ self.k_proj.weight, tokens, tokens)))
        return self.head(self._attend(query, self.k_proj(tokens), self.v_proj(tokens)))

    def forward_stacked(
        self, parameters: Mapping[str, Tensor], x: Float[Tensor, "tasks batch length width"]
    ) -> Float[Tensor, "tasks batch num_classes"]:
        """``forward`` for many tasks at once, each under its own parameters, stacked in front (tasks, ...).

        The same function as ``vmap`` over ``functional_call``, in half as many operations.
        """
        tasks, batch, length, width = x.shape
        query = torch.bmm(x[:, :, 0], parameters["q_proj.weight"].mT)
        if self.absorb_projections:
            query, key, value = torch.bmm(query, parameters["k_proj.weight"]), x, x
        else:
            tokens = x.view(tasks, batch * length, width)
            key = torch.bmm(tokens, parameters["k_proj.weight"].mT).view(x.shape)
            value = torch.bmm(tokens, parameters["v_proj.weight"].mT).view(x.shape)
        read = scaled_dot_product_attention(
            query.unsqueeze(2), key, value, scale=width**-0.5, backend=self.backend
        ).squeeze(2)
        if self.absorb_projections:
            read = torch.bmm(read, parameters["v_proj.weight"].mT)
        return torch.baddbmm(parameters["head.bias"].unsqueeze(1), read, parameters["head.weight"].mT)

    def _attend(
        self,
        query: Float[Tensor, "batch width"],
        key: Float[Tensor, "batch 1 length width"],
        value: Float[Tensor, "batch 1 length width"],
    ) -> Float[Tensor, "batch width"]:
        batch = query.shape[0]
        out = scaled_dot_product_attention(
            query.view(batch, 1, 1, self.width), key, value, scale=self.width**-0.5, backend=self.backend
        )
        return out.view(batch, self.width)
