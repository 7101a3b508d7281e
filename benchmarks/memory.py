"""Speed and memory of the causal projection, and of training the memory language model, against named peers.

    python -m benchmarks.memory --device cpu --out docs/results/memory_cpu.md
    python -m benchmarks.memory --device cuda --out docs/results/memory_h200.md

Every ratio is against a peer timed in turns with it in this process.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import peak_bytes, seconds_in_turns
from benchmarks.plain_transformer import PlainTransformer, plain_peer
from benchmarks.report import fitted_exponent, markdown_table, provenance
from lightning_modules.host_memory import keep_freed_memory
from lightning_modules.throughput import peak_flops_of
from theria.cuda_graph import CapturedTraining
from theria.memory import causal_projection
from theria.memory.accumulator import causal_read
from theria.memory.fla_kernels import refusal
from theria.models.flops import training_flops_per_token
from theria.models.memory_lm import MemoryLM

HEADS = 2
CHUNK = 64
GROWTH_DIM = 64
_ARCHITECTURE = ("width", "blocks", "heads", "window", "memory_heads", "memory_dim", "rule", "slots", "taps")


def per_token_projection(q: Tensor, k: Tensor, m_persistent: Tensor, norm_persistent: Tensor) -> Tensor:
    """The peer: q' of the same equations, M_t and norm_sum updated token by token, batched over the rest."""
    memory, norm, reads = m_persistent, norm_persistent, []
    for key, query in zip(k.unbind(2), q.unbind(2), strict=True):
        memory = memory + key.unsqueeze(-1) * key.unsqueeze(-2)
        norm = norm + key.square().sum(-1)
        reads.append((memory @ query.unsqueeze(-1)).squeeze(-1) / norm.clamp_min(1e-8).unsqueeze(-1))
    return torch.stack(reads, dim=2)


def projection_inputs(
    length: int, dim: int, device: str, *, batch: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, M and the norm, of which q and k want gradients."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(batch, HEADS, length, dim, generator=generator) for _ in range(2))
    q, k = (F.normalize(part, dim=-1).to(device).requires_grad_() for part in (q, k))
    vectors = 0.02 * torch.randn(HEADS, 64, dim, generator=generator)
    return q, k, (vectors.mT @ vectors).to(device), vectors.square().sum((1, 2)).to(device)


def with_backward(read: Callable[..., Tensor], q: Tensor, k: Tensor, *rest: Tensor) -> None:
    """Forward and gradients to q and k."""
    torch.autograd.grad(read(q, k, *rest).square().sum(), (q, k))


def against_the_loop(device: str, dims: Sequence[int], length: int, rounds: int) -> list[str]:
    """The chunked projection against one token at a time."""
    rows = []
    for dim in dims:
        inputs = projection_inputs(length, dim, device)
        for title, run in (("forward", None), ("forward and backward", with_backward)):
            ways = {"loop": per_token_projection, "chunked": _chunked}
            calls: dict[str, Callable[[], Any]] = {
                name: partial(way, *inputs) if run is None else partial(run, way, *inputs)
                for name, way in ways.items()
            }
            seconds = seconds_in_turns(calls, rounds=rounds)
            cells = [f"{1e3 * seconds[name]:.1f}" for name in ways]
            rows.append([str(dim), title, *cells, f"{seconds['loop'] / seconds['chunked']:.0f}"])
    header = ["head width", "what", "loop ms", "chunked ms", "times faster"]
    said = f"1 sequence of {length} tokens, {HEADS} heads, float32, chunks of {CHUNK}."
    return ["## Projection against a loop over tokens", "", said, "", *markdown_table(header, rows), ""]


def growth(device: str, lengths: Sequence[int], dim: int, rounds: int) -> list[str]:
    """Time and memory of forward and backward by length."""
    seconds, memory = [], []
    for length in lengths:
        call = partial(with_backward, _chunked, *projection_inputs(length, dim, device))
        seconds.append(seconds_in_turns({"chunked": call}, rounds=rounds)["chunked"])
        memory.append(peak_bytes(call))
    rows = [
        [f"{length:,}", f"{1e3 * s:.1f}", f"{1e9 * s / length:.0f}", f"{m / 2**20:.1f}", f"{m / length:.0f}"]
        for length, s, m in zip(lengths, seconds, memory, strict=True)
    ]
    header = ["tokens", "ms", "ns a token", "peak MiB", "bytes a token"]
    exponents = (fitted_exponent(lengths, seconds), fitted_exponent(lengths, memory))
    said = (
        f"Forward and backward of the projection, 1 sequence, {HEADS} heads of width {dim}, float32. "
        f"Fitted exponent of the length: {exponents[0]:.2f} for time, {exponents[1]:.2f} for memory."
    )
    return ["## Growth with length", "", said, "", *markdown_table(header, rows), ""]


def against_fla(dim: int, length: int, rounds: int, *, batch: int = 16) -> list[str]:
    """Tensor operations, flash-linear-attention's kernels as called here, and those kernels alone."""
    reason = refusal(torch.bfloat16, torch.device("cuda"), dim, CHUNK)
    title = ["## Accumulators against flash-linear-attention", ""]
    if reason is not None:
        return [*title, f"Not measured: {reason}.", ""]
    q, k = (part.detach().bfloat16() for part in projection_inputs(length, dim, "cuda", batch=batch)[:2])
    v = torch.randn_like(q)
    inputs = [part.requires_grad_() for part in (q, k, v)]
    beta = torch.rand(q.shape[:3], device="cuda")
    rows = []
    for rule in ("hebbian", "delta"):
        strength = None if rule == "hebbian" else beta
        calls: dict[str, Callable[[], Any]] = {
            "alone": partial(_gradients, partial(_fla_alone, rule, strength), inputs)
        }
        for kernel in ("fla", "tensor"):
            calls[kernel] = partial(_gradients, partial(_accumulate, rule, strength, kernel), inputs)
        seconds = seconds_in_turns(calls, rounds=rounds)
        cells = [f"{1e3 * seconds[name]:.2f} ({seconds[name] / seconds['alone']:.2f}x)" for name in calls]
        rows.append([rule, *cells])
    header = ["rule", "fla's function alone, ms", 'kernel="fla", ms', 'kernel="tensor", ms']
    said = (
        f"Forward and backward, {batch} sequences of {length} tokens, {HEADS} heads of width {dim}, bfloat16."
    )
    return [*title, said, "", *markdown_table(header, rows), ""]


def training_speed(
    config: Path, device: str, batch: int, length: int, rounds: int, *, compiled: bool
) -> list[str]:
    """Tokens a second of a training step of the configured model against a plain transformer of its size."""
    given = yaml.safe_load(config.read_text())["model"]["init_args"]
    sizes = {name: given[name] for name in _ARCHITECTURE}
    vocab = given["vocab_size"]
    torch.manual_seed(0)
    model = MemoryLM(vocab, **sizes, mlp_hidden=given["mlp_hidden"], chunk_size=given["chunk_size"]).to(
        device
    )
    parameters = sum(p.numel() for p in model.parameters())
    peer = plain_peer(
        parameters, vocab=vocab, width=given["width"], blocks=given["blocks"], heads=given["heads"]
    ).to(device)
    tokens = torch.randint(vocab, (batch, length), device=device)
    shards = (torch.arange(length, device=device) >= length // 3).long().expand(batch, -1)
    steps: dict[str, Callable[[], Any]] = {
        "plain": training_step(peer, lambda: peer(tokens), tokens),
        "memory": training_step(model, lambda: model(tokens, segment_ids=shards).logits, tokens),
    }
    if compiled:
        plain, memory = torch.compile(peer), torch.compile(model)
        steps["plain, compiled"] = training_step(peer, lambda: plain(tokens), tokens)
        steps["memory, compiled"] = training_step(
            model, lambda: memory(tokens, segment_ids=shards).logits, tokens
        )
        if device == "cuda":
            steps |= {
                "plain, compiled and captured": _captured(peer, lambda: plain(tokens), tokens),
                "memory, compiled and captured": _captured(
                    model, lambda: memory(tokens, segment_ids=shards).logits, tokens
                ),
            }
    return _speed_table(steps, model, peer, tokens, rounds)


def _captured(model: torch.nn.Module, logits: Callable[[], Tensor], tokens: Tensor) -> Callable[[], None]:
    """``training_step`` with forward and backward as CUDA graphs, captured at the first call."""

    @cache
    def captured() -> CapturedTraining:
        return CapturedTraining(lambda _: (logits(),), [tokens], list(model.parameters()))

    return training_step(model, lambda: captured()(tokens)[0], tokens)


def training_step(model: torch.nn.Module, logits: Callable[[], Tensor], tokens: Tensor) -> Callable[[], None]:
    """Forward, backward and AdamW on the next token, under bfloat16 autocast on CUDA."""
    device = tokens.device.type
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device == "cuda")

    def step() -> None:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            made = logits()
        loss = F.cross_entropy(made[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
        adamw.zero_grad()
        loss.backward()
        adamw.step()

    return step


def _speed_table(
    steps: dict[str, Callable[[], Any]],
    model: MemoryLM,
    peer: PlainTransformer,
    tokens: Tensor,
    rounds: int,
) -> list[str]:
    length = tokens.shape[1]
    seconds = seconds_in_turns(steps, rounds=rounds)
    peak = peak_flops_of(tokens.device, "bf16-mixed", None)
    rows = []
    for name, value in seconds.items():
        plain = name.startswith("plain")
        flops = peer.training_flops_per_token(length) if plain else training_flops_per_token(model, length)
        rate = tokens.numel() / value
        best_peer = min(time for other, time in seconds.items() if other.startswith("plain"))
        rows.append(
            [
                name,
                f"{sum(p.numel() for p in (peer if plain else model).parameters()):,}",
                f"{1e3 * value:.1f}",
                f"{rate:,.0f}",
                "" if peak is None else f"{100 * rate * flops / peak:.1f}%",
                f"{seconds['plain'] / value:.2f}",
                f"{best_peer / value:.2f}",
                # a graph keeps its memory from one step to the next
                "" if name.endswith("captured") else f"{peak_bytes(steps[name]) / 2**20:,.0f}",
            ]
        )
    header = [
        "model",
        "parameters",
        "ms a step",
        "tokens a second",
        "MFU",
        "speed over plain",
        "speed over the best peer",
        "peak MiB",
    ]
    said = (
        f"{tokens.shape[0]} sequences of {length} tokens, forward, backward and AdamW; on CUDA under "
        "autocast to bfloat16. The peer has the same width and depth, full attention by "
        "torch.nn.functional.scaled_dot_product_attention, and MLPs as wide as equal size wants."
    )
    return ["## Training", "", said, "", *markdown_table(header, rows), ""]


def _chunked(q: Tensor, k: Tensor, m_persistent: Tensor, norm_persistent: Tensor) -> Tensor:
    return causal_projection(q, k, m_persistent, norm_persistent, chunk_size=CHUNK, kernel="tensor")[0]


def _gradients(read: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    torch.autograd.grad(read(*inputs).float().square().sum(), inputs)


def _accumulate(rule: Any, beta: Tensor | None, kernel: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    initial = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1], dtype=torch.float32)
    return causal_read(
        rule,
        q,
        k,
        v,
        beta=beta,
        log_decay=None,
        ranks=None,
        initial=initial,
        chunk_size=CHUNK,
        kernel=kernel,
    )[0]


def _fla_alone(rule: str, beta: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The package's own function, tokens before heads as it wants them."""
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    if beta is None:
        from fla.ops.simple_gla import chunk_simple_gla

        return chunk_simple_gla(q, k, v, scale=1.0)[0]
    from fla.ops.delta_rule import chunk_delta_rule

    return chunk_delta_rule(q, k, v, beta.transpose(1, 2).to(q.dtype), scale=1.0)[0]


def main() -> None:
    """Measure, print and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--config", type=Path, help="of the trained model; memory_lm.yaml, on CUDA that of 60M"
    )
    parser.add_argument(
        "--dims", type=int, nargs="+", default=[32, 64, 256], help="head widths, against the loop"
    )
    parser.add_argument("--length", type=int, default=2048, help="tokens, against the loop and fla")
    parser.add_argument("--longest", type=int, default=131072, help="of the growth with length")
    parser.add_argument("--batch", type=int, help="sequences of a training step; as configured")
    parser.add_argument("--compiled", action="store_true", help="and compiled, on CUDA captured too")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    args = parser.parse_args()
    if args.device == "cpu":
        keep_freed_memory()
    name = "memory_lm.yaml" if args.device == "cpu" else "memory_lm_60m.yaml"
    config = args.config or Path("configs") / name
    data = yaml.safe_load(config.read_text())["data"]["init_args"]
    lengths = [length for length in (2**e for e in range(11, 31)) if length <= args.longest]
    lines = ["# The memory: speed and memory", "", provenance("benchmarks.memory")]
    lines += against_the_loop(args.device, args.dims, args.length, args.rounds)
    lines += growth(args.device, lengths, GROWTH_DIM, args.rounds)
    if args.device == "cuda":
        lines += against_fla(args.dims[-1], args.length, args.rounds)
    batch = args.batch or data["batch_size"]
    lines += training_speed(
        config, args.device, batch, data["sequence_length"], args.rounds, compiled=args.compiled
    )
    report = "\n".join(lines)
    print(report)
    if args.out:
        args.out.write_text(report, encoding="utf-8")


if __name__ == "__main__":
    main()
