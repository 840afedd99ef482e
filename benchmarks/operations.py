"""How many operations a model needs, and how many a device does: their quotient is the model FLOP utilisation.

And what else there is to do: kernels to start, bytes to read and write.
"""

import time
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


def encoder_operations(model: Any, side: int) -> float:
    """Of one picture in `get_image_embeddings`; a multiplication and an addition are two. The model has no weights.

    Args:
        model: On the device "meta".
        side: Of the picture, in pixels.
    """
    model.set_attn_implementation("eager")  # plain products, which the counter knows
    with FlopCounterMode(display=False) as counter:
        model.get_image_embeddings(torch.empty(1, 3, side, side, device="meta"))
    return float(counter.get_total_flops())


def place(device: str) -> str:
    """The device as the head of a table names it: of a GPU its name and transformers' version, too."""
    if device == "cpu":
        return device
    return f"{torch.cuda.get_device_name(device)}, transformers {transformers.__version__}"


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product, the fastest of ten."""
    side = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        (left @ right)[0, 0].item()
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds)


class Traffic(TorchDispatchMode):
    """Counts what a device is given to do, whichever it is: `operations`, and `bytes` of their inputs and outputs.

    Views are no operations. What one operation does inside, and caches, it does not see.
    """

    def __init__(self):
        super().__init__()
        self.operations, self.bytes = 0, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        answer = operation(*args, **(kwargs or {}))
        given, got = (
            [part for part in tree_leaves(parts) if isinstance(part, Tensor)] for parts in ((args, kwargs), answer)
        )
        places = {part.untyped_storage().data_ptr() for part in given}
        if operation._schema.is_mutable or any(part.untyped_storage().data_ptr() not in places for part in got):
            self.operations += 1
            self.bytes += sum(part.numel() * part.element_size() for part in (*given, *got))
        return answer
