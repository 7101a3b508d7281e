"""The whole meta-gradient as one CUDA graph: no launch overhead, the same kernels, the same numbers."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from theria.maml.meta_gradient import MetaGradient
from theria.maml.task_model import Batch

_WARMUP_CALLS = 3


class CapturedMetaGradient:
    """A meta-gradient for one set of shapes, captured once and replayed with new tasks.

    The graph reads the parameters where they stand, so an optimiser that updates them in place is seen by
    the next replay. The tensors of the returned `MetaGradient` are overwritten by the next call: use or
    copy them before.

    Args:
        compute: support, query -> MetaGradient, without synchronisation: `meta_gradient` with its other
            arguments bound.
        support: a batch of the shapes, types and device of all later ones; likewise ``query``.
        query: see ``support``.
        parameters: what ``compute`` reads besides its arguments; must keep their storage.

    Raises:
        ValueError: the batch is not on a CUDA device, a later batch differs in shape, type or device, or a
            parameter has moved since the capture.
    """

    def __init__(
        self,
        compute: Callable[[Batch, Batch], MetaGradient],
        support: Batch,
        query: Batch,
        parameters: Sequence[Tensor],
    ) -> None:
        given = (*support, *query)
        if any(not t.is_cuda for t in given):
            raise ValueError(
                f"a CUDA graph needs its batch on a CUDA device, got {[str(t.device) for t in given]}"
            )
        self._static = tuple(t.clone() for t in given)
        self._parameters = list(parameters)
        self._addresses = [p.data_ptr() for p in self._parameters]
        static_support, static_query = self._static[:2], self._static[2:]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARMUP_CALLS):
                compute(static_support, static_query)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        # other threads (a collective's watchdog, a data loader's pinning) may talk to the device meanwhile
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._result = compute(static_support, static_query)

    def fits(self, support: Batch, query: Batch) -> bool:
        """Whether this graph was captured for batches like these."""
        return all(_alike(new, static) for new, static in zip((*support, *query), self._static, strict=True))

    def __call__(self, support: Batch, query: Batch) -> MetaGradient:
        """The meta-gradient of these tasks at the present values of the parameters."""
        if not self.fits(support, query):
            raise ValueError(
                f"captured for {[_describe(t) for t in self._static]},"
                f" got {[_describe(t) for t in (*support, *query)]}"
            )
        if [p.data_ptr() for p in self._parameters] != self._addresses:
            raise ValueError(
                "a parameter has moved since the capture, which reads its old place: capture again"
            )
        for static, new in zip(self._static, (*support, *query), strict=True):
            static.copy_(new)
        self._graph.replay()
        return self._result


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype is b.dtype and a.device == b.device


def _describe(t: Tensor) -> str:
    return f"{tuple(t.shape)} {t.dtype} on {t.device}"
