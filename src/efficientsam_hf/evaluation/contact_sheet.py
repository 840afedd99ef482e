"""The worst cases on one page: what was missed, what was covered falsely, and where the clicks were."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from ..masks_efficientsam import masks_to_boxes
from ..visualization import BACKGROUND, FOREGROUND, as_image, mark_point

HIT, MISSED, FALSE = (46, 213, 115), (255, 200, 20), (240, 60, 150)
PAPER, INK, FAINT = (24, 26, 31), (240, 240, 240), (150, 155, 165)
TILE, GAP, CAPTION, HEADER = 300, 14, 40, 64  # pixels
MARGIN = 0.25  # around the object, as a share of its side


@dataclass(frozen=True)
class Case:
    """One mask to show.

    Args:
        photo: H x W, RGB.
        truth: (H, W), booleans.
        answer: (H, W), booleans.
        title: First line below it.
        note: Second line.
        points: Clicks x, y.
        labels: 1 on the object, 0 on the background.
        box: The prompt, if it was one.
    """

    photo: Image.Image
    truth: np.ndarray
    answer: np.ndarray
    title: str
    note: str
    points: Sequence[Sequence[float]] = ()
    labels: Sequence[int] = ()
    box: Sequence[float] | None = None


def draw_sheet(cases: Sequence[Case], heading: str, columns: int = 4) -> Image.Image:
    """The cases in rows, below a heading and the meaning of the colours."""
    columns = min(columns, len(cases)) or 1
    rows = -(-len(cases) // columns)
    width = max(columns * (TILE + GAP) + GAP, 760)
    sheet = Image.new("RGB", (width, HEADER + rows * (TILE + CAPTION + GAP) + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, 12), heading, INK, ImageFont.load_default(20))
    draw_legend(draw, 40)
    for number, case in enumerate(cases):
        left = GAP + number % columns * (TILE + GAP)
        top = HEADER + GAP + number // columns * (TILE + CAPTION + GAP)
        sheet.paste(draw_case(case), (left, top))
        draw.text((left, top + TILE + 3), shortened(case.title, 42), INK, ImageFont.load_default(14))
        draw.text((left, top + TILE + 21), shortened(case.note, 48), FAINT, ImageFont.load_default(12))
    return sheet


def draw_legend(draw: ImageDraw.ImageDraw, top: int) -> None:
    """What the colours mean, in a line."""
    left = GAP
    words = [(HIT, "found"), (MISSED, "missed"), (FALSE, "covered falsely"), (INK, "true edge")]
    for color, word in words:
        draw.rounded_rectangle((left, top + 2, left + 12, top + 14), 3, fill=color)
        draw.text((left + 18, top), word, FAINT, ImageFont.load_default(13))
        left += 40 + int(draw.textlength(word, ImageFont.load_default(13)))


def draw_case(case: Case) -> Image.Image:
    """A square tile of the surroundings of the true and the given mask."""
    left, top, right, bottom = surroundings(case)
    scale = TILE / max(right - left, bottom - top)
    size = (max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale)))
    part = case.photo.convert("RGB").crop((left, top, right, bottom)).resize(size, Image.Resampling.LANCZOS)
    part = Image.blend(part, Image.new("RGB", size, PAPER), 0.15)

    def fitted(mask: np.ndarray) -> Image.Image:
        return as_image(mask[top:bottom, left:right]).resize(size, Image.Resampling.BILINEAR)

    kinds = ((case.answer & case.truth, HIT, 0.3), (case.truth & ~case.answer, MISSED, 0.55))
    for mask, color, opacity in (*kinds, (case.answer & ~case.truth, FALSE, 0.55)):
        part.paste(color, mask=fitted(mask).point(lambda value, share=opacity: int(value * share)))
    truth = fitted(case.truth).point(lambda value: 255 * (value > 127))
    edge = ImageChops.subtract(truth.filter(ImageFilter.MaxFilter(3)), truth)
    part.paste(INK, mask=edge)
    if case.box is not None:
        corners = [(value - start) * scale for value, start in zip(case.box, (left, top) * 2, strict=True)]
        ImageDraw.Draw(part).rectangle(tuple(corners), outline=INK, width=2)
    for (x, y), label in zip(case.points, case.labels, strict=True):
        place = ((x + 0.5 - left) * scale, (y + 0.5 - top) * scale)
        mark_point(part, place, FOREGROUND if label else BACKGROUND, 0.7)
    tile = Image.new("RGB", (TILE, TILE), tuple(value + 10 for value in PAPER))
    tile.paste(part, ((TILE - size[0]) // 2, (TILE - size[1]) // 2))
    return tile


def surroundings(case: Case) -> tuple[int, int, int, int]:
    """The object with a margin, as a square where the photo allows, with so much of the answer as lies near."""
    x0, y0, x1, y1 = masks_to_boxes(case.truth).tolist()
    reach = max(x1 - x0, y1 - y0, 32) * (0.5 + 2 * MARGIN)
    middle = ((x0 + x1) / 2, (y0 + y1) / 2)
    left, top = (max(0, int(center - reach)) for center in middle)
    right, bottom = (min(side, int(center + reach) + 1) for side, center in zip(case.photo.size, middle, strict=True))
    return left, top, right, bottom


def shortened(text: str, most: int) -> str:
    """The text, or its end, which tells files apart."""
    return text if len(text) <= most else "…" + text[1 - most :]
