"""The page of a study: what was trained, its figures beside xz and the controls, and the way there."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.report import markdown_table

TITLES = {
    "memory": "memory",
    "attention": "attention alone",
    "no_polarization": "memory, no polarisation loss",
}

Figures = Mapping[str, Any]


def page(runs: Sequence[Figures], xz: Mapping[str, float], config: str) -> str:
    """Markdown of the figures of some variants, the first of which names the data."""
    first = runs[0]
    lines = [f"# {config}: text and recall", "", *dict.fromkeys(run["provenance"] for run in runs)]
    lines += [*_what(runs), "", "## Text", "", *_text(runs, xz), "", "## Recall", "", *_recall(runs), ""]
    for run in runs:
        lines += [f"## {TITLES[run['variant']]}: over training", "", *_history(run), ""]
    lines += ["## Corpus", "", "```", first["corpus"], "```", ""]
    return "\n".join(lines)


def _what(runs: Sequence[Figures]) -> list[str]:
    rows = [
        [
            TITLES[run["variant"]],
            f"{run['parameters']:,}",
            f"{run['steps']:,}",
            f"{run['steps'] * run['tokens_per_step'] / 1e6:.1f} M",
            f"{run['seconds'] / 60:.1f}",
            f"{run['tokens_per_second']:,.0f}",
        ]
        for run in runs
    ]
    header = ["model", "parameters", "steps", "tokens", "minutes of fit", "tokens a second at its end"]
    recall = runs[0]["recall"]
    mixture = "No recall among the text."
    if recall is not None:
        mixture = (
            f"{100 * recall['share']:.0f}% of the training sequences are recall ({recall['min_pairs']} to "
            f"{recall['max_pairs']} pairs, {recall['queries']} queries, {recall['num_keys']} keys, "
            f"{recall['num_values']} values, filler: {recall['filler']}), all others text. Minutes "
            "are those of `theria fit`, reading the corpus and validations included."
        )
    return [*markdown_table(header, rows), "", mixture]


def _text(runs: Sequence[Figures], compressed: Mapping[str, float]) -> list[str]:
    rows = []
    for domain, xz in compressed.items():
        cells = [_number(run["figures"].get(f"test/{domain}_bits_per_byte")) for run in runs]
        rows.append([domain, *cells, f"{xz:.3f}"])
    header = ["domain", *(TITLES[run["variant"]] for run in runs), "xz -9e after the training text"]
    return [
        "Bits a byte over all of the test split, its windows read apart.",
        "",
        *markdown_table(header, rows),
    ]


def _recall(runs: Sequence[Figures]) -> list[str]:
    if runs[0]["recall"] is None:
        return ["There was none."]
    shown = {
        "all distances": "recall_accuracy",
        f"stored at most {runs[0]['reach']} tokens back": "recall_accuracy_inside",
        f"stored farther back than {runs[0]['reach']} tokens": "recall_accuracy_beyond",
        "memory switched off": "recall_accuracy_memory_off",
        "key never stored": "recall_never_stored_accuracy",
        "stored in the previous shard": "recall_previous_shard_accuracy",
    }
    rows = [
        [title, *(_number(run["figures"].get(f"test/{name}")) for run in runs)]
        for title, name in shown.items()
    ]
    header = ["share of right answers", *(TITLES[run["variant"]] for run in runs)]
    chance = 1 / runs[0]["recall"]["num_values"]
    said = f"Chance is {chance:.3f}. Blocks x (window - 1) = {runs[0]['reach']} tokens is attention's reach."
    shares = [
        f"{TITLES[run['variant']]}: the projected query's share of what reads the memory, by block, is "
        + ", ".join("/".join(f"{share:.3f}" for share in block) for block in run["shares"])
        + "."
        for run in runs
        if run["shares"]
    ]
    return [said, "", *markdown_table(header, rows), "", *shares]


def _history(run: Figures) -> list[str]:
    columns = [name for name in run["history"][-1] if name.endswith(("bits_per_byte", "_accuracy"))]
    columns += [name for name in run["history"][-1] if name.endswith(("_beyond", "_memory_off"))]
    columns += [name for name in ("gate_mean", "polarized_ratio") if name in run["history"][-1]]
    rows = [[str(row["step"]), *(_number(row.get(name)) for name in columns)] for row in run["history"]]
    return markdown_table(["step", *(name.replace("val/", "") for name in columns)], rows)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
