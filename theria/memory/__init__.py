"""Memories that a sequence writes and reads: persistent, projected, associative; and the gates before them.

Everything is causal, per head and per sequence, carries a state of constant size, and starts afresh where a
shard begins. ``causal_projection`` is the functional core, ``QKProjection`` and ``AssociativeMemory`` are the
modules over it, ``MemoryBranch`` is what a language model puts beside its attention.
"""

from theria.memory.accumulator import resolve_kernel
from theria.memory.atlas import AtlasMemory, GatedMLP
from theria.memory.branch import MemoryBranch, MemoryState
from theria.memory.gates import (
    GateStatistics,
    PolarizationSchedule,
    TokenGate,
    gate_faults,
    gate_statistics,
    polarization_loss,
)
from theria.memory.persistent import PersistentMemory
from theria.memory.projection import (
    AssociativeMemory,
    AssociativeState,
    ProjectionState,
    QKProjection,
    causal_projection,
)
from theria.memory.short_conv import ConvState, ShortConvolution

__all__ = [
    "AssociativeMemory",
    "AssociativeState",
    "AtlasMemory",
    "ConvState",
    "GateStatistics",
    "GatedMLP",
    "MemoryBranch",
    "MemoryState",
    "PersistentMemory",
    "PolarizationSchedule",
    "ProjectionState",
    "QKProjection",
    "ShortConvolution",
    "TokenGate",
    "causal_projection",
    "gate_faults",
    "gate_statistics",
    "polarization_loss",
    "resolve_kernel",
]
