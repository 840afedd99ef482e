"""How good a mask is: IoU, boundary IoU, and the number of clicks it took. Pure functions of arrays.

N masks, H x W pixels, booleans. numpy rather than torch, which takes sixty times as long to count booleans.
"""

import math
from collections.abc import Sequence

import numpy as np

SMALL, LARGE = 32**2, 96**2  # pixels of an object; COCO's borders between small, medium and large
BOUNDARY_SHARE = 0.02  # of the picture's diagonal, Cheng et al., 2021


def iou(answer: np.ndarray, truth: np.ndarray, ignore: np.ndarray | None = None) -> float:
    """Intersection over union of two masks (H, W), without the pixels of `ignore`; 0 if there is nothing in either.

    Raises:
        ValueError: if they are of different sizes.
    """
    check_sizes(answer, truth, ignore)
    both, either = answer & truth, answer | truth
    if ignore is not None:
        both, either = both & ~ignore, either & ~ignore
    return float(np.count_nonzero(both) / np.maximum(np.count_nonzero(either), 1))


def boundary_iou(
    answer: np.ndarray, truth: np.ndarray, ignore: np.ndarray | None = None, share: float = BOUNDARY_SHARE
) -> float:
    """As `iou`, of what of each mask lies near its own boundary (Cheng et al., 2021).

    Args:
        answer: (H, W).
        truth: (H, W).
        ignore: (H, W), pixels that count for nothing.
        share: Width of the boundary as a share of the picture's diagonal.
    """
    check_sizes(answer, truth, ignore)
    width = boundary_width(truth.shape, share)
    return iou(boundary(answer, width), boundary(truth, width), ignore)


def boundary_width(size: tuple[int, ...], share: float = BOUNDARY_SHARE) -> int:
    """Pixels that count as boundary in a picture of (H, W)."""
    return max(1, round(share * math.hypot(*size)))


def boundary(mask: np.ndarray, width: int) -> np.ndarray:
    """The pixels of a mask (H, W) less than `width` + 1 from a pixel outside it, along rows, columns and diagonals.

    What lies outside the picture is outside the mask.
    """
    import cv2

    padded = np.pad(mask, 1).astype(np.uint8)
    inner = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=width)[1:-1, 1:-1]
    return mask & (inner == 0)


def number_of_clicks(scores: Sequence[float], wanted: float, most: int = 20) -> int:
    """The first click whose IoU is `wanted` or better, or `most` if none is (Sofiiuk et al., 2021).

    Args:
        scores: IoU after each click.
        wanted: 0 to 1.
        most: Clicks that count as never.
    """
    reached = (number for number, score in enumerate(scores[:most], start=1) if score >= wanted)
    return next(reached, most)


def size_class(area: float) -> str:
    """COCO's small, medium or large."""
    return "small" if area < SMALL else "medium" if area < LARGE else "large"


def check_sizes(answer: np.ndarray, truth: np.ndarray, ignore: np.ndarray | None) -> None:
    """Refuse masks of different sizes, which numpy might broadcast, and masks that are no booleans."""
    for mask in (answer, truth, *([] if ignore is None else [ignore])):
        if mask.ndim != 2 or mask.dtype != bool or mask.shape != truth.shape:
            found = f"{mask.dtype} {mask.shape} beside {truth.shape}"
            raise ValueError(f"wanted boolean masks (height, width) of one size, found {found}")
