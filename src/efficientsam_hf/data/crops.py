"""Random squares cut out of pictures, and the random numbers that hide their patches.

What becomes of a picture depends on nothing but the seed, the picture's number and the epoch, so that stopping,
resuming and dividing the work are exact, and so that features can be kept from one epoch to the next.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image


@dataclass(frozen=True)
class Crop:
    """A rectangle of a picture in whole pixels, and whether its mirror image is wanted."""

    left: int
    top: int
    width: int
    height: int
    flip: bool


@dataclass(frozen=True)
class RandomResizedCrop:
    """Where to cut (Szegedy et al., 2015): a random share of the area, in a random shape, at a random place.

    Args:
        smallest_area: Least share of the picture's area; MAE's, the paper gives none.
        flattest: Sides' ratio is drawn between this and its inverse, evenly in its logarithm.
        flip: Chance of a mirror image.
    """

    smallest_area: float = 0.2
    flattest: float = 3 / 4
    flip: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.smallest_area <= 1:
            raise ValueError(f"smallest_area must be above 0 and at most 1, got {self.smallest_area}")

    def draw(self, width: int, height: int, generator: np.random.Generator) -> Crop:
        """A crop of a picture of this size in pixels."""
        flip = bool(generator.random() < self.flip)
        for _ in range(10):
            area = width * height * generator.uniform(self.smallest_area, 1)
            ratio = math.exp(generator.uniform(math.log(self.flattest), -math.log(self.flattest)))
            wide, high = max(1, round(math.sqrt(area * ratio))), max(1, round(math.sqrt(area / ratio)))
            if wide <= width and high <= height:
                left, top = generator.integers(width - wide + 1), generator.integers(height - high + 1)
                return Crop(int(left), int(top), wide, high, flip)
        # No shape fits a very long picture: the largest middle part that is not too flat.
        wide, high = min(width, round(height / self.flattest)), min(height, round(width / self.flattest))
        return Crop((width - wide) // 2, (height - high) // 2, max(wide, 1), max(high, 1), flip)


def cut(image: Image.Image, crop: Crop, side: int) -> torch.Tensor:
    """The crop at `side` x `side`, antialiased bicubic -> (3, side, side), uint8."""
    box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
    pixels = np.array(image.resize((side, side), Image.Resampling.BICUBIC, box=box))
    return torch.from_numpy(np.ascontiguousarray(pixels[:, ::-1] if crop.flip else pixels)).permute(2, 0, 1)


@dataclass(frozen=True)
class SampleMaker:
    """Makes a sample of a picture.

    Args:
        size: Side of the student's square in pixels.
        patches: How many random numbers the masking takes.
        seed: Start of all random choices.
        crop: How a square is chosen.
        teacher_size: Side of the same square for a teacher that wants another; None for the student's own.
        crops: Different crops of a picture; the next epochs repeat them. None is as many as there are epochs.
        crop_seed: Start of the crops' choices alone, such as that of a cache; None for `seed`.
    """

    size: int = 224
    patches: int = 196
    seed: int = 0
    crop: RandomResizedCrop = RandomResizedCrop()
    teacher_size: int | None = None
    crops: int | None = None
    crop_seed: int | None = None

    def draw_crop(self, image: Image.Image, number: int, epoch: int) -> Crop:
        """What is cut out of picture `number` in this epoch."""
        seed = self.seed if self.crop_seed is None else self.crop_seed
        generator = np.random.default_rng((seed, number, epoch % self.crops if self.crops else epoch))
        return self.crop.draw(*image.size, generator)

    def make(self, image: Image.Image, number: int, epoch: int) -> dict[str, Any]:
        """`pixels` (3, size, size) uint8, `noise` (patches,) in [0, 1), `teacher_pixels` if of another size."""
        crop = self.draw_crop(image, number, epoch)
        noise = np.random.default_rng((self.seed, number, epoch, 1)).random(self.patches, dtype=np.float32)
        sample = {"pixels": cut(image, crop, self.size), "noise": torch.from_numpy(noise)}
        if self.teacher_size not in (None, self.size):
            sample["teacher_pixels"] = cut(image, crop, self.teacher_size)
        return sample
