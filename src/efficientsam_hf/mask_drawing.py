"""Masks at full size, made and noted only where there is something of them.

h x w the decoder's grid, H x W the picture or crop.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .masks_efficientsam import compress_counts, read_counts, resizing_matrix

# Bicubic weights of neighbouring cells add up to at most 0.445 below zero and then to 1.445 above. So a pixel can be
# of the object only if one of the cells around it has a logit above this share of the lowest one.
OVERSHOOT = 0.31
REACH = 2  # cells on each side that a pixel is made of
STRIP = 64  # pixels that are made at one time of the cells around them
DRAWN_BYTES = 2**29  # of masks of full size that a GPU draws at one time


class MaskPainter:
    """Brings masks of a grid to a size, each only inside the box that it can reach.

    Args:
        grid: h, w of the logits.
        size: H, W of the masks.
        mode: "bicubic" or "bilinear"; the numbers are those of `resize_masks`, up to rounding.
        device: Of the logits.
    """

    def __init__(self, grid: tuple[int, int], size: tuple[int, int], mode: str, device: torch.device):
        self.grid, self.size = grid, size
        self.rows, self.columns = (
            resizing_matrix(cells, length, mode, device) for cells, length in zip(grid, size, strict=True)
        )

    def boxes(self, logits: Tensor) -> list[tuple[int, int, int, int]]:
        """Where each of the masks (N, h, w) can have pixels: top, bottom, left, right; a GPU is asked but once."""
        lowest = logits.flatten(1).amin(1).clamp(max=0)[:, None, None]
        reached = logits >= OVERSHOOT * lowest
        extents = torch.cat([extents_of(reached.any(2)), extents_of(reached.any(1))], dim=1)
        return [
            (*pixels_of(top, bottom, self.grid[0], self.size[0]), *pixels_of(left, right, self.grid[1], self.size[1]))
            for top, bottom, left, right in extents.tolist()
        ]

    def paint(self, logits: Tensor, box: tuple[int, int, int, int]) -> tuple[Tensor, int, int]:
        """Logits (h, w) -> booleans of their box (H', W'), and the box's top and left in pixels.

        In memory one column follows the other, as in COCO's run lengths.
        """
        logits, (top, bottom, left, right) = logits.float(), box
        higher = torch.cat(list(enlarge(logits, self.rows, top, bottom)))
        mask = torch.cat([strip >= 0 for strip in enlarge(higher.T, self.columns, left, right)])
        return mask.T, top, left

    def annotate(self, logits: Tensor, top: int, left: int, size: tuple[int, int]) -> Iterator[dict[str, Any]]:
        """What COCO notes of each of the masks (N, h, w), which lie at a place of a picture of `size`; see `annotate`.

        A GPU draws several whole masks at one time, because it waits longer than it works; a CPU only their boxes.
        """
        if logits.device.type == "cpu":
            for own, box in zip(logits, self.boxes(logits), strict=True):
                mask, y, x = self.paint(own, box)
                yield annotate(find_edges(mask), mask.shape[0], top + y, left + x, size)
            return
        for some in logits.split(max(1, DRAWN_BYTES // (8 * self.size[0] * self.size[1]))):
            for edges in edges_of_columns(self.paint_columns(some)):
                yield annotate(edges, self.size[0], top, left, size)

    def paint_columns(self, logits: Tensor) -> Tensor:
        """Logits (N, h, w) -> booleans of all of the size, one column after the other (N, W, H)."""
        return self.columns @ (self.rows @ logits.float()).transpose(1, 2) >= 0


def enlarge(cells: Tensor, matrix: Tensor, first: int, last: int) -> Iterator[Tensor]:
    """Rows `first` to `last` of matrix (length, n) @ cells (n, m), some of them at a time, at least one time.

    On a CPU each strip is made of the few cells around it, since almost all of the matrix is 0.
    """
    length, count = matrix.shape
    step = STRIP if cells.device.type == "cpu" else max(1, last - first)
    for start in range(first, max(last, first + 1), step):
        stop = min(start + step, last)
        near = slice(max(0, start * count // length - REACH), -(-stop * count // length) + REACH)
        yield matrix[start:stop, near] @ cells[near]


def extents_of(marked: Tensor) -> Tensor:
    """Of each row of cells (N, n) the first that is marked and the one behind the last (N, 2); 0 and 0 if none is."""
    numbers = torch.arange(1, marked.shape[1] + 1, device=marked.device)
    stops, heads = (marked * numbers).amax(1), (marked * numbers.flip(0)).amax(1)
    return torch.stack([(marked.shape[1] - heads) * (stops > 0), stops], dim=1)


def pixels_of(first: int, stop: int, cells: int, length: int) -> tuple[int, int]:
    """First pixel and the one behind the last, of `length`, in which the cells `first` to `stop` have a part."""
    if stop == 0:
        return 0, 0
    return max(0, (first - REACH) * length // cells - 1), min(length, -(-(stop + REACH) * length // cells) + 1)


def annotate(edges: np.ndarray, rows: int, top: int, left: int, size: tuple[int, int]) -> dict[str, Any]:
    """What COCO notes of a mask that lies at a place of a picture of height and width `size`.

    Args:
        edges: Of the mask, as `find_edges` gives them.
        rows: How many the mask has.
        top: Its first row's place in the picture.
        left: Its first column's.
        size: Of the picture.

    Returns:
        `segmentation` (run lengths of the whole picture), `bbox` (x, y, width, height) and `area`, which is 0 for a
        mask without pixels.
    """
    height, width = size
    # Half the bytes are half the time, and enough for any picture below two gigapixels.
    edges = edges.astype(np.int32 if (height + 1) * width < 2**31 else np.int64)
    # Divided by one number, which NumPy does several times as fast as `divmod`.
    columns = edges // (rows + 1)
    places = edges - columns * (rows + 1)
    edges = (columns + left) * height + places + top
    area, bbox = int((edges[1::2] - edges[::2]).sum(dtype=np.int64)), [0, 0, 0, 0]
    if area:
        x, y = int(columns[0]) + left, int(places[::2].min()) + top
        bbox = [x, y, int(columns[-1]) + left + 1 - x, int(places[1::2].max()) + top - y]
    # A run that ends with its column goes on where the next one begins at once.
    joined = np.flatnonzero(edges[1:] == edges[:-1])
    if len(joined):
        edges = np.delete(edges, np.concatenate([joined, joined + 1]))
    counts = np.diff(edges, prepend=0, append=height * width)
    text = compress_counts(counts if counts[-1] else counts[:-1])
    return {"segmentation": {"size": [height, width], "counts": text}, "bbox": bbox, "area": area}


def find_edges(mask: Tensor) -> np.ndarray:
    """Where runs begin and end in a mask (H', W'), column after column with a row of background before each.

    So every run begins and ends in its column.
    """
    padded = np.zeros((mask.shape[1], mask.shape[0] + 1), dtype=bool)
    padded[:, 1:] = mask.numpy().T
    flat = np.append(padded.ravel(), False)
    return np.flatnonzero(flat[1:] != flat[:-1])


def edges_of_columns(masks: Tensor) -> list[np.ndarray]:
    """The edges of masks (N, W', H') as `find_edges` gives those of one; only these numbers are copied from a GPU.

    On a CPU NumPy finds them ten times as fast.
    """
    flat = F.pad(F.pad(masks, (1, 0)).flatten(1), (0, 1))
    numbers, edges = (flat[:, 1:] != flat[:, :-1]).nonzero().cpu().numpy().T
    return np.split(edges, np.searchsorted(numbers, np.arange(1, len(masks))))


def without_small_regions(mask: Tensor, least: int) -> Tensor:
    """A mask (H, W) with holes of fewer than `least` pixels filled and islands of fewer removed, but for the largest.

    Raises:
        ImportError: without scipy.
    """
    from scipy import ndimage

    neighbours = torch.ones(3, 3).numpy()
    for fill in (True, False):
        regions = (~mask if fill else mask).numpy()
        labels, count = ndimage.label(regions, structure=neighbours)
        if not count:
            continue
        areas = torch.from_numpy(ndimage.sum_labels(regions, labels, range(1, count + 1)))
        small = areas < least
        if not fill and small.all():
            small[areas.argmax()] = False
        turned = torch.cat([torch.tensor([False]), small])[torch.from_numpy(labels).long()]
        mask = mask | turned if fill else mask & ~turned
    return mask


def decode_box(rle: dict, box: list[int]) -> np.ndarray:
    """What COCO's run lengths have in a box (x, y, width, height), without painting the rest: (height, width)."""
    (whole_height, _), (x, y, width, height) = rle["size"], box
    ends = (read_counts(rle).cumsum() - x * whole_height).clip(0, width * whole_height)
    runs = np.diff(ends, prepend=0)
    pixels = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return np.ascontiguousarray(pixels.reshape(width, whole_height)[:, y : y + height].T)
