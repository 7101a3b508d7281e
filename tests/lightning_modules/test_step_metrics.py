import copy
import math
import pickle

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_modules.step_metrics import Rows, StepMetrics


def random_rows(count: int) -> list[dict[str, Tensor | float]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "loss": torch.randn((), generator=generator),
            "seconds": 0.1 * i,
            "norm": torch.rand((), generator=generator),
        }
        for i in range(count)
    ]


def naive(rows: list[dict[str, Tensor | float]]) -> Rows:
    return [
        {"step": i + 1} | {name: float(value) for name, value in row.items()} for i, row in enumerate(rows)
    ]


class Collector:
    def __init__(self) -> None:
        self.blocks: list[Rows] = []

    def receive(self, rows: Rows) -> None:
        self.blocks.append(rows)

    @property
    def rows(self) -> Rows:
        return [row for block in self.blocks for row in block]


class RecordOps(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("capacity", [1, 4, 10, 11])
def test_every_row_comes_back_exactly_once_in_order_and_unrounded(capacity: int) -> None:
    buffer, collector, rows = StepMetrics(capacity), Collector(), random_rows(10)
    buffer.subscribe(collector.receive)
    for i, row in enumerate(rows):
        buffer.append(i + 1, row)
    assert [len(block) for block in collector.blocks] == [capacity] * (10 // capacity)
    assert len(buffer) == 10 % capacity
    buffer.flush()
    assert collector.rows == naive(rows)
    assert buffer.last == naive(rows)[-1]


def test_an_appended_tensor_may_change_afterwards() -> None:
    buffer = StepMetrics(4)
    loss = torch.tensor(1.0)
    buffer.append(1, {"loss": loss})
    loss.fill_(2.0)
    buffer.flush()
    assert buffer.last == {"step": 1, "loss": 1.0}


def test_append_is_one_write_and_reads_nothing() -> None:
    buffer, row = StepMetrics(4), random_rows(1)[0]
    buffer.append(1, row)
    with RecordOps() as ops:
        buffer.append(2, row)
    views = {"aten.select.int", "aten.detach.default", "aten.unsqueeze.default"}
    assert [name for name in ops.names if name not in views] == ["aten.stack.out"]


def test_values_that_require_grad_leave_no_graph_behind() -> None:
    buffer, collector = StepMetrics(2), Collector()
    buffer.subscribe(collector.receive)
    weight = torch.ones((), requires_grad=True)
    for step in (1, 2):
        buffer.append(step, {"loss": 3 * weight})
    assert collector.rows == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 3.0}]


def test_a_buffer_begun_in_inference_mode_is_written_outside_of_it() -> None:
    buffer = StepMetrics(3)
    with torch.inference_mode():
        buffer.append(1, {"loss": torch.tensor(1.0)})
    buffer.append(2, {"loss": torch.tensor(2.0)})
    buffer.flush()
    assert buffer.last == {"step": 2, "loss": 2.0}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.tensor(0.1, dtype=torch.float64), 0.1),
        (torch.tensor(2**40 + 1), float(2**40 + 1)),
        (torch.tensor(True), 1.0),
        (torch.tensor(1.5, dtype=torch.bfloat16), 1.5),
    ],
)
def test_wider_and_narrower_types_stay_exact_beside_float32(value: Tensor, expected: float) -> None:
    buffer = StepMetrics(1)
    buffer.append(1, {"loss": torch.tensor(0.25), "other": value})
    assert buffer.last == {"step": 1, "loss": 0.25, "other": expected}


@pytest.mark.parametrize("on_host", [False, True])
def test_non_finite_values_pass(on_host: bool) -> None:
    buffer, collector = StepMetrics(3), Collector()
    buffer.subscribe(collector.receive)
    for step, value in enumerate((math.nan, math.inf, -math.inf)):
        buffer.append(step, {"loss": value if on_host else torch.tensor(value)})
    assert math.isnan(collector.rows[0]["loss"])
    assert [row["loss"] for row in collector.rows[1:]] == [math.inf, -math.inf]


def test_without_subscribers_rows_are_dropped_and_last_is_kept() -> None:
    buffer = StepMetrics(2)
    assert buffer.last == {}
    for step in (1, 2, 3):
        buffer.append(step, {"loss": torch.tensor(float(step))})
    assert buffer.last == {"step": 2, "loss": 2.0}
    assert len(buffer) == 1


def test_flushing_nothing_calls_nobody() -> None:
    buffer, collector = StepMetrics(2), Collector()
    buffer.subscribe(collector.receive)
    buffer.flush()
    assert collector.blocks == []
    assert buffer.last == {}


def test_a_step_of_plain_numbers_needs_no_device() -> None:
    buffer = StepMetrics(1)
    buffer.append(1, {"seconds": 0.5})
    assert buffer.last == {"step": 1, "seconds": 0.5}


def test_the_order_of_names_does_not_matter_after_the_first_step() -> None:
    buffer = StepMetrics(2)
    buffer.append(1, {"a": torch.tensor(1.0), "b": torch.tensor(2.0)})
    buffer.append(2, {"b": torch.tensor(4.0), "a": torch.tensor(3.0)})
    assert buffer.last == {"step": 2, "a": 3.0, "b": 4.0}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loss": torch.tensor(1.0)}, r"missing \['seconds'\], unexpected \[\]"),
        ({"loss": torch.tensor(1.0), "seconds": 1.0, "new": 1.0}, r"missing \[\], unexpected \['new'\]"),
        ({"loss": torch.tensor(1.0), "second": 1.0}, r"missing \['seconds'\], unexpected \['second'\]"),
        ({"loss": 1.0, "seconds": 1.0}, r"\['loss'\] changed between tensor and plain number"),
        ({"loss": torch.ones(1), "seconds": 1.0}, r"0-dimensional tensors, got shapes \{'loss': \(1,\)\}"),
    ],
)
def test_a_step_unlike_the_first_is_refused_by_name(values: dict[str, Tensor | float], message: str) -> None:
    buffer, collector = StepMetrics(9), Collector()
    buffer.subscribe(collector.receive)
    buffer.append(1, {"loss": torch.tensor(1.0), "seconds": 1.0})
    with pytest.raises(ValueError, match=message):
        buffer.append(2, values)
    buffer.append(2, {"loss": torch.tensor(2.0), "seconds": 2.0})
    buffer.flush()
    assert [row["step"] for row in collector.rows] == [1, 2]


@pytest.mark.parametrize("values", [{}, {"step": 1.0}])
def test_a_step_needs_metrics_with_names_of_their_own(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="none of them named 'step'"):
        StepMetrics().append(1, values)


def test_tensors_on_several_devices_are_refused() -> None:
    values = {"a": torch.tensor(1.0), "b": torch.empty((), device="meta")}
    with pytest.raises(ValueError, match=r"one device, got \{'a': 'cpu', 'b': 'meta'\}"):
        StepMetrics().append(1, values)


def test_a_step_number_on_the_device_is_refused() -> None:
    with pytest.raises(TypeError, match="step must be an int, got Tensor"):
        StepMetrics().append(torch.tensor(1), {"loss": 1.0})  # type: ignore[arg-type]


@pytest.mark.parametrize("capacity", [0, -1, 2.0, True, "3"])
def test_capacity_is_checked(capacity: object) -> None:
    with pytest.raises(ValueError, match="capacity must be a positive integer"):
        StepMetrics(capacity)  # type: ignore[arg-type]
    buffer = StepMetrics()
    with pytest.raises(ValueError, match="capacity must be a positive integer"):
        buffer.capacity = capacity  # type: ignore[assignment]


@pytest.mark.parametrize("capacity", [1, 2, 7])
def test_capacity_can_change_while_rows_wait(capacity: int) -> None:
    buffer, collector, rows = StepMetrics(4), Collector(), random_rows(12)
    buffer.subscribe(collector.receive)
    for i, row in enumerate(rows):
        if i == 3:
            buffer.capacity = capacity
        buffer.append(i + 1, row)
    buffer.flush()
    assert [len(block) for block in collector.blocks[:2]] == [3, capacity]
    assert collector.rows == naive(rows)


def test_subscribing_twice_is_once_and_unsubscribing_ends_it() -> None:
    buffer, collector = StepMetrics(1), Collector()
    buffer.subscribe(collector.receive)
    buffer.subscribe(collector.receive)
    buffer.append(1, {"loss": 1.0})
    buffer.unsubscribe(collector.receive)
    buffer.unsubscribe(collector.receive)
    buffer.append(2, {"loss": 1.0})
    assert [row["step"] for row in collector.rows] == [1]


def test_a_subscriber_that_fails_or_meddles_spoils_nothing() -> None:
    buffer, collector = StepMetrics(2), Collector()

    def meddle(rows: Rows) -> None:
        rows.pop().clear()
        buffer.flush()
        raise OSError("disk full")

    buffer.subscribe(collector.receive)
    buffer.subscribe(meddle)
    buffer.append(1, {"loss": 1.0})
    with pytest.raises(OSError, match="disk full"):
        buffer.append(2, {"loss": 2.0})
    buffer.flush()
    assert collector.rows == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}]
    assert buffer.last == {"step": 2, "loss": 2.0}


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda buffer: pickle.loads(pickle.dumps(buffer))])
def test_a_copy_is_an_empty_buffer_of_the_same_capacity(clone) -> None:
    buffer, collector = StepMetrics(2), Collector()
    buffer.subscribe(collector.receive)
    buffer.append(1, {"loss": 1.0})
    copied = clone(buffer)
    copied.append(7, {"other": 1.0})
    copied.append(8, {"other": 2.0})
    assert copied.last == {"step": 8, "other": 2.0}
    assert collector.blocks == []


def test_reduce_sees_the_tensors_of_the_waiting_steps_once_a_flush() -> None:
    buffer, shapes = StepMetrics(8), []

    def double(block: Tensor) -> Tensor:
        shapes.append(tuple(block.shape))
        return 2 * block

    buffer.reduce = double
    for step in (1, 2, 3):
        buffer.append(step, {"loss": torch.tensor(float(step)), "seconds": 0.5, "norm": torch.tensor(1.0)})
    buffer.flush()
    assert shapes == [(3, 2)]
    assert buffer.last == {"step": 3, "loss": 6.0, "seconds": 0.5, "norm": 2.0}
    buffer.append(4, {"loss": torch.tensor(4.0), "seconds": 0.5, "norm": torch.tensor(1.0)})
    buffer.flush(reduce=False)
    assert buffer.last == {"step": 4, "loss": 4.0, "seconds": 0.5, "norm": 1.0}


@pytest.mark.gpu
def test_on_cuda_append_is_one_kernel_that_nothing_waits_for() -> None:
    buffer, collector = StepMetrics(8), Collector()
    buffer.subscribe(collector.receive)
    values = {f"metric_{i}": torch.tensor(float(i), device="cuda") for i in range(9)} | {"seconds": 0.5}
    buffer.append(1, values)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        buffer.append(2, values)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        buffer.append(3, values)
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len([name for name in kernels if "sync" not in name.lower()]) == 1, kernels
    buffer.flush()
    assert collector.rows == [
        {"step": step} | {f"metric_{i}": float(i) for i in range(9)} | {"seconds": 0.5} for step in (1, 2, 3)
    ]


@pytest.mark.gpu
def test_rows_of_a_module_that_moves_to_cuda_keep_their_order() -> None:
    buffer, collector = StepMetrics(8), Collector()
    buffer.subscribe(collector.receive)
    buffer.append(1, {"loss": torch.tensor(1.0)})
    buffer.append(2, {"loss": torch.tensor(2.0, device="cuda")})
    buffer.flush()
    assert collector.rows == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}]


def test_the_latest_value_is_that_of_the_step_asked_for_and_is_not_read() -> None:
    metrics = StepMetrics(capacity=2)
    assert metrics.latest("loss", 1) is None
    metrics.append(1, {"loss": torch.tensor(0.5), "seconds": 3.0})
    latest = metrics.latest("loss", 1)
    assert isinstance(latest, torch.Tensor)
    assert latest.item() == 0.5
    assert metrics.latest("seconds", 1) == 3.0
    assert metrics.latest("loss", 2) is metrics.latest("accuracy", 1) is None
    metrics.append(2, {"loss": torch.tensor(0.25), "seconds": 3.0})  # full, so flushed
    assert metrics.latest("loss", 2) == 0.25
    assert metrics.latest("loss", 1) is None
