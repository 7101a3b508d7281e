"""Second-order MAML of one's own model through a named attention backend.

    python examples/second_order_maml.py

Any module that maps (batch, length, width) to logits will do. The meta-gradient is taken once through the
whole inner loop (FULL) and once with the inner gradients for constants (FO); the difference is what curvature
says. On a GPU "auto" takes the Triton kernels, whose second derivative is as exact; the loop stays the same.
"""

import torch
from torch import Tensor, nn

from theria.attention import scaled_dot_product_attention
from theria.maml import meta_gradient
from theria.tasks import SeqClsSpec, sample_tasks


class Classifier(nn.Module):
    """One head of attention, averaged over the tokens."""

    def __init__(self, width: int, classes: int, backend: str) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.head = nn.Linear(width, classes)
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch of sequences."""
        query, key, value = (part.unsqueeze(1) for part in self.qkv(x).chunk(3, dim=-1))
        read = scaled_dot_product_attention(query, key, value, backend=self.backend)
        logits: Tensor = self.head(read.squeeze(1).mean(dim=1))
        return logits


def main(steps: int = 30, backend: str = "auto") -> list[float]:
    """Meta-train, and return the query loss of every outer step."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    spec = SeqClsSpec(length=16, width=16, num_classes=3, num_signal_positions=4)
    model = Classifier(spec.width, spec.num_classes, backend).to(device)
    adam = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        ids = torch.arange(8 * step, 8 * (step + 1), device=device)
        tasks = sample_tasks(spec, ids, seed=0, epoch=0, stream="train")
        support, query = (tasks.support_x, tasks.support_y), (tasks.query_x, tasks.query_y)
        full = meta_gradient(
            model, support, query, mode="FULL", inner_steps=3, inner_lr=0.4, strategy="sweep"
        )
        for name, parameter in model.named_parameters():
            parameter.grad = full.grads[name]
        adam.step()
        losses.append(float(full.loss))
        if step % 10 == 0:
            first = meta_gradient(model, support, query, mode="FO", inner_steps=3, inner_lr=0.4)
            again = meta_gradient(model, support, query, mode="FULL", inner_steps=3, inner_lr=0.4)
            names = list(first.grads)
            apart = torch.cat([(again.grads[n] - first.grads[n]).flatten() for n in names]).norm()
            whole = torch.cat([again.grads[n].flatten() for n in names]).norm()
            print(f"step {step}: query loss {losses[-1]:.3f}, |FULL - FO| / |FULL| = {apart / whole:.3f}")
    print(f"query loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
