"""Finding the attention layers of a model, and how their projections are laid out."""

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from theria.interference.layout import AttentionLayer, Projection, fused_features, separate_features
from theria.models.seq_classifier import SeqClassifier

_SEPARATE = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"))
_OUTPUTS = ("o_proj", "out_proj", "out_lin", "output.dense")
_OUTPUTS_WITHIN = (*_OUTPUTS, "dense")
"""Beside an attention module, a child called dense may be anything."""
_FUSED = ("c_attn", "query_key_value", "qkv_proj", "qkv", "Wqkv", "wqkv", "W_pack", "in_proj")

# The order within a fused projection cannot be seen in shapes, and one child's name stands for several
# (qkv_proj is contiguous in Phi-3 and neither order in CodeGen): it is known by class, or given by the user.
_FUSED_CLASSES: dict[str, dict[str, str]] = {
    "GPT2Attention": {"qkv": "c_attn", "o": "c_proj", "order": "contiguous"},
    "GPTNeoXAttention": {"qkv": "query_key_value", "o": "dense", "order": "interleaved"},
    "BloomAttention": {"qkv": "query_key_value", "o": "dense", "order": "interleaved"},
    "Phi3Attention": {"qkv": "qkv_proj", "o": "o_proj", "order": "contiguous"},
}

_ATTRIBUTES = {
    "heads": ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads"),
    "head_dim": ("head_dim", "head_size", "attention_head_size"),
}

_KEYS = ("attention", "q", "k", "v", "qkv", "o", "order", *_ATTRIBUTES)

_HOW = (
    "Pass layout={'attention': pattern of module names, 'q': ..., 'k': ..., 'v': ... or 'qkv': ... with "
    "'order': 'contiguous' or 'interleaved', 'o': ..., and where needed 'heads', 'kv_heads', 'head_dim'}"
)


def detect_layout(model: nn.Module) -> tuple[AttentionLayer, ...]:
    """The attention layers of a model in the order of its modules.

    Separate projections are found by their names and measured by their shapes; a fused one is taken apart
    where its class is known (GPT-2, GPT-NeoX, Bloom, Phi-3). An output projection is looked for beside the
    projections and one module further out. Heads come from the attention module's attributes or its
    ``config``, and have to agree with the shapes.

    Raises:
        ValueError: where no attention is found, a fused projection's order or what may be an output
            projection is not known, or sizes disagree; the message says what was found and how to give the
            layout.
    """
    layers = []
    for name, module in model.named_modules():
        found = _recognise(name, module)
        if found is not None:
            layers.append(_layer(model, name, found))
            if "o" not in found and "O" not in layers[-1].projections:
                _check_no_output(module, layers[-1])
    if not layers:
        raise ValueError(f"no attention layer found among {_inventory(model)}. {_HOW}")
    return tuple(layers)


def layout_from(model: nn.Module, mapping: Mapping[str, Any]) -> tuple[AttentionLayer, ...]:
    """The attention layers that a mapping describes.

    Args:
        model: holds them.
        mapping: ``attention``, a pattern of dotted module names ("*" is any one part); the names of the
            projections within these modules or one module further out: ``q``, ``k`` and ``v``, or ``qkv`` and
            its ``order`` (see `fused_features`), and ``o`` where there is one; ``heads``, ``kv_heads`` and
            ``head_dim`` where they cannot be found as in `detect_layout`.

    Raises:
        ValueError: for unknown or missing keys, a pattern without match, and what `detect_layout` refuses.
    """
    unknown = sorted(set(mapping) - set(_KEYS))
    wanted = ("qkv", "order") if "qkv" in mapping else ("q", "k", "v")
    missing = [key for key in ("attention", *wanted) if key not in mapping]
    if unknown or missing:
        raise ValueError(f"layout has unknown keys {unknown} and lacks {missing}; known are {list(_KEYS)}")
    matched = [name for name, _ in model.named_modules() if _matches(name, mapping["attention"])]
    if not matched:
        raise ValueError(f"no module's name matches {mapping['attention']!r}; there are {_inventory(model)}")
    return tuple(_layer(model, name, mapping) for name in matched)


def _matches(name: str, pattern: str) -> bool:
    """Whether every part of a dotted name matches that of the pattern."""
    parts, patterns = name.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def _recognise(name: str, module: nn.Module) -> Mapping[str, Any] | None:
    """What is known of a module's projections by name; None where it is no attention."""
    children = {child for child, _ in module.named_children()}
    if isinstance(module, SeqClassifier):
        return {"q": "q_proj", "k": "k_proj", "v": "v_proj", "heads": 1, "o": None}
    for cls in type(module).__mro__:
        known = _FUSED_CLASSES.get(cls.__name__)
        if known is not None and known["qkv"] in children:
            return known
    for names in _SEPARATE:
        if children.issuperset(names):
            return dict(zip("qkv", names, strict=True))
    looks_like_attention = "attention" in type(module).__name__.lower()
    fused = sorted(children.intersection(_FUSED))
    if looks_like_attention and fused:
        raise ValueError(
            f"{type(module).__name__} at {name!r} fuses query, key and value in {fused[0]!r} in an unknown "
            f"order: {_describe(module)}. {_HOW}"
        )
    return None


def _layer(model: nn.Module, name: str, names: Mapping[str, Any]) -> AttentionLayer:
    module = model.get_submodule(name)
    where = f"{type(module).__name__} at {name!r}"
    projections = {}
    if "qkv" in names:
        path, linear, transposed = _linear(model, name, names["qkv"])
        outputs = linear.shape[1 if transposed else 0]
        heads, kv_heads, head_dim = _fused_sizes(where, module, names, outputs)
        features = fused_features(names["order"], heads, kv_heads, head_dim)
        projections = {b: Projection(path, "output", transposed, f) for b, f in features.items()}
    else:
        found = {block: _linear(model, name, names[block.lower()]) for block in "QKV"}
        outputs_of = {b: w.shape[1 if transposed else 0] for b, (_, w, transposed) in found.items()}
        heads, kv_heads, head_dim = _separate_sizes(where, module, names, outputs_of)
        for block, (path, _, transposed) in found.items():
            count = heads if block == "Q" else kv_heads
            features_of = separate_features(count, head_dim)
            projections[block] = Projection(path, "output", transposed, features_of)
    output = names["o"] if "o" in names else _output_of(model, name)
    if output is not None:
        path, linear, transposed = _linear(model, name, output)
        inputs = linear.shape[0 if transposed else 1]
        if inputs != heads * head_dim:
            raise ValueError(
                f"{where}: {path!r} reads {inputs} features, but {heads} heads of {head_dim} give "
                f"{heads * head_dim}"
            )
        projections["O"] = Projection(path, "input", transposed, separate_features(heads, head_dim))
    return AttentionLayer(name, projections, heads)


def _separate_sizes(
    where: str, module: nn.Module, names: Mapping[str, Any], outputs: Mapping[str, int]
) -> tuple[int, int, int]:
    given = _given_sizes(module, names)
    query, key, value = outputs["Q"], outputs["K"], outputs["V"]
    head_dim = given["head_dim"] or (query // given["heads"] if given["heads"] else None)
    if not head_dim:
        raise ValueError(
            f"{where} tells neither its number of heads nor their width: {_describe(module)}. {_HOW}"
        )
    sizes = {"heads": query // head_dim, "kv_heads": key // head_dim, "head_dim": head_dim}
    fits = query == sizes["heads"] * head_dim and key == value == sizes["kv_heads"] * head_dim
    return _checked(where, module, given, sizes, fits=fits)


def _fused_sizes(
    where: str, module: nn.Module, names: Mapping[str, Any], outputs: int
) -> tuple[int, int, int]:
    given = _given_sizes(module, names)
    heads = given["heads"]
    if not heads:
        raise ValueError(f"{where} does not tell its number of heads: {_describe(module)}. {_HOW}")
    if given["head_dim"]:
        head_dim = given["head_dim"]
        kv_heads = given["kv_heads"] or (outputs // head_dim - heads) // 2
    else:
        kv_heads = given["kv_heads"] or heads
        head_dim = outputs // (heads + 2 * kv_heads)
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    return _checked(where, module, given, sizes, fits=outputs == (heads + 2 * kv_heads) * head_dim)


def _checked(
    where: str, module: nn.Module, given: Mapping[str, int | None], sizes: Mapping[str, int], *, fits: bool
) -> tuple[int, int, int]:
    agrees = all(given[name] in (None, size) for name, size in sizes.items())
    divides = sizes["kv_heads"] > 0 and sizes["heads"] % sizes["kv_heads"] == 0
    if not (fits and agrees and divides):
        told = {name: size for name, size in given.items() if size is not None}
        raise ValueError(f"{where}: sizes told, {told}, do not fit the shapes: {_describe(module)}. {_HOW}")
    return sizes["heads"], sizes["kv_heads"], sizes["head_dim"]


def _given_sizes(module: nn.Module, names: Mapping[str, Any]) -> dict[str, int | None]:
    """Sizes from the mapping, or else the module's attributes, or else its configuration's."""
    return {size: next(_told(module, names, size), None) for size in _ATTRIBUTES}


def _told(module: nn.Module, names: Mapping[str, Any], size: str) -> Iterator[int]:
    if size in names:
        yield names[size]
    for source in (module, getattr(module, "config", None)):
        for attribute in _ATTRIBUTES[size]:
            value = getattr(source, attribute, None)
            if isinstance(value, int):
                yield value


def _linear(model: nn.Module, attention: str, child: str) -> tuple[str, nn.Parameter, bool]:
    """Full name of a linear map in the attention module or one further out, its weight and orientation."""
    path = next((p for p in _paths(attention, child) if _module_at(model, p) is not None), None)
    if path is None:
        raise ValueError(
            f"no module {child!r} in or beside {attention!r}: {_describe(model.get_submodule(attention))}"
        )
    linear = model.get_submodule(path)
    weight = getattr(linear, "weight", None)
    if isinstance(weight, nn.Parameter) and weight.ndim == 2:
        if isinstance(linear, nn.Linear):
            return path, weight, False
        # transformers' Conv1D, told by its structure: nf outputs, weight (inputs, outputs)
        if getattr(linear, "nf", None) == weight.shape[1]:
            return path, weight, True
    raise ValueError(
        f"{path!r} is a {type(linear).__name__}, expected an nn.Linear or a Conv1D with a weight of rank 2"
    )


def _output_of(model: nn.Module, attention: str) -> str | None:
    """Name of the output projection beside the others, or one module further out."""
    for place, children in enumerate((_OUTPUTS_WITHIN, _OUTPUTS)):
        for child in children:
            paths = _paths(attention, child)
            if place < len(paths) and _module_at(model, paths[place]) is not None:
                return child
    return None


def _check_no_output(module: nn.Module, layer: AttentionLayer) -> None:
    """Raise ValueError if some other child reads as many features as the heads give."""
    known = {projection.module for projection in layer.projections.values()}
    width = layer.projections["Q"].features.numel()
    for child, linear in module.named_children():
        other = _paths(layer.name, child)[0] not in known
        if other and isinstance(linear, nn.Linear) and linear.in_features == width:
            raise ValueError(
                f"{type(module).__name__} at {layer.name!r} may have its output projection in {child!r}: "
                f"{_describe(module)}. {_HOW}; 'o' is None where there is none"
            )


def _paths(attention: str, child: str) -> list[str]:
    """Where a child may stand: in the attention module, or beside it."""
    if not attention:
        return [child]
    parent = attention.rpartition(".")[0]
    return [f"{attention}.{child}", f"{parent}.{child}" if parent else child]


def _module_at(model: nn.Module, path: str) -> nn.Module | None:
    module: Any = model
    for part in path.split("."):
        module = module._modules.get(part)
        if module is None:
            return None
    return module


def _describe(module: nn.Module) -> str:
    """Weights of a module by name and shape."""
    shapes = [f"{n} {tuple(p.shape)}" for n, p in module.named_parameters() if n.endswith("weight")]
    return ", ".join(shapes[:8]) or "no weights"


def _inventory(model: nn.Module) -> str:
    """Names and classes of modules that look like attention, or of the first ones."""
    modules = [(n, type(m).__name__) for n, m in model.named_modules()]
    likely = [f"{n!r} ({cls})" for n, cls in modules if "attention" in cls.lower()]
    return ", ".join(likely[:4] or [f"{n!r} ({cls})" for n, cls in modules[:8]])
