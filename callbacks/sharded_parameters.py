"""Parameters that are divided over processes, as ``torch.distributed.fsdp.fully_shard`` leaves them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def whole_tensor(tensor: Tensor) -> Tensor:
    """The whole of a divided tensor, for which every rank has to ask; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """This rank's part of a divided tensor, in the same memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextmanager
def whole_parameters(module: nn.Module) -> Iterator[None]:
    """Every parameter whole on every rank inside; divided again, if it was, behind it.

    Every rank has to come here. Inside nothing is communicated: ranks may call the module differently often,
    or one alone. There is no backward pass inside.
    """
    divided = [part for part in module.modules() if isinstance(part, FSDPModule)]
    # tensors made inside inference mode could not be trained outside of it
    with torch.inference_mode(False), torch.no_grad():
        for part in divided:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
    try:
        yield
    finally:
        with torch.inference_mode(False), torch.no_grad():
            for index, part in enumerate(divided):
                # the outermost comes first; what it holds itself is needed again at the end of a forward pass
                part.set_reshard_after_forward(index > 0, recurse=False)
                part.reshard()
