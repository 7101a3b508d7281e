"""Ask two attention functions whether second order passes through them.

    python examples/audit_your_kernel.py

The first is written in tensor operations. The second returns the same output and the same gradient, but its
backward builds no graph, as that of a kernel launched by hand: `create_graph=True` runs, and learns first
order. Put a function of your own in their place; for a kernel on a GPU, give ``device="cuda"`` and its dtype.
"""

from typing import Any

import torch
from torch import Tensor

from theria.attention import scaled_dot_product_attention
from theria.curvature import audit


def sound(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Explicit softmax."""
    scores = query @ key.mT * query.shape[-1] ** -0.5
    return scores.softmax(dim=-1) @ value


class _Launched(torch.autograd.Function):
    """Attention whose backward computes its gradients outside of autograd's sight."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return scaled_dot_product_attention(*inputs, backend="reference")

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        with torch.enable_grad():
            inputs = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
            out = scaled_dot_product_attention(*inputs, backend="reference")
            gradients = torch.autograd.grad(out, inputs, cotangent.detach())
        # an edge of weight zero: without it the second derivative would raise instead of being wrong
        return tuple(g + 0 * tensor for g, tensor in zip(gradients, ctx.saved_tensors, strict=True))


def launched(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same output and first derivative, and no curvature."""
    out: Tensor = _Launched.apply(query, key, value)
    return out


def main() -> None:
    """Audit both and say what came out."""
    for attention in (sound, launched):
        report = audit(attention, name=attention.__name__, inner_steps=(1,), steps=2)
        print(f"{attention.__name__}: {report.verdict}")
        print("  share of curvature that is there:", {k: round(v, 3) for k, v in report.surviving.items()})
        for finding in report.findings:
            print(f"  {finding.text}")


if __name__ == "__main__":
    main()
