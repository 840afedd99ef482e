"""SA-1B as it ships: pairs of a JPEG and a JSON with COCO run-length masks, in folders or tar shards.

The JSON is `{"image": {...}, "annotations": [{"area", "segmentation": {"size", "counts"}, ...}]}`. A folder holds the
pairs side by side (`sa_1.jpg`, `sa_1.json`) or in `images/` and `annotations/`; a tar holds them side by side.
"""

import io
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from ..image_processing_efficientsam import EfficientSamImageProcessor
from ..masks_efficientsam import decode_rle, masks_to_boxes
from ..pictures_efficientsam import LARGEST_PICTURE, as_stored
from .augmentation import Augmentation, paste_objects, paste_shapes
from .blobs import Blob, find_blobs

logger = logging.getLogger(__name__)

# So many draws in a row without a usable picture are no accident.
FRUITLESS = 100


@dataclass(frozen=True)
class LabelledPicture:
    """A picture whose masks are known; both are read when asked for."""

    name: str
    image: Blob

    def open_image(self) -> Image.Image:
        """The picture, of which only the header has been looked at.

        Raises:
            ValueError: names the picture, if it is none or has more than `LARGEST_PICTURE` pixels.
        """
        try:
            image = Image.open(io.BytesIO(self.image.read()))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            # Pillow names the place in memory, which is another each time; who counts by reasons wants the same one.
            reason = "of no known format" if isinstance(error, UnidentifiedImageError) else error
            raise ValueError(f"{self.name} in {self.image.path} is no readable picture: {reason}") from error
        if image.width * image.height > LARGEST_PICTURE:
            raise ValueError(
                f"{self.name} in {self.image.path} has {image.width} x {image.height} pixels, "
                f"wanted at most {LARGEST_PICTURE:,}"
            )
        return image

    def read_image(self, smallest: tuple[int, int] | None = None) -> Image.Image:
        """The picture in RGB, as stored (SA-1B's masks belong to the stored pixels, not to EXIF's orientation).

        Args:
            smallest: Width and height that are enough: a JPEG of twice that or more is decoded at a half, a quarter
                or an eighth of its size, at a lower cost. None is all of it.

        Raises:
            ValueError: names the picture, if it cannot be read.
        """
        image = self.open_image()
        try:
            if smallest is not None:
                image.draft("RGB", smallest)
            return as_stored(image)
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"{self.name} in {self.image.path} is no readable picture: {error}") from error

    def label_blobs(self) -> tuple[Blob, ...]:
        """The files that hold this picture's masks alone."""
        return ()

    def read_annotations(self) -> list[dict]:
        """A record for each mask: its `area` in pixels and its `segmentation`, still run-length encoded."""
        raise NotImplementedError(f"{type(self).__name__} reads no annotations")


@dataclass(frozen=True)
class Pair(LabelledPicture):
    """A picture and the JSON of its masks."""

    annotations: Blob

    def label_blobs(self) -> tuple[Blob, ...]:
        """The JSON."""
        return (self.annotations,)

    def read_annotations(self) -> list[dict]:
        """The records of SA-1B's JSON."""
        try:
            records = json.loads(self.annotations.read())["annotations"]
            if not (isinstance(records, list) and all(isinstance(record, dict) for record in records)):
                raise TypeError("wanted a list of records")
            return records
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.name} in {self.annotations.path} has no readable annotations: {error}") from error


def find_pairs(source: str | Path) -> list[Pair]:
    """All pairs in a folder or a tar, sorted by name.

    A picture without its JSON, the reverse, and one whose name another has are left out and counted in the log.

    Raises:
        FileNotFoundError: if there is nothing at `source`, or no pair in it.
        ValueError: if it is a file, but no uncompressed tar.
    """
    blobs = find_blobs(source, ".jpg and .json pairs")
    images, doubles = by_pair_name(blobs, (".jpg", ".jpeg"))
    records, double_records = by_pair_name(blobs, (".json",))
    if doubles := doubles + double_records:
        logger.warning("%s: left out: %d files whose pair's name another has, as %s", source, len(doubles), doubles[0])
    names = sorted(images.keys() & records.keys())
    if not names:
        raise FileNotFoundError(
            f"no pair of .jpg and .json of one name in {source}: "
            f"found {len(images)} pictures and {len(records)} JSON files"
        )
    if halves := sorted(images.keys() ^ records.keys()):
        logger.warning("%s: %d pairs, left out: %d halves, such as %s", source, len(names), len(halves), halves[0])
    return [Pair(name, images[name], records[name]) for name in names]


def by_pair_name(blobs: dict[str, Blob], suffixes: tuple[str, ...]) -> tuple[dict[str, Blob], list[str]]:
    """The files of these suffixes by their pairs' names, the first by path of each; and the others' paths."""
    names = sorted(name for name in blobs if name.lower().endswith(suffixes))
    first = {pair_name(name): name for name in reversed(names)}
    doubles = [name for name in names if first[pair_name(name)] != name]
    return {pair: blobs[name] for pair, name in first.items()}, doubles


def pair_name(name: str) -> str:
    """What a picture and its JSON have in common: the path without suffix, `images` and `annotations`."""
    path = Path(name).with_suffix("")
    return "/".join(part for part in path.parts if part not in ("images", "annotations"))


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
        augmentation: Crops, flips and colours; None leaves the picture as it is.
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
        self.image_processor = image_processor
        self.length = length
        self.masks_per_image = masks_per_image
        self.augmentation = augmentation or Augmentation()
        self.seed = seed
        self.first = first
        self.smallest_share = smallest_share
        self.largest_share = largest_share

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
                sample = self.make(*self.draw_scene(generator), generator)
            except ValueError as error:
                logger.warning("skipped: %s", error)
                skipped.append(str(error).replace("\n", " "))
                continue
            return {**sample, "skipped": "\n".join(skipped)}
        raise ValueError(f"nothing to train on in {FRUITLESS} draws: {sorted(set(skipped))[:3]}")

    def make(self, image: np.ndarray, masks: np.ndarray, generator: np.random.Generator) -> dict[str, torch.Tensor]:
        """`pixel_values` and `labels` of a picture (H, W, 3) and its masks (K, H, W), changed at random."""
        image, masks = self.augmentation(image, masks, generator)
        pixel_values = self.image_processor(images=image, return_tensors="pt")["pixel_values"][0]
        size = (pixel_values.shape[-2] // 4, pixel_values.shape[-1] // 4)
        labels = torch.full((self.masks_per_image, *size), -1, dtype=torch.int8)
        for number, mask in enumerate(self.shrink(masks, size)):
            labels[number] = mask
        return {"pixel_values": pixel_values, "labels": labels}

    def draw_pair(self, generator: np.random.Generator) -> LabelledPicture:
        """A random picture of a random source."""
        source = self.sources[int(generator.integers(len(self.sources)))]
        return source[int(generator.integers(len(source)))]

    def draw_scene(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """A random picture with its masks, or with masks pasted into it, as the augmentation's chances say."""
        pair = self.draw_pair(generator)
        image, kind = np.asarray(pair.read_image()), generator.random()
        if kind < self.augmentation.shapes:
            other = np.asarray(self.draw_pair(generator).read_image())
            return paste_shapes(image, other, self.masks_per_image, generator)
        kind -= self.augmentation.shapes
        if kind < self.augmentation.objects:
            return paste_objects(image, self.draw_cutouts(self.masks_per_image, generator), generator)
        if kind < self.augmentation.objects + self.augmentation.copy_paste:
            own = self.draw_masks(pair, image.shape[:2], self.masks_per_image // 2, generator)
            cutouts = self.draw_cutouts(self.masks_per_image - len(own), generator)
            return paste_objects(image, cutouts, generator, own)
        masks = self.draw_masks(pair, image.shape[:2], self.masks_per_image, generator)
        shares = np.array([np.count_nonzero(mask) / mask.size for mask in masks])
        if not (shares >= vanishing_share(self.image_processor, self.augmentation)).any():
            raise ValueError(f"{pair.name} in {pair.image.path}: none of {len(masks)} drawn masks is of fitting size")
        return image, masks

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
        try:
            records = pair.read_annotations()
            shares = np.array([record["area"] for record in records]) / (size[0] * size[1])
            fitting = np.flatnonzero((shares > 0) & (shares >= self.smallest_share) & (shares <= self.largest_share))
            chosen = generator.permutation(fitting)[:count]
            masks = np.zeros((len(chosen), *size), dtype=bool)
            for number, index in enumerate(chosen):
                mask = decode_rle(records[index]["segmentation"]).numpy()
                # A turned or resized picture would otherwise be trained on masks of other places.
                if mask.shape != size:
                    raise ValueError(f"a mask of {mask.shape} for a picture of {size}")
                masks[number] = mask
        except (KeyError, TypeError) as error:
            raise ValueError(f"{pair.name} in {pair.image.path}: a mask is broken, found {error!r}") from error
        except ValueError as error:
            raise ValueError(f"{pair.name} in {pair.image.path}: {error}") from error
        return masks

    def shrink(self, masks: np.ndarray, size: tuple[int, int]) -> list[torch.Tensor]:
        """The masks at the training resolution, without those that cropping or shrinking left empty or too large."""
        small = []
        # One by one: as floats the masks of a large photo together would take a gigabyte.
        for mask in torch.from_numpy(masks):
            cells = F.adaptive_avg_pool2d(mask[None].float(), size)[0] >= 0.5
            if 0 < cells.count_nonzero() <= self.largest_share * cells.numel():
                small.append(cells)
        return small


def vanishing_share(image_processor: EfficientSamImageProcessor, augmentation: Augmentation) -> float:
    """Share of the picture below which a mask cannot cover half of a cell, whatever is cropped.

    A window around a mask shows it, however small it is.
    """
    if augmentation.closer:
        return 0.0
    cells = (image_processor.size.height // 4) * (image_processor.size.width // 4)
    return augmentation.smallest_crop**2 / (2 * cells)
