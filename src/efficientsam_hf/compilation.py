"""`torch.compile` for a model that answers many requests of the same shapes; without it where it does not work."""

import re
import warnings
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .cuda_graphs import copied
from .modeling_efficientsam import EfficientSamModel, EfficientSamPreparedImage, EfficientSamPromptedImage

# Modes of torch.compile that record CUDA graphs, whose answers the next call writes over.
GRAPH_MODES = ("reduce-overhead", "max-autotune")


def compile_model(model: EfficientSamModel, mode: str | None = None) -> EfficientSamModel:
    """Compile encoder and decoder in their places; the first call of each shape takes tens of seconds.

    Shapes are fixed: keep pictures in batches of one size. Numbers of prompts are filled up to powers of two, so that
    the last, smaller batch of clicks needs no compilation of its own. From a ninth kind of call on (another batch,
    other slots filled) torch goes on without compiling; `torch._dynamo.config.recompile_limit` says otherwise. Where
    compiling fails, the model goes on without it and warns once.

    Args:
        model: On any device; changed, and given back.
        mode: Of `torch.compile`; "reduce-overhead" records CUDA graphs.
    """
    copies = mode in GRAPH_MODES
    encoder, decoder = model.vision_encoder, model.mask_decoder
    encode, look, write_out = (
        Compiled(function, copies, mode=mode, dynamic=False)
        for function in (encoder.forward, decoder.look, decoder.write_out)
    )
    encoder.__dict__["forward"], decoder.__dict__["look"] = encode, partial(in_powers_of_two, look)
    decoder.__dict__["write_out"] = partial(few_in_powers_of_two, write_out)
    return model


class Compiled:
    """A function, compiled at its first call; the function itself from then on if that fails."""

    def __init__(self, eager: Callable, copies: bool = False, **options: Any):
        self.eager = eager
        self.copies = copies
        self.options = options
        self.compiled: Callable | None = torch.compile(eager, **options)

    def __deepcopy__(self, memo: dict) -> "Compiled":
        """Of a copied model the function is the copy's, and what was compiled is not: it has the old weights."""
        return Compiled(deepcopy(self.eager, memo), self.copies, **self.options)

    def __call__(self, *arguments: Any, **inputs: Any) -> Any:
        """What the function gives."""
        if self.compiled is None:
            return self.eager(*arguments, **inputs)
        try:
            if self.copies:
                torch.compiler.cudagraph_mark_step_begin()
            answer = self.compiled(*arguments, **inputs)
        except Exception as fault:
            answer = self.eager(*arguments, **inputs)  # which raises again what is the caller's fault
            self.compiled = None
            warnings.warn(f"torch.compile failed, going on without it: {reason_of(fault)}", stacklevel=2)
            return answer
        return copied(answer) if self.copies else answer


def reason_of(fault: Exception) -> str:
    """One line: the last one that names an error, where a compiler quotes those of its processes; or the first."""
    lines = str(fault).strip().splitlines() or [type(fault).__name__]
    named = [line.strip() for line in lines if re.match(r"\s*[\w.]*(Error|Exception)\b[^:]*: *\S", line)]
    return (named or lines)[-1 if named else 0]


def in_powers_of_two(
    look: Callable, prepared: EfficientSamPreparedImage, prompts: Tensor, last_stands_for: int | Tensor
) -> tuple[Tensor, EfficientSamPromptedImage]:
    """`EfficientSamMaskDecoder.look` on 1, 2, 4, ... prompts: those that are missing are zeros, and cut off again."""
    count = prompts.shape[1]
    missing = missing_to_power_of_two(count)
    if missing and isinstance(last_stands_for, int):  # slots that each prompt counts for itself are not filled up
        prompts = F.pad(prompts, (0, 0, 0, 0, 0, missing))
    tokens, image = look(prepared, prompts, last_stands_for)
    return tokens[:, :count], image[:count]


def few_in_powers_of_two(write_out: Callable, **inputs: Any) -> tuple[Tensor, Tensor]:
    """`EfficientSamMaskDecoder.write_out` on 1, 2 or 4 prompts: those that are missing are cut off again."""
    count = inputs["prompts"].shape[1]
    missing = missing_to_power_of_two(count)
    for name in ("prompts", "dense", "last_stands_for"):
        value = inputs[name]
        if isinstance(value, Tensor) and value.ndim > 2:  # each prompt has its own
            inputs[name] = F.pad(value, (0, 0) * (value.ndim - 2) + (0, missing))
    scores, masks = write_out(**inputs)
    return scores[:, :count], masks[:, :count]


def missing_to_power_of_two(count: int) -> int:
    """How many more make 1, 2, 4, ... of them; none of none."""
    return (1 << (count - 1).bit_length()) - count if count else 0
