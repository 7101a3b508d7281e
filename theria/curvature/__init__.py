"""Curvature safety: is second-order learning through an attention implementation real?

``audit`` answers for any callable; ``python -m theria.curvature module:function`` does it from the shell.
"""

from theria.curvature.audit import AuditReport, Finding, audit
from theria.curvature.cases import Case, default_cases
from theria.curvature.convention import Convention, ConventionError, as_backend
from theria.curvature.learning import MetaTask, probe_learning
from theria.curvature.probes import probe_derivatives, relative_difference, second_order_path
from theria.curvature.signal import SecondOrderSignal, full_and_first_order, second_order_signal
from theria.curvature.verdicts import Status, Verdict

__all__ = [
    "AuditReport",
    "Case",
    "Convention",
    "ConventionError",
    "Finding",
    "MetaTask",
    "SecondOrderSignal",
    "Status",
    "Verdict",
    "as_backend",
    "audit",
    "default_cases",
    "full_and_first_order",
    "probe_derivatives",
    "probe_learning",
    "relative_difference",
    "second_order_path",
    "second_order_signal",
]
