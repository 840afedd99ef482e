"""SA-1B as it ships: pairs of a JPEG and a JSON with COCO run-length masks, in folders or tar shards.

The JSON is `{"image": {...}, "annotations": [{"area", "segmentation": {"size", "counts"}, ...}]}`. A folder holds the
pairs side by side (`sa_1.jpg`, `sa_1.json`) or in `images/` and `annotations/`; a tar holds them side by side.
"""

import io
import json
import logging
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from ..pictures_efficientsam import LARGEST_PICTURE, as_stored
from .blobs import Blob, find_blobs

logger = logging.getLogger(__name__)


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
