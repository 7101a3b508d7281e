"""What was judged of the steps, for their records and the loggers."""

from collections.abc import Mapping

from lightning.pytorch import Trainer

from callbacks import loop_state
from callbacks.perplexity_baseline import Judgement


class JudgedSteps:
    """The judgements of finished steps until someone takes them.

    Attributes:
        keeps_fields: whether someone will ask for the fields of every step.
        every: steps between two rows of the loggers.
        spike: the largest ppl_delta of the spikes since the last row, 0 for none.
    """

    def __init__(self) -> None:
        self.keeps_fields = False
        self.every = 1
        self.spike = 0.0
        self._fields: dict[int, dict[str, float]] = {}
        self._newest: tuple[int, Judgement] | None = None

    def add(self, step: int, judged: Judgement, rollbacks: int) -> None:
        """Keep a step's judgement, made after so many rollbacks."""
        self._newest = (step, judged)
        if (step - 1) % self.every == 0:
            self.spike = 0.0  # the first after a row, whether or not this process wrote that
        if judged.is_spike:
            self.spike = max(self.spike, judged.ppl_delta)
        if self.keeps_fields:
            self._fields[step] = {
                "perplexity": judged.perplexity,
                "ppl_delta": judged.ppl_delta,
                "is_spike": float(judged.is_spike),
                "rollback_count": float(rollbacks),
            }

    def __contains__(self, step: int) -> bool:
        return step in self._fields

    def take(self, step: int) -> dict[str, float]:
        """The fields of a step's record, once; none where it was not judged."""
        return self._fields.pop(step, {})

    def clear_fields(self) -> None:
        """Forget the fields of steps that are undone."""
        self._fields.clear()

    def log(self, trainer: Trainer, rollbacks: int) -> None:
        """Give the newest judgement to the loggers, on the steps the trainer logs."""
        if self._newest is None or self._newest[0] % self.every != 0:
            return
        (_, judged), self._newest = self._newest, None
        values = {"ppl_delta": judged.ppl_delta, "z_score": judged.z_score, "spike": self.spike}
        values |= {"count": rollbacks}
        log_between_batches(trainer, values)


def log_between_batches(trainer: Trainer, values: Mapping[str, float]) -> None:
    """Give values of the batch that has just ended to the loggers, under rollback/."""
    step = loop_state.logging_step(trainer) - 1
    loop_state.log_values(trainer, {f"rollback/{name}": value for name, value in values.items()}, step)
