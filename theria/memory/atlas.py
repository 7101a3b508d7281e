"""Gated multi-layer perceptrons."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

INIT_STD = 0.02


class GatedMLP(nn.Module):
    """W1(SiLU(W2 x) * W3 x), without biases, weights 0.02 N(0, 1) at the start.

    Shazeer, "GLU variants improve transformer", 2020 (arXiv 2002.05202), with SiLU as the gate's activation.

    Args:
        width: of input and output.
        hidden: width of W2 x and W3 x.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(hidden, width, bias=False)
        self.w2 = nn.Linear(width, hidden, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)
        for linear in (self.w1, self.w2, self.w3):
            nn.init.normal_(linear.weight, std=INIT_STD)

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """The perceptron of every vector."""
        return self.w1(F.silu(self.w2(x)) * self.w3(x))


class AtlasMemory(nn.Module):
    """x + W1(SiLU(W2 x) * W3 x): what is read from a memory, digested.

    Args:
        width: of input and output.
        expansion: hidden width over width, 4 by default.
    """

    def __init__(self, width: int, *, expansion: int = 4) -> None:
        super().__init__()
        self.mlp = GatedMLP(width, expansion * width)

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """The input and what the perceptron adds to it."""
        return x + self.mlp(x)
