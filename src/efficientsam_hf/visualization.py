"""Masks drawn over the photo they belong to, for people."""

import colorsys
import math
from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter
from torch import Tensor

from .mask_drawing import decode_box
from .masks_efficientsam import as_booleans
from .pictures_efficientsam import Picture, read_photo
from .prompts_efficientsam import NO_BOX, NO_POINT, gather_prompts, one_image

# Bright, far apart in hue and for colour-blind eyes too (after Okabe and Ito, 2008), repeated when they run out.
COLORS = [
    (0, 158, 255),
    (255, 159, 28),
    (46, 213, 115),
    (240, 98, 176),
    (255, 221, 51),
    (120, 111, 255),
    (230, 73, 53),
]
MOST_OBJECTS = 2**16 - 1  # in a label map of 16 bits
FOREGROUND, BACKGROUND, WHITE = (46, 213, 115), (235, 59, 60), (255, 255, 255)


def draw_segmentation(
    photo: Picture,
    masks: Any,
    points: Any = None,
    labels: Any = None,
    boxes: Any = None,
    opacity: float = 0.45,
) -> Image.Image:
    """The photo with each mask in a colour of its own, outlined, the rest dimmed, and the prompts on top.

    Args:
        photo: What was segmented: PIL picture, array, tensor, path or URL.
        masks: (N, H, W), booleans; tensors may lie on any device.
        points: Clicks as `segment` takes them, one object's or several objects'.
        labels: As there; 1 draws a click in green, 0 in red; all green if left out.
        boxes: As there, each in its object's colour.
        opacity: Of the colours, 0 to 1.

    Raises:
        ValueError: if photo and masks differ in size, or points and labels in number, and for logits.
    """
    photo = read_photo(photo)
    masks = as_booleans(np.asarray(masks.cpu() if hasattr(masks, "cpu") else masks)).numpy()
    if masks.ndim != 3 or masks.shape[1:] != (photo.height, photo.width):
        raise ValueError(f"masks must be (N, {photo.height}, {photo.width}) like the photo, got {masks.shape}")
    unit = max(photo.size) / 640  # Line widths grow with the photo, so that it looks alike at any size.
    picture = Image.composite(photo, photo.point(lambda value: int(value * 0.62)), as_image(np.any(masks, axis=0)))
    for index, mask in enumerate(masks):
        paint_mask(picture, as_image(mask), COLORS[index % len(COLORS)], opacity, unit)
    draw = ImageDraw.Draw(picture)
    given = one_image(points, "input_points"), one_image(labels, "input_labels"), one_image(boxes, "input_boxes")
    (prompts,) = gather_prompts(*given, images=1)
    for index, prompt in enumerate(prompts):
        if prompt.box and prompt.box != NO_BOX:
            draw.rectangle(prompt.box, outline=WHITE, width=round(3 * unit) or 1)
            draw.rectangle(prompt.box, outline=COLORS[index % len(COLORS)], width=round(2 * unit) or 1)
    for prompt in prompts:
        for point, label in zip(prompt.points, prompt.labels, strict=True):
            if label != NO_POINT:
                mark_point(picture, point, FOREGROUND if label else BACKGROUND, unit)
    return picture


def draw_everything(
    photo: Picture,
    masks: Iterable[np.ndarray | Tensor],
    opacity: float = 0.5,
    corners: Iterable[tuple[int, int]] | None = None,
) -> Image.Image:
    """The photo with many masks, the largest at the bottom, in colours that neighbours are unlikely to share.

    Args:
        photo: What was segmented: PIL picture, array, tensor, path or URL.
        masks: (H, W) booleans each, largest first; read one at a time.
        opacity: Of the colours, 0 to 1.
        corners: x, y of each mask's upper left corner in the photo, for masks of a part of it.
    """
    photo = read_photo(photo)
    picture = photo.copy()
    for index, (mask, (x, y)) in enumerate(zip(masks, corners or repeat((0, 0)), strict=False)):
        # Steps of the golden ratio around the circle of hues never come back to where they were.
        hue, value = index * 0.618034 % 1, 1.0 - 0.25 * (index % 3) / 2
        color = tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.75, value))
        area = as_image(as_booleans(mask).cpu().numpy())
        if (box := area.getbbox()) is None:
            continue
        # Around the mask alone: most are small, and there may be hundreds.
        left, top, right, bottom = near((x + box[0], y + box[1], x + box[2], y + box[3]), 1, photo.size)
        area, box = area.crop((left - x, top - y, right - x, bottom - y)), (left, top, right, bottom)
        under = photo.crop(box)
        # Over the photo, not over the larger masks below, or colours would pile up to brown.
        picture.paste(Image.blend(under, Image.new("RGB", under.size, color), opacity), box, mask=area)
        edge = ImageChops.subtract(area, area.filter(ImageFilter.MinFilter(3)))
        picture.paste(color, box, mask=edge)
    return picture


def draw_records(photo: Picture, records: Sequence[dict[str, Any]], opacity: float = 0.5) -> Image.Image:
    """As `draw_everything`, of records as `segment_everything` gives, in any order.

    Raises:
        ValueError: if they are of a photo of another size.
    """
    photo = read_photo(photo)
    for record in records:
        height, width = record["segmentation"]["size"]
        if (width, height) != photo.size:
            raise ValueError(f"found a record of {width} x {height} pixels, wanted the photo's {photo.size}")
    largest_first = sorted(records, key=lambda record: -record["area"])
    masks = (decode_box(record["segmentation"], record["bbox"]) for record in largest_first)
    return draw_everything(photo, masks, opacity, (record["bbox"][:2] for record in largest_first))


def cut_out(photo: Image.Image, mask: np.ndarray) -> Image.Image:
    """The photo in RGBA, transparent outside of a mask (H, W)."""
    cutout = photo.convert("RGBA")
    cutout.putalpha(as_image(mask))
    return cutout


def label_map(records: Sequence[dict[str, Any]], size: tuple[int, int]) -> Image.Image:
    """Masks as numbers in one picture of 16 bits: 0 is no object, and a small object lies over a large one.

    Args:
        records: With `segmentation`, `bbox` and `area`; an object's number is its place among them, from 1 on.
        size: Width and height.
    """
    labels = np.zeros(size[::-1], dtype=np.uint16)
    for number in sorted(range(min(len(records), MOST_OBJECTS)), key=lambda n: -records[n]["area"]):
        x, y, width, height = bbox = records[number]["bbox"]
        labels[y : y + height, x : x + width][decode_box(records[number]["segmentation"], bbox)] = number + 1
    return Image.fromarray(labels)


def as_image(mask: np.ndarray) -> Image.Image:
    """A boolean mask (H, W) as a greyscale picture of 0 and 255."""
    return Image.fromarray(mask.astype(np.uint8) * 255)


def paint_mask(
    picture: Image.Image, mask: Image.Image, color: tuple[int, int, int], opacity: float, unit: float
) -> None:
    """The mask in its colour, outlined in it, with a soft white line around that."""
    if (box := mask.getbbox()) is None:
        return
    soft = 0.6 * unit
    reaches = [max(1, round(width * unit / 2)) for width in (4, 2)]
    # Nothing is drawn beyond the wider line and the three passes of the blur.
    box = near(box, max(reaches) + 3 * math.ceil(soft), picture.size)
    mask = mask.crop(box)
    picture.paste(color, box, mask.point(lambda value: int(value * opacity)))
    for reach, ink in zip(reaches, (WHITE, color), strict=True):
        edge = ImageChops.subtract(widened(mask, reach), mask)
        picture.paste(ink, box, edge.filter(ImageFilter.GaussianBlur(soft)))


def near(box: tuple[int, int, int, int], reach: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """A box (left, top, right, bottom) with so many pixels around it, as far as a picture of this size has them."""
    left, top, right, bottom = box
    return max(left - reach, 0), max(top - reach, 0), min(right + reach, size[0]), min(bottom + reach, size[1])


def widened(mask: Image.Image, reach: int) -> Image.Image:
    """A mask of 0 and 255 with what lies at most `reach` (up to 254) pixels beside it, as Pillow's MaxFilter gives it.

    In time that does not grow with the reach: where an average is above 0, something is near.
    """
    for direction in ((reach, 0), (0, reach)):
        mask = mask.filter(ImageFilter.BoxBlur(direction)).point(lambda value: 255 * (value > 0))
    return mask


def mark_point(picture: Image.Image, point: Sequence[float], color: tuple[int, int, int], unit: float) -> None:
    """A round marker, drawn four times as large and shrunk, because Pillow's circles have steps."""
    radius, fine = max(5.0, 7 * unit), 4
    side = round(2 * (radius + 2))
    marker = Image.new("RGBA", (side * fine, side * fine), (255, 255, 255, 0))
    draw, middle = ImageDraw.Draw(marker), side * fine / 2
    for share, ink in ((1.0, (0, 0, 0)), (0.92, WHITE), (0.66, color)):
        reach = radius * fine * share
        draw.ellipse((middle - reach, middle - reach, middle + reach, middle + reach), fill=(*ink, 255))
    marker = marker.resize((side, side), Image.Resampling.LANCZOS)
    picture.paste(marker, (round(point[0] - side / 2), round(point[1] - side / 2)), marker)
