"""RandAugment: a few random changes of a picture's colours and shape, all of one strength.

Cubuk et al., 2020. The fifteen changes and their ranges are those that ImageNet recipes use since DeiT: a stronger
magnitude always changes more.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

# What moves in from outside the picture; near ImageNet's mean colour.
GREY = (124, 116, 104)


def transformed(image: Image.Image, *matrix: float) -> Image.Image:
    """The picture seen through x' = ax + by + c, y' = dx + ey + f."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=GREY)


def enhanced(kind: Callable) -> Callable[[Image.Image, float], Image.Image]:
    """Colour, contrast and the like, from 0.1 to 1.9 times what they are."""
    return lambda image, strength: kind(image).enhance(1 + 0.9 * strength)


def solarize_add(image: Image.Image, strength: float) -> Image.Image:
    """Dark parts become lighter, by at most 110 of 255."""
    table = [min(255, value + int(110 * strength)) if value < 128 else value for value in range(256)]
    return image.point(table * len(image.getbands()))


# By name: what is done with a strength in 0 to 1, and whether its sign is random.
CHANGES: dict[str, tuple[Callable[[Image.Image, float], Image.Image], bool]] = {
    "autocontrast": (lambda image, _: ImageOps.autocontrast(image), False),
    "equalize": (lambda image, _: ImageOps.equalize(image), False),
    "invert": (lambda image, _: ImageOps.invert(image), False),
    "posterize": (lambda image, strength: ImageOps.posterize(image, 4 - int(3 * strength)), False),
    "solarize": (lambda image, strength: ImageOps.solarize(image, 256 - int(256 * strength)), False),
    "solarize_add": (solarize_add, False),
    "rotate": (
        lambda image, strength: image.rotate(30 * strength, Image.Resampling.BICUBIC, fillcolor=GREY),
        True,
    ),
    "color": (enhanced(ImageEnhance.Color), True),
    "contrast": (enhanced(ImageEnhance.Contrast), True),
    "brightness": (enhanced(ImageEnhance.Brightness), True),
    "sharpness": (enhanced(ImageEnhance.Sharpness), True),
    "shear_x": (lambda image, strength: transformed(image, 1, 0.3 * strength, 0, 0, 1, 0), True),
    "shear_y": (lambda image, strength: transformed(image, 1, 0, 0, 0.3 * strength, 1, 0), True),
    "translate_x": (lambda image, strength: transformed(image, 1, 0, 0.45 * strength * image.width, 0, 1, 0), True),
    "translate_y": (lambda image, strength: transformed(image, 1, 0, 0, 0, 1, 0.45 * strength * image.height), True),
}


@dataclass(frozen=True)
class RandAugment:
    """Some changes in a row, each drawn from all of `CHANGES`.

    Args:
        count: How many; each is left out by a chance of one half, as in timm.
        magnitude: How strong, from 0 to 10.
        deviation: Of the magnitude, drawn for each change from a normal distribution.
    """

    count: int = 2
    magnitude: float = 9.0
    deviation: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.magnitude <= 10:
            raise ValueError(f"the magnitude must be from 0 to 10, got {self.magnitude}")

    def __call__(self, image: Image.Image, generator: np.random.Generator) -> Image.Image:
        """An RGB picture -> one of the same size."""
        names = list(CHANGES)
        for _ in range(self.count):
            change, signed = CHANGES[names[generator.integers(len(names))]]
            strength = float(np.clip(generator.normal(self.magnitude, self.deviation), 0, 10)) / 10
            sign = -1 if signed and generator.random() < 0.5 else 1
            if generator.random() < 0.5:
                image = change(image, sign * strength)
        return image
