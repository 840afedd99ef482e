"""Masks shrunk without being painted: from COCO's run lengths straight to the cells of the training resolution.

H x W pixels of the picture, h x w cells. A cell covers the pixels that `adaptive_avg_pool2d` gives it: from
floor(i H / h) to ceil((i + 1) H / h), so that neighbours share a row where H is no multiple of h.
"""

from functools import lru_cache

import numpy as np

from ..masks_efficientsam import read_counts


def shrink_run_lengths(rle: dict, size: tuple[int, int]) -> np.ndarray:
    """The cells of a mask that are covered by half or more: what painting it and averaging each cell would give.

    The work grows with the number of runs and of cells inside the mask's box, not with the picture's area.

    Args:
        rle: `{"size": [H, W], "counts": ...}`, compressed or not.
        size: (h, w).

    Returns:
        (h, w), bool.

    Raises:
        ValueError: if the counts are cut short, or do not add up to the size.
    """
    (height, width), cells = rle["size"], np.zeros(size, dtype=bool)
    columns, tops, bottoms = vertical_strips(read_counts(rle), height)
    if not len(columns):
        return cells
    left, right = cell_edges(width, size[1])
    # A column on an edge that two cells share counts in both.
    strip, across = spread(
        np.searchsorted(right, columns, side="right"), np.searchsorted(left, columns, side="right") - 1
    )
    top, bottom = cell_edges(height, size[0])
    first_row = np.searchsorted(bottom, tops.min(), side="right")
    behind_row = np.searchsorted(top, bottoms.max() - 1, side="right")
    first_column, behind_column = across.min(), across.max() + 1
    rows, inside = slice(first_row, behind_row), slice(first_column, behind_column)
    edges = np.unique(np.concatenate([top[rows], bottom[rows]]))
    above = pixels_above(across - first_column, behind_column - first_column, tops[strip], bottoms[strip], edges)
    covered = above[:, np.searchsorted(edges, bottom[rows])] - above[:, np.searchsorted(edges, top[rows])]
    area = np.outer(right[inside] - left[inside], bottom[rows] - top[rows])
    cells[rows, inside] = (2 * covered >= area).T
    return cells


def pixels_above(
    group: np.ndarray, groups: int, tops: np.ndarray, bottoms: np.ndarray, edges: np.ndarray
) -> np.ndarray:
    """How many pixels of each group of strips lie above each edge -> (groups, E).

    A strip from y0 to y1 has max(e - y0, 0) - max(e - y1, 0) pixels above edge e. Summed over strips, that is e times
    the number of tops above it less their sum, and the same for bottoms: two histograms and their running sums.

    Args:
        group: (S,), the group of each strip.
        groups: How many there are.
        tops: (S,), y0.
        bottoms: (S,), y1.
        edges: (E,), ascending, from at most the first top to at least the last bottom.
    """
    behind = np.searchsorted(edges, np.concatenate([tops, bottoms]), side="right")
    place = np.concatenate([group, group]) * (len(edges) + 1) + behind
    sign = np.repeat([1.0, -1.0], len(tops))
    weights = (sign, sign * np.concatenate([tops, bottoms]))
    shape = (groups, len(edges) + 1)
    number, total = (
        np.bincount(place, weight, minlength=shape[0] * shape[1]).reshape(shape)[:, :-1].cumsum(axis=1)
        for weight in weights
    )
    return edges * number - total


def vertical_strips(counts: np.ndarray, height: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Run lengths down the columns of a mask -> column, first row and the row behind the last of its S strips."""
    ends = np.cumsum(counts)
    starts, stops = ends[:-1:2], ends[1::2]
    starts, stops = starts[stops > starts], stops[stops > starts]
    run, columns = spread(starts // height, (stops - 1) // height)
    return columns, np.maximum(starts[run] - columns * height, 0), np.minimum(stops[run] - columns * height, height)


def spread(first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every whole number from `first` to `last` of each item, and the item that it belongs to."""
    lengths = last - first + 1
    if (lengths == 1).all():
        return np.arange(len(first)), first
    item = np.repeat(np.arange(len(first)), lengths)
    return item, np.arange(len(item)) + np.repeat(first - (np.cumsum(lengths) - lengths), lengths)


@lru_cache(maxsize=256)
def cell_edges(length: int, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each of the cells of a side of `length` pixels starts, and where it ends."""
    numbers = np.arange(cells)
    return numbers * length // cells, -(-(numbers + 1) * length // cells)
