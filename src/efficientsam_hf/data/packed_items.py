"""Many small objects in one piece of memory, so that the processes that read pictures can share it."""

import pickle
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import numpy as np

Item = TypeVar("Item")


class PackedItems(Sequence[Item]):
    """Objects as bytes in a row, each made anew when it is asked for.

    A loader's workers are forked, and to look at an object is to write its reference count: a list of a million
    pictures would be copied, page by page, into every one of them. Of a row of bytes nothing is written.

    Args:
        items: Whatever can be pickled.
    """

    def __init__(self, items: Iterable[Item]):
        pieces = [pickle.dumps(item, protocol=pickle.HIGHEST_PROTOCOL) for item in items]
        self.ends = np.cumsum([0, *map(len, pieces)])
        self.content = b"".join(pieces)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: Any) -> Any:
        """An item, or a list of them for a slice."""
        numbers = range(len(self))[index]
        if isinstance(numbers, range):
            return [self[number] for number in numbers]
        return pickle.loads(self.content[self.ends[numbers] : self.ends[numbers + 1]])
