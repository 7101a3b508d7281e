r"""QK-OV interference: which heads of which layers do samples of two tasks fight over.

METRIC DESIGN

For a block B among the query, key, value and output projections, a layer and a head, sample i of task A and
sample j of task B, with g the gradient of a sample's loss and k running over the head's slice of B's weight
and bias:

    directional   M_ij = sum_k g_ik^2 / (I_k + ridge) |g_jk|
    signed        M_ij = sum_k g_ik g_jk / (I_k + ridge)
    symmetric     M_ij = sum_k |g_ik| |g_jk| / (I_k + ridge)

I_k is the diagonal of the Fisher information: the mean of g_ik^2 over task A, or pooled over both tasks.

- Diagonal: entries are taken one by one, and covariance between them is lost. The full Fisher of a block has
  (entries)^2 numbers, 3.5e11 in one projection of GPT-2 small. A Kronecker-factored one mixes the heads of a
  projection through the factor of the side that heads share, so that scores of heads would no longer add up
  to those of the block. Neither is offered.
- Directional: M_ij says how strongly i presses, in units of what task A presses on the average, on the
  entries that j would move. It is neither symmetric in i and j nor signed: large where both are large,
  whether they agree or not. The signed variant tells agreement from conflict: a step of -eta g_i / (I +
  ridge) changes the loss of j by about -eta M_ij, so a negative score is a conflict. The symmetric variant
  bounds it: |signed| <= symmetric.
- Task A's Fisher makes the mean over i of the directional M_ij equal |g_j|_1 without a ridge, whatever task A
  is: averages over samples of A then rank heads by the size of B's gradients alone. M_ij / |g_j|_1 is free of
  that (`InterferenceResult.normalised`).
- Scale, with task A's Fisher and a relative ridge or none: gradients of A times c > 0 leave the directional
  score and divide the others by c; gradients of B times c multiply all by c. A loss that is a mean over
  tokens has smaller gradients for longer samples, so the number of tokens stands beside the scores.
- Heads: every key-value head counts once, however many queries it serves. Scores of distinct heads add up to
  those of the block (`per_head=False`), the bias of the output projection left out of both.

Gradients are accumulated and squared in float32 (float64 for models in float64), never in half precision.
"""

from theria.interference.bootstrap import bootstrap_intervals
from theria.interference.compute import collect, compute, score
from theria.interference.detection import detect_layout, layout_from
from theria.interference.fisher import Ridge
from theria.interference.gradients import SampleGradients
from theria.interference.layout import BLOCKS, AttentionLayer, Projection
from theria.interference.result import BlockDiagnostics, Conflict, InterferenceResult
from theria.interference.scores import VARIANTS, score_matrices
from theria.interference.significance import (
    Finding,
    Significance,
    TooFewSamplesError,
    label_permutation,
    permutations_needed,
    significance,
)

__all__ = [
    "BLOCKS",
    "VARIANTS",
    "AttentionLayer",
    "BlockDiagnostics",
    "Conflict",
    "Finding",
    "InterferenceResult",
    "Projection",
    "Ridge",
    "SampleGradients",
    "Significance",
    "TooFewSamplesError",
    "bootstrap_intervals",
    "collect",
    "compute",
    "detect_layout",
    "label_permutation",
    "layout_from",
    "permutations_needed",
    "score",
    "score_matrices",
    "significance",
]
