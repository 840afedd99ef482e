"""Pictures without labels: folders and tars by number, a data set of the Hub as a stream."""

import io
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from ..pictures_efficientsam import as_stored
from .blobs import Blob, find_blobs
from .crops import Crop, SampleMaker
from .packed_items import PackedItems

MOST_CORRUPT = 100  # pictures in a row
# Pillow writes these, or knows them by name, but reads no pixels of them.
UNREAD = {"BUFR", "GRIB", "HDF5", "MPEG", "PALM", "PDF"}
logger = logging.getLogger(__name__)


def picture_suffixes() -> tuple[str, ...]:
    """The suffixes, in small letters, of all pictures that Pillow reads."""
    return tuple(suffix for suffix, kind in Image.registered_extensions().items() if kind not in UNREAD)


class CorruptPictureError(ValueError):
    """A picture that cannot be read; the message begins with its name."""


@dataclass(frozen=True)
class Picture:
    """A picture that is read when asked for."""

    name: str
    blob: Blob

    def read(self) -> Image.Image:
        """In RGB, as stored. Raises CorruptPictureError."""
        try:
            content = self.blob.read()
        except OSError as error:
            raise CorruptPictureError(f"{self.name} cannot be read: {error}") from error
        return decode_picture(self.name, content)


def decode_picture(name: str, content: bytes) -> Image.Image:
    """The bytes of a picture file -> RGB.

    Raises:
        CorruptPictureError: if they are none.
    """
    try:
        return as_stored(Image.open(io.BytesIO(content)))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise CorruptPictureError(f"{name} is no readable picture: {error}") from error


def cell_bytes(cell: dict[str, Any]) -> bytes:
    """The file in a cell of an undecoded column of pictures: its `bytes`, or what lies at its `path`; else nothing.

    Raises:
        OSError: if nothing can be read at the path, which may be an address, or within an archive.
    """
    content, path = cell.get("bytes"), cell.get("path")
    if content is not None or not path:
        return content or b""
    import fsspec  # comes with `datasets`

    with fsspec.open(path) as file:
        return file.read()


def undecoded(rows: Any, column: str = "image") -> Any:
    """A data set whose column of pictures gives files: decoded, pictures would come turned as their EXIF data says."""
    from datasets import Image as ImageColumn

    return rows.cast_column(column, ImageColumn(decode=False))


def read_cell(cell: dict[str, Any] | None, name: str, size: tuple[int, int]) -> Image.Image:
    """The picture in a cell of an undecoded column, as stored: RGB, of the width and height of what is drawn on it.

    Raises:
        CorruptPictureError: if it is none, or of another size.
    """
    picture = decode_picture(name, cell_bytes(cell or {}))
    check_size(name, size, picture)
    return picture


def check_size(name: str, size: tuple[int, int], picture: Image.Image) -> None:
    """Refuse what is drawn on a picture of another width and height. Raises CorruptPictureError."""
    if size != picture.size:
        wanted = f"{picture.height} x {picture.width}"
        raise CorruptPictureError(f"{name} is {size[1]} x {size[0]}, wanted {wanted}")


def too_many_corrupt(names: Sequence[str]) -> ValueError:
    """What is wrong where no picture is found that can be read."""
    return ValueError(f"wanted a readable picture, found {len(names)} corrupt ones in a row, such as {names[0]}")


def find_pictures(sources: Sequence[str | Path]) -> Sequence[Picture]:
    """All pictures of folders (searched to their depth) and uncompressed tars, each source's sorted by name.

    Raises:
        FileNotFoundError: if there is nothing at a source, or no picture in it.
        ValueError: if it is a file, but no uncompressed tar.
    """
    pictures: list[Picture] = []
    suffixes = picture_suffixes()
    for source in sources:
        blobs = find_blobs(source, "pictures")
        found = [Picture(f"{source}/{name}", blob) for name, blob in blobs.items() if name.lower().endswith(suffixes)]
        if not found:
            raise FileNotFoundError(f"no picture (.jpg, .png, .tif or so) in {source}: found {len(blobs)} other files")
        pictures += sorted(found, key=lambda picture: picture.name)
    return PackedItems(pictures)


# --------------------------------------------------------------------------------------------------------------------
# Data sets


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """Numbers of `count` items in the order in which an epoch takes them."""
    return np.random.default_rng((seed, epoch)).permutation(count)


class CorruptPictures:
    """Counts the pictures that could not be read, and stops when they are too many.

    Args:
        pictures: How many there are, if that is known; otherwise the share is of those seen so far.
        most: Largest share that is borne.
    """

    def __init__(self, pictures: int | None = None, most: float = 0.01):
        self.pictures = pictures
        self.most = most
        self.names: set[str] = set()
        self.seen = 0

    def add(self, corrupt: Iterable[str], seen: int) -> None:
        """Note what the samples' `corrupt` said, and how many samples there were.

        Raises:
            ValueError: if too many were corrupt.
        """
        self.names |= {name for text in corrupt for name in text.splitlines()}
        self.seen += seen
        # Of a stream's first hundred a single one may be corrupt.
        total = self.pictures or max(self.seen, 100)
        if len(self.names) > self.most * total:
            examples = ", ".join(sorted(self.names)[:3])
            raise ValueError(
                f"{len(self.names)} of {total} pictures are corrupt, wanted at most {self.most:.0%}: {examples}"
            )


class UnlabelledImages(Dataset):
    """Numbered samples of pictures: each epoch takes every picture once, in an order of its own.

    A corrupt picture is named in the log, and the next one of the epoch stands in for it; `corrupt` of a sample holds
    the names, a line each, for `CorruptPictures` to count.

    Args:
        pictures: What to draw from.
        length: How many samples there are to be.
        maker: Makes a sample of a picture.
        first: Number of the first sample; resuming starts further on.
        features: Gives the teacher's features of a crop, from a cache: picture's number, its width and height, crop,
            epoch -> (C, h, w). They become `features` of the sample; a picture that has none counts as corrupt.
    """

    def __init__(
        self,
        pictures: Sequence[Picture],
        length: int,
        maker: SampleMaker,
        first: int = 0,
        features: Callable[[int, tuple[int, int], Crop, int], torch.Tensor] | None = None,
    ):
        self.pictures = pictures
        self.length = length
        self.maker = maker
        self.first = first
        self.features = features

    def __len__(self) -> int:
        return max(self.length - self.first, 0)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Sample `first + index`, see `SampleMaker.make`."""
        epoch, place = divmod(self.first + index, len(self.pictures))
        order = epoch_order(self.maker.seed, epoch, len(self.pictures))
        corrupt: list[str] = []
        for step in range(min(MOST_CORRUPT, len(self.pictures))):
            number = int(order[(place + step) % len(self.pictures)])
            try:
                return {**self.make(number, epoch), "corrupt": "\n".join(corrupt)}
            except CorruptPictureError as error:
                logger.warning("skipped: %s", error)
                corrupt.append(self.pictures[number].name)
        raise too_many_corrupt(corrupt)

    def make(self, number: int, epoch: int) -> dict[str, Any]:
        """A sample of picture `number`. Raises CorruptPictureError."""
        image = self.pictures[number].read()
        sample = self.maker.make(image, number, epoch)
        if self.features is not None:
            crop = self.maker.draw_crop(image, number, epoch)
            sample["features"] = self.features(number, image.size, crop, epoch)
        return sample


class StreamedImages(IterableDataset):
    """Endless samples of a stream of `datasets`, for what is too large to download.

    A process reads its own part of the stream, and each of its workers decodes every so many-th picture of that part.
    Shards and a buffer of pictures are shuffled anew for each epoch. Resuming reads what was read before again: exact,
    and not quick.

    Args:
        stream: A `datasets.IterableDataset`, already this process's part (`datasets.distributed`).
        maker: Makes a sample of a picture.
        batch_size: Of the loader, whose batches come from one worker after the other.
        first_batch: Batches of this process already taken; resuming starts further on.
        column: Where the pictures are.
        buffer: How many pictures are shuffled at a time.
        rank: Number of this process, so that each cuts and hides in its own way.
        ranks: How many there are.
    """

    def __init__(
        self,
        stream: Any,
        maker: SampleMaker,
        batch_size: int,
        first_batch: int = 0,
        column: str = "image",
        buffer: int = 1000,
        rank: int = 0,
        ranks: int = 1,
    ):
        if stream.column_names is not None and column not in stream.column_names:
            raise ValueError(f"no column {column!r} in the data set: found {', '.join(stream.column_names)}")
        self.stream = undecoded(stream, column)
        self.maker = maker
        self.batch_size = batch_size
        self.first_batch = first_batch
        self.column = column
        self.buffer = buffer
        self.rank = rank
        self.ranks = ranks

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Samples of this worker; one whose picture was corrupt names it in the next one's `corrupt`."""
        worker = get_worker_info()
        workers = 1 if worker is None else worker.num_workers
        # The worker that would come next had there been no stop.
        lane = (self.first_batch + (0 if worker is None else worker.id)) % workers
        taken = len(range(lane, self.first_batch, workers)) * self.batch_size
        corrupt: list[str] = []
        for number, epoch, record in self.records(lane, workers):
            record = record or {}  # a data set may have rows without a picture
            name = record.get("path") or f"picture {number}"
            try:
                image = decode_picture(name, cell_bytes(record))
            except (CorruptPictureError, OSError) as error:
                logger.warning("skipped: %s", error)
                corrupt.append(name)
                if len(corrupt) == MOST_CORRUPT:
                    raise too_many_corrupt(corrupt) from error
                continue
            if taken:
                taken -= 1
            else:
                yield {**self.maker.make(image, number, epoch), "corrupt": "\n".join(corrupt)}
            corrupt = []

    def records(self, lane: int, workers: int) -> Iterator[tuple[int, int, dict]]:
        """Every `workers`-th picture of every epoch: its number among all processes', the epoch, bytes and path."""
        epoch, seen = 0, True
        while seen:
            seen = False
            shuffled = self.stream.shuffle(seed=self.maker.seed + epoch, buffer_size=self.buffer)
            # Not its own iterator, which would divide the shards among the workers in its own way.
            for number, batch in enumerate(shuffled.iter(batch_size=1)):
                seen = True
                if number % workers == lane:
                    yield number * self.ranks + self.rank, epoch, batch[self.column][0]
            epoch += 1
