"""What the interference metric was asked to be, point by point, and the tests that hold it to that."""

from typing import NamedTuple

from benchmarks.report import markdown_table


class Point(NamedTuple):
    """One point of a list: what was asked, what there is, and its tests as FILE::NAME below tests/."""

    asked: str
    there_is: str
    tests: tuple[str, ...]


_LAYOUT = "interference/test_layout.py::test_"
_SCORES = "interference/test_scores.py::test_"
_COMPUTE = "interference/test_compute.py::test_"
_GRADIENTS = "interference/test_gradients.py::test_"
_MEANING = "interference/test_meaning.py::test_"
_SIGNIFICANCE = "interference/test_significance.py::test_"
_PAGE = "experiments/interference/test_study.py::test_"
_HEATMAP = "callbacks/test_interference_heatmap.py::test_"

MUST = (
    Point(
        "Averages of squared gradients in float32, never in half precision",
        "gradients of half-precision models are accumulated, squared and averaged in float32",
        (
            _GRADIENTS + "half_precision_is_accumulated_in_float32",
            _SCORES + "shapes_and_dtypes_that_do_not_fit",
        ),
    ),
    Point(
        "Guards for empty tasks",
        "a warning, scores of shape (nA, 0, layers, heads) or (0, nB, ...), averages of zeros, no conflicts",
        (_COMPUTE + "an_empty_task_is_warned_of_and_has_no_scores",),
    ),
    Point(
        "True sample ids in the list of conflicts",
        "ids of any hashable type, given and returned as they are, never parsed",
        (_COMPUTE + "ids_are_of_any_type_and_come_back",),
    ),
    Point(
        "Shape checks",
        "one ValueError that names all shapes, and layouts that partition every projection",
        (
            _SCORES + "shapes_and_dtypes_that_do_not_fit",
            _LAYOUT + "slices_partition_every_projection",
        ),
    ),
)
SHOULD = (
    Point(
        "Docstrings state the design choices",
        "`score_matrices`, `compute`, `Ridge` and the result carry equations, units and limits",
        (_PAGE + "the_design_is_stated_where_it_was_asked_for",),
    ),
    Point(
        "A METRIC DESIGN section in the module's docstring",
        "`theria.interference`: diagonal, directional, magnitudes, whose Fisher information, scales, heads",
        (_PAGE + "the_design_is_stated_where_it_was_asked_for",),
    ),
    Point(
        "Diagonal Fisher and asymmetry made clear in a methods section",
        "the methods paragraph of this page",
        (_PAGE + "the_page_has_every_part",),
    ),
)
NICE = (
    Point(
        "Signed variant",
        "against loops; minus the score predicts the change of a loss after a small preconditioned step",
        (
            _SCORES + "equal_loops_over_pairs_heads_and_entries",
            _MEANING + "the_signed_score_predicts_what_a_step_on_one_sample_does_to_another",
        ),
    ),
    Point(
        "Symmetric variant",
        "bounds the signed one; transposes when the tasks are exchanged under a pooled Fisher information",
        (
            _SCORES + "bounds_and_means",
            _SCORES + "swapping_tasks_transposes_signed_and_symmetric_under_a_pooled_fisher",
        ),
    ),
    Point(
        "Device policy",
        "`computation_device` cpu, cuda or auto; cpu is the same from run to run",
        (_COMPUTE + "devices", _COMPUTE + "scores_on_a_gpu_are_those_of_float64_on_a_cpu"),
    ),
    Point(
        "Validation tests: head additivity, scale laws",
        "heads add up to the unsliced block, which is public (`per_head=False`); laws of scaling either task",
        (
            _SCORES + "distinct_heads_add_up_to_the_block",
            _SCORES + "scale_laws",
            _SCORES + "scale_laws_of_whole_computations",
        ),
    ),
)
FURTHER = (
    Point(
        "Four meanings of the ridge",
        "relative (default), absolute as it was, floor, conditional; the clamped and the exceeded share told",
        (
            _SCORES + "every_fisher_and_ridge_equals_loops",
            _SCORES + "a_number_is_an_absolute_ridge_with_the_seeds_clamp",
        ),
    ),
    Point(
        "Pooled Fisher information",
        "plain and n-weighted mean of both tasks, and whether it changes the ranking (below)",
        (_SCORES + "every_fisher_and_ridge_equals_loops", _PAGE + "the_ablation_is_that_of_the_library"),
    ),
    Point(
        "A least number of samples behind the Fisher information",
        "`min_samples_for_fisher` warns",
        (_COMPUTE + "few_samples_behind_a_fisher_are_warned_of",),
    ),
    Point(
        "Selection of layers and heads",
        "parts of the whole, query heads and the key-value heads that serve them",
        (_COMPUTE + "layers_heads_and_blocks_are_parts_of_the_whole",),
    ),
    Point(
        "Scores with diagnostics",
        "ridge, clamped, zero and negative shares, |g|_1 of both tasks, tokens, missing gradients",
        (
            _SCORES + "equal_loops_over_pairs_heads_and_entries",
            _COMPUTE + "entries_without_information_are_counted_and_left_out",
        ),
    ),
    Point(
        "What task A's Fisher information does to averages",
        "mean_i M_ij = |g_j|_1 proved, stated in every report, and M / |g_j|_1 beside every mean",
        (_SCORES + "the_mean_over_task_a_says_nothing_of_task_a",),
    ),
    Point(
        "Significance",
        "label permutation, BH, BY and max-T, calibrated; too few permutations or samples are named",
        (
            _SIGNIFICANCE + "levels_are_kept_where_there_is_nothing",
            _SIGNIFICANCE + "a_planted_conflict_is_found_and_ranked_first",
            _SIGNIFICANCE + "too_few_samples_for_any_number_of_permutations",
        ),
    ),
    Point(
        "Heat maps while training",
        "`InterferenceHeatmap`, bit-identical training with and without, in one process and in two",
        (
            _HEATMAP + "training_is_bit_identical_with_and_without_it",
            _HEATMAP + "the_first_of_two_processes_measures_and_training_does_not_notice",
        ),
    ),
    Point(
        "Head layouts of GPT-2, Llama, Qwen3, GPT-NeoX, Phi-3 and our models",
        "found from classes and shapes, or given; every entry in one slice; unknown ones say what was found",
        (
            _LAYOUT + "slices_partition_every_projection",
            _LAYOUT + "zeroing_a_value_path_zeroes_its_output_slice_alone",
            _LAYOUT + "an_unknown_layout_says_what_was_found",
        ),
    ),
    Point(
        "Gradients of samples by hooks",
        "eager and SDPA attention, gradient checkpointing, bf16 models, padded batches; torch.func agrees",
        (
            _GRADIENTS + "equal_one_backward_a_sample",
            _GRADIENTS + "equal_one_backward_under_each_attention_with_checkpointing",
            _GRADIENTS + "mixed_lengths_in_padded_batches_change_nothing",
            _GRADIENTS + "equal_torch_func",
        ),
    ),
    Point(
        "Memory bounded by a budget",
        "factors in memory or in mapped files; gradients of one block, or some of its rows, at a time",
        (
            _COMPUTE + "any_budget_gives_the_same_numbers",
            _COMPUTE + "memory_stays_within_the_budget",
            _GRADIENTS + "records_beyond_the_memory_are_mapped_files",
        ),
    ),
    Point(
        "Missing gradients",
        "frozen layers, unused maps and gradients that are not finite are NaN with a mask, and in no mean",
        (
            _COMPUTE + "frozen_and_unused_projections_are_missing",
            _COMPUTE + "gradients_that_are_not_finite_are_missing_and_named",
        ),
    ),
    Point(
        "Intervals of means",
        "bootstrap over the samples of both tasks",
        (
            _SIGNIFICANCE + "intervals_cover_the_mean",
            _SIGNIFICANCE + "intervals_of_samples_of_one_task_are_scipys",
        ),
    ),
)
LISTS = (("Must do", MUST), ("Should do", SHOULD), ("Nice to have", NICE), ("Beside the lists", FURTHER))


def checklist() -> list[str]:
    """Lines of Markdown: every list with its points, ticked, and their tests."""
    lines: list[str] = []
    for title, points in LISTS:
        rows = [
            # a bar in a cell would begin the next one
            [
                f"&#10003; {point.asked}",
                point.there_is.replace("|", r"\|"),
                ", ".join(f"`{test}`" for test in point.tests),
            ]
            for point in points
        ]
        lines += [
            f"### {title}",
            "",
            *markdown_table(["asked for", "there is", "tests, below tests/"], rows),
            "",
        ]
    return lines
