"""Where the protocols click, as their authors do. Pure functions of masks and generators.

H x W pixels, booleans; clicks are x, y of a pixel.
"""

from collections.abc import Iterable

import numpy as np

from ..masks_efficientsam import masks_to_boxes

Click = tuple[int, int]


def deepest(region: np.ndarray, clicked: Iterable[Click] = ()) -> tuple[Click, float]:
    """The pixel of a region (H, W) that is farthest from what is not in it, and how far; the first of equals.

    What lies outside the picture is not in the region. Distances are exact. Pixels that were `clicked` have no depth,
    so that it is 0 if all were.
    """
    import cv2

    left, top, right, bottom = masks_to_boxes(region).tolist()
    # Around the region alone everything is background, as a border of one pixel says.
    part = np.pad(region[top:bottom, left:right], 1).astype(np.uint8)
    distances = cv2.distanceTransform(part, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    for column, row in clicked:
        if left <= column < right and top <= row < bottom:
            distances[row - top + 1, column - left + 1] = 0
    y, x = np.unravel_index(distances.argmax(), distances.shape)
    return (left + int(x) - 1, top + int(y) - 1), float(distances[y, x])


def anywhere(region: np.ndarray, generator: np.random.Generator) -> Click:
    """A pixel of the region (H, W), each with the same chance."""
    pixels = np.flatnonzero(region)
    y, x = divmod(int(pixels[generator.integers(len(pixels))]), region.shape[1])
    return x, y


def centroid(region: np.ndarray) -> Click:
    """The centre of mass, if it lies in the region (H, W); else the pixel with most room to all four sides.

    segment-anything-fast's. Its search ends at the first row with a pixel that has room for 20; this one goes on.
    """
    y, x = (round(float(axis.mean())) for axis in np.nonzero(region))
    if region[y, x]:
        return x, y
    room = np.minimum.reduce([free_way(np.rot90(region, turn), turn) for turn in range(4)])
    y, x = divmod(int(np.where(region, room, -1).argmax()), region.shape[1])
    return x, y


def free_way(turned: np.ndarray, turn: int) -> np.ndarray:
    """Pixels of the region above each before it ends, of a region turned by `turn` quarters; turned back."""
    rows = np.arange(len(turned))[:, None]
    last_outside = np.maximum.accumulate(np.where(turned, -1, rows), axis=0)
    return np.rot90(rows - last_outside - 1, -turn)


def errors(answer: np.ndarray, truth: np.ndarray, ignore: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """What the answer missed and what it covered falsely, both (H, W), without what is to be ignored."""
    missed, false = truth & ~answer, answer & ~truth
    return (missed, false) if ignore is None else (missed & ~ignore, false & ~ignore)
