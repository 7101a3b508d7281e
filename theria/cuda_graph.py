"""Functions of tensors as CUDA graphs: no launch overhead, the same kernels, the same numbers."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function

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
        self._operands = _Operands(inputs, parameters)
        static = self._operands.static
        with _warming_up():
            for _ in range(_WARMUP_CALLS):
                function(*static)
        self._graph = torch.cuda.CUDAGraph()
        with _capturing(self._graph):
            self._result = function(*static)

    def fits(self, inputs: Sequence[Tensor]) -> bool:
        """Whether this graph was captured for inputs like these."""
        return self._operands.fit(inputs)

    def __call__(self, *inputs: Tensor) -> Result:
        """The function's result for these inputs and the present values of the parameters."""
        self._operands.copy(inputs)
        self._graph.replay()
        return self._result


class CapturedTraining:
    """Forward and backward of a function captured once each, and replayed with new values.

    A call gives what the function gives, with a graph for autograd whose backward is the second replay. It
    reaches the parameters alone, once: there is no second derivative. The tensors given are overwritten by
    the next call, gradients are not. Random numbers (dropout) are new at every replay, and as many as the
    function takes by itself; the capture leaves the generator where it was. Autocast is as at the capture.
    A backward with ``create_graph=True`` raises NotImplementedError.

    Args:
        function: of as many tensors as there are inputs, without synchronisation; gives floating-point
            tensors, each with a gradient.
        inputs: examples of all later ones, on a CUDA device; no gradient goes to them.
        parameters: all that gets a gradient; must keep their storage.

    Raises:
        ValueError: the inputs are not on a CUDA device, later ones differ in shape, type or device, or a
            parameter has moved since the capture.
    """

    def __init__(
        self,
        function: Callable[..., Sequence[Tensor]],
        inputs: Sequence[Tensor],
        parameters: Sequence[Tensor],
    ) -> None:
        self._operands = _Operands(inputs, parameters)
        static, self._parameters = self._operands.static, self._operands.parameters

        def gradients(results: Sequence[Tensor], cotangents: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
            # a backward pass is not under autocast
            with torch.autocast("cuda", enabled=False):
                return torch.autograd.grad(results, self._parameters, cotangents, allow_unused=True)

        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        device = static[0].device
        with torch.random.fork_rng(devices=[device]), _without_autocast_cache():
            with _warming_up():
                for _ in range(_WARMUP_CALLS):
                    results = function(*static)
                    gradients(results, [torch.zeros_like(r) for r in results])
                    del results
            with _capturing(self._forward):
                results = function(*static)
            self._cotangents = [torch.empty_like(r) for r in results]
            with _capturing(self._backward, pool=self._forward.pool()):
                self._gradients = gradients(results, self._cotangents)
        self._results = tuple(r.detach() for r in results)

    def fits(self, inputs: Sequence[Tensor]) -> bool:
        """Whether this was captured for inputs like these."""
        return self._operands.fit(inputs)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The function's results for these inputs and the present values of the parameters."""
        self._operands.copy(inputs)
        results: tuple[Tensor, ...] = _Replayed.apply(self, *self._parameters)
        return results

    def replay_forward(self) -> tuple[Tensor, ...]:
        """The results of what the operands hold now."""
        self._forward.replay()
        return tuple(r.detach() for r in self._results)

    def replay_backward(self, cotangents: Sequence[Tensor]) -> list[Tensor | None]:
        """Gradients of the parameters, behind the forward that was replayed last."""
        for static, given in zip(self._cotangents, cotangents, strict=True):
            static.copy_(given)
        self._backward.replay()
        # autograd may keep what it gets, as a parameter's .grad
        return [None if g is None else g.clone() for g in self._gradients]


class _Replayed(Function):
    @staticmethod
    def forward(ctx: Any, captured: CapturedTraining, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.captured = captured
        return captured.replay_forward()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "a captured backward has no second derivative; for create_graph=True call the function itself"
            )
        return None, *ctx.captured.replay_backward(cotangents)


class _Operands:
    """What a graph reads: copies of its inputs, which new values are written to, and parameters."""

    def __init__(self, inputs: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
        if any(not t.is_cuda for t in inputs):
            devices = [str(t.device) for t in inputs]
            raise ValueError(f"a CUDA graph needs its inputs on a CUDA device, got {devices}")
        self.static = [t.clone() for t in inputs]
        self.parameters = list(parameters)
        self._addresses = [p.data_ptr() for p in self.parameters]

    def fit(self, inputs: Sequence[Tensor]) -> bool:
        return all(
            new.shape == static.shape and new.dtype is static.dtype and new.device == static.device
            for new, static in zip(inputs, self.static, strict=True)
        )

    def copy(self, inputs: Sequence[Tensor]) -> None:
        if not self.fit(inputs):
            raise ValueError(
                f"captured for {[_describe(t) for t in self.static]}, got {[_describe(t) for t in inputs]}"
            )
        if [p.data_ptr() for p in self.parameters] != self._addresses:
            raise ValueError("a parameter moved after the capture, which reads its old place: capture again")
        for static, new in zip(self.static, inputs, strict=True):
            static.copy_(new)


@contextmanager
def _warming_up() -> Iterator[None]:
    """A stream of its own, on which kernels are compiled and libraries start."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        # the thread of the backward pass gets a context from a kernel; from cuBLAS it would get a warning too
        torch.zeros((), device="cuda", requires_grad=True).neg().backward()
        yield
    torch.cuda.current_stream().wait_stream(side)


@contextmanager
def _capturing(graph: torch.cuda.CUDAGraph, pool: Any = None) -> Iterator[None]:
    # other threads (a collective's watchdog, a data loader's pinning) may talk to the device meanwhile
    with _no_garbage_collection(), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        yield


@contextmanager
def _without_autocast_cache() -> Iterator[None]:
    """Autocast as it is, but for its cache: a graph would go on reading weights cast before it."""
    on = torch.is_autocast_enabled("cuda")
    dtype = torch.get_autocast_dtype("cuda")
    with torch.autocast("cuda", dtype=dtype, enabled=on, cache_enabled=False):
        yield


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
