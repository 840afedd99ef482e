"""CUDA graphs of a whole model: the GPU starts its operations by itself, where Python would start them one by one.

For one picture a GPU is done with an operation long before Python has started the next.
"""

import warnings
from collections.abc import Callable, Hashable
from copy import deepcopy
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

MOST_RECORDINGS = 16  # of one function; each keeps the memory that its shapes take
WARM_UP = 3  # calls before one is recorded, in which libraries choose their kernels


def record_model(model: nn.Module) -> nn.Module:
    """Record `forward` and `get_image_embeddings` in their places, once for each shapes of inputs, then replay them.

    For inference alone: with gradients or autocast, inputs from elsewhere, or after a failure the model answers as
    before. Weights may be changed where they are, not moved.

    Args:
        model: On a CUDA device, in its final dtype, perhaps compiled (`compile_model` without a mode); changed, and
            given back.

    Raises:
        ValueError: for a model that is on no CUDA device.
    """
    device = next(model.parameters()).device
    if device.type != "cuda":
        raise ValueError(f"CUDA graphs are recorded of a model on a CUDA device, got one on {device}")
    for name in ("forward", "get_image_embeddings"):
        model.__dict__[name] = Recorded(getattr(model, name))
    return model


class Recorded:
    """A function of tensors, recorded at its first call with inputs of new shapes; itself if that fails.

    Args:
        eager: Must not wait for the GPU, nor look at its numbers.
        record: What makes a recording of a function and its inputs.
    """

    def __init__(self, eager: Callable, record: Callable | None = None):
        self.eager = eager
        self.record = record or Recording
        self.recordings: dict[Hashable, Callable] = {}
        self.failed = False

    def __deepcopy__(self, memo: dict) -> "Recorded":
        """Of a copied model the function is the copy's, and nothing is recorded."""
        return Recorded(deepcopy(self.eager, memo), self.record)

    def __call__(self, *arguments: Any, **inputs: Any) -> Any:
        """What the function gives, in memory of its own."""
        if self.failed or torch.is_grad_enabled() or torch.is_autocast_enabled("cuda"):
            return self.eager(*arguments, **inputs)
        key = signature(arguments, inputs)
        if key not in self.recordings:
            answer = self.eager(*arguments, **inputs)  # which raises what is the caller's fault
            self.note(key, arguments, inputs)
            return answer
        return copied(self.recordings[key](arguments, inputs))

    def note(self, key: Hashable, arguments: tuple, inputs: dict[str, Any]) -> None:
        """Record a call for the next ones like it, in place of the oldest if there are many."""
        if key is None:
            return
        try:
            recording = self.record(self.eager, arguments, inputs)
        except RuntimeError as fault:
            self.failed = True
            reason = (str(fault).strip().splitlines() or [type(fault).__name__])[0]
            warnings.warn(f"no CUDA graph could be recorded, going on without: {reason}", stacklevel=3)
            return
        if len(self.recordings) == MOST_RECORDINGS:
            del self.recordings[next(iter(self.recordings))]
        self.recordings[key] = recording


class Recording:
    """One call on the GPU, to be replayed with other numbers in the same shapes."""

    @torch.inference_mode()
    def __init__(self, eager: Callable, arguments: tuple, inputs: dict[str, Any]):
        self.arguments = tuple(own(value) for value in arguments)
        self.inputs = {name: own(value) for name, value in inputs.items()}
        places = [*self.arguments, *self.inputs.values()]
        device = next(place.device for place in places if isinstance(place, Tensor))
        with torch.cuda.device(device):  # streams and graphs are the current device's, whatever the model's is
            self.graph = torch.cuda.CUDAGraph()
            self.answer = self.record(eager)

    def record(self, eager: Callable) -> Any:
        """Warm up, then note what the GPU is told to do; gives the answer's memory."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                eager(*self.arguments, **self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        # Other threads, which read the next pictures, go on meanwhile.
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            return eager(*self.arguments, **self.inputs)

    @torch.inference_mode()
    def __call__(self, arguments: tuple, inputs: dict[str, Any]) -> Any:
        """The answer, which the next call writes over."""
        places = [*self.arguments, *self.inputs.values()]
        for place, value in zip(places, [*arguments, *(inputs[name] for name in self.inputs)], strict=True):
            if isinstance(place, Tensor):
                place.copy_(value)
        self.graph.replay()
        return self.answer


def own(value: Any) -> Any:
    """A tensor in memory of its own; anything else as it is."""
    return value.clone() if isinstance(value, Tensor) else value


def signature(arguments: tuple, inputs: dict[str, Any]) -> Hashable:
    """What calls have in common that may share a recording; None for one that cannot be recorded."""

    def of(value: Any) -> Hashable:
        if isinstance(value, Tensor):
            return (tuple(value.shape), value.dtype, value.device)
        return value

    values = [*arguments, *inputs.values()]
    plain = all(isinstance(value, Tensor | bool | int | float | str | None) for value in values)
    if not plain or any(isinstance(value, Tensor) and value.device.type == "cpu" for value in values):
        return None
    return (tuple(map(of, arguments)), tuple((name, of(value)) for name, value in inputs.items()))


def copied(answer: Any) -> Any:
    """A copy of a tensor, or of those in a list, a tuple, a dataclass or an output of transformers."""
    if isinstance(answer, Tensor):
        return answer.clone()
    if isinstance(answer, list | tuple):
        return type(answer)(copied(part) for part in answer)
    parts = {field.name: getattr(answer, field.name) for field in fields(answer)}
    return type(answer)(**{name: copied(part) for name, part in parts.items() if part is not None})
