"""Pictures with labels brought to one square: enlarged or shrunk at random for training, fitted whole for a test."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance

# What is around a picture that does not fill the square; near ImageNet's mean colour, so near 0 once normalised.
GREY = (124, 116, 104)


@dataclass(frozen=True)
class Placement:
    """How a picture comes to lie in a square of `size` pixels.

    Args:
        size: Side of the square.
        height: Of the whole picture after resizing.
        width: Of the whole picture after resizing.
        top: Row of the resized picture that is the square's first.
        left: Column of the resized picture that is the square's first.
        flip: Mirror the picture before all.
    """

    size: int
    height: int
    width: int
    top: int = 0
    left: int = 0
    flip: bool = False

    def place_picture(self, image: Image.Image) -> np.ndarray:
        """RGB -> (size, size, 3), uint8; antialiased bilinear, grey where the picture is not."""
        pixels = np.asarray(image.resize((self.width, self.height), Image.Resampling.BILINEAR))
        square = np.empty((self.size, self.size, 3), dtype=np.uint8)
        square[:] = GREY
        return self.paste(square, pixels)

    def place_labels(self, labels: np.ndarray, outside: int) -> np.ndarray:
        """(..., H, W) of the picture's size -> (..., size, size) by the nearest pixel; `outside` where it is not."""
        rows = (np.arange(self.height) + 0.5) * labels.shape[-2] / self.height
        columns = (np.arange(self.width) + 0.5) * labels.shape[-1] / self.width
        resized = labels[..., rows.astype(int)[:, None], columns.astype(int)]
        square = np.full((*labels.shape[:-2], self.size, self.size), outside, dtype=labels.dtype)
        moved = self.paste(np.moveaxis(square, (-2, -1), (0, 1)), np.moveaxis(resized, (-2, -1), (0, 1)))
        return np.ascontiguousarray(np.moveaxis(moved, (0, 1), (-2, -1)))

    def paste(self, square: np.ndarray, pixels: np.ndarray) -> np.ndarray:
        """The part of the resized picture (height, width, ...) that is in the square (size, size, ...)."""
        pixels = pixels[:, ::-1] if self.flip else pixels
        part = pixels[self.top : self.top + self.size, self.left : self.left + self.size]
        square[: part.shape[0], : part.shape[1]] = part
        return square


@dataclass(frozen=True)
class WholePicture:
    """Makes the input of an evaluation: the whole picture in the upper left corner of a frame.

    Args:
        size: What the side that is named by `by` becomes, in pixels.
        by: "long" gives frames of size x size, which fit in one batch; "short" frames of multiples of 32, one a batch.
    """

    size: int
    by: str = "long"

    def __call__(self, image: Image.Image) -> dict[str, Any]:
        """`pixels` (3, h, w) uint8, and heights and widths: of the `frame`, as `placed` in it, `original`."""
        original = (image.height, image.width)
        scale = self.size / (max(original) if self.by == "long" else min(original))
        placed = (max(1, round(original[0] * scale)), max(1, round(original[1] * scale)))
        rows, columns = (-(-side // 32) * 32 for side in placed)
        frame = (self.size, self.size) if self.by == "long" else (rows, columns)
        pixels = np.empty((*frame, 3), dtype=np.uint8)
        pixels[:] = GREY
        pixels[: placed[0], : placed[1]] = np.asarray(image.resize(placed[::-1], Image.Resampling.BILINEAR))
        return {
            "pixels": torch.from_numpy(pixels).permute(2, 0, 1),
            "frame": frame,
            "placed": placed,
            "original": original,
        }


@dataclass(frozen=True)
class ScaleJitter:
    """Large-scale jitter (Ghiasi et al., 2021): a random size, then a random square of it, mirrored or not.

    Args:
        size: Side of the square.
        smallest: The scales are drawn evenly from this on ...
        largest: ... to this.
        by: At scale 1 the picture's "long" side is as long as the square's (COCO), or its "short" one (ADE20K).
        flip: Chance of a mirror image.
        color: Largest relative change of brightness, contrast and saturation.
    """

    size: int = 1024
    smallest: float = 0.1
    largest: float = 2.0
    by: str = "long"
    flip: float = 0.5
    color: float = 0.0

    def __post_init__(self) -> None:
        if self.by not in ("long", "short"):
            raise ValueError(f"by must be 'long' or 'short', got {self.by!r}")
        if not 0 < self.smallest <= self.largest:
            raise ValueError(f"scales must be above 0 and rise, got {self.smallest} to {self.largest}")

    def draw(self, image_size: tuple[int, int], generator: np.random.Generator) -> Placement:
        """Where a picture of (height, width) comes to lie."""
        side = max(image_size) if self.by == "long" else min(image_size)
        scale = generator.uniform(self.smallest, self.largest) * self.size / side
        height, width = (max(1, round(length * scale)) for length in image_size)
        top, left = (int(generator.integers(max(length - self.size, 0) + 1)) for length in (height, width))
        return Placement(self.size, height, width, top, left, bool(generator.random() < self.flip))

    def recolor(self, image: Image.Image, generator: np.random.Generator) -> Image.Image:
        """Brightness, contrast and saturation changed at random."""
        if not self.color:
            return image
        for kind in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = kind(image).enhance(generator.uniform(1 - self.color, 1 + self.color))
        return image
