"""A labelled picture made into a training sample at little cost: masks that are not drawn are never looked at."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..image_processing_efficientsam import EfficientSamImageProcessor
from ..masks_efficientsam import decode_rle
from .augmentation import Augmentation
from .run_lengths import shrink_run_lengths
from .sa1b import LabelledPicture, vanishing_share


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
        width, height = pair.open_image().size
        chosen = self.draw_masks(pair, (height, width), generator)
        pixels = self.decode(pair)
        shrink: Callable[[Any, tuple[int, int]], np.ndarray] = shrink_run_lengths
        try:
            if self.augmentation != Augmentation():
                painted = np.stack([decode_rle(rle).numpy() for rle in chosen])
                pixels, chosen = self.augmentation(pixels, painted, generator)
                shrink = average
            pixel_values = self.resize(pixels)
            size = (pixel_values.shape[-2] // 4, pixel_values.shape[-1] // 4)
            cells = [shrink(mask, size) for mask in chosen]
        except ValueError as error:
            raise ValueError(f"{pair.name} in {pair.image.path}: {error}") from error
        except (KeyError, TypeError) as error:
            raise ValueError(f"{pair.name} in {pair.image.path}: a mask is broken, found {error!r}") from error
        # Small numbers: 32 masks as floats would be 8 MB to fill, to batch and to hand to another process.
        labels = torch.full((self.masks_per_image, *size), -1, dtype=torch.int8)
        fitting = [mask for mask in cells if 0 < np.count_nonzero(mask) <= self.largest_share * mask.size]
        for number, mask in enumerate(fitting):
            labels[number] = torch.from_numpy(mask)
        return {"pixel_values": pixel_values, "labels": labels}

    def draw_masks(self, pair: LabelledPicture, size: tuple[int, int], generator: np.random.Generator) -> Any:
        """Run lengths of up to `masks_per_image` masks of fitting area of a picture of `size` (H, W)."""
        try:
            records = [(record["area"], record["segmentation"]) for record in pair.read_annotations()]
            wrong = [tuple(rle["size"]) for _, rle in records if tuple(rle["size"]) != size]
            shares = np.array([area / (size[0] * size[1]) for area, _ in records])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{pair.name} in {pair.image.path}: a mask is broken, found {error!r}") from error
        # A turned or resized picture would otherwise be trained on masks of other places.
        if wrong:
            raise ValueError(f"{pair.name} in {pair.image.path}: a mask of {wrong[0]} for a picture of {size}")
        smallest = max(self.smallest_share, vanishing_share(self.image_processor, self.augmentation))
        fitting = np.flatnonzero((shares > 0) & (shares >= smallest) & (shares <= self.largest_share))
        if not len(fitting):
            raise ValueError(
                f"{pair.name} in {pair.image.path}: none of {len(records)} masks covers between "
                f"{smallest:.4%} and {self.largest_share:.0%} of the picture"
            )
        return [records[index][1] for index in generator.permutation(fitting)[: self.masks_per_image]]

    def decode(self, pair: LabelledPicture) -> np.ndarray:
        """The picture's pixels (H, W, 3), uint8; fewer of them where an average gives the training size, too."""
        if not self.image_processor.antialias or self.augmentation != Augmentation():
            return np.asarray(pair.read_image())
        size = self.image_processor.size
        return np.asarray(pair.read_image(smallest=(size.width, size.height)))

    def resize(self, pixels: np.ndarray) -> torch.Tensor:
        """(H, W, 3) -> (3, S, S)."""
        return self.image_processor(images=pixels, return_tensors="pt")["pixel_values"][0]


def average(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool -> (h, w) bool: the cells covered by half or more."""
    return (F.adaptive_avg_pool2d(torch.from_numpy(mask)[None].float(), size)[0] >= 0.5).numpy()
