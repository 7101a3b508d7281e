"""Per-sample gradients of linear maps, kept as factors, in memory or in memory-mapped files."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from safetensors.torch import load_file, save_file
from torch import Tensor


class Factors(NamedTuple):
    """The gradient sum_t d_t x_t^T of one linear map for one sample, in factors.

    Attributes:
        inputs: x, what the map read.
        outputs: d, the gradient of what it gave.
    """

    inputs: Float[Tensor, "tokens inputs"]
    outputs: Float[Tensor, "tokens outputs"]


class Whole(NamedTuple):
    """The gradient of one linear map for one sample itself; ``bias`` None where there is none."""

    weight: Float[Tensor, "outputs inputs"]
    bias: Float[Tensor, " outputs"] | None


Gradient = Factors | Whole
Record = Mapping[str, Gradient]
"""Gradients of one sample by the module's name; modules without one are left out."""


class GradientStore:
    """Records of samples one after the other; beyond a number of bytes they go to memory-mapped safetensors.

    A tensor that several gradients of a record share (the input of separate query, key and value projections)
    is kept once. Files have no name once they are mapped: their space is free when the store is no longer
    referenced, or its process killed.

    Args:
        memory_bytes: held in memory at most.
        directory: where files go; None for the system's temporary directory.
    """

    def __init__(self, memory_bytes: int, directory: Path | None = None) -> None:
        self.memory_bytes = memory_bytes
        self.held_bytes = 0
        self.spilled_bytes = 0
        self._directory = directory
        self._records: list[Record] = []

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, sample: int) -> Record:
        return self._records[sample]

    def append(self, record: Record) -> None:
        """Keep the gradients of one more sample."""
        tensors = {id(t): t for gradient in record.values() for t in gradient if t is not None}
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        if self.held_bytes + size <= self.memory_bytes or not tensors:
            self.held_bytes += size
            self._records.append(record)
            return
        mapped = self._mapped(tensors)
        self.spilled_bytes += size
        self._records.append({module: _replaced(gradient, mapped) for module, gradient in record.items()})

    def _mapped(self, tensors: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """The tensors as views of a file, by the same keys."""
        with tempfile.TemporaryDirectory(prefix="interference-", dir=self._directory) as directory:
            path = Path(directory) / "record.safetensors"
            save_file({str(key): t.cpu().contiguous() for key, t in tensors.items()}, path)
            return {int(key): t for key, t in load_file(path).items()}


def _replaced(gradient: Gradient, by: Mapping[int, Tensor]) -> Gradient:
    """The same gradient over other tensors."""
    if isinstance(gradient, Factors):
        return Factors(by[id(gradient.inputs)], by[id(gradient.outputs)])
    return Whole(by[id(gradient.weight)], None if gradient.bias is None else by[id(gradient.bias)])


def other_features(gradient: Gradient, side: str) -> int:
    """Number of features of the side that heads do not own."""
    if isinstance(gradient, Whole):
        return gradient.weight.shape[1 if side == "output" else 0]
    return (gradient.inputs if side == "output" else gradient.outputs).shape[1]


def gradient_rows(
    gradient: Gradient, side: str, features: Int64[Tensor, "*heads"], out: Float[Tensor, "features other"]
) -> None:
    """Write the rows of the gradient that belong to some features of one side of the map.

    Args:
        gradient: of one sample.
        side: "output" for features the map gives, "input" for features it reads.
        features: their indices.
        out: receives the rows, in the dtype and on the device of the computation.
    """
    if isinstance(gradient, Whole):
        weight = gradient.weight if side == "output" else gradient.weight.mT
        out.copy_(weight[features.flatten().to(weight.device)])
        return
    inputs, outputs = gradient
    owned, other = (outputs, inputs) if side == "output" else (inputs, outputs)
    torch.mm(_columns(owned, features).to(out).T, other.to(out), out=out)


def gradient_bias(
    gradient: Gradient, features: Int64[Tensor, "*heads"], out: Float[Tensor, "features 1"]
) -> None:
    """Write the gradient of the bias of some outputs."""
    if isinstance(gradient, Whole):
        if gradient.bias is None:
            raise ValueError("this map has no bias")
        out[:, 0] = gradient.bias[features.flatten().to(gradient.bias.device)]
    else:
        out[:, 0] = _columns(gradient.outputs, features).to(out).sum(dim=0)


def squared_norm(
    gradient: Gradient, side: str, features: Int64[Tensor, "*heads"], like: Tensor
) -> Float[Tensor, ""]:
    """Sum of squares of those rows, without forming them where tokens are few.

    With X and D the factors, |D^T X|^2 = sum((X X^T) * (D D^T)).
    """
    if isinstance(gradient, Whole):
        weight = gradient.weight if side == "output" else gradient.weight.mT
        return weight[features.flatten().to(weight.device)].to(like).square().sum()
    inputs, outputs = gradient
    owned, other = (outputs, inputs) if side == "output" else (inputs, outputs)
    owned, other = _columns(owned, features).to(like), other.to(like)
    tokens, rows, columns = len(owned), owned.shape[1], other.shape[1]
    if tokens * (rows + columns) < rows * columns:
        return ((owned @ owned.T) * (other @ other.T)).sum()
    return (owned.T @ other).square().sum()


def _columns(
    matrix: Float[Tensor, "tokens all"], features: Int64[Tensor, "*heads"]
) -> Float[Tensor, "tokens some"]:
    """Columns of a matrix; a view where they stand one after the other."""
    chosen = features.flatten()
    first, count = int(chosen[0]), len(chosen)
    if torch.equal(chosen, torch.arange(first, first + count)):
        return matrix[:, first : first + count]
    return matrix[:, chosen.to(matrix.device)]
