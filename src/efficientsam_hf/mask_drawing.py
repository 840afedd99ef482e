"""Masks at full size, made and noted only where there is something of them.

h x w the decoder's grid, H x W the picture or crop.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .masks_efficientsam import compress_counts, read_counts

# Bicubic weights of neighbouring cells add up to at most 0.445 below zero and then to 1.445 above. So a pixel can be
# of the object only if one of the cells around it has a logit above this share of the lowest one.
OVERSHOOT = 0.31
REACH = 2  # cells on each side that a pixel is made of


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
            resizing_matrix(cells, length, mode).to(device) for cells, length in zip(grid, size, strict=True)
        )

    def paint(self, logits: Tensor) -> tuple[Tensor, int, int]:
        """Logits (h, w) -> booleans of a box (H', W') on the CPU, and the box's top and left in pixels."""
        logits = logits.float()
        reached = logits >= OVERSHOOT * logits.min().clamp(max=0)
        (top, bottom), (left, right) = (pixels_of(reached.any(1 - axis), self.size[axis]) for axis in range(2))
        box = self.rows[top:bottom] @ logits @ self.columns[left:right].T
        return (box >= 0).cpu(), top, left


def resizing_matrix(cells: int, length: int, mode: str) -> Tensor:
    """What interpolation does along one axis, (length, cells)."""
    return F.interpolate(torch.eye(cells)[None, None], (length, cells), mode=mode, align_corners=False)[0, 0]


def pixels_of(cells: Tensor, length: int) -> tuple[int, int]:
    """First pixel and the one behind the last, of `length`, that the marked cells (h,) have a part in."""
    marked = cells.nonzero()
    if not len(marked):
        return 0, 0
    first, last = int(marked[0]), int(marked[-1])
    return (
        max(0, (first - REACH) * length // len(cells) - 1),
        min(length, -(-(last + 1 + REACH) * length // len(cells)) + 1),
    )


def encode_placed(mask: Tensor, top: int, left: int, size: tuple[int, int]) -> dict:
    """COCO's run lengths of a mask (H', W') that has pixels and lies at a place of a picture, as of the whole."""
    height, width = size
    # Column after column, with a row of background between, every run begins and ends in its column.
    padded = np.zeros((mask.shape[1], mask.shape[0] + 1), dtype=bool)
    padded[:, 1:] = mask.numpy().T
    flat = np.append(padded.ravel(), False)
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    columns, rows = np.divmod(edges, mask.shape[0] + 1)
    edges = (columns + left) * height + rows + top
    # A run that ends with its column goes on where the next one begins at once.
    joined = np.flatnonzero(edges[1:] == edges[:-1])
    edges = np.delete(edges, np.concatenate([joined, joined + 1]))
    counts = np.diff(edges, prepend=0, append=height * width)
    return {"size": [height, width], "counts": compress_counts(counts if counts[-1] else counts[:-1])}


def decode_box(rle: dict, box: list[int]) -> np.ndarray:
    """What COCO's run lengths have in a box (x, y, width, height), without painting the rest: (height, width)."""
    (whole_height, _), (x, y, width, height) = rle["size"], box
    ends = (read_counts(rle).cumsum() - x * whole_height).clip(0, width * whole_height)
    runs = np.diff(ends, prepend=0)
    pixels = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return np.ascontiguousarray(pixels.reshape(width, whole_height)[:, y : y + height].T)
