"""The decoder's forward in training: as it is, compiled, and captured in CUDA graphs."""

from collections.abc import Callable
from typing import Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor

from theria.cuda_graph import CapturedTraining
from theria.models.memory_lm import MemoryLM, MemoryLMOutput

CudaGraph = Literal["auto", "on", "off"]


class TrainingForward:
    """Logits and gates of training batches.

    A graph is captured at the first batch and serves batches of its shape; another shape is computed
    without. Logits and gates of a replay are overwritten by the next one.

    Args:
        model: whose forward it is.
        compiled: by torch.compile.
        cuda_graph: "auto" captures on CUDA devices, "on" demands it.
        strategy: of the trainer. That of a single device and DDP, which takes gradients as they come out of
            the graph, can be captured; others divide parameters or call into the backward.
    """

    def __init__(
        self, model: MemoryLM, *, compiled: bool, cuda_graph: CudaGraph, strategy: Strategy | None = None
    ) -> None:
        self._model = model
        self._forward: Callable[..., MemoryLMOutput] = (
            # called as a module, which gathers what a strategy has divided
            torch.compile(model.forward) if compiled else model
        )
        self._cuda_graph, self._strategy = cuda_graph, strategy
        self._captured: CapturedTraining | None = None

    def __call__(self, tokens: Tensor, segment_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits, and gates where there is a memory."""
        inputs = tokens, segment_ids
        if not self._to_be_captured(tokens):
            return self._outputs(*inputs)
        if self._captured is None:
            self._captured = self._capture(inputs)
        if not self._captured.fits(inputs):
            return self._outputs(*inputs)
        logits, *gates = self._captured(*inputs)
        return logits, gates[0] if gates else None

    def _capture(self, inputs: tuple[Tensor, Tensor]) -> CapturedTraining:
        parameters = [p for p in self._model.parameters() if p.requires_grad]
        try:
            return CapturedTraining(self._tensors, inputs, parameters)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise MisconfigurationException(
                "training's forward and backward could not be captured in CUDA graphs, where nothing may wait"
                f" for the device: {error}; model.init_args.cuda_graph: off does without"
            ) from error

    def _outputs(self, tokens: Tensor, segment_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        output = self._forward(tokens, segment_ids=segment_ids)
        return output.logits, output.gates

    def _tensors(self, tokens: Tensor, segment_ids: Tensor) -> tuple[Tensor, ...]:
        return tuple(t for t in self._outputs(tokens, segment_ids) if t is not None)

    def _to_be_captured(self, tokens: Tensor) -> bool:
        if self._cuda_graph == "off":
            return False
        obstacle = None
        if not tokens.is_cuda:
            obstacle = f"the batch is on {tokens.device}"
        elif not isinstance(self._strategy, SingleDeviceStrategy | DDPStrategy | None):
            obstacle = f"the strategy is {type(self._strategy).__name__}"
        if obstacle and self._cuda_graph == "on":
            raise MisconfigurationException(f"cuda_graph is on, but {obstacle}; use auto or off")
        return obstacle is None
