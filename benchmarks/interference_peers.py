"""What interference scores are measured against: a loop over pairs and heads, and vmap(grad)."""

import argparse
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.plain_transformer import PlainTransformer
from theria.interference import VARIANTS, AttentionLayer, SampleGradients, layout_from
from theria.interference.store import Factors

RIDGE = 1e-3
"""The library's default, times the mean of I over a block."""

Gradients = Mapping[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """A model and its samples, task A's before task B's."""

    model: PlainTransformer
    layout: tuple[AttentionLayer, ...]
    tokens: Tensor
    samples_a: int

    @property
    def tasks(self) -> tuple[range, range]:
        """Where the tasks' samples stand."""
        return range(self.samples_a), range(self.samples_a, len(self.tokens))

    @property
    def blocks(self) -> int:
        """How many projections of how many layers."""
        return sum(len(layer.projections) for layer in self.layout)

    @property
    def scores(self) -> int:
        """How many numbers are asked for."""
        heads = sum(p.heads for layer in self.layout for p in layer.projections.values())
        a, b = self.tasks
        return len(a) * len(b) * heads * len(VARIANTS)


def problem(args: argparse.Namespace) -> Problem:
    """The model and random samples; a gated MLP of 8/3 the width has as many weights as a plain one of 4."""
    torch.manual_seed(0)
    device, hidden = torch.device(args.device), -(-args.width * 8 // 24) * 8
    sizes = {"width": args.width, "blocks": args.layers, "heads": args.heads, "hidden": hidden}
    model = PlainTransformer(args.vocab, **sizes).to(device)
    mapping = {"attention": "blocks.*", "qkv": "qkv", "order": "contiguous", "o": "o_proj"}
    tokens = torch.randint(args.vocab, (2 * args.samples, args.tokens), device=device)
    return Problem(model, layout_from(model, mapping), tokens, args.samples)


def sequence_loss(model: PlainTransformer, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of one sequence's next tokens."""
    return F.cross_entropy(model(tokens[None])[0, :-1], tokens[1:])


def attention_weights(given: Problem) -> dict[str, Tensor]:
    """Weights that scores look at."""
    wanted = {f"{p.module}.weight" for layer in given.layout for p in layer.projections.values()}
    return {n: p for n, p in given.model.named_parameters() if n in wanted}


def one_gradient(given: Problem, sample: int) -> Gradients:
    """The gradient of one sample: one backward to the attention's weights."""
    named = attention_weights(given)
    found = torch.autograd.grad(sequence_loss(given.model, given.tokens[sample]), list(named.values()))
    return dict(zip(named, found, strict=True))


def formed_gradient(gradients: SampleGradients, sample: int) -> Gradients:
    """The gradient of one sample from what the library keeps of it."""
    found = {}
    for module, kept in gradients.store[sample].items():
        if not isinstance(kept, Factors):
            found[f"{module}.weight"] = kept.weight.to(gradients.device)
            continue
        inputs, outputs = (part.to(gradients.device) for part in kept)
        found[f"{module}.weight"] = outputs.T @ inputs
    return found


def vmapped_gradients(given: Problem, samples: range) -> Gradients:
    """Gradients, stacked: ``vmap(grad)`` over samples of one length."""
    frozen = {n: p.detach() for n, p in given.model.named_parameters()}
    named = {n: frozen[n] for n in attention_weights(given)}

    def loss(weights: Gradients, tokens: Tensor) -> Tensor:
        logits = functional_call(given.model, {**frozen, **weights}, (tokens[None],))
        return F.cross_entropy(logits[0, :-1], tokens[1:])

    # the fused kernels have no vmap rule
    with sdpa_kernel(SDPBackend.MATH):
        found: Gradients = vmap(grad(loss), in_dims=(None, 0))(
            named, given.tokens[samples.start : samples.stop]
        )
    return found


def divisors_of(given: Problem, gradients: Sequence[Gradients]) -> Gradients:
    """I + ridge of every weight, I being the mean square over some samples."""
    found = {n: torch.stack([g[n] for g in gradients]).square().mean(dim=0) for n in gradients[0]}
    for layer in given.layout:
        for projection in layer.projections.values():
            rows = projection.rows(found[f"{projection.module}.weight"])
            features = projection.features.flatten().to(rows.device)
            rows[features] += RIDGE * rows[features].mean()
    return found


def looped_scores(
    given: Problem,
    task_a: Sequence[int],
    task_b: Sequence[int],
    gradient_of: Callable[[int], Gradients],
    divisors: Gradients,
) -> dict[tuple[str, int, int, int, str, int], float]:
    """Every pair, layer, block and head by itself: the three equations, I + ridge being given."""
    found = {}
    for i in task_a:
        own = gradient_of(i)
        for j in task_b:
            other = gradient_of(j)
            for (number, layer), block in itertools.product(enumerate(given.layout), "QKVO"):
                projection = layer.projections[block]
                tensors = [projection.rows(g[f"{projection.module}.weight"]) for g in (own, other, divisors)]
                for head, features in enumerate(projection.features):
                    first, end = int(features[0]), int(features[-1]) + 1
                    g_i, g_j, divisor = (tensor[first:end] for tensor in tensors)
                    place = (i, j, number, block, head)
                    found["directional", *place] = float((g_i.square() / divisor * g_j.abs()).sum())
                    found["signed", *place] = float((g_i * g_j / divisor).sum())
                    found["symmetric", *place] = float((g_i.abs() * g_j.abs() / divisor).sum())
    return found
