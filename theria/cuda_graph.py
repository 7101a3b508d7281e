"""A function of tensors as one CUDA graph: no launch overhead, the same kernels, the same numbers."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")

_WARMUP_CALLS = 3


class CapturedFunction(Generic[Result]):
    """A function captured once for inputs of one shape, type and device, and replayed with new values.

    The graph reads ``parameters`` where they stand, so an optimiser that updates them in place is seen by the
    next replay. The tensors of the result are overwritten by the next call: use or copy them before.

    Args:
        function: of as many tensors as there are inputs, without synchronisation; its result may be any
            structure of tensors.
        inputs: examples of all later ones, on a CUDA device.
        parameters: what the function reads besides its inputs and constants; must keep their storage.

    Raises:
        ValueError: the inputs are not on a CUDA device, later ones differ in shape, type or device, or a
            parameter has moved since the capture.
    """

    def __init__(
        self,
        function: Callable[..., Result],
        inputs: Sequence[Tensor],
        parameters: Sequence[Tensor] = (),
    ) -> None:
        if any(not t.is_cuda for t in inputs):
            devices = [str(t.device) for t in inputs]
            raise ValueError(f"a CUDA graph needs its inputs on a CUDA device, got {devices}")
        self._static = [t.clone() for t in inputs]
        self._parameters = list(parameters)
        self._addresses = [p.data_ptr() for p in self._parameters]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARMUP_CALLS):
                function(*self._static)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        # other threads (a collective's watchdog, a data loader's pinning) may talk to the device meanwhile
        with _no_garbage_collection(), torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._result = function(*self._static)

    def fits(self, inputs: Sequence[Tensor]) -> bool:
        """Whether this graph was captured for inputs like these."""
        return all(
            new.shape == static.shape and new.dtype is static.dtype and new.device == static.device
            for new, static in zip(inputs, self._static, strict=True)
        )

    def __call__(self, *inputs: Tensor) -> Result:
        """The function's result for these inputs and the present values of the parameters."""
        if not self.fits(inputs):
            raise ValueError(
                f"captured for {[_describe(t) for t in self._static]}, got {[_describe(t) for t in inputs]}"
            )
        if [p.data_ptr() for p in self._parameters] != self._addresses:
            raise ValueError("a parameter moved after the capture, which reads its old place: capture again")
        for static, new in zip(self._static, inputs, strict=True):
            static.copy_(new)
        self._graph.replay()
        return self._result


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collect now and not for a while: a graph that is collected during a capture invalidates it."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _describe(t: Tensor) -> str:
    return f"{tuple(t.shape)} {t.dtype} on {t.device}"
