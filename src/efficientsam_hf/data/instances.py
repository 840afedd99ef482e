"""Pictures with instances and their classes: COCO's JSON beside a folder, or a data set of the Hub."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..masks_efficientsam import decode_rle
from .coco import PictureFiles, file_names, read_dataset, run_lengths, single_objects
from .images import CorruptPictureError, decode_picture, read_cell, undecoded
from .packed_items import PackedItems
from .scale_jitter import ScaleJitter


@dataclass(frozen=True)
class InstancePicture:
    """A picture and its instances.

    Args:
        number: Its id in COCO's JSON, or its place in the data set.
        image: RGB.
        masks: (N, H, W), booleans.
        labels: Class numbers from 0, (N,).
    """

    number: int
    image: Image.Image
    masks: np.ndarray
    labels: np.ndarray


class CocoInstances(Sequence):
    """COCO's layout; a picture's masks are made when it is asked for. Crowds are left out.

    Args:
        annotations: The JSON, with `categories`.
        pictures: The folder, or an uncompressed tar, searched to its depth.
        with_masks: Leave out pictures without masks, as training does; an evaluation wants them.

    Raises:
        FileNotFoundError: if the JSON, the folder, or a picture that it names is not there, or no picture is left.
        ValueError: if the JSON is none, has no categories, or an annotation's category is none of them.
    """

    def __init__(self, annotations: str | Path, pictures: str | Path, with_masks: bool = True):
        content = read_dataset(annotations)
        records, categories = single_objects(content["annotations"]), content.get("categories") or []
        self.category_ids = [category["id"] for category in categories]
        self.names = [str(category["name"]) for category in categories]
        if not categories:
            raise ValueError(f"{annotations} has no categories: wanted the classes of its instances")
        numbers = {identity: number for number, identity in enumerate(self.category_ids)}
        for rows in records.values():
            wrong = next((row["category_id"] for row in rows if row.get("category_id") not in numbers), None)
            if wrong is not None:
                raise ValueError(
                    f"{annotations} has an instance of category {wrong}: wanted one of its {len(numbers)}"
                )
        self.numbers = numbers
        files, found = PictureFiles(pictures, content["images"]), []
        for image in content["images"]:
            if with_masks and image["id"] not in records:
                continue
            blob = files.find(image)
            if blob is None:
                raise FileNotFoundError(
                    f"{annotations} names {file_names(image)[0]}: found no such picture in {pictures}"
                )
            found.append((image, blob, records.get(image["id"], [])))
        if not found:
            raise FileNotFoundError(f"no picture with masks in {annotations}")
        self.pictures = PackedItems(found)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: Any) -> Any:
        """An `InstancePicture`."""
        image, blob, rows = self.pictures[index]
        name, size = file_names(image)[0], (image["height"], image["width"])
        try:
            found = [(run_lengths(row["segmentation"], size), self.numbers[row["category_id"]]) for row in rows]
            pairs = [(decode_rle(rle).numpy(), number) for rle, number in found if rle is not None]
        except (ValueError, KeyError, TypeError) as error:
            fault = error if isinstance(error, ValueError) else f"a mask is broken, found {error!r}"
            raise CorruptPictureError(f"{name}: {fault}") from error
        picture = decode_picture(name, blob.read())
        for what, shape in [
            ("picture", (picture.height, picture.width)),
            *(("mask", mask.shape) for mask, _ in pairs),
        ]:
            if shape != size:
                raise CorruptPictureError(
                    f"{name}: the {what} is {shape[0]} x {shape[1]}, the JSON has {size[0]} x {size[1]}"
                )
        masks = np.stack([mask for mask, _ in pairs]) if pairs else np.zeros((0, *size), dtype=bool)
        return InstancePicture(image["id"], picture, masks, np.array([number for _, number in pairs], dtype=np.int64))


class InstanceColumn(Sequence):
    """A data set of `datasets` in the form of transformers' own instance segmentation examples.

    Args:
        rows: A `datasets.Dataset` whose `annotation` is a picture: red is the class, green the instance's number.
        names: The classes by their numbers.
        outside: Class that is no instance.

    Raises:
        ValueError: if there are no such columns.
    """

    def __init__(self, rows: Any, names: Sequence[str], outside: int = 255):
        for column in ("image", "annotation"):
            if column not in rows.column_names:
                raise ValueError(f"no column {column!r} in the data set: found {', '.join(rows.column_names)}")
        self.rows, self.names, self.outside = undecoded(rows), list(names), outside
        self.category_ids = list(range(len(self.names)))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        """An `InstancePicture`."""
        row = self.rows[index]
        image = read_cell(row["image"], f"row {index}", row["annotation"].size)
        drawn = np.asarray(row["annotation"].convert("RGB")).astype(np.int64)
        classes, numbers = drawn[..., 0], drawn[..., 1]
        pairs = np.unique(np.stack([classes, numbers], axis=-1)[classes != self.outside], axis=0)
        if len(pairs) and pairs[:, 0].max() >= len(self.names):
            raise ValueError(f"labels must be from 0 to {len(self.names) - 1}, got {pairs[:, 0].max()} in row {index}")
        masks = np.stack([(classes == one) & (numbers == two) for one, two in pairs]) if len(pairs) else None
        masks = np.zeros((0, *classes.shape), dtype=bool) if masks is None else masks
        return InstancePicture(int(index), image, masks, pairs[:, 0])


def open_instance_column(source: str, split: str, names: Sequence[str]) -> InstanceColumn:
    """A data set of the Hub, or of a folder that `datasets` can read."""
    from datasets import load_dataset

    return InstanceColumn(load_dataset(source, split=split), names)


@dataclass(frozen=True)
class InstanceSample:
    """Makes a training sample of an `InstancePicture`.

    Args:
        jitter: Where in the square it comes to lie.
        smallest: Instances of fewer pixels in the square are dropped.
    """

    jitter: ScaleJitter = field(default_factory=ScaleJitter)
    smallest: int = 4

    def __call__(self, picture: InstancePicture, generator: np.random.Generator) -> dict[str, Any]:
        """`pixels` (3, S, S) uint8, `mask_labels` (N, S, S) bool, `class_labels` (N,)."""
        placed = self.jitter.draw(picture.masks.shape[1:], generator)
        pixels = placed.place_picture(self.jitter.recolor(picture.image, generator))
        masks = placed.place_labels(picture.masks, outside=False)
        kept = masks.sum((1, 2)) >= self.smallest
        return {
            "pixels": torch.from_numpy(pixels).permute(2, 0, 1),
            "mask_labels": torch.from_numpy(masks[kept]),
            "class_labels": torch.from_numpy(picture.labels[kept]),
        }


def keep_lists(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch: pixels as one tensor, everything else as lists, since pictures differ in their instances."""
    batch: dict[str, Any] = {key: [sample[key] for sample in samples] for key in samples[0]}
    return {**batch, "pixels": torch.stack(batch["pixels"])}
