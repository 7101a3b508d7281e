"""Few-shot classification of synthetic sequences, where the answer sits in a few unknown positions.

A task has a prototype per class and a handful of signal positions, never position 0, from which a model that
answers at position 0 must learn to fetch:

    prototype[c] ~ N(0, I)
    x[l] = prototype[y] + 0.5 sigma n at signal positions, sigma n elsewhere, n ~ N(0, I)

with labels y drawn uniformly for the support and for the query set. Task i is a function of (seed, stream,
epoch, i) and the specification alone, so it comes out the same in any batch, on any worker and any rank.
"""

import dataclasses
import math
from enum import IntEnum
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from theria.tasks.philox import WORD_BITS, WORD_MASK, normal_pairs, philox_4x32, uniform_integers

Stream = Literal["train", "validation", "test"]

STREAMS: dict[Stream, int] = {"train": 0, "validation": 1, "test": 2}
"""The disjoint streams of tasks, with the number each has in the random counter."""

_SIGNAL_NOISE = 0.5
_WORDS_PER_BLOCK = 4
_PURPOSE_SHIFT = 8
_POSITION_BITS = 63 - WORD_BITS


class _Purpose(IntEnum):
    """What a random word is for; a coordinate of the counter, so sizes of one never shift another."""

    SIGNAL_POSITIONS = 0
    SUPPORT_LABELS = 1
    QUERY_LABELS = 2
    PROTOTYPES = 3
    SUPPORT_NOISE = 4
    QUERY_NOISE = 5


_FIRST_NORMAL = _Purpose.PROTOTYPES


@dataclasses.dataclass(frozen=True)
class SeqClsSpec:
    """The shape and difficulty of a synthetic sequence-classification task.

    Attributes:
        length: positions in a sequence, at least 2.
        width: features of a position.
        num_classes: classes of a task, at least 2.
        num_signal_positions: positions that carry the class prototype, in [1, length - 1].
        noise: sigma, the standard deviation of positions without signal; signal positions have half of it.
        support_size: sequences a task adapts on.
        query_size: sequences a task is judged on.

    Raises:
        ValueError: a value has the wrong type or range, or a task needs more than 2^32 random blocks.
    """

    length: int = 32
    width: int = 64
    num_classes: int = 5
    num_signal_positions: int = 4
    noise: float = 1.0
    support_size: int = 16
    query_size: int = 16

    def __post_init__(self) -> None:
        for name, least in (
            ("length", 2),
            ("width", 1),
            ("num_classes", 2),
            ("num_signal_positions", 1),
            ("support_size", 1),
            ("query_size", 1),
        ):
            _check_integer(name, getattr(self, name), least=least, most=2**_POSITION_BITS - 1)
        if self.num_signal_positions > self.length - 1:
            raise ValueError(
                f"num_signal_positions must be at most length - 1 = {self.length - 1}, since position 0 "
                f"never carries signal, got {self.num_signal_positions}"
            )
        if not isinstance(self.noise, (int, float)) or not math.isfinite(self.noise) or self.noise < 0:
            raise ValueError(f"noise must be a finite number of at least 0, got {self.noise!r}")
        for purpose, blocks in _blocks(self).items():
            if blocks > 2**WORD_BITS:
                raise ValueError(
                    f"{purpose.name.lower()} of {self} needs {blocks} blocks of random words a task, "
                    f"more than the 2^32 there are: lower its sizes"
                )


class TaskBatch(NamedTuple):
    """Tasks of one meta-batch; task_ids are their numbers within (stream, epoch)."""

    support_x: Float[Tensor, "tasks support length width"]
    support_y: Int64[Tensor, "tasks support"]
    query_x: Float[Tensor, "tasks query length width"]
    query_y: Int64[Tensor, "tasks query"]
    task_ids: Int64[Tensor, " tasks"]


def sample_tasks(
    spec: SeqClsSpec,
    task_ids: Int64[Tensor, " tasks"],
    *,
    seed: int,
    epoch: int | Int64[Tensor, ""] | Int64[Tensor, " epochs"],
    stream: Stream,
    dtype: torch.dtype = torch.float32,
) -> TaskBatch:
    """The tasks of the given numbers, on the device of task_ids.

    Nothing here reads the device back, and every shape follows from spec and task_ids.shape, so a call can
    be captured in a CUDA graph with task_ids and epoch as its inputs. Labels and positions are bit-equal on
    every device; the normal numbers of CPU and CUDA agree within float32 rounding. On one CPU everything is
    bit-equal whatever the batch.

    Args:
        spec: the shape of a task.
        task_ids: numbers in [0, 2^32). Checked on the CPU; on a device, where a look would synchronise, a
            number outside is taken modulo 2^32.
        seed: in [0, 2^64).
        epoch: in [0, 2^32), for all tasks or one a task; a tensor is treated as task_ids is.
        stream: "train", "validation" or "test": no two share a random word.
        dtype: of the sequences. The normals are drawn in float32 whatever it is, then cast.

    Raises:
        ValueError: an argument is out of range, or of the wrong kind, shape or device.
    """
    _check_request(task_ids, seed=seed, epoch=epoch, stream=stream)
    integers, normals = _draw(spec, task_ids, seed=seed, epoch=epoch, stream=stream)
    signal = _distinct_positions(integers[_Purpose.SIGNAL_POSITIONS], spec.num_signal_positions)
    support_y = uniform_integers(integers[_Purpose.SUPPORT_LABELS], spec.num_classes)
    query_y = uniform_integers(integers[_Purpose.QUERY_LABELS], spec.num_classes)
    prototypes = normals[_Purpose.PROTOTYPES].to(dtype).unflatten(1, (spec.num_classes, spec.width))

    def sequences(purpose: _Purpose, labels: Tensor) -> Tensor:
        noise = normals[purpose].to(dtype).unflatten(1, (-1, spec.length, spec.width))
        return _compose(noise, prototypes, labels, signal, spec.noise)

    return TaskBatch(
        support_x=sequences(_Purpose.SUPPORT_NOISE, support_y),
        support_y=support_y,
        query_x=sequences(_Purpose.QUERY_NOISE, query_y),
        query_y=query_y,
        task_ids=task_ids,
    )


def _compose(
    noise: Float[Tensor, "tasks batch length width"],
    prototypes: Float[Tensor, "tasks classes width"],
    labels: Int64[Tensor, "tasks batch"],
    signal: Bool[Tensor, "tasks length"],
    sigma: float,
) -> Float[Tensor, "tasks batch length width"]:
    """Noise of scale sigma, or the label's prototype plus noise of half that scale where there is signal."""
    chosen = prototypes.take_along_dim(labels[:, :, None], dim=1)
    mask = signal[:, None, :, None].to(noise.dtype)
    scale = sigma * (1.0 - (1.0 - _SIGNAL_NOISE) * mask)
    # mask is 0 or 1, so the sum rounds the same with and without a fused multiply-add.
    return (noise * scale).addcmul_(mask, chosen[:, :, None, :])


def _distinct_positions(words: Int64[Tensor, "tasks positions"], count: int) -> Bool[Tensor, "tasks length"]:
    """A mask of count distinct positions of 1 .. length - 1: those whose words are the largest.

    The position completes the word in the low bits, so that no two keys tie.
    """
    tasks, num_positions = words.shape
    positions = torch.arange(1, num_positions + 1, device=words.device)
    keys = (words << _POSITION_BITS) | positions
    chosen = keys.topk(count, dim=1).values & (2**_POSITION_BITS - 1)
    mask = torch.zeros((tasks, num_positions + 1), dtype=torch.bool, device=words.device)
    return mask.scatter_(1, chosen, True)


def _draw(
    spec: SeqClsSpec, task_ids: Tensor, *, seed: int, epoch: int | Tensor, stream: Stream
) -> tuple[dict[_Purpose, Int64[Tensor, "tasks _"]], dict[_Purpose, Float32[Tensor, "tasks _"]]]:
    """All random numbers of the tasks, one Philox call: raw words, and standard normals, by purpose.

    The counter of a block of four words is (block, task id, epoch, purpose and stream), the key is the seed;
    element e of a purpose is word e mod 4 of block e // 4.
    """
    device = task_ids.device
    blocks = _blocks(spec)
    epochs = epoch if isinstance(epoch, Tensor) else torch.full((1,), epoch, device=device)
    block_index = torch.cat([torch.arange(count, device=device) for count in blocks.values()])
    purpose_and_stream = torch.cat(
        [
            torch.full((count,), purpose << _PURPOSE_SHIFT | STREAMS[stream], device=device)
            for purpose, count in blocks.items()
        ]
    )
    ids_and_epochs = (task_ids[:, None] & WORD_MASK, epochs.reshape(-1, 1) & WORD_MASK)
    words = philox_4x32((block_index, *ids_and_epochs, purpose_and_stream), key=seed)
    raw = sum(count for purpose, count in blocks.items() if purpose < _FIRST_NORMAL)
    raw_words = torch.stack([word[:, :raw] for word in words], dim=-1)
    pairs = (normal_pairs(words[i][:, raw:], words[i + 1][:, raw:]) for i in (0, 2))
    normals = torch.stack([normal for pair in pairs for normal in pair], dim=-1)
    return (
        _split(raw_words, {p: n for p, n in _elements(spec).items() if p < _FIRST_NORMAL}),
        _split(normals, {p: n for p, n in _elements(spec).items() if p >= _FIRST_NORMAL}),
    )


def _split(numbers: Tensor, elements: dict[_Purpose, int]) -> dict[_Purpose, Tensor]:
    """Numbers (tasks, blocks, 4) cut into their purposes, without the unused last words of each."""
    parts = numbers.flatten(1).split([_round_up(count) for count in elements.values()], dim=1)
    return {purpose: part[:, :count] for (purpose, count), part in zip(elements.items(), parts, strict=True)}


def _elements(spec: SeqClsSpec) -> dict[_Purpose, int]:
    """Random numbers a task needs, by purpose."""
    sequence = spec.length * spec.width
    return {
        _Purpose.SIGNAL_POSITIONS: spec.length - 1,
        _Purpose.SUPPORT_LABELS: spec.support_size,
        _Purpose.QUERY_LABELS: spec.query_size,
        _Purpose.PROTOTYPES: spec.num_classes * spec.width,
        _Purpose.SUPPORT_NOISE: spec.support_size * sequence,
        _Purpose.QUERY_NOISE: spec.query_size * sequence,
    }


def _round_up(elements: int) -> int:
    return -(-elements // _WORDS_PER_BLOCK) * _WORDS_PER_BLOCK


def _blocks(spec: SeqClsSpec) -> dict[_Purpose, int]:
    """Philox blocks a task needs, by purpose."""
    return {purpose: _round_up(n) // _WORDS_PER_BLOCK for purpose, n in _elements(spec).items()}


def _check_integer(name: str, value: object, *, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{name} must be an integer in [{least}, {most}], got {value!r}")


def _check_request(task_ids: Tensor, *, seed: int, epoch: int | Tensor, stream: str) -> None:
    """Raise ValueError for what sample_tasks cannot take; looks at tensor values on the CPU only."""
    _check_integer("seed", seed, least=0, most=2 ** (2 * WORD_BITS) - 1)
    if stream not in STREAMS:
        raise ValueError(f"stream must be one of {', '.join(STREAMS)}, got {stream!r}")
    if task_ids.ndim != 1:
        raise ValueError(f"task_ids must have one dimension, got shape {tuple(task_ids.shape)}")
    _check_counter("task_ids", task_ids)
    if not isinstance(epoch, Tensor):
        _check_integer("epoch", epoch, least=0, most=2**WORD_BITS - 1)
        return
    if epoch.device != task_ids.device:
        raise ValueError(f"epoch is on {epoch.device} and task_ids on {task_ids.device}: put both on one")
    if epoch.ndim > 1 or epoch.numel() not in (1, len(task_ids)):
        raise ValueError(
            f"epoch must be one number or one for each of {len(task_ids)} tasks, got {tuple(epoch.shape)}"
        )
    _check_counter("epoch", epoch)


def _check_counter(name: str, value: Tensor) -> None:
    if value.dtype != torch.int64:
        raise ValueError(f"{name} must be int64, got {value.dtype}")
    if value.device.type == "cpu" and value.numel() and not ((value >= 0) & (value < 2**WORD_BITS)).all():
        raise ValueError(f"{name} must be in [0, 2^32), got values from {value.min()} to {value.max()}")
