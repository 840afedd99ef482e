"""A closer look at an object: the same prompt once more, on a crop of the picture around it.

A small object covers few cells of the embedding grid; in a crop it covers many. RITM (Sofiiuk et al., 2022, "zoom-in")
crops around the last answer in the same way, from the second click on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .masks_efficientsam import masks_to_boxes
from .prompts_efficientsam import clip_box

Window = tuple[int, int, int, int]  # left, top, right, bottom; the last two are behind the last pixel
LEAST_SIDE = 32  # pixels of a window, where the picture has them
MOST_STRETCH = 2  # how much longer than the other a window's side may be, within the picture
WORTH_A_LOOK = 0.6  # windows that cover more of the picture show nothing new


def window_around(box: Sequence[float], size: tuple[int, int], zoom: float) -> Window | None:
    """The part of an H x W picture around a box (x0, y0, x1, y1), with sides `zoom` times as long, cut at its edges.

    None where that would be most of the picture anyway.
    """
    (x0, y0, x1, y1), (height, width) = box, size
    longest = zoom * max(x1 - x0, y1 - y0)
    across, down = (max(zoom * side, longest / MOST_STRETCH, LEAST_SIDE) / 2 for side in (x1 - x0, y1 - y0))
    middle_x, middle_y = (x0 + x1) / 2, (y0 + y1) / 2
    left, top = max(0, int(middle_x - across)), max(0, int(middle_y - down))
    right, bottom = min(width, int(middle_x + across) + 1), min(height, int(middle_y + down) + 1)
    if right <= left or bottom <= top or (right - left) * (bottom - top) > WORTH_A_LOOK * height * width:
        return None
    return left, top, right, bottom


@dataclass(frozen=True)
class Pointed:
    """What points at one object, in pixels.

    Args:
        points: Clicks [x, y].
        labels: Of the clicks: 1 on the object, 0 on the background, -1 for none.
        box: x0, y0, x1, y1, or None.
        mask: Of an earlier answer, (H, W), booleans, or None.
    """

    points: Sequence[Sequence[float]] = ()
    labels: Sequence[int] = ()
    box: Sequence[float] | None = None
    mask: Tensor | None = None

    def on_object(self) -> list[Sequence[float]]:
        """The clicks on the object."""
        return [point for point, label in zip(self.points, self.labels, strict=True) if label == 1]

    def region(self, mask: Tensor) -> list[float] | None:
        """The box around the object: the given one, cut to the picture, or else that of a mask (H, W); and its clicks.

        None without either: a click alone says nothing of the object's size.
        """
        if not self.box and not mask.any():
            return None
        own = clip_box("an object", list(self.box), *mask.shape) if self.box else masks_to_boxes(mask).tolist()
        x0, y0, x1, y1 = zip(own, *([x, y, x + 1, y + 1] for x, y in self.on_object()), strict=True)
        return [min(x0), min(y0), max(x1), max(y1)]

    def window(self, answer: Tensor, zoom: float) -> Window | None:
        """Where to look: around the mask that is given, or, where that shows nothing larger, an answer (H, W).

        A mask without one of the clicks on its object says too little of where that ends: then around the answer.
        """
        height, width = answer.shape
        masks = [answer]
        if self.mask is not None:
            cells = [(min(int(y), height - 1), min(int(x), width - 1)) for x, y in self.on_object()]
            masks = [self.mask, answer] if all(self.mask[cell] for cell in cells) else masks
        regions = [self.region(mask) for mask in masks]
        windows = [window_around(region, (height, width), zoom) for region in regions if region]
        return next((window for window in windows if window), None)

    def inside(self, window: Window, size: tuple[int, int]) -> "Pointed":
        """The same in the pixels of a window of an H x W picture, without what lies outside of it.

        A picture's far edges, x = W and y = H, still belong to it.
        """
        left, top, right, bottom = window
        last_x, last_y = (end + (end == side) for end, side in ((right, size[1]), (bottom, size[0])))
        clicks = [
            ([x - left, y - top], label)
            for (x, y), label in zip(self.points, self.labels, strict=True)
            if left <= x < last_x and top <= y < last_y and label >= 0
        ]
        box = self.box and [self.box[0] - left, self.box[1] - top, self.box[2] - left, self.box[3] - top]
        mask = None if self.mask is None else self.mask[top:bottom, left:right]
        return Pointed([point for point, _ in clicks], [label for _, label in clicks], box, mask)


def look_closer(
    picture: Tensor,
    logits: Tensor,
    scores: Tensor,
    objects: Sequence[Pointed],
    zoom: float,
    draw: Callable[[Tensor], Tensor],
    ask: Callable[[Tensor, Pointed], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """The answer at the picture's size; of each object that a window shows larger, what is seen there.

    Args:
        picture: (C, H, W).
        logits: Of the first answer, (Q, M, h, w), the best first.
        scores: (Q, M).
        objects: Q of them.
        zoom: Sides of a window, as multiples of those of the object.
        draw: Logits (q, M, h, w) -> masks (q, M, H, W).
        ask: Part of the picture, and what points at an object in it -> masks (M, h, w), scores (M).

    Returns:
        Masks (Q, M, H, W), booleans, and scores (Q, M).
    """
    size, scores = (picture.shape[-2], picture.shape[-1]), scores.clone()
    # A box says where to look by itself: such masks, which large photos have gigabytes of, need not be drawn first.
    undrawn = torch.zeros((), dtype=torch.bool, device=logits.device).expand(size)
    windows = [pointed.window(undrawn, zoom) if pointed.box else None for pointed in objects]
    rows = [row for row, window in enumerate(windows) if not window]
    if len(rows) == len(objects):
        masks = draw(logits)
    else:
        masks = logits.new_zeros((*logits.shape[:2], *size), dtype=torch.bool)
        if rows:
            masks[rows] = draw(logits[rows])
    for row, pointed in enumerate(objects):
        window = windows[row] or (None if pointed.box else pointed.window(masks[row, 0], zoom))
        inside = pointed.inside(window, size) if window else Pointed()
        if window and (inside.on_object() or inside.box or inside.mask is not None):
            left, top, right, bottom = window
            closer, scores[row] = ask(picture[:, top:bottom, left:right], inside)
            masks[row] = False
            masks[row, :, top:bottom, left:right] = closer
    return masks, scores


__all__ = ["Pointed", "look_closer", "window_around"]
