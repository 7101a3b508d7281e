"""What TensorBoard's custom-scalars page shows: charts, told by whoever logs their tags."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from lightning.pytorch import Trainer
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.custom_scalar import layout_pb2, metadata
from tensorboard.util.tensor_util import make_tensor_proto


@dataclass(frozen=True)
class Lines:
    """A chart of several tags.

    Attributes:
        category, title: where it stands, and what it is called.
        tags: regular expressions, each of which is a whole tag.
        first_step: optimiser step at which all of them are there; infinite for never.
    """

    category: str
    title: str
    tags: tuple[str, ...]
    first_step: float = 1

    def _content(self) -> dict[str, layout_pb2.MultilineChartContent]:
        # TensorBoard looks for them at the beginning of a tag
        return {"multiline": layout_pb2.MultilineChartContent(tag=[f"{tag}$" for tag in self.tags])}


@dataclass(frozen=True)
class Bands:
    """A chart of values with their intervals.

    Attributes:
        category, title: where it stands, and what it is called.
        series: tags of each value, the lower and the upper end of its interval.
        first_step: optimiser step at which all of them are there; infinite for never.
    """

    category: str
    title: str
    series: tuple[tuple[str, str, str], ...]
    first_step: float = 1

    def _content(self) -> dict[str, layout_pb2.MarginChartContent]:
        of = layout_pb2.MarginChartContent.Series
        series = [of(value=value, lower=lower, upper=upper) for value, lower, upper in self.series]
        return {"margin": layout_pb2.MarginChartContent(series=series)}


Chart = Lines | Bands


@runtime_checkable
class HasCharts(Protocol):
    """A module or a callback that tells how what it logs is looked at."""

    def charts(self, trainer: Trainer) -> Sequence[Chart]:
        """Charts of tags that it will have logged itself, if the training lasts as long."""
        ...


def with_interval(tag: str) -> tuple[str, str, str]:
    """A tag and those of the ends of its interval, for `Bands`."""
    return tag, f"{tag}_low", f"{tag}_high"


def layout_summary(charts: Iterable[Chart]) -> Summary:
    """The layout of these charts; categories stand in the order in which they first come."""
    categories: dict[str, layout_pb2.Category] = {}
    for chart in charts:
        category = categories.setdefault(chart.category, layout_pb2.Category(title=chart.category))
        category.chart.append(layout_pb2.Chart(title=chart.title, **chart._content()))
    layout = layout_pb2.Layout(category=categories.values())
    value = Summary.Value(
        tag=metadata.CONFIG_SUMMARY_TAG,
        tensor=make_tensor_proto(layout.SerializeToString()),
        metadata=metadata.create_summary_metadata(),
    )
    return Summary(value=[value])


def first_validation(trainer: Trainer) -> float:
    """The optimiser step that the first validation follows, once training has begun; infinite for none."""
    if not trainer.enable_validation:
        return math.inf
    batches: float = trainer.val_check_batch  # type: ignore[assignment]  # known once training has begun
    if trainer.check_val_every_n_epoch is not None and trainer.check_val_every_n_epoch > 1:
        batches += (trainer.check_val_every_n_epoch - 1) * trainer.num_training_batches
    return batches / trainer.accumulate_grad_batches


def first_row(trainer: Trainer) -> float:
    """The optimiser step at which metrics are first given to the loggers; infinite for never."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set outside of Trainer's class body
    return every or math.inf
