"""Samples by number: epoch after epoch, each item once in an epoch, and the same again after a stop."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset


class EpochSamples(Dataset):
    """Numbered samples of items: each epoch takes every item once, in an order of its own.

    What a sample is depends on nothing but the seed, the item's number and the epoch, so that stopping, resuming and
    dividing the work are exact.

    Args:
        items: What to draw from.
        make: An item and a generator of random numbers -> a sample.
        length: How many samples there are to be.
        seed: Start of all random choices.
        first: Number of the first sample; resuming starts further on.
    """

    def __init__(
        self,
        items: Sequence,
        make: Callable[[Any, np.random.Generator], dict[str, Any]],
        length: int,
        seed: int = 0,
        first: int = 0,
    ):
        self.items = items
        self.make = make
        self.length = length
        self.seed = seed
        self.first = first
        self.order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=int))

    def __len__(self) -> int:
        return max(self.length - self.first, 0)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Sample `first + index`."""
        epoch, place = divmod(self.first + index, len(self.items))
        if self.order[0] != epoch:
            self.order = (epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.items)))
        number = int(self.order[1][place])
        return self.make(self.items[number], np.random.default_rng((self.seed, number, epoch)))
