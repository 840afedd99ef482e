"""Samples by number: epoch after epoch, each item once in an epoch, and the same again after a stop."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from .images import CorruptPictureError, epoch_order

FRUITLESS = 100  # unreadable items in a row after which nothing is to be hoped for
logger = logging.getLogger(__name__)


class EpochSamples(Dataset):
    """Numbered samples of items: each epoch takes every item once, in an order of its own.

    What a sample is depends on nothing but the seed, the item's number and the epoch, so that stopping, resuming and
    dividing the work are exact. An item that cannot be read is named in the log, and the next one of the epoch stands
    in for it.

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

    def __len__(self) -> int:
        return max(self.length - self.first, 0)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Sample `first + index`.

        Raises:
            ValueError: if a hundred items in a row cannot be read.
        """
        epoch, place = divmod(self.first + index, len(self.items))
        order = epoch_order(self.seed, epoch, len(self.items))
        for step in range(FRUITLESS):
            sample = self.sample(int(order[(place + step) % len(self.items)]), epoch)
            if sample is not None:
                return sample
        raise ValueError(f"wanted an item that can be read, found none among {FRUITLESS} in a row; the log names them")

    def sample(self, number: int, epoch: int) -> dict[str, Any] | None:
        """A sample of item `number`; None if it cannot be read."""
        try:
            return self.make(self.items[number], np.random.default_rng((self.seed, number, epoch)))
        except (CorruptPictureError, OSError) as error:
            logger.warning("skipped: item %d, %s", number, error)
            return None
