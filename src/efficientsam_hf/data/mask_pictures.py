"""Pictures in `images/` and their masks in PNG in `masks/`: one PNG an object, or one with all objects' numbers.

images/cup.jpg   masks/cup/left.png, masks/cup/right.png    an object each: whatever is not black
images/dog.jpg   masks/dog.png                              a label map: each value, or colour, but 0 an object
"""

import io
import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..masks_efficientsam import encode_rle
from .blobs import Blob, find_blobs
from .images import picture_suffixes
from .sa1b import LabelledPicture

VOID = 255  # PASCAL VOC's border between objects
MOST_OBJECTS = 1000  # in a label map; a picture that has lost its few exact values to JPEG or resizing has more
MOST_BESIDE_VOID = 32  # values of 8 bits, where the void is more than all objects together; soft edges have more
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MaskedPicture(LabelledPicture):
    """A picture with a label map, or with a PNG for each object."""

    masks: tuple[tuple[str, Blob], ...]
    one_object_each: bool

    def label_blobs(self) -> tuple[Blob, ...]:
        """Its files in `masks/`."""
        return tuple(blob for _, blob in self.masks)

    def read_annotations(self) -> list[dict]:
        """Records with `area` and `segmentation`; empty masks are none.

        Raises:
            ValueError: names the PNG, if it is unreadable or no label map.
        """
        records = []
        for name, blob in self.masks:
            labels = read_labels(name, blob, colors=self.one_object_each)
            for value in [None] if self.one_object_each else label_values(name, labels):
                mask = labels != 0 if value is None else labels == value
                if mask.any():
                    records.append({"area": int(mask.sum()), "segmentation": encode_rle(mask)})
        return records


def read_labels(name: str, blob: Blob, colors: bool = False) -> np.ndarray:
    """A mask PNG -> (H, W): 8 or 16 bits of grey, or colours as int64 0xRRGGBB; alpha dropped.

    Of a palette the numbers, as label maps are meant, or with `colors` what it shows.
    """
    try:
        with Image.open(io.BytesIO(blob.read())) as image:
            grey = image.mode in ("1", "L", "P", "I", "I;16", "I;16B", "I;16L") and not (colors and image.mode == "P")
            pixels = np.asarray(image if grey else image.convert("L" if image.mode == "LA" else "RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        # Pillow would name the place in memory, as of pictures.
        reason = "of no known format" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"{name} in {blob.path} is no readable mask: {reason}") from error
    if pixels.ndim == 3:
        return pixels.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])
    return pixels.astype(np.uint8) if pixels.dtype == bool else pixels


def label_values(name: str, labels: np.ndarray) -> list[int]:
    """The numbers of a label map's objects: all but 0, and of 8 bits all but 255, unless that is the only one."""
    values = [value for value in np.unique(labels).tolist() if value]
    if len(values) > MOST_OBJECTS:
        raise ValueError(f"{name} has {len(values)} values, wanted a label map of at most {MOST_OBJECTS} objects")
    if labels.dtype != np.uint8 or values == [VOID]:
        return values
    void = np.count_nonzero(labels == VOID)
    if len(values) > MOST_BESIDE_VOID and 2 * void > np.count_nonzero(labels):
        raise ValueError(
            f"{name} is mostly {VOID}, with {len(values) - 1} other values: wanted a label map, found a mask whose "
            "edges are soft (above 127 it is the object)"
        )
    return [value for value in values if value != VOID]


def find_masked_pictures(folder: str | Path) -> list[LabelledPicture]:
    """The pictures of `folder/images` that have masks in `folder/masks`, sorted by name.

    A picture without masks, and masks without a picture, are left out and counted in the log.

    Raises:
        FileNotFoundError: if there is nothing at the folder, or no picture with masks.
        ValueError: if a picture has a label map and single masks.
    """
    blobs = find_blobs(folder, "images/ and masks/")
    shown = sorted(name for name in blobs if is_in(name, "images", picture_suffixes()))
    images = {within(name): blobs[name] for name in reversed(shown)}
    masks: dict[str, list[tuple[str, Blob]]] = {}
    for name, blob in sorted(blobs.items()):
        if is_in(name, "masks", (".png",)):
            path = within(name)
            # `cup` if it is the map of picture `cup`, else one object of the picture that its folder is named after.
            masks.setdefault(path if path in images else str(PurePath(path).parent), []).append((name, blob))
    names = sorted(images.keys() & masks.keys())
    left_out = Counter({"pictures without masks": len(images) - len(names), "masks without a picture": 0})
    left_out["pictures that another one shares its name with"] = len(shown) - len(images)
    left_out["masks without a picture"] = sum(len(found) for name, found in masks.items() if name not in images)
    told = ", ".join(f"{number} {reason}" for reason, number in left_out.items() if number)
    if not names:
        raise FileNotFoundError(f"no picture with masks in {folder}/images and {folder}/masks: found {told or 'none'}")
    if told:
        logger.warning("%s: %d pictures, left out: %s", folder, len(names), told)
    return [masked_picture(name, images[name], masks[name]) for name in names]


def masked_picture(name: str, image: Blob, masks: list[tuple[str, Blob]]) -> MaskedPicture:
    """A picture with its masks; one that has the picture's own name is a label map."""
    is_map = any(within(mask) == name for mask, _ in masks)
    if is_map and len(masks) > 1:
        raise ValueError(
            f"{name} wants a label map or a folder of masks, found both: {', '.join(m for m, _ in masks)}"
        )
    return MaskedPicture(name, image, tuple(masks), one_object_each=not is_map)


def is_in(name: str, part: str, suffixes: tuple[str, ...]) -> bool:
    """Whether a path begins with a folder and ends with one of the suffixes."""
    return PurePath(name).parts[0] == part and name.lower().endswith(suffixes)


def within(name: str) -> str:
    """A path without its first folder and its suffix."""
    return str(PurePath(*PurePath(name).parts[1:]).with_suffix(""))
