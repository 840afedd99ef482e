"""The loop that every recipe of one model and one loss shares: from batches to weight updates."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from .optimization import seeded_generator, set_learning_rate

Inputs = Callable[[dict[str, Any], torch.Generator], dict[str, Any]]


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
) -> Iterator[tuple[int, Tensor]]:
    """Train; after each weight update, how many there were, and the mean loss of this process's batches (detached).

    Args:
        accelerator: Knows how many batches an update takes.
        model: Prepared; called with the inputs, gives something with a `loss`.
        optimizer: Prepared.
        batches: From update `first` on, at least as many as are asked for.
        inputs: A batch and a generator that depends on the batch's number and the process -> the model's arguments.
        rate: Updates done -> the learning rate of the next.
        first: Updates done before.
        last: Updates done at the end.
        seed: Start of all random choices.
        max_grad_norm: Gradients longer than this are cut.
    """
    accumulate = accelerator.gradient_accumulation_steps
    step, losses = first, []
    # A loader that has no batch left is not asked for one.
    for number, batch in enumerate(islice(batches, max(last - first, 0) * accumulate), start=first * accumulate):
        set_learning_rate(optimizer, rate(step))
        generator = seeded_generator(seed, number, accelerator.process_index)
        # For what draws inside the model (skipped layers, points of a mask): after a stop it must go on the same.
        torch.manual_seed(generator.initial_seed() + 1)
        arguments = inputs(batch, generator)
        with accelerator.accumulate(model):
            # Called, never model.forward: the call is what synchronises the processes.
            loss = model(**arguments).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients and max_grad_norm is not None:
                accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach().float())
        if accelerator.sync_gradients:
            step += 1
            yield step, torch.stack(losses).mean()
            losses = []
