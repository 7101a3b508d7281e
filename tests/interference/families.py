"""Small models of every layout, and what their heads own, written down index by index."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from theria.models.memory_lm import MemoryLM
from theria.models.seq_classifier import SeqClassifier

VOCAB = 23
HUGGING_FACE = ("gpt2", "llama", "qwen3", "neox", "phi3")
OURS = ("memory_lm", "seq_classifier", "seq_classifier_absorbed")
TOKENS = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
SIZES = {
    **TOKENS,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "max_position_embeddings": 32,
}
NORMS = ("norm", "ln_")


@dataclass(frozen=True)
class Family:
    """Heads, key-value heads and their width; what each owns by layer, block and head."""

    heads: int
    kv_heads: int
    head_dim: int
    owned: dict


def build(name, **options):
    """A model with weights large enough for every projection to matter, in float64."""
    torch.manual_seed(0)
    if name == "gpt2":
        config = GPT2Config(**TOKENS, n_embd=18, n_layer=2, n_head=3, n_positions=32, **options)
        model = GPT2LMHeadModel(config)
    elif name == "llama":
        config = LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, **options)
        model = LlamaForCausalLM(config)
    elif name == "qwen3":
        config = Qwen3Config(
            **SIZES, num_attention_heads=4, num_key_value_heads=2, head_dim=6, attention_bias=True, **options
        )
        model = Qwen3ForCausalLM(config)
    elif name == "neox":
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, num_attention_heads=2, **options))
    elif name == "phi3":
        config = Phi3Config(**SIZES, num_attention_heads=4, num_key_value_heads=2, **options)
        model = Phi3ForCausalLM(config)
    elif name == "memory_lm":
        sizes = {"memory_heads": 1, "memory_dim": 8, "slots": 4} | options
        model = MemoryLM(VOCAB, width=12, blocks=2, heads=3, window=4, **sizes)
    else:
        model = SeqClassifier(6, 3, absorb_projections=name.endswith("absorbed"), **options)
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            if not any(norm in parameter_name for norm in NORMS):
                p.normal_(std=p.shape[-1] ** -0.5 if p.ndim > 1 else 0.3)
    return model.double().eval()


def samples(name, count, *, seed=0, least=4, most=9):
    """Samples of mixed lengths for a family's loss."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for _ in range(count):
        length = int(torch.randint(least, most + 1, (), generator=generator))
        if name.startswith("seq_classifier"):
            x = torch.randn(length, 6, generator=generator, dtype=torch.float64)
            drawn.append((x, torch.randint(3, (), generator=generator)))
        else:
            drawn.append(torch.randint(3, VOCAB, (length,), generator=generator))
    return drawn


def logits_of(model, tokens, **options):
    found = model(tokens, **options)
    return found.logits


def token_loss(model, tokens):
    """Mean cross-entropy of one sequence's next tokens."""
    logits = logits_of(model, tokens[None])
    return F.cross_entropy(
        logits[0, :-1].float() if logits.dtype.itemsize == 2 else logits[0, :-1], tokens[1:]
    )


def class_loss(model, sample):
    x, label = sample
    return F.cross_entropy(model(x[None].to(model.head.weight.dtype)), label[None])


def loss_of(name):
    return class_loss if name.startswith("seq_classifier") else token_loss


def family(name):
    """What the heads of a family's attention own, by the papers and the models' own forward passes."""
    rows = lambda first, count: (slice(first, first + count), slice(None))  # noqa: E731
    columns = lambda first, count: (slice(None), slice(first, first + count))  # noqa: E731
    entries = lambda first, count: (slice(first, first + count),)  # noqa: E731
    owned = {}
    if name == "gpt2":
        for layer in range(2):
            base = f"transformer.h.{layer}.attn"
            for h in range(3):
                for part, block in enumerate("QKV"):
                    first = 18 * part + 6 * h
                    owned[layer, block, h] = [
                        (f"{base}.c_attn.weight", columns(first, 6)),
                        (f"{base}.c_attn.bias", entries(first, 6)),
                    ]
                owned[layer, "O", h] = [(f"{base}.c_proj.weight", rows(6 * h, 6))]
        return Family(3, 3, 6, owned)
    if name in ("llama", "qwen3"):
        d = 4 if name == "llama" else 6
        for layer in range(2):
            base = f"model.layers.{layer}.self_attn"
            for block, heads in (("Q", 4), ("K", 2), ("V", 2)):
                for h in range(heads):
                    projection = f"{base}.{block.lower()}_proj"
                    owned[layer, block, h] = [(f"{projection}.weight", rows(d * h, d))]
                    if name == "qwen3":
                        owned[layer, block, h].append((f"{projection}.bias", entries(d * h, d)))
            for h in range(4):
                owned[layer, "O", h] = [(f"{base}.o_proj.weight", columns(d * h, d))]
        return Family(4, 2, d, owned)
    if name == "neox":
        for layer in range(2):
            base = f"gpt_neox.layers.{layer}.attention"
            for h in range(2):
                for part, block in enumerate("QKV"):
                    first = 24 * h + 8 * part
                    owned[layer, block, h] = [
                        (f"{base}.query_key_value.weight", rows(first, 8)),
                        (f"{base}.query_key_value.bias", entries(first, 8)),
                    ]
                owned[layer, "O", h] = [(f"{base}.dense.weight", columns(8 * h, 8))]
        return Family(2, 2, 8, owned)
    if name == "phi3":
        for layer in range(2):
            base = f"model.layers.{layer}.self_attn"
            for block, offset, heads in (("Q", 0, 4), ("K", 16, 2), ("V", 24, 2)):
                for h in range(heads):
                    owned[layer, block, h] = [(f"{base}.qkv_proj.weight", rows(offset + 4 * h, 4))]
            for h in range(4):
                owned[layer, "O", h] = [(f"{base}.o_proj.weight", columns(4 * h, 4))]
        return Family(4, 2, 4, owned)
    if name == "memory_lm":
        for layer in range(2):
            for h in range(3):
                for block in "QKV":
                    projection = f"blocks.{layer}.attention.{block.lower()}_proj"
                    owned[layer, block, h] = [(f"{projection}.weight", rows(4 * h, 4))]
                owned[layer, "O", h] = [(f"blocks.{layer}.o_proj.weight", columns(4 * h, 4))]
        return Family(3, 3, 4, owned)
    for block in "QKV":
        owned[0, block, 0] = [(f"{block.lower()}_proj.weight", rows(0, 6))]
    return Family(1, 1, 6, owned)


def autograd_gradients(model, loss_fn, drawn):
    """One backward a sample, all parameters, None where there is no gradient."""
    named = dict(model.named_parameters())
    found = []
    for sample in drawn:
        gradients = torch.autograd.grad(loss_fn(model, sample), list(named.values()), allow_unused=True)
        found.append(dict(zip(named, gradients, strict=True)))
    return found


def head_gradient(owned, gradients):
    """The entries of one head's slice as a vector."""
    return torch.cat([gradients[parameter][index].flatten() for parameter, index in owned])
