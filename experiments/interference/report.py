"""The Markdown report of a run, every number of which stands in its arrays and tables."""

from dataclasses import dataclass

import pandas as pd

from benchmarks.report import markdown_table
from theria.interference import InterferenceResult
from theria.interference.significance import Significance

MEANING = {
    "directional": "sum of g_i^2 |g_j| / I: how hard sample i of A presses on what sample j of B would move",
    "signed": "sum of g_i g_j / I: minus the change of j's loss by a step on i, so negative is conflict",
    "symmetric": "sum of |g_i| |g_j| / I: how much both move the same entries, whichever way",
}

_PAIR = ("block", "layer", "head", "sample_i", "sample_j")


@dataclass(frozen=True)
class Report:
    """What a report is written from.

    Attributes:
        title: of the page.
        provenance: lines on the command, the device and the versions.
        model: its name.
        tasks: names of the files of both tasks.
        result: the scores.
        heads, conflicts: tables of the run.
        tests: of significance, or why there are none.
        identity: largest deviation of mean_i M_ij from |g_j|_1, where it applies.
        top: rows of tables here.
        confidence: of intervals.
    """

    title: str
    provenance: str
    model: str
    tasks: tuple[str, str]
    result: InterferenceResult
    heads: pd.DataFrame
    conflicts: pd.DataFrame
    tests: Significance | str
    identity: float | None
    top: int
    confidence: float

    def text(self) -> str:
        """The page."""
        lines = [f"# {self.title}", "", self.provenance, *self._what(), ""]
        for variant in self.result.variants:
            lines += [f"## {variant.capitalize()}", "", f"{MEANING[variant]}.", ""]
            lines += [f"![{variant} by layer and head]({variant}.png)", ""]
            lines += [*self._heads(variant), "", *self._conflicts(variant), ""]
        lines += ["## Significance", "", *self._significance(), ""]
        lines += ["## Diagnostics", "", *self._diagnostics(), ""]
        lines += ["## What these figures cannot say", "", *self._limits(), ""]
        return "\n".join(lines)

    def _what(self) -> list[str]:
        result = self.result
        ridge = result.ridge
        rows = [
            [
                name,
                task,
                str(len(ids)),
                f"{tokens.min()} to {tokens.max()}",
                str(int(sum(missing[block].any(axis=1).sum() for block in result.blocks))),
            ]
            for name, task, ids, tokens, missing in (
                ("A", self.tasks[0], result.ids_a, result.tokens_a, result.missing_a),
                ("B", self.tasks[1], result.ids_b, result.tokens_b, result.missing_b),
            )
        ]
        return [
            f"Model: `{self.model}`, layers {_list(result.layers)}, blocks {_list(result.blocks)}. "
            f"Fisher information: {result.fisher}. Ridge: {ridge.kind} {ridge.strength:g}.",
            "",
            *markdown_table(["task", "file", "samples", "tokens", "without gradient (over blocks)"], rows),
            "",
            "Heads of K and V are key-value heads. `arrays.npz` holds every score, `heads.csv` every head, "
            "`conflicts.csv` the strongest pairs and `samples.csv` what the samples are.",
        ]

    def _heads(self, variant: str) -> list[str]:
        known = self.heads.dropna(subset=[variant])
        order = known.sort_values(variant, ascending=variant == "signed", kind="stable").head(self.top)
        rows = [
            [
                row["block"],
                str(row["layer"]),
                str(row["head"]),
                f"{row[variant]:.4g}",
                f"{row[f'{variant}_low']:.4g} to {row[f'{variant}_high']:.4g}",
                f"{row[f'{variant}_per_l1']:.4g}",
            ]
            for _, row in order.iterrows()
        ]
        first = "most negative" if variant == "signed" else "largest"
        header = [
            "block",
            "layer",
            "head",
            "mean M",
            f"{self.confidence:.0%} interval",
            "mean M / l1 norm of g_j",
        ]
        return [f"Heads with the {first} means over pairs:", "", *markdown_table(header, rows)]

    def _conflicts(self, variant: str) -> list[str]:
        mine = self.conflicts[self.conflicts["variant"] == variant]
        order = mine.sort_values("score", ascending=variant == "signed", kind="stable").head(self.top)
        rows = [[*(str(row[name]) for name in _PAIR), f"{row['score']:.4g}"] for _, row in order.iterrows()]
        if not rows:
            return ["No pair is in conflict."]
        header = ["block", "layer", "head", "sample of A", "sample of B", "M"]
        return ["Strongest pairs:", "", *markdown_table(header, rows)]

    def _significance(self) -> list[str]:
        if isinstance(self.tests, str):
            return [f"Not tested: {self.tests}."]
        tests = self.tests
        ranked = tests.ranked()
        found = [finding for finding in ranked if finding.significant]
        rows = [
            [
                *(f.block, str(f.layer), str(f.head), f"{f.mean:.4g}", f"{f.effect:.2f}"),
                *(f"{f.p_value:.4g}", f"{f.adjusted:.4g}", "yes" if f.significant else "no"),
            ]
            for f in ranked[: self.top]
        ]
        kind = "all labellings there are" if tests.exact else "labellings, the given one included"
        header = ["block", "layer", "head", "mean M", "distance", "p", "adjusted p", "significant"]
        opposed = sum(finding.mean < 0 for finding in found)
        return [
            f"Labels of samples were exchanged under the Fisher information of all samples together "
            f"({tests.permutations} {kind}; alternative: {tests.alternative}; correction over "
            f"{len(ranked)} heads: {tests.correction}). Significant at {tests.level:g}: {len(found)}, of "
            f"which with a mean below 0: {opposed}. The distance is in standard deviations of relabelled "
            "means.",
            "",
            *markdown_table(header, rows),
        ]

    def _diagnostics(self) -> list[str]:
        columns = ["slice_size", "l1_a", "l1_b", "ridge_share", "clamped_share", "zero_share"]
        columns += ["negative_share"] if "negative_share" in self.heads else []
        means = self.heads.groupby("block", sort=False)[columns].mean()
        rows = [[str(block), *(f"{value:.4g}" for value in row)] for block, row in means.iterrows()]
        return ["Means over heads:", "", *markdown_table(["block", *columns], rows)]

    def _limits(self) -> list[str]:
        lines = [
            "- With task A's Fisher information and no ridge the mean over i of the directional M_ij is "
            "|g_j|_1 exactly, whatever task A is: averages of it rank heads by the size of B's gradients "
            "and say nothing about A. M / |g_j|_1 stands beside it, whose mean over A is 1."
        ]
        if self.identity is not None:
            lines[0] += f" Here, with its ridge, the two differ by {self.identity:.3g} of |g_j|_1 at most."
        return [
            *lines,
            "- The Fisher information is a diagonal: covariance between entries is left out.",
            "- The directional and the symmetric score are magnitudes and do not tell help from harm; the "
            "signed one is a first-order statement about a small preconditioned step.",
            "- Scores grow with gradients: blocks of different sizes, and samples of different lengths, do "
            "not compare at face value. A mean over more tokens has the smaller gradient.",
            "- Entries with little information are held by the ridge: see its share of each block above.",
            "- A significant signed score says that samples of different tasks agree less than samples at "
            "large do; the tasks oppose each other on the average only where its mean is below 0 as well.",
            "- Intervals and tests take the Fisher information as given and hold for these samples' source.",
        ]


def _list(items: object) -> str:
    return ", ".join(str(item) for item in items)  # type: ignore[attr-defined]  # any sequence
