"""How far a run is and how well it goes: steps, losses, the best answer so far; what has gone wrong stops it."""

import math
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from .checkpoints import Checkpoints


class LossMeter:
    """The mean losses since they were last read, over all batches and processes; a run gone wrong is an error.

    Args:
        accelerator: Knows the other processes.
        checkpoints: Where the run's states are, so that the error can name the last good one.
        most: Loss part -> what it cannot be above while all is well; a mean above it is an error, too.
    """

    def __init__(self, accelerator: Accelerator, checkpoints: Checkpoints, most: dict[str, float] | None = None):
        self.accelerator = accelerator
        self.checkpoints = checkpoints
        self.most = most or {}
        # A loss speaks of the weights before its step: the newest state is not yet known to be good.
        self.good_until = max([step for step, _ in checkpoints.found()], default=0) - 1
        self.losses: list[dict[str, Tensor]] = []

    def add(self, losses: dict[str, Tensor]) -> None:
        """Note a batch's losses; nothing waits for the device here."""
        self.losses.append({name: loss.detach().float() for name, loss in losses.items()})

    def read(self, step: int) -> dict[str, float]:
        """The means; counting starts anew.

        Raises:
            FloatingPointError: if one is not finite or above its limit, in all processes alike.
        """
        values = torch.stack([torch.stack(list(losses.values())) for losses in self.losses]).mean(0)
        means = dict(zip(self.losses[0], self.accelerator.reduce(values, "mean").tolist(), strict=True))
        self.losses = []
        for name, mean in means.items():
            if not mean <= self.most.get(name, float("inf")) or math.isinf(mean):
                raise FloatingPointError(f"{name} is {mean:.4g} at step {step}: {self.way_back()}")
        self.good_until = step - 1
        return means

    def way_back(self) -> str:
        """Where a run that went wrong can go on."""
        found = self.checkpoints.found()
        good = [path for step, path in found if step <= self.good_until]
        newer = ", ".join(path.name for step, path in found if step > self.good_until)
        if not good:
            return "no good state was saved before; begin anew with a lower learning rate or a longer warmup"
        without = f", without {newer}," if newer else ""
        return f"the last good state is {good[-1]}; go on there{without} with a lower learning rate"


class BestScore:
    """The best score so far, and whether there is hope for a better one; `register_for_checkpointing` takes it.

    Args:
        patience: Scores without a better one after which to stop; 0 never stops.
    """

    def __init__(self, patience: int = 0):
        self.patience = patience
        self.best, self.step, self.fruitless = -math.inf, 0, 0

    def add(self, score: float, step: int) -> bool:
        """Note a score, higher is better; whether it is the best one. NaN never is."""
        if score > self.best:
            self.best, self.step, self.fruitless = score, step, 0
            return True
        self.fruitless += 1
        return False

    @property
    def is_over(self) -> bool:
        """Whether to stop."""
        return 0 < self.patience <= self.fruitless

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run has to know."""
        return {"best": self.best, "step": self.step, "fruitless": self.fruitless}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.best, self.step, self.fruitless = state["best"], state["step"], state["fruitless"]


def log_pictures(accelerator: Accelerator, pictures: dict[str, np.ndarray], step: int) -> None:
    """Give pictures (H, W, 3) uint8 to every tracker that takes some."""
    for tracker in accelerator.trackers:
        if tracker.name == "trackio":
            import trackio

            tracker.log({name: trackio.Image(picture) for name, picture in pictures.items()}, step=step)
        elif hasattr(tracker, "log_images"):
            # TensorBoard must be told that channels come last.
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({name: picture[None] for name, picture in pictures.items()}, step=step, **layout)


def steps_of(epochs: float, pictures: int, total_batch: int) -> int:
    """Weight updates in so many epochs, at least one unless there are no epochs."""
    return max(math.ceil(epochs > 0), int(epochs * pictures / total_batch))


def warmup_steps(
    epochs: float | None, paper: float, max_steps: int | None, pictures: int | None, total_batch: int
) -> int:
    """Steps of climb in so many epochs; where none are given the paper's, or a tenth of a number of steps.

    Raises:
        ValueError: for epochs of nobody knows how many pictures.
    """
    if epochs is None and max_steps is not None:
        return max_steps // 10
    if pictures is None:
        raise ValueError(f"{epochs} epochs of warmup of a stream, which does not say how long it is: give --pictures")
    return steps_of(paper if epochs is None else epochs, pictures, total_batch)


def sam_warmup(given: int | None, max_steps: int) -> int:
    """Steps of climb as they are given, or else SAM's 250, or a tenth of a run that is too short for these."""
    return min(250, max_steps // 10) if given is None else given


def batches_per_step(total_batch: int, batch_size: int, processes: int) -> int:
    """How many batches a process takes for one weight update.

    Raises:
        ValueError: if the total is no multiple of what the processes take at once.
    """
    at_once = batch_size * processes
    if total_batch % at_once:
        raise ValueError(
            f"the total batch must be a multiple of batch_size * processes = {batch_size} * {processes}, "
            f"got {total_batch}"
        )
    return total_batch // at_once
