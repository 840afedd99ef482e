"""The loop that all training of one model by one loss shares: from batches to weight updates."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from .optimization import seeded_generator, set_learning_rate

Inputs = Callable[[dict[str, Any], torch.Generator], dict[str, Any]]


@dataclass(frozen=True)
class Update:
    """A weight update that is done.

    Args:
        step: How many there were with it.
        losses: Means over this process's batches, detached: `loss`, and what else the model answers with one number.
        inputs: What the model was asked last.
        outputs: What it answered.
    """

    step: int
    losses: dict[str, Tensor]
    inputs: dict[str, Any]
    outputs: Any


def weight_updates(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[dict[str, Any]],
    *,
    inputs: Inputs,
    rate: Callable[[int], float],
    first: int,
    last: int,
    seed: int = 0,
    max_grad_norm: float | None = None,
) -> Iterator[Update]:
    """Train, and tell of each weight update.

    Args:
        accelerator: Knows how many batches an update takes.
        model: Prepared; called with the inputs, gives a mapping with a `loss`.
        optimizer: Prepared.
        batches: From update `first` on, at least as many as are asked for.
        inputs: A batch and a generator on the CPU that depends on the batch's number -> the model's arguments.
        rate: Updates done -> the learning rate of the next.
        first: Updates done before.
        last: Updates done at the end.
        seed: Start of all random choices.
        max_grad_norm: Gradients longer than this are cut.
    """
    accumulate, processes = accelerator.gradient_accumulation_steps, accelerator.num_processes
    step, losses = first, []
    # A loader that has no batch left is not asked for one.
    for number, batch in enumerate(islice(batches, max(last - first, 0) * accumulate), start=first * accumulate):
        set_learning_rate(optimizer, rate(step))
        # By the batch's number over all processes, so that two draw what one would.
        generator = seeded_generator(seed, number * processes + accelerator.process_index)
        # For what draws inside the model (skipped layers, points of a mask): after a stop it must go on the same.
        torch.manual_seed(generator.initial_seed() + 1)
        arguments = inputs(batch, generator)
        with accelerator.accumulate(model):
            # Called, never model.forward: the call is what synchronises the processes.
            with accelerator.autocast():
                outputs = model(**arguments)
            accelerator.backward(outputs["loss"])
            if accelerator.sync_gradients and max_grad_norm is not None:
                accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(single_numbers(outputs))
        if accelerator.sync_gradients:
            step += 1
            means = {name: torch.stack([part[name] for part in losses]).mean() for name in losses[0]}
            yield Update(step, means, arguments, outputs)
            losses = []


def single_numbers(outputs: Any) -> dict[str, Tensor]:
    """What a model answered with one number each, detached, float32."""
    found = {name: value for name, value in outputs.items() if isinstance(value, Tensor) and not value.ndim}
    return {name: value.detach().float() for name, value in found.items()}
