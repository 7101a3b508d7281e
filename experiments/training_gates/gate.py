"""What a gate says: a figure, its bar, and whether it is met."""

import dataclasses

TITLES = {
    "G2-1": "chunk sizes are locked",
    "G2-2": "the needle probe costs next to nothing",
    "G2-3": "norm_persistent is in the projection",
    "G2-4": "training is stable",
    "G2-5": "needles are found at both levels",
    "G2-6": "a forced spike is rolled back",
    "G2-7": "ppl_delta is visible",
    "G2-8": "no gradient crosses a shard boundary",
}


@dataclasses.dataclass(frozen=True)
class Gate:
    """The outcome of one exit gate.

    Attributes:
        name: a key of ``TITLES``.
        measured: the figures.
        bar: what they have to be.
        passed: whether they are.
    """

    name: str
    measured: str
    bar: str
    passed: bool

    @property
    def title(self) -> str:
        """What is asked."""
        return TITLES[self.name]

    def __str__(self) -> str:
        verdict = "PASSED" if self.passed else "FAILED"
        return f"[{self.name}] {self.title}... {verdict} ({self.measured}; bar: {self.bar})"
