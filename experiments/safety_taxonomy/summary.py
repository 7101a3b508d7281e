"""The study in words and tables; every sentence that depends on a number is made from it."""

from collections.abc import Sequence

import pandas as pd

from benchmarks.report import markdown_table
from experiments.safety_taxonomy.depth import COMPARED, PUBLISHED
from experiments.safety_taxonomy.variants import VARIANTS

_STATISTICS = ("stats_detach_logits_sdpa", "stats_detach_softmax_output_sdpa")
_HEALTHY, *_COLLAPSED = COMPARED


INTRODUCTION = """# Ways to break attention, and what each does to second-order meta-learning

Every variant is put around every backend and audited (`theria.curvature`): its verdict beside the expected
one, the share of its curvature that survives, and |FULL - FO| / |FULL| by the depth of the inner loop beside
the published figures. There is a section for each device and dtype, with the command that renews it.
"""


def summarise(
    table: pd.DataFrame, depths: pd.DataFrame | None, provenance: Sequence[str], picture: str
) -> str:
    """A section of the report: the crossed table and the FULL-FO difference by depth.

    Args:
        table: rows of `theria.curvature.report`.
        depths: of `differences_by_depth`; None leaves them out.
        provenance: lines on where the figures come from.
        picture: path of the heat map from the page.
    """
    lines = [
        *(f"{line}  " for line in provenance),
        "",
        f"![variants by diagnostics]({picture})",
        "",
        "### Verdicts",
        "",
        *_verdicts(table),
        "",
        "### What survives",
        "",
        *_surviving(table),
    ]
    if depths is not None:
        lines += ["", "### |FULL - FO| / |FULL| by depth", "", *_by_depth(depths)]
    return "\n".join([*lines, ""])


def _verdicts(table: pd.DataFrame) -> list[str]:
    backends = list(dict.fromkeys(table["attention_backend"]))
    lines = []
    for name in dict.fromkeys(table["wrapper"]):
        variant = VARIANTS[name]
        cells = []
        for backend in backends:
            own = table[(table["wrapper"] == name) & (table["attention_backend"] == backend)]
            verdict, status = own["verdict"].iloc[0], own["status"].iloc[0]
            cells.append(verdict if status == "OK" else f"{verdict} ({status})")
        lines.append([f"`{name}`", variant.imitates, variant.verdict.value, *cells])
    others = int((table["status"] == "HARD_FAIL_OTHER").sum())
    return [
        *markdown_table(["variant", "imitates", "expected", *backends], lines),
        "",
        f"Rows with HARD_FAIL_OTHER: {others} of {len(table)}.",
    ]


def _surviving(table: pd.DataFrame) -> list[str]:
    backend = table["attention_backend"].iloc[0]
    first = table[table["attention_backend"] == backend].drop_duplicates("wrapper").set_index("wrapper")
    columns = {
        "query": "surviving_query",
        "key": "surviving_key",
        "value": "surviving_value",
        "cotangent": "surviving_cotangent",
        "q_proj": "surviving_q_proj",
        "k_proj": "surviving_k_proj",
        "v_proj": "surviving_v_proj",
        "attention": "surviving_attn",
        "path": "second_order_magnitude_attn",
    }
    lines = [
        [f"`{name}`", *(_percent(row[c]) for c in columns.values()), str(row["second_order_path_attn_any"])]
        for name, row in first.iterrows()
    ]
    said = [
        f"Over {backend}. The first four columns: the least share, over all calls, of the callable's own"
        " curvature by each input, as a variable of the gradients of query, key and value or as what the"
        " gradient is taken by. Then the same of the classifier's support loss by its projections, and of all"
        " three together along one direction. Last the magnitude of that second-order path, and whether it"
        " counts as existing (1% or more).",
        "",
        *markdown_table(["variant", *columns, "path exists"], lines),
    ]
    for name in _STATISTICS:
        if name in first.index:
            row = first.loc[name]
            said += [
                "",
                f"`{name}`: as a boolean the attention path"
                f" {'exists' if row['second_order_path_attn_any'] else 'is gone'}, with"
                f" {_percent(row['second_order_magnitude_attn'])} of the reference's magnitude. Of the"
                f" reference's attention curvature {_percent(row['surviving_attn'])} survives: v_proj's own,"
                " which runs through the loss and not through the attention. Straight through the"
                f" callable {_percent(row['surviving_query'])}, {_percent(row['surviving_key'])} and"
                f" {_percent(row['surviving_value'])} survive by query, key and value.",
            ]
    return said


def _by_depth(depths: pd.DataFrame) -> list[str]:
    seeds = depths["seed"].nunique()
    lines = []
    for name in COMPARED:
        published = PUBLISHED.get(name, {})
        for count in sorted(depths["inner_steps"].unique()):
            own = depths[(depths["variant"] == name) & (depths["inner_steps"] == count)]
            found = own["rel_diff"]
            lines.append(
                [
                    f"`{name}`",
                    str(count),
                    f"{published[count]:.3f}" if count in published else "",
                    f"{found.mean():.3f} ± {found.std():.3f}",
                    f"{found.min():.3f} to {found.max():.3f}",
                    f"{own['meta_gradient_rel_error'].mean():.3f}",
                ]
            )
    header = ["variant", "k", "published", "mean ± sd", "range", "error of FULL against baseline"]
    return [
        f"Reference backend, float32, parameters at initialisation, inner rate 0.4, 16 tasks, {seeds} seeds;"
        " published: one step, seed 0.",
        "",
        *markdown_table(header, lines),
        "",
        "Published text says both that the difference stays high at k = 20 under collapse and that collapse"
        " suppresses it. What the seeds here say, depth by depth:",
        "",
        *(line for name in _COLLAPSED for line in _what_is_true(depths, name)),
    ]


def _what_is_true(depths: pd.DataFrame, collapsed: str) -> list[str]:
    """Whether a collapse lowers the difference, depth by depth, from pairs of the same seed."""
    wide = depths.pivot_table(index=["inner_steps", "seed"], columns="variant", values="rel_diff")
    said: list[str] = []
    always: list[str] = []
    overlapping: list[str] = []
    for count, pairs in wide.groupby(level="inner_steps"):
        lower = int((pairs[collapsed] < pairs[_HEALTHY]).sum())
        ratio = pairs[collapsed].mean() / pairs[_HEALTHY].mean()
        said.append(f"- k = {count}: {ratio:.2f} times the baseline's mean, lower in {lower} of {len(pairs)}")
        (always if lower == len(pairs) else overlapping).append(f"k = {count}")
    errors = depths[depths["variant"] == collapsed].groupby("inner_steps")["meta_gradient_rel_error"].mean()
    conclusion = f"So under `{collapsed}` rel_diff is suppressed"
    conclusion += f" in every seed at {', '.join(always)}" if always else " at no depth in every seed"
    if overlapping:
        conclusion += (
            f"; at {', '.join(overlapping)} the curvature that remains, the head's, makes it as large as the"
            " healthy one in some seeds, so that there a single run's rel_diff tells nothing"
        )
    conclusion += (
        ". Nor is it ever near zero: the number alone, without the healthy one beside it, does not show a"
        f" collapse, while the FULL meta-gradient is off by {errors.min():.0%} to {errors.max():.0%} in the"
        " mean."
    )
    return [f"`{collapsed}` beside `{_HEALTHY}`, same parameters and tasks:", "", *said, "", conclusion, ""]


def _percent(value: object) -> str:
    return "" if pd.isna(value) else f"{float(str(value)):.1%}"
