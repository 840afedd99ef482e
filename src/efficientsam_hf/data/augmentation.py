"""Random changes of a picture together with its masks, drawn from a generator that is an argument."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Augmentation:
    """Crop, flip, colours.

    SAM's and EfficientSAM's SA-1B stages used none: with few photos it is what prevents learning them by heart.

    Args:
        smallest_crop: Sides of the crop are drawn between this share of the picture's and the whole; 1 never crops.
        flip: Chance of a mirror image.
        color: Largest relative change of brightness, contrast and saturation.
    """

    smallest_crop: float = 1.0
    flip: float = 0.0
    color: float = 0.0

    def __call__(
        self, image: np.ndarray, masks: np.ndarray, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Picture (H, W, 3) uint8 and masks (K, H, W) bool -> the same, changed alike; sides may shrink."""
        height, width = image.shape[:2]
        rows = draw_crop(height, self.smallest_crop, generator)
        columns = draw_crop(width, self.smallest_crop, generator)
        image, masks = image[rows, columns], masks[:, rows, columns]
        if generator.random() < self.flip:
            image, masks = image[:, ::-1], masks[:, :, ::-1]
        if self.color:
            image = jitter_colors(image, *generator.uniform(1 - self.color, 1 + self.color, 3))
        return np.ascontiguousarray(image), np.ascontiguousarray(masks)


def draw_crop(length: int, smallest: float, generator: np.random.Generator) -> slice:
    """A random part of `length` pixels, at least `smallest` (a share) of it."""
    size = max(1, round(length * generator.uniform(smallest, 1.0)))
    start = generator.integers(length - size + 1)
    return slice(start, start + size)


def jitter_colors(image: np.ndarray, brightness: float, contrast: float, saturation: float) -> np.ndarray:
    """Scale a picture's (H, W, 3) uint8 brightness, its contrast about the mean, its distance from grey."""
    pixels = image.astype(np.float32) * brightness
    pixels = (pixels - pixels.mean()) * contrast + pixels.mean()
    grey = pixels.mean(axis=2, keepdims=True)
    return np.clip(np.rint((pixels - grey) * saturation + grey), 0, 255).astype(np.uint8)
