"""Curvature safety: is second-order learning through an attention implementation real?

``audit`` answers for any callable; ``python -m theria.curvature module:function`` does it from the shell.
"""

from theria.curvature.audit import AuditReport, Finding, audit
from theria.curvature.cases import Case, default_cases
from theria.curvature.convention import Convention, ConventionError
from theria.curvature.learning import MetaTask, probe_learning
from theria.curvature.probes import probe_derivatives, relative_difference, second_order_path
from theria.curvature.verdicts import Status, Verdict

__all__ = [
    "AuditReport",
    "Case",
    "Convention",
    "ConventionError",
    "Finding",
    "MetaTask",
    "Status",
    "Verdict",
    "audit",
    "default_cases",
    "probe_derivatives",
    "probe_learning",
    "relative_difference",
    "second_order_path",
]
