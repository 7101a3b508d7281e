"""What a needle-in-a-haystack probe found, as numbers for logs and as words for a warning."""

import dataclasses
from collections.abc import Iterator

from theria.memory.needle import NeedleRecall
from theria.models.needle_prompts import PromptRecall


@dataclasses.dataclass(frozen=True)
class NIAHResult:
    """The figures of one probe.

    Attributes:
        step: finished optimiser steps.
        memory: the memory level, for the number of pairs that is judged.
        capacity: the same for every number of pairs, ascending.
        prompts: the behavioural level; None where it is left out.
        seconds: what the measurement took, without logging.
    """

    step: int
    memory: NeedleRecall
    capacity: tuple[NeedleRecall, ...]
    prompts: PromptRecall | None
    seconds: float

    def fields(self) -> dict[str, float]:
        """For the step's record: niah_cosine, and niah_accuracy where prompts were asked."""
        fields = {"niah_cosine": self.memory.cosine.value}
        if self.prompts is not None:
            fields["niah_accuracy"] = self.prompts.accuracy.value
        return fields

    def scalars(self) -> dict[str, float]:
        """For loggers, tags under niah/."""
        memory = self.memory
        scalars = {
            "cosine": memory.cosine.value,
            "cosine_low": memory.cosine.low,
            "cosine_high": memory.cosine.high,
            "cosine_worst": memory.worst,
            "cosine_theory": memory.theory,
            "cosine_never_stored": memory.never_stored.value,
            "seconds": self.seconds,
        }
        scalars |= {f"cosine_at_{point.pairs}": point.cosine.value for point in self.capacity}
        if self.prompts is not None:
            accuracy = self.prompts.accuracy
            scalars["accuracy"] = accuracy.value
            scalars["accuracy_low"], scalars["accuracy_high"] = accuracy.interval()
            scalars["chance"] = self.prompts.chance
            scalars |= {f"accuracy_{name}": share.value for name, share in self.prompts.controls.items()}
            depths = enumerate(self.prompts.by_depth, start=1)
            scalars |= {f"accuracy_depth_{number}": share.value for number, share in depths}
        return {f"niah/{name}": value for name, value in scalars.items()}

    def failures(self, threshold: float) -> Iterator[str]:
        """What falls short at each level, with its figures."""
        memory, prompts = self.memory, self.prompts
        if not memory.passes(threshold):
            cosine, never = memory.cosine, memory.never_stored
            yield (
                f"a needle among {memory.pairs} pairs is read back with a cosine of {cosine.value:.3f} "
                f"[{cosine.low:.3f}, {cosine.high:.3f}], {memory.worst:.3f} in the worst head, expected "
                f"{threshold} (theory of the rule: {memory.theory:.3f}); a key never stored reads "
                f"{never.value:.3f} [{never.low:.3f}, {never.high:.3f}], expected 0"
            )
        if prompts is not None and not prompts.passes(threshold):
            said = []
            for name, share in {"answered": prompts.accuracy, **prompts.controls}.items():
                low, high = share.interval()
                said.append(f"{name} {share.value:.3f} [{low:.3f}, {high:.3f}]")
            yield (
                f"of the needles in prompts, beyond attention's reach: {', '.join(said)}; expected "
                f"{threshold} answered, and {prompts.chance:.3f} in the controls"
            )
