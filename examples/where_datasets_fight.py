"""Find the heads of a language model over which two kinds of text fight.

    python examples/where_datasets_fight.py

A small transformer learns a language in which every token is followed by the next one. Sentences of task A go
on as it has learnt, those of task B go backwards. The signed score is minus the change of B's loss after a
small step on A: where it is most negative, the two want different things of the same weights. (Which heads
differ by more than chance, `theria.interference.significance` tells.)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from theria.interference import BLOCKS, compute
from theria.models.memory_lm import MemoryLM

VOCAB, LENGTH = 12, 24


def sentences(count: int, step: int, seed: int) -> Tensor:
    """Tokens that go on by ``step``, from random beginnings."""
    begin = torch.randint(VOCAB, (count, 1), generator=torch.Generator().manual_seed(seed))
    return (begin + step * torch.arange(LENGTH)) % VOCAB


def loss_of(model: MemoryLM, tokens: Tensor) -> Tensor:
    """Mean loss of the next token of one sentence."""
    logits = model(tokens.unsqueeze(0)).logits[0]
    return F.cross_entropy(logits[:-1], tokens[1:])


def main(steps: int = 60) -> list[tuple[str, int, int, float]]:
    """Train, score, and return (block, layer, head, mean signed score), the worst conflict first."""
    torch.manual_seed(0)
    model = MemoryLM(VOCAB, width=32, blocks=2, heads=4, window=LENGTH, memory_heads=0, backend="reference")
    adam = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(steps):
        tokens = sentences(16, 1, seed=step)
        logits = model(tokens).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        adam.zero_grad()
        loss.backward()
        adam.step()
    print(f"loss on task A {loss.item():.3f}")
    task_a, task_b = (list(sentences(12, direction, seed=1000)) for direction in (1, -1))
    result = compute(model, loss_of, task_a, task_b, variants=("signed",), fisher="pooled_n")
    found = [
        (block, layer, head, float(result.scores["signed"][block][:, :, layer, head].mean()))
        for block in BLOCKS
        for layer in range(2)
        for head in range(4)
    ]
    found.sort(key=lambda entry: entry[-1])
    for block, layer, head, score in found[:5]:
        print(f"{block} of layer {layer}, head {head}: {score:+.3g}")
    worst = result.top_conflicts("signed", found[0][0], 3)
    print(*worst, sep="\n")
    return found


if __name__ == "__main__":
    main()
