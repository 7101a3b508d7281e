"""Heads own what the models' own forward passes say, each entry once."""

import pytest
import torch
from families import HUGGING_FACE, OURS, SIZES, autograd_gradients, build, family, loss_of, samples
from torch import nn
from transformers import PhiConfig, PhiForCausalLM

from theria.interference import detect_layout, layout_from
from theria.interference.layout import fused_features

ALL = (*HUGGING_FACE, *OURS)


def slices_by_parameter(model, name):
    """Every entry's head, -1 where none: from the layout, and as written down."""
    marks = {}
    for way in ("found", "written"):
        marks[way] = {n: torch.full(p.shape, -1, dtype=torch.int64) for n, p in model.named_parameters()}
    counts = {n: torch.zeros(p.shape, dtype=torch.int64) for n, p in model.named_parameters()}
    for number, layer in enumerate(detect_layout(model)):
        for block, projection in layer.projections.items():
            for kind, by_head in (("weight", projection.weight_by_head), ("bias", projection.bias_by_head)):
                parameter = f"{projection.module}.{kind}"
                if parameter not in counts:
                    continue
                places = by_head(
                    torch.arange(counts[parameter].numel()).view(counts[parameter].shape).double()
                )
                for head in range(projection.heads if places is not None else 0):
                    owned = places[head].flatten().long()
                    marks["found"][parameter].view(-1)[owned] = key(number, block, head)
                    counts[parameter].view(-1)[owned] += 1
    for (number, block, head), owned in family(name).owned.items():
        for parameter, index in owned:
            marks["written"][parameter][index] = key(number, block, head)
    return marks, counts


def key(layer, block, head):
    return 1000 * layer + 100 * "QKVO".index(block) + head


@pytest.mark.parametrize("name", ALL)
def test_slices_partition_every_projection(name):
    model = build(name)
    marks, counts = slices_by_parameter(model, name)
    covered = set()
    for layer in detect_layout(model):
        for block, projection in layer.projections.items():
            covered.add(f"{projection.module}.weight")
            # the output projection's bias is common to all heads, and no head's
            if block != "O":
                covered.add(f"{projection.module}.bias")
    for parameter, count in counts.items():
        assert (count == (1 if parameter in covered else 0)).all(), parameter
        assert torch.equal(marks["found"][parameter], marks["written"][parameter]), parameter


@pytest.mark.parametrize("name", [*HUGGING_FACE, "memory_lm"])
def test_zeroing_a_value_path_zeroes_its_output_slice_alone(name):
    model = build(name, **({"memory_heads": 0} if name == "memory_lm" else {}))
    layout = detect_layout(model)
    for number, layer in enumerate(layout):
        value, output = layer.projections["V"], layer.projections["O"]
        for head in range(value.heads):
            gradient = with_zeroed(model, name, value, head, [output])[0]
            group = output.heads // value.heads
            dead = gradient.flatten(1).abs().amax(dim=1) == 0
            expected = torch.arange(output.heads) // group == head
            assert torch.equal(dead, expected), (number, head)


@pytest.mark.parametrize("name", [*HUGGING_FACE, "memory_lm"])
def test_a_head_without_queries_has_no_gradient_of_keys_and_one_without_keys_none_of_queries(name):
    model = build(name)
    layer = detect_layout(model)[0]
    query, key, value = (layer.projections[block] for block in "QKV")
    group = query.heads // key.heads
    for head in range(key.heads):
        served = list(range(group * head, group * (head + 1)))
        of_keys, of_values = with_zeroed(model, name, query, served, [key, value])
        dead = of_keys.flatten(1).abs().amax(dim=1) == 0
        assert torch.equal(dead, torch.arange(key.heads) == head)
        assert (of_values.flatten(1).abs().amax(dim=1) > 0).all()
        (of_queries,) = with_zeroed(model, name, key, head, [query])
        dead = of_queries.flatten(1).abs().amax(dim=1) == 0
        assert torch.equal(dead, torch.arange(query.heads) // group == head)


def with_zeroed(model, name, projection, heads, looked_at):
    """Gradients by head of some projections, with what some heads of another own set to zero."""
    parameters = dict(model.named_parameters())
    saved = {n: p.detach().clone() for n, p in parameters.items()}
    with torch.no_grad():
        weight = parameters[f"{projection.module}.weight"]
        projection.rows(weight)[projection.features[heads].flatten()] = 0
        bias = parameters.get(f"{projection.module}.bias")
        if bias is not None:
            bias[projection.features[heads].flatten()] = 0
    try:
        (gradients,) = autograd_gradients(model, loss_of(name), samples(name, 1, least=6))
    finally:
        with torch.no_grad():
            for n, p in parameters.items():
                p.copy_(saved[n])
    return [other.weight_by_head(gradients[f"{other.module}.weight"]) for other in looked_at]


def test_sizes_are_those_of_the_models():
    found = {name: detect_layout(build(name))[0] for name in HUGGING_FACE}
    sizes = {
        name: (layer.heads, layer.projections["K"].heads, layer.projections["Q"].features.shape[1])
        for name, layer in found.items()
    }
    assert sizes == {
        "gpt2": (3, 3, 6),
        "llama": (4, 2, 4),
        "qwen3": (4, 2, 6),
        "neox": (2, 2, 8),
        "phi3": (4, 2, 4),
    }
    assert detect_layout(build("memory_lm"))[1].name == "blocks.1.attention"
    (classifier,) = detect_layout(build("seq_classifier"))
    assert (classifier.heads, sorted(classifier.projections)) == (1, ["K", "Q", "V"])


class Renamed(nn.Module):
    """Self-attention with names of its own, fused or not, and what a reader would call it."""

    def __init__(self, fused=6, output=2, **attributes):
        super().__init__()
        self.mix = nn.Linear(4, fused)
        self.out = nn.Linear(output, 4)
        for attribute, value in attributes.items():
            setattr(self, attribute, value)


def test_a_mapping_describes_what_is_not_known():
    model = nn.ModuleDict({"a": Renamed(12, 4), "b": Renamed(12, 4), "c": nn.Linear(2, 2)})
    mapping = {"attention": "[ab]", "qkv": "mix", "o": "out", "order": "interleaved", "heads": 2}
    first, second = layout_from(model, mapping)
    assert (first.name, second.name) == ("a", "b")
    assert first.projections["Q"].features.tolist() == [[0, 1], [6, 7]]
    assert first.projections["V"].features.tolist() == [[4, 5], [10, 11]]
    assert first.projections["O"].side == "input"
    # 16 outputs for 4 queries of 2 leave 2 keys and 2 values
    grouped = nn.ModuleDict({"a": Renamed(16, 8)})
    (layer,) = layout_from(grouped, mapping | {"attention": "a", "heads": 4, "head_dim": 2})
    assert layer.projections["K"].features.tolist() == [[4, 5], [12, 13]]
    nested = nn.ModuleDict({"blocks": model})
    mapping |= {"attention": "blocks.*", "o": None, "heads": 2}
    del nested["blocks"]["c"]
    assert [layer.name for layer in layout_from(nested, mapping)] == ["blocks.a", "blocks.b"]
    separate = nn.ModuleDict({n: nn.Linear(4, 4 if n == "wq" else 2) for n in ("wq", "wk", "wv")})
    mapping = {"attention": "", "q": "wq", "k": "wk", "v": "wv", "head_dim": 2, "o": None}
    (layer,) = layout_from(separate, mapping)
    assert (layer.heads, layer.projections["K"].heads, set(layer.projections)) == (2, 1, set("QKV"))


def test_fused_orders():
    contiguous = fused_features("contiguous", 4, 2, 2)
    assert {b: f.flatten().tolist() for b, f in contiguous.items()} == {
        "Q": list(range(8)),
        "K": list(range(8, 12)),
        "V": list(range(12, 16)),
    }
    interleaved = fused_features("interleaved", 4, 2, 2)
    assert interleaved["Q"].tolist() == [[0, 1], [2, 3], [8, 9], [10, 11]]
    assert interleaved["K"].tolist() == [[4, 5], [12, 13]]
    assert interleaved["V"].tolist() == [[6, 7], [14, 15]]
    with pytest.raises(ValueError, match="contiguous or interleaved, received 'qvk'"):
        fused_features("qvk", 4, 2, 2)


def test_an_output_projection_called_dense_is_found_within_attention_alone():
    sizes = {**SIZES, "num_attention_heads": 2}
    model = PhiForCausalLM(PhiConfig(**sizes, num_key_value_heads=2))
    assert [x.projections["O"].module for x in detect_layout(model)] == [
        f"model.layers.{layer}.self_attn.dense" for layer in range(2)
    ]
    attention = SilentAttention(num_heads=2)
    del attention.o_proj
    (layer,) = detect_layout(nn.ModuleDict({"attention": attention, "dense": nn.Linear(8, 8)}))
    assert set(layer.projections) == set("QKV")


class OddAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv_proj = nn.Linear(8, 24)


class SilentAttention(nn.Module):
    def __init__(self, query=8, key=8, value=8, **attributes):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(8, query), nn.Linear(8, key)
        self.v_proj, self.o_proj = nn.Linear(8, value), nn.Linear(query, 8)
        for name, size in attributes.items():
            setattr(self, name, size)


class OddOutput(SilentAttention):
    def __init__(self):
        super().__init__(num_heads=2)
        self.mix = self.o_proj
        del self.o_proj


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            nn.Sequential(nn.Linear(2, 2)),
            r"no attention layer found among '' \(Sequential\), '0' \(Linear\).*layout=",
        ),
        (nn.MultiheadAttention(4, 2), r"no attention layer found among '' \(MultiheadAttention\)"),
        (
            nn.ModuleDict({"x": OddAttention()}),
            r"OddAttention at 'x' fuses query, key and value in 'qkv_proj' in an unknown order: "
            r"qkv_proj.weight \(24, 8\)",
        ),
        (SilentAttention(), "tells neither its number of heads nor their width: q_proj.weight"),
        (OddOutput(), "OddOutput at '' may have its output projection in 'mix': q_proj.weight .*'o' is None"),
        (SilentAttention(num_heads=3), "{'heads': 3}, do not fit the shapes"),
        (SilentAttention(num_heads=2, head_dim=8), "{'heads': 2, 'head_dim': 8}, do not fit"),
        (SilentAttention(key=6, value=6, head_dim=2), "do not fit the shapes"),
        (SilentAttention(key=4, head_dim=2), "do not fit the shapes"),
        (SilentAttention(key=4, value=4, head_dim=2, num_key_value_heads=4), "'kv_heads': 4"),
    ],
)
def test_an_unknown_layout_says_what_was_found(model, message):
    with pytest.raises(ValueError, match=message):
        detect_layout(model)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"attention": "a", "qkv": "mix", "rows": 3}, r"unknown keys \['rows'\] and lacks \['order'\]"),
        ({"q": "x", "k": "y", "v": "z"}, r"lacks \['attention'\]"),
        ({"attention": "b*", "qkv": "mix", "order": "contiguous"}, "no module's name matches 'b\\*'"),
        ({"attention": "a", "qkv": "mixed", "order": "contiguous"}, "no module 'mixed' in or beside 'a'"),
        ({"attention": "a", "qkv": "mix", "order": "contiguous"}, "does not tell its number of heads"),
        ({"attention": "a", "qkv": "mix", "order": "contiguous", "heads": 5}, "do not fit the shapes"),
        (
            {"attention": "a", "qkv": "mix", "order": "contiguous", "heads": 2, "o": "out"},
            "'a.out' reads 3 features, but 2 heads of 2 give 4",
        ),
        (
            {"attention": "a", "q": "norm", "k": "mix", "v": "mix"},
            "'norm' is a LayerNorm, expected an nn.Linear",
        ),
    ],
)
def test_a_mapping_that_does_not_fit_is_refused(mapping, message):
    model = nn.ModuleDict({"a": Renamed(12, 3), "norm": nn.LayerNorm(4)})
    with pytest.raises(ValueError, match=message):
        layout_from(model, mapping)
