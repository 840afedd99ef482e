"""Training samples by number, of labelled pictures and of scenes made of several."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ..image_processing_efficientsam import EfficientSamImageProcessor
from ..masks_efficientsam import masks_to_boxes
from .augmentation import Augmentation, paste_objects, paste_shapes
from .pair_reading import PairReader, paint
from .sa1b import LabelledPicture

logger = logging.getLogger(__name__)

# So many draws in a row without a usable picture are no accident.
FRUITLESS = 100


class Sa1bSamples(Dataset):
    """Numbered training samples: number n is always the same source, picture, masks and augmentation for one seed.

    A source is drawn first, then a picture, then masks, so that a source with many masks does not drown the others.
    That a sample depends on nothing but its number makes stopping, resuming and dividing the work exact. A picture
    that cannot be used is named in the log and in `skipped` of the sample that is drawn in its place.

    Args:
        sources: Lists of labelled pictures, each drawn with equal chance.
        image_processor: Gives `pixel_values` of the training size.
        length: How many samples there are to be.
        masks_per_image: Masks of a sample; where a picture has fewer, the rest is unknown (-1) and costs nothing.
        augmentation: Crops, flips, colours and what is pasted; None leaves the picture as it is.
        seed: Start of all random choices.
        first: Number of the first sample; resuming starts further on.
        smallest_share: Masks that cover less of the picture are not used.
        largest_share: Masks that cover more of the picture are not used (0.9 in SAM's recipe).
    """

    def __init__(
        self,
        sources: Sequence[Sequence[LabelledPicture]],
        image_processor: EfficientSamImageProcessor,
        length: int,
        masks_per_image: int = 64,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        first: int = 0,
        smallest_share: float = 0.0,
        largest_share: float = 0.9,
    ):
        self.sources = sources
        self.augmentation = augmentation or Augmentation()
        alone = replace(self.augmentation, shapes=0.0, objects=0.0, copy_paste=0.0)
        self.reader = PairReader(image_processor, masks_per_image, alone, smallest_share, largest_share)
        self.length = length
        self.seed = seed
        self.first = first

    def __len__(self) -> int:
        return max(self.length - self.first, 0)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Sample `first + index`: `pixel_values` (3, S, S), int8 `labels` (masks_per_image, S / 4, S / 4) of 1, 0, -1.

        Beside them `skipped`, reasons a line each, for `SkippedPictures` to count.

        Raises:
            ValueError: if no picture of very many can be used.
        """
        generator, skipped = np.random.default_rng((self.seed, self.first + index)), []
        for _ in range(FRUITLESS):
            try:
                sample = self.draw_sample(generator)
            except ValueError as error:
                logger.warning("skipped: %s", error)
                skipped.append(str(error).replace("\n", " "))
                continue
            return {**sample, "skipped": "\n".join(skipped)}
        raise ValueError(f"nothing to train on in {FRUITLESS} draws: {sorted(set(skipped))[:3]}")

    def draw_sample(self, generator: np.random.Generator) -> dict[str, torch.Tensor]:
        """A random picture with its masks, or with masks pasted into it, as the augmentation's chances say."""
        pair, kind, chances = self.draw_pair(generator), generator.random(), self.augmentation
        if kind >= chances.shapes + chances.objects + chances.copy_paste:
            return self.reader.read(pair, generator)
        return self.reader.sample(*self.draw_scene(pair, kind, generator), generator)

    def draw_pair(self, generator: np.random.Generator) -> LabelledPicture:
        """A random picture of a random source."""
        source = self.sources[int(generator.integers(len(self.sources)))]
        return source[int(generator.integers(len(source)))]

    def draw_scene(
        self, pair: LabelledPicture, kind: float, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """A picture (H, W, 3) with masks (K, H, W) pasted into it; of what kind is a number below all chances."""
        image, count = np.asarray(pair.read_image()), self.reader.masks_per_image
        if kind < self.augmentation.shapes:
            other = np.asarray(self.draw_pair(generator).read_image())
            return paste_shapes(image, other, count, generator)
        if kind < self.augmentation.shapes + self.augmentation.objects:
            return paste_objects(image, self.draw_cutouts(count, generator), generator)
        own = self.draw_masks(pair, image.shape[:2], count // 2, generator)
        return paste_objects(image, self.draw_cutouts(count - len(own), generator), generator, own)

    def draw_cutouts(self, count: int, generator: np.random.Generator) -> list[tuple[np.ndarray, np.ndarray]]:
        """Up to `count` objects, each of a picture of its own; fewer where pictures have no fitting mask."""
        return [cutout for _ in range(count) for cutout in self.draw_cutout(generator)]

    def draw_cutout(self, generator: np.random.Generator) -> list[tuple[np.ndarray, np.ndarray]]:
        """A random object: the part of its picture inside its box and its mask there; none if no mask fits."""
        pair = self.draw_pair(generator)
        image = np.asarray(pair.read_image())
        masks = self.draw_masks(pair, image.shape[:2], 1, generator)
        boxes = masks_to_boxes(torch.from_numpy(masks)).tolist()
        places = [(slice(top, bottom), slice(left, right)) for left, top, right, bottom in boxes]
        return [(image[place], mask[place]) for place, mask in zip(places, masks, strict=True)]

    def draw_masks(
        self, pair: LabelledPicture, size: tuple[int, int], count: int, generator: np.random.Generator
    ) -> np.ndarray:
        """Up to `count` masks of fitting area of a picture of `size` (H, W) -> (masks, H, W) bool; none may fit."""
        masks = self.reader.read_masks(pair, size)
        return paint(pair, self.reader.draw_masks(masks, count, self.reader.smallest_share, generator), size)
