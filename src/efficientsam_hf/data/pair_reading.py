"""A labelled picture made into a training sample at little cost: masks that are not drawn are never looked at."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..image_processing_efficientsam import EfficientSamImageProcessor
from ..masks_efficientsam import decode_rle
from .augmentation import Augmentation
from .run_lengths import shrink_run_lengths
from .sa1b import LabelledPicture


@dataclass(frozen=True)
class PairReader:
    """Reads a labelled picture with some of its masks at the training resolution.

    Without augmentation masks are shrunk from their run lengths; with it, the drawn ones are painted, cropped with the
    picture, and averaged. Either way a cell belongs to a mask that covers half of it or more.

    Args:
        image_processor: Gives `pixel_values` of the training size. If it smooths (`antialias`), a JPEG of more than
            twice that size is decoded at a half, a quarter or an eighth of it, which is an average, too.
        masks_per_image: Masks of a sample, drawn from those that the training resolution can show; where a picture has
            fewer, the rest is unknown (-1) and costs nothing.
        augmentation: Crops, flips and colours. Nothing can be pasted: a stream knows no other picture.
        smallest_share: Masks that cover less of the picture are not used.
        largest_share: Masks that cover more of the picture are not used (0.9 in SAM's recipe).
    """

    image_processor: EfficientSamImageProcessor
    masks_per_image: int = 64
    augmentation: Augmentation = field(default_factory=Augmentation)
    smallest_share: float = 0.0
    largest_share: float = 0.9

    def __post_init__(self) -> None:
        if self.augmentation.shapes or self.augmentation.objects or self.augmentation.copy_paste:
            raise ValueError(
                "a stream has no second picture to paste from: found shapes, objects or copy_paste above 0, wanted 0"
            )

    def read(self, pair: LabelledPicture, generator: np.random.Generator) -> dict[str, torch.Tensor]:
        """A sample: `pixel_values` (3, S, S), int8 `labels` (masks_per_image, S / 4, S / 4) of 1, 0, -1.

        Raises:
            ValueError: names the pair, if it is unreadable or too large, if its masks are of another size than the
                picture or broken, or if none has a fitting area.
        """
        size = pair.open_image().size[::-1]
        masks = self.read_masks(pair, size)
        smallest = max(self.smallest_share, vanishing_share(self.image_processor, self.augmentation))
        chosen = self.draw_masks(masks, self.masks_per_image, smallest, generator)
        if not chosen:
            raise ValueError(
                f"{pair.name} in {pair.image.path}: none of {len(masks)} masks covers between "
                f"{smallest:.4%} and {self.largest_share:.0%} of the picture"
            )
        pixels = self.decode(pair)
        if self.augmentation != Augmentation():
            return self.sample(pixels, paint(pair, chosen, size), generator)
        pixel_values = self.resize(pixels)
        with named(pair):
            return self.labelled(pixel_values, chosen, shrink_run_lengths)

    def sample(self, pixels: np.ndarray, masks: np.ndarray, generator: np.random.Generator) -> dict[str, torch.Tensor]:
        """The same of a picture (H, W, 3) and its masks (K, H, W), changed at random."""
        pixels, masks = self.augmentation(pixels, masks, generator)
        return self.labelled(self.resize(pixels), masks, average)

    def labelled(
        self, pixel_values: torch.Tensor, masks: Iterable[Any], shrink: Callable[[Any, tuple[int, int]], np.ndarray]
    ) -> dict[str, torch.Tensor]:
        """The sample, without masks that cropping or shrinking left empty or too large."""
        size = (pixel_values.shape[-2] // 4, pixel_values.shape[-1] // 4)
        # Small numbers: 32 masks as floats would be 8 MB to fill, to batch and to hand to another process.
        labels = torch.full((self.masks_per_image, *size), -1, dtype=torch.int8)
        cells = (shrink(mask, size) for mask in masks)
        fitting = [mask for mask in cells if 0 < np.count_nonzero(mask) <= self.largest_share * mask.size]
        for number, mask in enumerate(fitting):
            labels[number] = torch.from_numpy(mask)
        return {"pixel_values": pixel_values, "labels": labels}

    def read_masks(self, pair: LabelledPicture, size: tuple[int, int]) -> list[tuple[float, dict[str, Any]]]:
        """Of each mask its share of a picture of `size` (H, W), and its run lengths.

        Raises:
            ValueError: names the pair, if a record is broken or a mask has another size.
        """
        with named(pair):
            pixels = size[0] * size[1]
            masks = [(record["area"] / pixels, record["segmentation"]) for record in pair.read_annotations()]
            # A turned or resized picture would otherwise be trained on masks of other places.
            if wrong := [tuple(rle["size"]) for _, rle in masks if tuple(rle["size"]) != size]:
                raise ValueError(f"a mask of {wrong[0]} for a picture of {size}")
        return masks

    def draw_masks(
        self, masks: list[tuple[float, dict]], count: int, smallest: float, generator: np.random.Generator
    ) -> list[dict[str, Any]]:
        """Run lengths of up to `count` of the masks whose shares fit."""
        shares = np.array([share for share, _ in masks])
        fitting = np.flatnonzero((shares > 0) & (shares >= smallest) & (shares <= self.largest_share))
        return [masks[index][1] for index in generator.permutation(fitting)[:count]]

    def decode(self, pair: LabelledPicture) -> np.ndarray:
        """The picture's pixels (H, W, 3), uint8; fewer of them where an average gives the training size, too."""
        if not self.image_processor.antialias or self.augmentation != Augmentation():
            return np.asarray(pair.read_image())
        size = self.image_processor.size
        return np.asarray(pair.read_image(smallest=(size.width, size.height)))

    def resize(self, pixels: np.ndarray) -> torch.Tensor:
        """(H, W, 3) -> (3, S, S)."""
        return self.image_processor(images=pixels, return_tensors="pt")["pixel_values"][0]


@contextmanager
def named(pair: LabelledPicture) -> Iterator[None]:
    """Errors inside name the pair.

    Raises:
        ValueError: with what was wrong.
    """
    try:
        yield
    except (KeyError, TypeError) as error:
        raise ValueError(f"{pair.name} in {pair.image.path}: a mask is broken, found {error!r}") from error
    except ValueError as error:
        place = f"{pair.name} in {pair.image.path}"
        raise error if place in str(error) else ValueError(f"{place}: {error}") from error


def paint(pair: LabelledPicture, chosen: Sequence[dict[str, Any]], size: tuple[int, int]) -> np.ndarray:
    """Run lengths of a picture of `size` (H, W) -> (masks, H, W) bool.

    Raises:
        ValueError: names the pair, if they are broken.
    """
    masks = np.zeros((len(chosen), *size), dtype=bool)
    with named(pair):
        for number, rle in enumerate(chosen):
            masks[number] = decode_rle(rle).numpy()
    return masks


def average(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool -> (h, w) bool: the cells covered by half or more."""
    return (F.adaptive_avg_pool2d(torch.from_numpy(mask)[None].float(), size)[0] >= 0.5).numpy()


def vanishing_share(image_processor: EfficientSamImageProcessor, augmentation: Augmentation) -> float:
    """Share of the picture below which a mask cannot cover half of a cell, whatever is cropped.

    A window around a mask shows it, however small it is.
    """
    if augmentation.closer:
        return 0.0
    cells = (image_processor.size.height // 4) * (image_processor.size.width // 4)
    return augmentation.smallest_crop**2 / (2 * cells)
