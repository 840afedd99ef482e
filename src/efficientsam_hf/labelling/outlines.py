"""Masks as polygons, for formats that know nothing else.

Holes are lost. Where several parts must be one polygon (`joined`), readers draw bridges between them as lines, too.
"""

import numpy as np

from ..masks_efficientsam import decode_rle


def outlines_of(rle: dict) -> list[np.ndarray]:
    """The outer outline of each part of a mask in run lengths, the largest part first: (P, 2), x and y of pixels.

    A part of one or two corners repeats the last, for readers want three.
    """
    import cv2

    mask = decode_rle(rle).numpy().astype(np.uint8)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return []
    # Around the mask alone: most are small.
    top, left = int(rows[0]), int(columns[0])
    inside = np.ascontiguousarray(mask[top : rows[-1] + 1, left : columns[-1] + 1])
    found, _ = cv2.findContours(inside, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE, offset=(left, top))
    outlines = [outline[:, 0] if len(outline) > 2 else outline[[0, -1, -1], 0] for outline in found]
    return sorted(outlines, key=cv2.contourArea, reverse=True)


def joined(outlines: list[np.ndarray]) -> np.ndarray:
    """Several polygons as one (P, 2) that encloses the same area: a way there and back has no area of its own.

    Each part is reached from what is joined already between the corners that are nearest to each other.
    """
    path = outlines[0].astype(np.int64)
    for outline in outlines[1:]:
        at, place = nearest_corners(path, outline)
        around = np.roll(outline, -place, axis=0)
        path = np.concatenate([path[: at + 1], around, around[:1], path[at:]])
    return path


def nearest_corners(path: np.ndarray, outline: np.ndarray) -> tuple[int, int]:
    """Where two polygons (P, 2) are nearest to each other: the place of a corner of each."""
    # Corner by corner: all pairs of two large polygons would fill the memory.
    distances = (((path - corner) ** 2).sum(1) for corner in outline)
    _, at, place = min((int(row.min()), int(row.argmin()), place) for place, row in enumerate(distances))
    return at, place
