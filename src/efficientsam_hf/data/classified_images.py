"""Pictures with the class of the whole: folders named by class, as torchvision's ImageFolder, or a set of the Hub."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BitImageProcessorPil
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..pictures_efficientsam import as_stored
from .crops import RandomResizedCrop
from .images import find_pictures
from .randaugment import RandAugment

Item = tuple[Image.Image, int]


class ClassFolder(Sequence):
    """Pictures in a folder for each class, searched to its depth: `FOLDER/dog/any/thing.jpg` is a dog.

    Args:
        folder: Or an uncompressed tar.
        names: The classes by their numbers; the names of the folders in their order if None.

    Raises:
        FileNotFoundError: if there is no picture.
        ValueError: if a picture is in no class's folder, or in that of a class not in `names`.
    """

    def __init__(self, folder: str | Path, names: Sequence[str] | None = None):
        self.pictures = find_pictures([folder])
        paths = [picture.name.removeprefix(f"{folder}/").removeprefix("./") for picture in self.pictures]
        found = [path.split("/")[0] if "/" in path else None for path in paths]
        if None in found:
            raise ValueError(
                f"wanted pictures in folders named by class, found {self.pictures[found.index(None)].name}"
            )
        self.names = sorted(set(map(str, found))) if names is None else list(names)
        numbers = {name: number for number, name in enumerate(self.names)}
        unknown = sorted(set(map(str, found)) - set(numbers))
        if unknown:
            raise ValueError(f"{folder} has a class {unknown[0]!r}: wanted one of the {len(numbers)} known ones")
        self.labels = [numbers[str(name)] for name in found]

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: Any) -> Any:
        """The picture in RGB, and the number of its class."""
        return self.pictures[index].read(), self.labels[index]


class ClassColumn(Sequence):
    """The same of a data set of `datasets`, from the Hub or from a folder that it can read.

    Args:
        rows: A `datasets.Dataset`.
        image: Name of the column with the pictures.
        label: Name of the column with the classes.
        names: The classes by their numbers; those of the column's `ClassLabel` if None.

    Raises:
        ValueError: if there is no such column, no names, or a number outside their range.
    """

    def __init__(self, rows: Any, image: str = "image", label: str = "label", names: Sequence[str] | None = None):
        for column in (image, label):
            if column not in rows.column_names:
                raise ValueError(f"no column {column!r} in the data set: found {', '.join(rows.column_names)}")
        known = getattr(rows.features[label], "names", None)
        if names is None and known is None:
            raise ValueError(f"column {label!r} has no names of classes: wanted a ClassLabel")
        self.names: list[str] = list(known or []) if names is None else list(names)
        self.rows, self.image = rows, image
        self.labels = [int(number) for number in rows[label]]
        wrong = next((number for number in self.labels if not 0 <= number < len(self.names)), None)
        if wrong is not None:
            raise ValueError(f"labels must be from 0 to {len(self.names) - 1}, got {wrong} in column {label!r}")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        """The picture in RGB, and the number of its class."""
        return as_stored(self.rows[index][self.image]), self.labels[index]


def open_classified(
    source: str,
    split: str,
    names: Sequence[str] | None = None,
    image: str = "image",
    label: str = "label",
    whole: bool = False,
) -> ClassFolder | ClassColumn:
    """A split of a local folder, with its class folders in `source/split`, or of a data set of the Hub.

    Args:
        source: Folder or Hub id.
        split: Name of the split.
        names: The classes by their numbers; as they are found if None.
        image: Column of a data set of the Hub with the pictures.
        label: Its column with the classes.
        whole: Take a local folder without such a split, or a tar, for the split itself.

    Raises:
        FileNotFoundError: if a local folder has no such split.
    """
    path = Path(source)
    if (path / split).is_dir():
        return ClassFolder(path / split, names)
    if path.exists() and not whole:
        found = sorted(folder.name for folder in path.iterdir() if folder.is_dir()) if path.is_dir() else ["a file"]
        raise FileNotFoundError(f"{source} has no folder {split!r} for its split: found {', '.join(found) or 'none'}")
    if path.exists():
        return ClassFolder(path, names)
    from datasets import load_dataset

    return ClassColumn(load_dataset(source, split=split), image, label, names)


def centre_crop_processor(side: int) -> BitImageProcessorPil:
    """How ImageNet is measured: the short side at 8/7 of `side`, bicubic, and the square in the middle."""
    return BitImageProcessorPil(
        size={"shortest_edge": round(side * 8 / 7)},
        crop_size={"height": side, "width": side},
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
    )


@dataclass(frozen=True)
class CollateForTest:
    """Items -> `pixel_values` (B, 3, side, side) and `labels` (B,), as the image processor makes them."""

    processor: Any

    def __call__(self, items: list[Item]) -> dict[str, torch.Tensor]:
        """A batch."""
        images, labels = zip(*items, strict=True)
        pixels = self.processor(list(images), return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": torch.tensor(labels)}


@dataclass(frozen=True)
class TrainingCrop:
    """Makes a sample of a picture and its class: a random crop, perhaps mirrored, its colours and shape changed.

    Args:
        size: Side of the square in pixels.
        crop: How it is chosen; 0.08 of the area at least, as is usual for ImageNet.
        augment: What is done to it; None for nothing.
    """

    size: int = 224
    crop: RandomResizedCrop = field(default_factory=lambda: RandomResizedCrop(smallest_area=0.08))
    augment: RandAugment | None = field(default_factory=RandAugment)

    def __call__(self, item: Item, generator: np.random.Generator) -> dict[str, Any]:
        """`pixels` (3, size, size), uint8, and `labels`, a number."""
        image, label = item
        crop = self.crop.draw(*image.size, generator)
        box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
        image = image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box)
        if crop.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.augment is not None:
            image = self.augment(image, generator)
        return {"pixels": torch.from_numpy(np.array(image)).permute(2, 0, 1), "labels": label}
