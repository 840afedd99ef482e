"""Prompts as users nest them -> one record for each object -> padded tensors.

B pictures, Q objects a picture, P clicks an object; coordinates are x, y in pixels. What is missing in a ragged batch
is -1 throughout, which the model takes as nothing: clicks (-1, -1) with label -1, boxes (-1, -1, -1, -1).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from numbers import Real
from typing import Any

import torch
from torch import Tensor

# Labels of a slot. The first three are the user's; box corners get theirs inside the model.
NO_POINT, BACKGROUND, OBJECT, BOX_TOP_LEFT, BOX_BOTTOM_RIGHT = -1, 0, 1, 2, 3
NO_BOX = [-1, -1, -1, -1]
BOX_SLOTS = 2

LEVELS = {
    "input_points": ("image", "object", "point", "x and y"),
    "input_labels": ("image", "object", "point"),
    "input_boxes": ("image", "box", "x0, y0, x1 and y1"),
}


@dataclass
class Prompt:
    """What was shown of one object, in the pixels of its picture; `name` is what errors call it."""

    name: str
    points: list[list[float]]
    labels: list[int]
    box: list[float] | None


def plain_lists(value: Any, name: str) -> Any:
    """Tensors, arrays, tuples and lists within each other -> lists of numbers and None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [plain_lists(item, name) for item in value]
    if value is None or isinstance(value, Real):
        return value
    raise ValueError(f"{name} wants numbers in lists, an array or a tensor, found {value!r}")


def number_depths(value: Any) -> Iterator[int]:
    """For every number, how many lists it lies in."""
    if isinstance(value, list):
        for item in value:
            yield from (depth + 1 for depth in number_depths(item))
    elif value is not None:
        yield 0


def one_image(prompt: Any, name: str) -> list | None:
    """One click, one object's prompt, or a list of several objects', as the argument of this name for one image."""
    if prompt is None:
        return None
    prompt, levels = plain_lists(prompt, name), len(LEVELS[name])
    # A list too many is left to be refused with the image's around it.
    for _ in range(max(1, levels - max(number_depths(prompt), default=levels))):
        prompt = [prompt]
    return prompt


def nested(value: Any, name: str, images: int) -> list[list]:
    """A prompt argument as a list for each image, of entries for each object; entries may be None or empty."""
    if value is None:
        return [[]] * images
    value, levels = plain_lists(value, name), LEVELS[name]
    strange = set(number_depths(value)) - {len(levels)}
    if strange or not isinstance(value, list):
        raise ValueError(f"{name} wants {len(levels)} levels ({' > '.join(levels)}), found {max(strange, default=0)}")
    if len(value) != images:
        raise ValueError(f"{name} wants a list for each image: found {len(value)} lists for {images} images")
    return [entries or [] for entries in value]


def gather_prompts(points: Any, labels: Any, boxes: Any, images: int) -> list[list[Prompt]]:
    """The nested arguments as prompts: object q of an image has the q-th points and the q-th box, or lacks one.

    Raises:
        ValueError: if the nesting is not transformers', or points and labels do not go together.
    """
    all_points, all_boxes = nested(points, "input_points", images), nested(boxes, "input_boxes", images)
    if labels is None:
        all_labels = [[[OBJECT] * len(clicks or []) for clicks in objects] for objects in all_points]
    else:
        all_labels = nested(labels, "input_labels", images)
    rows: list[list[Prompt]] = []
    for image, objects in enumerate(zip(all_points, all_labels, all_boxes, strict=True)):
        rows.append([])
        for index, (clicks, marks, box) in enumerate(zip_longest(*objects)):
            name, clicks, marks = f"image {image}, object {index}", clicks or [], marks or []
            if len(clicks) != len(marks):
                raise ValueError(f"{name}: every point wants a label, found {len(clicks)} points, {len(marks)} labels")
            rows[-1].append(Prompt(name, clicks, marks, box or None))
    return rows


def check_numbers(name: str, kind: str, numbers: Any, count: int) -> None:
    """Refuse a point or a box that is not `count` finite numbers."""
    if not isinstance(numbers, list) or len(numbers) != count or None in numbers:
        raise ValueError(f"{name}: a {kind} wants {count} numbers, found {numbers}")
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"{name}: a {kind} wants finite numbers, found {numbers}")


def check_point(name: str, point: list[float], height: int, width: int) -> None:
    """Refuse a click beside the picture; its far edges still belong to it."""
    check_numbers(name, "point", point, 2)
    if not (0 <= point[0] <= width and 0 <= point[1] <= height):
        raise ValueError(f"{name}: wanted 0 <= x <= {width} and 0 <= y <= {height}, found the point {point}")


def clip_box(name: str, box: list[float], height: int, width: int) -> list[float]:
    """The part of the box that lies in the picture, of which there must be some."""
    check_numbers(name, "box", box, 4)
    left, top, right, bottom = box
    if left >= right or top >= bottom:
        raise ValueError(f"{name}: a box wants x0 < x1 and y0 < y1, found {box}")
    if right <= 0 or bottom <= 0 or left >= width or top >= height:
        raise ValueError(f"{name}: wanted a box on the picture of width {width} and height {height}, found {box}")
    return [max(left, 0), max(top, 0), min(right, width), min(bottom, height)]


def pad_prompts(prompts: list[list[Prompt]], sizes: Tensor, frame: Tensor) -> dict[str, Tensor]:
    """Ragged prompts as tensors in the model's pixels, padded with -1.

    Args:
        prompts: For each of B images the prompts of its objects, checked.
        sizes: (B, 2), height and width of the pictures.
        frame: (2,), width and height of the model's picture.

    Returns:
        `input_points` (B, Q, P, 2) float32 with `input_labels` (B, Q, P) int64, and `input_boxes` (B, Q, 4) float32;
        each only if some object has one.
    """
    shape = (len(prompts), max(map(len, prompts)))
    everyone = [prompt for row in prompts for prompt in row]
    points = torch.full((*shape, max([1, *(len(prompt.points) for prompt in everyone)]), 2), -1.0)
    labels = torch.full(points.shape[:-1], NO_POINT)
    boxes = torch.full((*shape, 4), -1.0)
    for image, (row, size) in enumerate(zip(prompts, sizes.flip(-1).float(), strict=True)):
        for index, prompt in enumerate(row):
            if prompt.points:
                count = len(prompt.points)
                points[image, index, :count] = torch.tensor(prompt.points, dtype=torch.float32) * frame / size
                labels[image, index, :count] = torch.tensor(prompt.labels, dtype=torch.int64)
            if prompt.box:
                corners = torch.tensor(prompt.box, dtype=torch.float32).view(2, 2)
                boxes[image, index] = (corners * frame / size).flatten()
    has_box = any(prompt.box for prompt in everyone)
    tensors = {"input_boxes": boxes} if has_box else {}
    if any(prompt.points for prompt in everyone) or not has_box:
        tensors |= {"input_points": points, "input_labels": labels}
    return tensors


__all__ = ["Prompt", "check_point", "clip_box", "gather_prompts", "one_image", "pad_prompts", "plain_lists"]


def gather_slots(points: Tensor | None, labels: Tensor | None, boxes: Tensor | None) -> tuple[Tensor, Tensor]:
    """Boxes become two labelled points, so that nothing further down knows of boxes.

    Points (B, Q, P, 2), labels (B, Q, P), boxes (B, Q, 4) -> (B, Q, P + 2, 2), (B, Q, P + 2), box corners first.
    """
    slots = []
    if boxes is not None:
        corners = boxes.unflatten(-1, (2, 2))
        # The two labels follow each other: counted on the device, they need no copy to it.
        corner_labels = torch.arange(BOX_TOP_LEFT, BOX_BOTTOM_RIGHT + 1, device=boxes.device).expand(corners.shape[:3])
        is_padding = (boxes < 0).all(-1, keepdim=True)
        slots.append((corners, corner_labels.masked_fill(is_padding, NO_POINT)))
    if points is not None:
        labels = torch.ones_like(points[..., 0], dtype=torch.long) if labels is None else labels
        if labels.shape != points.shape[:-1]:
            shapes = f"points {tuple(points.shape)}, labels {tuple(labels.shape)}"
            raise ValueError(f"every point needs a label: got {shapes}")
        slots.append((points, labels.long()))
    all_points, all_labels = zip(*slots, strict=True)
    return torch.cat(all_points, dim=2), torch.cat(all_labels, dim=2)


def drop_padding(points: Tensor, labels: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Cut slots (B, Q, P, 2), (B, Q, P) down to `slots` of padding: one prompt may have clicks and another a box.

    Raises:
        ValueError: if a prompt really fills more.
        RuntimeError: the same from within a compiled model. What `torch.export` writes drops the last ones.
    """
    order = (labels == NO_POINT).int().argsort(dim=2, stable=True)
    points, labels = points.take_along_dim(order[..., None], dim=2), labels.take_along_dim(order, dim=2)
    wanted, too_many = f"a prompt has {slots} slots (a point takes one, a box two)", labels[:, :, slots:] != NO_POINT
    if not torch.compiler.is_compiling() and too_many.any():
        raise ValueError(f"{wanted}, got {int((labels != NO_POINT).sum(-1).max())}")
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        torch._assert_async(~too_many.any(), f"{wanted}, got more")
    return points[:, :, :slots], labels[:, :, :slots]
