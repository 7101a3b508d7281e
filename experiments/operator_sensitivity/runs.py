"""What one run of the study is, and the grid of them."""

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from theria.maml import MetaMode
from theria.tasks.synthetic_seqcls import SeqClsSpec

MODES = tuple(mode.value for mode in MetaMode)
BASELINE = "baseline"
"""The name of attention that nothing has been done to."""

BACKENDS = ("reference", "custom", "triton_fused")
GATED = ("triton_fused",)
"""Backends whose runs wait for the reference grid."""


@dataclass(frozen=True)
class Run:
    """One training run; the defaults are the frozen configuration of the study.

    Two runs that are equal give the same numbers, and a run is done once: the fields are its key.

    Attributes:
        backend: attention backend.
        variant: a wrapper of ``experiments.safety_taxonomy`` put around it.
        mode: FULL, FO or FO_STRICT.
        inner_steps: gradient steps of the inner loop.
        seed: of parameters and tasks.
        outer_steps: steps of Adam.
        meta_batch: tasks of an outer step.
        inner_lr, outer_lr: rates of the inner descent and of Adam.
        seq_len, width, num_classes, num_signal_positions, noise, support_size, query_size: the task, see
            `SeqClsSpec`.
        absorb_projections: the same model with keys and values left unprojected; equal up to rounding while
            attention is sound. It goes without a variant: values would pass beside the attention.
        device: "cpu" or "cuda".

    Raises:
        ValueError: for steps, tasks, rates or a seed that there cannot be, or absorbed projections under a
            variant.
    """

    backend: str = "reference"
    variant: str = BASELINE
    mode: str = "FULL"
    inner_steps: int = 5
    seed: int = 0
    outer_steps: int = 500
    meta_batch: int = 16
    inner_lr: float = 0.4
    outer_lr: float = 1e-3
    seq_len: int = 32
    width: int = 64
    num_classes: int = 5
    num_signal_positions: int = 4
    noise: float = 1.0
    support_size: int = 16
    query_size: int = 16
    absorb_projections: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, least in (("outer_steps", 1), ("inner_steps", 0), ("meta_batch", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("inner_lr", "outer_lr"):
            rate = getattr(self, name)
            if not (math.isfinite(rate) and rate > 0):
                raise ValueError(f"{name} must be a finite number above 0, got {rate}")
        if self.absorb_projections and self.variant != BASELINE:
            raise ValueError(
                f"{self.variant} is tested on projections that are not absorbed, whose values go through it;"
                " leave --absorb-projections out"
            )

    @property
    def run_id(self) -> str:
        """Twelve hexadecimal digits that all fields go into."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def spec(self) -> SeqClsSpec:
        """The task of this run."""
        return SeqClsSpec(
            length=self.seq_len,
            width=self.width,
            num_classes=self.num_classes,
            num_signal_positions=self.num_signal_positions,
            noise=self.noise,
            support_size=self.support_size,
            query_size=self.query_size,
        )

    @property
    def cost(self) -> float:
        """How long it takes beside other runs, roughly: forwards and backwards of all outer steps."""
        inner = 2.3 if self.mode == MetaMode.FULL else 1.0
        return self.outer_steps * (1.0 + inner * self.inner_steps)

    @property
    def order(self) -> tuple[object, ...]:
        """Where the run stands in tables: gated backends last, modes as they are defined."""
        rest = {**dataclasses.asdict(self), "mode": MODES.index(self.mode)}
        return (self.backend in GATED, *rest.values())


def from_fields(values: Mapping[str, Any]) -> Run:
    """A run of values as a table holds them, each brought to its field's type; others are the defaults."""
    defaults = dataclasses.asdict(Run())
    return Run(**{name: type(defaults[name])(value) for name, value in values.items()})


FIELDS = tuple(field.name for field in dataclasses.fields(Run))
PAIRED = tuple(name for name in FIELDS if name != "mode")
"""What two runs share that differ in their mode alone: parameters, tasks and everything else."""

CELL = tuple(name for name in PAIRED if name != "seed")
"""What the runs share whose seeds are averaged over."""


def grid(
    base: Run,
    *,
    backends: Sequence[str] = ("reference",),
    variants: Sequence[str] = (BASELINE,),
    modes: Sequence[str] = MODES,
    inner_steps: Sequence[int] = (1, 5, 10, 20),
    seeds: Sequence[int] = (0, 1),
) -> list[Run]:
    """Every combination, in the order of the tables, without duplicates."""
    combined = itertools.product(backends, variants, modes, inner_steps, seeds)
    runs = {
        dataclasses.replace(base, backend=b, variant=v, mode=m, inner_steps=k, seed=s)
        for b, v, m, k, s in combined
    }
    return sorted(runs, key=lambda run: run.order)


def shard(runs: Sequence[Run], index: int, count: int) -> list[Run]:
    """The runs of one of ``count`` shards, counted from 0, in their order.

    Each gets its share of every depth and mode, of the gated runs and of the others: of any of these, and of
    all runs together, no shard has more than one run more than another.

    Raises:
        ValueError: for an index that there is not.
    """
    if not 0 <= index < count:
        raise ValueError(f"a shard is one of 0/{count} to {count - 1}/{count}, got {index}/{count}")
    # what is alike is dealt out in one go
    alike = sorted(runs, key=lambda run: (run.backend in GATED, run.inner_steps, MODES.index(run.mode)))
    own = set(alike[index::count])
    return [run for run in runs if run in own]


def parse_shard(text: str) -> tuple[int, int]:
    """``i/n`` as two numbers, i from 0.

    Raises:
        ValueError: for anything else.
    """
    index, slash, count = text.partition("/")
    if not slash or not index.isdigit() or not count.isdigit() or not int(index) < int(count):
        raise ValueError(f"a shard is written i/n with i from 0 to n - 1, as in 0/4; got {text!r}")
    return int(index), int(count)


def costliest_first(runs: Iterable[Run]) -> list[Run]:
    """An order in which several workers finish at about the same time."""
    return sorted(runs, key=lambda run: -run.cost)
