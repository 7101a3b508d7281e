"""The page of results: what was asked for, the method, and the variants measured on two trained models."""

import argparse
from pathlib import Path

from benchmarks.report import markdown_table, provenance
from callbacks.interference_figures import draw_heat_map
from experiments.interference.ablation import ablation, table, verdict
from experiments.interference.checklist import checklist
from experiments.interference.trained import Trained, train_classifier, train_language_model
from theria.interference import score
from theria.interference.significance import Significance, significance

METHODS = """\
We score how samples of two tasks interfere in the attention heads of a network with a diagonal-Fisher-
normalised score. For a block B among the query, key, value and output projections of layer l and head h,
let g_i be the gradient of sample i's loss restricted to the head's rows (query, key, value) or columns
(output) of the projection, and I_k = mean_i g_ik^2 the diagonal of the empirical Fisher information. The
directional score M_ij = sum_k g_ik^2 / (I_k + ridge) |g_jk| says how strongly sample i of task A presses,
relative to task A's own average pressure, on the entries that sample j of task B would move. It is diagonal
(covariance between entries is left out), directional (M_ij is not M_ji: i enters by its share of the
information, j by its magnitude) and unsigned (it tells where, not whether, tasks disagree). The signed
score sum_k g_ik g_jk / (I_k + ridge) is minus the first-order change of j's loss under a small Fisher-
preconditioned step on i, so negative values are conflicts; the symmetric score sum_k |g_ik| |g_jk| / (I_k +
ridge) bounds it. The ridge is relative, 1e-3 of the mean of I over the projection, unless said otherwise.
Under task A's information the mean of the directional score over i is |g_j|_1, whatever A is, so that we
report M_ij / |g_j|_1 beside it and rank heads by the signed score. Key-value heads count once however many
query heads they serve. Significance is by permutation of the samples' labels under the information of all
samples together, with Benjamini-Hochberg correction over blocks, layers and heads; intervals are by the
pigeonhole bootstrap over samples of both tasks."""

LEFT_OUT = """\
- **Full Fisher information.** A head's slice of p entries has p^2 of them: {entries} entries in the largest
  slice of the models here make {here}, and one query head of GPT-2 small (49,216 entries) makes 9.0 GiB in
  float32, for one of its 576 head blocks. Nor does it say more: with fewer samples than entries F = sum_i
  g_i g_i^T / n has rank n at most, and where gradients are linearly independent g_i^T F^+ g_j is n for i =
  j and 0 for any two different samples that F is made of. What a ridge makes of that is a matter of the
  ridge. And only the signed score has such a form: g_ik^2 / I_k and |g_jk| are statements about single
  entries, which a matrix that mixes entries does not leave.
- **Kronecker factors.** The information of a projection as the product of a factor of its inputs and one of
  its outputs is affordable. But heads share the factor of the side that they do not own, and the other
  mixes them unless it is cut into blocks by head, so that scores of heads would no longer add up to those
  of their projection, which is what the head-resolved reading rests on. It also presumes that inputs and
  gradients of outputs are independent within a sample, and again gives a signed score alone.
- **What it would take to see the difference**: a signed score with a block-diagonal Kronecker factor per
  head, beside the diagonal one, on a model small enough for the full matrix. That has not been measured
  here."""


def study(args: argparse.Namespace) -> Path:
    """Train both models, measure, and write the page; its path."""
    models = (
        train_language_model(args.steps, args.samples, args.seed),
        train_classifier(args.steps, args.samples, args.seed),
    )
    return write_page(models, args)


def write_page(models: tuple[Trained, ...], args: argparse.Namespace) -> Path:
    """Write the page of trained models, and their heat maps beside it; its path."""
    out: Path = args.out
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = ["# Interference", "", provenance("experiments.interference")]
    lines += ["## What was asked for", "", *checklist(), "## Method", "", METHODS, ""]
    lines += ["## Variants and pooling", "", *_legend(args.top)]
    for model in models:
        lines += _section(model, args)
    largest = max(models, key=_entries)
    lines += ["## Fisher information that is left out", ""]
    lines += [LEFT_OUT.format(entries=f"{_entries(largest):,}", here=_size(4 * _entries(largest) ** 2)), ""]
    out.write_text("\n".join(lines), encoding="utf-8")
    return out


def _legend(top: int) -> list[str]:
    return [
        "Scores of every sample of A with every sample of B, relative ridge 1e-3. The Fisher information is "
        "task A's (a), the plain mean of both tasks' (pooled) or the mean over all samples (pooled_n). "
        "Figures beside A's compare a variant with itself under task A's information: Spearman correlation "
        f"over pairs and heads, over the means of heads, and the share of its {top} strongest pairs that "
        "stay. The last column is the Spearman correlation with the directional score under task A's "
        "information, for the signed score that of conflict, its negative. All are means over blocks.",
        "",
    ]


def _section(model: Trained, args: argparse.Namespace) -> list[str]:
    rows = ablation(model, args.top)
    name = f"{args.out.stem}_{model.name}.png"
    tests = significance(model.gradients, model.task_a, model.task_b, seed=args.seed)
    result = score(model.gradients, model.task_a, model.task_b, variants=("signed",), fisher="pooled_n")
    framed = {block: tests.significant(block) for block in result.blocks}
    draw_heat_map(result, "signed", significant=framed).savefig(args.out.parent / name, dpi=110)
    counts = f"{len(model.task_a)} samples of A, {len(model.task_b)} of B."
    return [
        f"### {model.title}",
        "",
        f"{model.what}. {counts}",
        "",
        *table(rows, args.top),
        "",
        verdict(rows, args.top),
        "",
        *_tests(tests),
        "",
        f"![signed scores by layer and head]({name})",
        "",
    ]


def _tests(tests: Significance) -> list[str]:
    ranked = tests.ranked()
    found = [finding for finding in ranked if finding.significant]
    opposed = sum(finding.mean < 0 for finding in found)
    rows = [
        [f.block, str(f.layer), str(f.head), f"{f.mean:.3g}", f"{f.effect:.2f}", f"{f.p_value:.2g}"]
        for f in ranked[:5]
    ]
    return [
        f"Signed score below that of relabelled samples ({tests.permutations} labellings, {tests.correction} "
        f"over {len(ranked)} heads). Significant at {tests.level:g} (framed): {len(found)}, where samples of "
        "different tasks agree less than samples at large do. With a mean below 0, so that the tasks oppose "
        f"each other there on the average: {opposed}. The surest:",
        "",
        *markdown_table(["block", "layer", "head", "mean M", "distance", "p"], rows),
    ]


def _entries(model: Trained) -> int:
    """Entries of the largest slice of a head."""
    found = score(model.gradients, model.task_a, model.task_b, variants=("signed",), fisher="pooled_n")
    return int(max(part.slice_size.max() for part in found.diagnostics.values()))


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
