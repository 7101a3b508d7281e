"""Tasks against a scalar reference, their purity, and the statistics the study presupposes."""

import dataclasses
import math
from typing import Any

import pytest
import scipy.stats
import torch
from torch import Tensor

from theria.tasks import SeqClsSpec, TaskBatch, sample_tasks
from theria.tasks.philox import philox_4x32
from theria.tasks.synthetic_seqcls import STREAMS, _check_request

SMALL = SeqClsSpec(
    length=6, width=3, num_classes=3, num_signal_positions=2, noise=0.7, support_size=3, query_size=5
)


def sample(spec: SeqClsSpec, ids: Tensor | range, **coordinates: Any) -> TaskBatch:
    task_ids = ids if isinstance(ids, Tensor) else torch.arange(ids.start, ids.stop, ids.step)
    return sample_tasks(spec, task_ids, **{"seed": 0, "epoch": 0, "stream": "train"} | coordinates)


def assert_equal(first: TaskBatch, second: TaskBatch) -> None:
    for name, a, b in zip(TaskBatch._fields, first, second, strict=True):
        assert torch.equal(a, b), name


class ScalarTask:
    """One task, one number at a time, from the counter's description alone."""

    def __init__(self, spec: SeqClsSpec, *, seed: int, stream: int, epoch: int, task_id: int) -> None:
        self.spec = spec
        self.coordinates = (seed, stream, epoch, task_id)

    def word(self, purpose: int, element: int) -> int:
        seed, stream, epoch, task_id = self.coordinates
        counter = (element // 4, task_id, epoch, purpose * 256 + stream)
        return int(philox_4x32(tuple(torch.tensor(c) for c in counter), seed)[element % 4])

    def normal(self, purpose: int, element: int) -> float:
        first = element - element % 2
        radius = math.sqrt(-2 * math.log((self.word(purpose, first) + 0.5) / 2**32))
        angle = 2 * math.pi * self.word(purpose, first + 1) / 2**32
        return radius * (math.sin(angle) if element % 2 else math.cos(angle))

    def signal_positions(self) -> list[int]:
        by_word = sorted(range(1, self.spec.length), key=lambda position: -self.word(0, position - 1))
        return by_word[: self.spec.num_signal_positions]

    def label(self, purpose: int, sequence: int) -> int:
        return self.word(purpose, sequence) * self.spec.num_classes // 2**32

    def value(self, labels: int, noise: int, sequence: int, position: int, feature: int) -> float:
        spec = self.spec
        n = self.normal(noise, (sequence * spec.length + position) * spec.width + feature)
        if position not in self.signal_positions():
            return spec.noise * n
        return self.normal(3, self.label(labels, sequence) * spec.width + feature) + 0.5 * spec.noise * n


def test_every_number_of_a_task_against_scalars() -> None:
    seed, epoch, task_id = 2**63 + 12345, 7, 2**32 - 2
    batch = sample(SMALL, torch.tensor([3, task_id]), seed=seed, epoch=epoch, stream="validation")
    task = ScalarTask(SMALL, seed=seed, stream=1, epoch=epoch, task_id=task_id)
    for x, y, labels, noise in (
        (batch.support_x[1], batch.support_y[1], 1, 4),
        (batch.query_x[1], batch.query_y[1], 2, 5),
    ):
        assert y.tolist() == [task.label(labels, sequence) for sequence in range(len(y))]
        expected = [
            [[task.value(labels, noise, s, p, f) for f in range(SMALL.width)] for p in range(SMALL.length)]
            for s in range(len(y))
        ]
        torch.testing.assert_close(x.double(), torch.tensor(expected).double(), rtol=0, atol=1e-5)
    assert batch.task_ids.tolist() == [3, task_id]


def test_shapes_and_types() -> None:
    spec = SeqClsSpec()
    batch = sample(spec, range(2))
    assert batch.support_x.shape == (2, 16, 32, 64)
    assert batch.query_x.shape == (2, 16, 32, 64)
    assert batch.support_y.shape == batch.query_y.shape == (2, 16)
    assert batch.support_x.dtype == batch.query_x.dtype == torch.float32
    assert batch.support_y.dtype == batch.query_y.dtype == batch.task_ids.dtype == torch.int64
    assert batch.support_x.is_contiguous()
    assert batch.query_x.is_contiguous()


@pytest.mark.parametrize(
    "spec",
    [
        SeqClsSpec(),
        SMALL,
        SeqClsSpec(length=17, width=7, num_classes=4, num_signal_positions=16, support_size=5, query_size=9),
    ],
    ids=["default", "small", "odd"],
)
def test_a_task_is_bit_equal_alone_and_in_any_batch(spec: SeqClsSpec) -> None:
    whole = sample(spec, range(16), seed=5, epoch=2)
    for ids in (torch.tensor([11]), torch.tensor([9, 2, 14]), torch.arange(15, -1, -1)):
        part = sample(spec, ids, seed=5, epoch=2)
        assert_equal(part, TaskBatch(*(field[ids] for field in whole)))


@pytest.mark.parametrize("threads", [1, 2])
def test_a_task_does_not_depend_on_the_number_of_threads(threads: int) -> None:
    expected = sample(SeqClsSpec(), range(16))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_equal(sample(SeqClsSpec(), range(16)), expected)
    finally:
        torch.set_num_threads(before)


def test_global_random_state_is_neither_read_nor_changed() -> None:
    state = torch.random.get_rng_state()
    first = sample(SMALL, range(4))
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(1234)
    assert_equal(sample(SMALL, range(4)), first)


def test_epoch_as_number_scalar_vector_and_per_task() -> None:
    expected = sample(SMALL, range(3), epoch=6)
    assert_equal(sample(SMALL, range(3), epoch=torch.tensor(6)), expected)
    assert_equal(sample(SMALL, range(3), epoch=torch.tensor([6])), expected)
    mixed = sample(SMALL, range(3), epoch=torch.tensor([4, 6, 8]))
    assert torch.equal(mixed.query_x[1], expected.query_x[1])
    assert torch.equal(mixed.query_x[2], sample(SMALL, range(3), epoch=8).query_x[2])


def test_float64_is_the_same_task_with_less_rounding() -> None:
    single, double = sample(SMALL, range(4)), sample(SMALL, range(4), dtype=torch.float64)
    assert double.support_x.dtype == double.query_x.dtype == torch.float64
    assert torch.equal(single.query_y, double.query_y)
    torch.testing.assert_close(single.support_x.double(), double.support_x, rtol=0, atol=1e-6)
    assert not torch.equal(single.support_x.double(), double.support_x)


def test_nothing_is_read_back_from_the_device() -> None:
    # A tensor on the meta device has no values: looking at one raises.
    epoch = torch.zeros((), dtype=torch.int64, device="meta")
    batch = sample(SMALL, torch.arange(4, device="meta"), epoch=epoch)
    assert batch.support_x.shape == (4, 3, 6, 3)
    assert batch.query_y.shape == (4, 5)


def test_sizes_of_one_set_leave_the_rest_of_a_task_alone() -> None:
    base = sample(SMALL, range(4))
    more_queries = sample(dataclasses.replace(SMALL, query_size=11), range(4))
    assert torch.equal(more_queries.support_x, base.support_x)
    assert torch.equal(more_queries.query_x[:, :5], base.query_x)
    more_support = sample(dataclasses.replace(SMALL, support_size=8), range(4))
    assert torch.equal(more_support.query_x, base.query_x)
    assert torch.equal(more_support.support_y[:, :3], base.support_y)


def test_no_two_tasks_are_equal_over_streams_epochs_seeds_and_ids() -> None:
    noises = {}
    for stream in STREAMS:
        for epoch in (0, 1, 2**32 - 1):
            for seed in (0, 1, 2**32, 2**64 - 1):
                batch = sample(SMALL, torch.tensor([0, 1, 2**32 - 1]), stream=stream, epoch=epoch, seed=seed)
                for task_id, x in zip(batch.task_ids.tolist(), batch.support_x, strict=True):
                    noises[stream, epoch, seed, task_id] = x.flatten()
    stacked = torch.stack(list(noises.values()))
    assert len(stacked) == 3 * 3 * 4 * 3
    # Noise at position 0 carries no prototype: it must not be shared even in part.
    values = stacked.unflatten(1, (3, 6, 3))[:, :, 0].flatten()
    assert len(values.unique()) > 0.999 * len(values)
    correlation = torch.corrcoef(stacked) - torch.eye(len(stacked))
    assert correlation.abs().max() < 0.9


@pytest.fixture(scope="module")
def quiet_and_noisy() -> tuple[SeqClsSpec, TaskBatch, TaskBatch]:
    """512 tasks without noise, where x shows prototypes and positions exactly, and the same with noise."""
    spec = SeqClsSpec(length=16, width=8, num_classes=5, num_signal_positions=4, noise=1.5)
    ids = range(512)
    return spec, sample(dataclasses.replace(spec, noise=0.0), ids, seed=3), sample(spec, ids, seed=3)


Draws = tuple[SeqClsSpec, TaskBatch, TaskBatch]


def test_signal_positions_are_distinct_never_zero_and_uniform(quiet_and_noisy: Draws) -> None:
    spec, quiet, _ = quiet_and_noisy
    support, query = ((x != 0).all(-1) for x in (quiet.support_x, quiet.query_x))
    signal = support[:, 0]
    assert (support == signal[:, None]).all()
    assert (query == signal[:, None]).all()
    assert (signal.sum(1) == spec.num_signal_positions).all()
    assert not signal[:, 0].any()
    counts = signal[:, 1:].sum(0)
    # 4 of 15 positions drawn without replacement: counts vary 11/14 as much as multinomial ones.
    statistic = float(((counts - counts.float().mean()) ** 2).sum() / counts.float().mean() * (14 / 11))
    assert scipy.stats.chi2(df=14).sf(statistic) > 0.01
    pairs = torch.einsum("ti,tj->ij", signal.float(), signal.float())[1:, 1:]
    off_diagonal = pairs[~torch.eye(15, dtype=torch.bool)]
    expected = 512 * (4 * 3) / (15 * 14)
    assert (off_diagonal - expected).abs().max() < 5 * expected**0.5


def test_without_noise_all_sequences_of_a_class_are_its_prototype(quiet_and_noisy: Draws) -> None:
    spec, quiet, _ = quiet_and_noisy
    signal = (quiet.support_x != 0).all(-1)[:, 0]
    for task in range(8):
        prototypes: dict[int, Tensor] = {}
        for x, y in (
            (quiet.support_x[task], quiet.support_y[task]),
            (quiet.query_x[task], quiet.query_y[task]),
        ):
            for sequence, label in zip(x, y.tolist(), strict=True):
                prototype = prototypes.setdefault(label, sequence[signal[task]][0])
                assert (sequence[signal[task]] == prototype).all()
        distinct = torch.stack(list(prototypes.values()))
        assert len(distinct.unique(dim=0)) == len(prototypes) <= spec.num_classes


def test_prototypes_are_standard_normal(quiet_and_noisy: Draws) -> None:
    _, quiet, _ = quiet_and_noisy
    signal = (quiet.support_x != 0).all(-1)[:, 0]
    first = quiet.support_x[:, 0][signal].unflatten(0, (512, -1))[:, 0]
    assert scipy.stats.kstest(first.flatten().numpy(), "norm").pvalue > 0.01
    # Independent features: off-diagonal correlations within five standard errors.
    correlation = torch.corrcoef(first.T) - torch.eye(8)
    assert correlation.abs().max() < 5 * 512**-0.5


def test_noise_has_scale_sigma_and_half_of_it_at_signal_positions(quiet_and_noisy: Draws) -> None:
    spec, quiet, noisy = quiet_and_noisy
    signal = (quiet.support_x != 0).all(-1)
    for clean, x in ((quiet.support_x, noisy.support_x), (quiet.query_x, noisy.query_x)):
        residual = (x - clean) / spec.noise
        for mask, scale in ((signal, 0.5), (~signal, 1.0)):
            values = (residual[mask] / scale).flatten()
            assert abs(values.mean()) < 4 * len(values) ** -0.5
            assert values.std().item() == pytest.approx(1.0, abs=4 * (2 * len(values)) ** -0.5)
            sample_of_values = values[:: max(1, len(values) // 50_000)]
            assert scipy.stats.kstest(sample_of_values.numpy(), "norm").pvalue > 0.01


def test_labels_are_uniform_and_independent_between_support_and_query(quiet_and_noisy: Draws) -> None:
    spec, quiet, _ = quiet_and_noisy
    for labels in (quiet.support_y, quiet.query_y):
        assert scipy.stats.chisquare(labels.flatten().bincount(minlength=spec.num_classes)).pvalue > 0.01
    pairs = torch.stack([quiet.support_y.flatten(), quiet.query_y.flatten()])
    table = torch.zeros(5, 5).index_put_(tuple(pairs), torch.ones(pairs.shape[1]), accumulate=True)
    assert scipy.stats.chi2_contingency(table.numpy()).pvalue > 0.01


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 1}, "length must be an integer in .2, .*got 1"),
        ({"width": 0}, "width must be .*got 0"),
        ({"num_classes": 1}, "num_classes must be .*got 1"),
        ({"num_signal_positions": 0}, "num_signal_positions must be .*got 0"),
        ({"num_signal_positions": 32}, "num_signal_positions must be at most length - 1 = 31, .*got 32"),
        ({"noise": -0.1}, "noise must be .*got -0.1"),
        ({"noise": math.nan}, "noise must be .*got nan"),
        ({"noise": math.inf}, "noise must be .*got inf"),
        ({"support_size": 0}, "support_size must be .*got 0"),
        ({"query_size": -3}, "query_size must be .*got -3"),
        ({"query_size": True}, "query_size must be .*got True"),
        ({"width": 2**25, "support_size": 2**20}, "support_noise .* more than the 2.32"),
    ],
)
def test_impossible_specifications_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SeqClsSpec(**changes)


def test_the_smallest_and_the_fullest_specification_work() -> None:
    smallest = SeqClsSpec(2, 1, 2, 1, 0.0, 1, 1)
    assert sample(smallest, range(1)).support_x[0, 0, 0, 0] == 0
    fullest = sample(SeqClsSpec(length=5, width=2, num_signal_positions=4, noise=0.0), range(3))
    assert (fullest.support_x[:, :, 1:] != 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, "seed must be .*got -1"),
        ({"seed": 2**64}, "seed must be .*got 18446744073709551616"),
        ({"epoch": -1}, "epoch must be .*got -1"),
        ({"epoch": 2**32}, "epoch must be .*got 4294967296"),
        ({"epoch": torch.tensor(-2)}, "epoch must be .*from -2"),
        ({"epoch": torch.tensor(1.0)}, "epoch must be int64, got torch.float32"),
        ({"epoch": torch.zeros(3, dtype=torch.int64)}, "epoch must be one number or one for each of 2"),
        (
            {"epoch": torch.zeros((), dtype=torch.int64, device="meta")},
            "epoch is on meta and task_ids on cpu",
        ),
        ({"stream": "holdout"}, "stream must be one of train, validation, test, got 'holdout'"),
        ({"task_ids": torch.tensor([0, 2**32])}, "task_ids must be .*to 4294967296"),
        ({"task_ids": torch.tensor([0.0])}, "task_ids must be int64"),
        ({"task_ids": torch.tensor([[0]])}, r"task_ids must have one dimension, got shape \(1, 1\)"),
    ],
)
def test_impossible_requests_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    request = {"task_ids": torch.arange(2), "seed": 0, "epoch": 0, "stream": "train"} | changes
    # The shape checks that run in tests would refuse some of these first.
    with pytest.raises(ValueError, match=message):
        _check_request(request.pop("task_ids"), **request)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_tasks_on_cuda_agree_with_the_cpu_and_never_synchronise() -> None:
    ids = torch.arange(16)
    expected = sample(SeqClsSpec(), ids, epoch=3)
    ids_cuda, epoch_cuda = ids.cuda(), torch.tensor(3, device="cuda")
    try:
        torch.cuda.set_sync_debug_mode("error")
        batch = sample(SeqClsSpec(), ids_cuda, epoch=epoch_cuda)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(batch.support_y.cpu(), expected.support_y)
    assert torch.equal(batch.query_y.cpu(), expected.query_y)
    torch.testing.assert_close(batch.support_x.cpu(), expected.support_x, rtol=1e-5, atol=5e-6)
    torch.testing.assert_close(batch.query_x.cpu(), expected.query_x, rtol=1e-5, atol=5e-6)


@pytest.mark.gpu
def test_sampling_is_captured_in_a_cuda_graph() -> None:
    ids = torch.arange(16, device="cuda")
    epoch = torch.zeros((), dtype=torch.int64, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        sample(SeqClsSpec(), ids, epoch=epoch)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sample(SeqClsSpec(), ids, epoch=epoch)
    ids.add_(32)
    epoch.fill_(5)
    graph.replay()
    assert_equal(captured, sample(SeqClsSpec(), ids, epoch=5))
