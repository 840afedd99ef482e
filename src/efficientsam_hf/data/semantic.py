"""Pictures with a class for each pixel: ADE20K's layout of folders, or a data set of the Hub."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from PIL import Image

from .images import check_size, find_pictures, read_cell, undecoded
from .packed_items import PackedItems
from .scale_jitter import ScaleJitter

# The class of a pixel that counts for nothing.
IGNORED = 255


@dataclass(frozen=True)
class SemanticPicture:
    """A picture and the class of each pixel: (H, W), uint8 or larger, `IGNORED` where there is none."""

    image: Image.Image
    classes: np.ndarray


def class_map(drawn: Image.Image, count: int, name: str, reduce: bool) -> np.ndarray:
    """A picture of class numbers -> (H, W) int64 with 0 to `count` - 1 and `IGNORED`.

    Args:
        drawn: Grey of 1, 8 or 16 bits, or palette.
        count: How many classes there are.
        name: Of the picture, for errors.
        reduce: 0 is no class, and 1 the first, as in ADE20K.

    Raises:
        ValueError: if a number is out of range, or would be taken for `IGNORED`; if the picture has colours.
    """
    if count > IGNORED - reduce:
        raise ValueError(f"wanted at most {IGNORED - reduce} classes, found {count}: {IGNORED} in a map is none")
    if drawn.mode not in ("1", "L", "LA", "P") and not drawn.mode.startswith("I"):
        raise ValueError(f"{name} has colours ({drawn.mode}): wanted grey or a palette, a class's number a pixel")
    classes = np.asarray(drawn.convert("L") if drawn.mode == "LA" else drawn).astype(np.int64)
    if reduce:
        classes = np.where((classes == 0) | (classes == IGNORED), IGNORED, classes - 1)
    largest = classes[classes != IGNORED].max(initial=0)
    if largest >= count:
        span = f"1 to {count}" if reduce else f"0 to {count - 1}"
        raise ValueError(f"{name} has class {largest + reduce}: wanted {span}, or {IGNORED} for none")
    return classes


class SemanticFolder(Sequence):
    """ADE20K's layout: `images/SPLIT/X.jpg` beside `annotations/SPLIT/X.png`.

    Args:
        folder: With `images` and `annotations`.
        split: Folder inside both, such as "training".
        names: The classes by their numbers.
        reduce: See `class_map`.

    Raises:
        FileNotFoundError: if a folder, or the classes of a picture, are not there.
    """

    def __init__(self, folder: str | Path, split: str, names: Sequence[str], reduce: bool = True):
        self.names, self.reduce = list(names), reduce
        self.images = find_pictures([Path(folder) / "images" / split])
        drawn = Path(folder) / "annotations" / split
        found = {below(drawn, picture.name): picture for picture in find_pictures([drawn])}
        wanted = {picture.name: below(Path(folder) / "images" / split, picture.name) for picture in self.images}
        lacking = next((name for name, path in wanted.items() if path not in found), None)
        if lacking is not None:
            raise FileNotFoundError(f"no classes of {lacking} in {drawn}: wanted its path there, as a PNG")
        self.maps = PackedItems(found[path] for path in wanted.values())

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Any) -> Any:
        """A `SemanticPicture`."""
        with self.maps[index].blob.path.open("rb") as file:
            classes = class_map(Image.open(file), len(self.names), self.maps[index].name, self.reduce)
        image = self.images[index].read()
        check_size(self.maps[index].name, classes.shape[::-1], image)
        return SemanticPicture(image, classes)


def below(folder: Path, name: str) -> PurePath:
    """A picture's path in a folder, without suffix."""
    return PurePath(name).relative_to(folder).with_suffix("")


class SemanticColumn(Sequence):
    """The same of a data set of `datasets` with the columns `image` and `annotation`.

    Raises:
        ValueError: if there are no such columns.
    """

    def __init__(self, rows: Any, names: Sequence[str], reduce: bool = True):
        for column in ("image", "annotation"):
            if column not in rows.column_names:
                raise ValueError(f"no column {column!r} in the data set: found {', '.join(rows.column_names)}")
        self.rows, self.names, self.reduce = undecoded(rows), list(names), reduce

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        """A `SemanticPicture`."""
        row = self.rows[index]
        classes = class_map(row["annotation"], len(self.names), f"row {index}", self.reduce)
        return SemanticPicture(read_cell(row["image"], f"row {index}", classes.shape[::-1]), classes)


def open_semantic(source: str, split: str, names: Sequence[str], reduce: bool = True) -> Sequence:
    """A local folder in ADE20K's layout, else a data set of the Hub."""
    if Path(source).is_dir():
        return SemanticFolder(source, split, names, reduce)
    from datasets import load_dataset

    return SemanticColumn(load_dataset(source, split=split), names, reduce)


def read_names(source: str | Path) -> list[str]:
    """Names of classes: a line each, or ADE20K's `objectInfo150.txt`, a table whose last column they are.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if there is no name in it.
    """
    lines = [line for line in Path(source).read_text(encoding="utf-8").splitlines() if line.strip()]
    if lines and "\t" in lines[0]:
        lines = [line.split("\t")[-1] for line in lines[1:]]
    if not lines:
        raise ValueError(f"{source} has no names of classes: wanted a line each")
    return [line.strip() for line in lines]


@dataclass(frozen=True)
class SemanticSample:
    """Makes a training sample of a `SemanticPicture`: a mask for each class that is there, for Mask2Former."""

    jitter: ScaleJitter = field(
        default_factory=lambda: ScaleJitter(size=512, smallest=0.5, largest=2.0, by="short", color=0.4)
    )

    def __call__(self, picture: SemanticPicture, generator: np.random.Generator) -> dict[str, Any]:
        """`pixels` (3, S, S) uint8, `mask_labels` (N, S, S) bool, `class_labels` (N,)."""
        placed = self.jitter.draw(picture.classes.shape, generator)
        pixels = placed.place_picture(self.jitter.recolor(picture.image, generator))
        classes = placed.place_labels(picture.classes, outside=IGNORED)
        present = np.setdiff1d(classes, [IGNORED])
        return {
            "pixels": torch.from_numpy(pixels).permute(2, 0, 1),
            "mask_labels": torch.from_numpy(classes[None] == present[:, None, None]),
            "class_labels": torch.from_numpy(present),
        }
