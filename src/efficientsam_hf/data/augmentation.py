"""Random changes of a picture together with its masks, drawn from a generator that is an argument."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageFilter

from ..masks_efficientsam import masks_to_boxes
from ..zooming import Window, window_around

CLOSEST, WIDEST = 1.2, 4.0  # sides of a window around an object, as multiples of its box's


@dataclass(frozen=True)
class Augmentation:
    """Crop, flip, colours.

    SAM's and EfficientSAM's SA-1B stages used none: with few photos it is what prevents learning them by heart.

    Args:
        smallest_crop: Sides of the crop are drawn between this share of the picture's and the whole; 1 never crops.
        smallest_scale: The picture is shrunk to between this share of its sides, 0.25 or more, and all of them, and
            put somewhere on a plain ground; 1 never shrinks. With `smallest_crop` this is scale jitter.
        flip: Chance of a mirror image.
        color: Largest relative change of brightness, contrast and saturation.
        closer: Chance that the crop is a window around one of the masks, as `segment(..., zoom=)` looks at an object.
        shapes: Chance that a sample's masks are random shapes pasted into its picture: see `paste_shapes`.
        objects: Chance that they are objects pasted from other pictures: see `paste_objects`.
        copy_paste: Chance that objects of other pictures are pasted beside and over the picture's own, and both are
            asked for, half of each where there are enough.
    """

    smallest_crop: float = 1.0
    flip: float = 0.0
    color: float = 0.0
    shapes: float = 0.0
    objects: float = 0.0
    smallest_scale: float = 1.0
    copy_paste: float = 0.0
    closer: float = 0.0

    def __post_init__(self) -> None:
        if (pasted := self.shapes + self.objects + self.copy_paste) > 1:
            raise ValueError(
                f"shapes, objects and copy_paste are chances of one draw, 1 at most together; got {pasted:g}"
            )
        if not 0.25 <= self.smallest_scale <= 1:
            raise ValueError(f"smallest_scale must be 0.25 to 1, got {self.smallest_scale}")

    def __call__(
        self, image: np.ndarray, masks: np.ndarray, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Picture (H, W, 3) uint8 and masks (K, H, W) bool -> the same, changed alike; sides may shrink."""
        rows, columns = self.draw_window(masks, generator)
        image, masks = image[rows, columns], masks[:, rows, columns]
        if self.smallest_scale < 1:
            image, masks = put_on_ground(image, masks, generator.uniform(self.smallest_scale, 1), generator)
        if generator.random() < self.flip:
            image, masks = image[:, ::-1], masks[:, :, ::-1]
        if self.color:
            image = jitter_colors(image, *generator.uniform(1 - self.color, 1 + self.color, 3))
        return np.ascontiguousarray(image), np.ascontiguousarray(masks)

    def draw_window(self, masks: np.ndarray, generator: np.random.Generator) -> tuple[slice, slice]:
        """Rows and columns of the crop of a picture with these masks (K, H, W)."""
        size = masks.shape[1:]
        if self.closer and generator.random() < self.closer and (window := window_on_one(masks, generator)):
            left, top, right, bottom = window
            return slice(top, bottom), slice(left, right)
        rows, columns = (draw_crop(side, self.smallest_crop, generator) for side in size)
        return rows, columns


def window_on_one(masks: np.ndarray, generator: np.random.Generator) -> Window | None:
    """A window around a random mask of (K, H, W); None if it would be most of the picture, or all are empty."""
    seen = masks[masks.any((1, 2))]
    if not len(seen):
        return None
    box = masks_to_boxes(torch.from_numpy(seen[int(generator.integers(len(seen)))])).tolist()
    zoom = np.exp(generator.uniform(np.log(CLOSEST), np.log(WIDEST)))
    return window_around(box, seen.shape[1:], float(zoom))


def draw_crop(length: int, smallest: float, generator: np.random.Generator, largest: float = 1.0) -> slice:
    """A random part of `length` pixels, a share of it between `smallest` and `largest`."""
    size = max(1, round(length * generator.uniform(smallest, largest)))
    start = generator.integers(length - size + 1)
    return slice(start, start + size)


def put_on_ground(
    image: np.ndarray, masks: np.ndarray, share: float, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A picture (H, W, 3) and its masks (K, H, W) on a ground of its mean colour, with `share` of its sides."""
    borders = []
    for side in image.shape[:2]:
        free = max(side, round(side / share)) - side
        before = int(generator.integers(free + 1))
        borders.append((before, free - before))
    colour = image.mean((0, 1)).round().astype(np.uint8)
    channels = [np.pad(image[..., channel], borders, constant_values=colour[channel]) for channel in range(3)]
    return np.stack(channels, axis=-1), np.pad(masks, [(0, 0), *borders])


def paste_shapes(
    image: np.ndarray, other: np.ndarray, count: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Cover parts of a picture with parts of another one, in random smooth shapes, whose masks are then known.

    Nothing but the looks of the pixels tells the shapes from what is around them: the grouping that few photos teach
    slowly. A later shape hides what it covers of an earlier one.

    Args:
        image: (H, W, 3), uint8.
        other: (h, w, 3), uint8; small parts of it fill the shapes.
        count: How many shapes.
        generator: Source of the random choices.

    Returns:
        The picture (H, W, 3) uint8 and the visible parts of the shapes (count, H, W) bool.
    """
    height, width = image.shape[:2]
    image, masks = image.copy(), np.zeros((count, height, width), dtype=bool)
    for number in range(count):
        place = draw_crop(height, 0.15, generator, largest=0.7), draw_crop(width, 0.15, generator, largest=0.7)
        size = (place[1].stop - place[1].start, place[0].stop - place[0].start)
        shape = random_shape(size, generator)
        part = other[tuple(draw_crop(side, 0.1, generator, largest=0.5) for side in other.shape[:2])]
        part = np.asarray(Image.fromarray(part).resize(size, Image.Resampling.BILINEAR))
        part = jitter_colors(part, *generator.uniform(0.6, 1.4, 3))
        cover(image, masks, number, place, part, shape.astype(np.float32))
    return image, masks


def paste_objects(
    image: np.ndarray,
    cutouts: list[tuple[np.ndarray, np.ndarray]],
    generator: np.random.Generator,
    own: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Put objects of other pictures somewhere into a picture, in any size, with soft edges (Ghiasi et al., 2021).

    A few photos with masks become as many scenes as training can use. A later object hides what it covers.

    Args:
        image: (H, W, 3), uint8.
        cutouts: Parts of pictures (h, w, 3) uint8, each with the mask (h, w) bool of the object in it.
        generator: Source of the random choices.
        own: Masks (K, H, W) bool of what is in the picture already; None for none that matter.

    Returns:
        The picture (H, W, 3) uint8 and the visible parts of its own objects and then of the pasted ones
        (K + objects, H, W) bool; what is hidden altogether has an empty mask.
    """
    height, width = image.shape[:2]
    pasted = np.zeros((len(cutouts), height, width), dtype=bool)
    image, masks = image.copy(), pasted if own is None else np.concatenate([own, pasted])
    for number, (part, mask) in enumerate(cutouts, start=len(masks) - len(cutouts)):
        # Small sizes as often as large ones, by their ratio; never larger than the picture.
        scale = np.exp(generator.uniform(np.log(0.15), np.log(0.9))) * min(height, width) / max(mask.shape)
        size = (max(1, round(mask.shape[1] * scale)), max(1, round(mask.shape[0] * scale)))
        top, left = generator.integers(height - size[1] + 1), generator.integers(width - size[0] + 1)
        place = slice(top, top + size[1]), slice(left, left + size[0])
        side = generator.choice((-1, 1))
        part = np.asarray(Image.fromarray(part).resize(size, Image.Resampling.BILINEAR))[:, ::side]
        alpha = Image.fromarray(255 * mask.astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)
        alpha = alpha.filter(ImageFilter.GaussianBlur(generator.uniform(0, 1)))
        part = jitter_colors(part, *generator.uniform(0.8, 1.2, 3))
        cover(image, masks, number, place, part, np.asarray(alpha, dtype=np.float32)[:, ::side] / 255)
    return image, masks


def cover(
    image: np.ndarray,
    masks: np.ndarray,
    number: int,
    place: tuple[slice, slice],
    part: np.ndarray,
    alpha: np.ndarray,
) -> None:
    """Blend `part` (h, w, 3) into a place of the picture by `alpha` (h, w) in [0, 1]; it becomes mask `number`."""
    masks[(slice(None), *place)] &= alpha < 0.5
    masks[(number, *place)] = alpha >= 0.5
    alpha = alpha[..., None]
    image[place] = np.rint(alpha * part + (1 - alpha) * image[place])


def random_shape(size: tuple[int, int], generator: np.random.Generator) -> np.ndarray:
    """A smooth blob, often with bays and holes, in a box of `size` (width, height) -> (height, width) bool."""
    side = int(generator.integers(3, 8))
    coarse = Image.fromarray(generator.random((side, side), dtype=np.float32))
    noise = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC))
    y, x = np.linspace(-1, 1, size[1])[:, None], np.linspace(-1, 1, size[0])
    return noise - 0.6 * (x**2 + y**2) > generator.uniform(-0.2, 0.2)


def jitter_colors(image: np.ndarray, brightness: float, contrast: float, saturation: float) -> np.ndarray:
    """Scale a picture's (H, W, 3) uint8 brightness, its contrast about the mean, its distance from grey.

    All three together are one matrix for every pixel, and a shift.
    """
    scale, shift = brightness * contrast, brightness * (1 - contrast) * image.mean()
    others = scale * (1 - saturation) / 3
    own = others + scale * saturation
    rows = (own, others, others, shift), (others, own, others, shift), (others, others, own, shift)
    return np.array(Image.fromarray(image).convert("RGB", sum(rows, ())))
