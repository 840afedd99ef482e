"""What every format of labels is: a shard that is written picture by picture, and is whole or not there."""

import glob
import secrets
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from torch import Tensor

from ..data.images import Picture

ONE_CATEGORY = [{"id": 1, "name": "object"}]


class PartlyLabelledError(ValueError):
    """What of a picture could not be labelled; `records` are of the rest."""

    def __init__(self, message: str, records: list[dict[str, Any]]):
        super().__init__(message)
        self.records = records


@dataclass(frozen=True)
class LabelledPhoto:
    """A picture and its masks.

    Args:
        picture: Where it came from; its name is its path among the labels.
        content: The bytes of its file.
        pixels: (3, H, W), upright; masks belong to these.
        records: As `segment_everything` gives them; with `category_id` if there is more than one category.
    """

    picture: Picture
    content: bytes
    pixels: Tensor
    records: list[dict[str, Any]]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.pixels.shape[-1], self.pixels.shape[-2]

    def beside(self, folder: Path, suffix: str) -> Path:
        """Where a label file of this picture's name lies."""
        return folder / PurePosixPath(self.picture.name).with_suffix(suffix)


@dataclass
class Format:
    """A shard being written: `add` for each picture, then `finish`.

    Args:
        folder: Of all labels.
        shard: The shard's name.
        number: The shard's place among all.
        categories: COCO's.
    """

    folder: Path
    shard: str
    number: int
    categories: list[dict[str, Any]] = field(default_factory=lambda: ONE_CATEGORY)

    # Whether a.jpg and a.png of one folder would share a file.
    by_stem = False
    # The files that it writes, and the stems of pictures that it has no file for.
    patterns: ClassVar[tuple[str, ...]] = ()
    taken: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        """Open what the shard is written to."""

    def add(self, photo: LabelledPhoto) -> None:
        """Write a picture's labels."""
        raise NotImplementedError(f"{type(self).__name__} writes nothing")

    def finish(self) -> None:
        """Make the shard visible."""

    @classmethod
    def files_in(cls, folder: Path) -> Iterator[Path]:
        """What is where labels of this format are written, half-written files left out."""
        for pattern in ("report.json", "progress/*.json", *cls.patterns):
            for path in folder.glob(pattern):
                if not any(part.startswith(".") for part in path.relative_to(folder).parts):
                    yield path

    @classmethod
    def stem_of(cls, picture: Picture) -> str:
        """A picture's path among the labels, without suffix.

        Raises:
            ValueError: if its labels would be written over the folder's own notes.
        """
        stem = str(PurePosixPath(picture.name).with_suffix(""))
        if any(fnmatchcase(stem, pattern) for pattern in cls.taken):
            raise ValueError(f"{picture.name}: {stem}.json is a note on all labels, wanted another name")
        return stem

    @classmethod
    def conclude(cls, folder: Path, shards: list[str], categories: list[dict[str, Any]]) -> list[Path]:
        """Write what there is one of, once all shards are there; gives its files."""
        return []


class WholeShards(Format):
    """Formats with one file a shard, which takes its name when it is complete.

    Should two processes write the same shard, each has a file of its own, and the first one that is done counts.
    """

    place = "."
    suffix = ""

    def __post_init__(self) -> None:
        self.path = self.folder / self.place / f"{self.shard}{self.suffix}"
        self.part = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.part")
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def finish(self) -> None:
        """Rename what was written beside, and take away what others wrote of this shard, killed ones among them."""
        try:
            self.part.replace(self.path)
        except FileNotFoundError:
            if not self.path.is_file():
                raise
        for other in self.path.parent.glob(f".{glob.escape(self.path.name)}.*.part"):
            with suppress(OSError):
                other.unlink()
