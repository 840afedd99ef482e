"""What is to be labelled, in shards: each a name and its pictures, read one after the other, always in the same order.

A folder is cut into runs of pictures, a tar is a shard, and a data set of the Hub has the shards it was stored in.
"""

import glob
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from ..data.blobs import find_blobs
from ..data.images import Picture, cell_bytes, picture_suffixes
from ..data.shards import Member, WholeHeader, find_shards, is_streamed, named_by, open_shard

TARS = (".tar", ".tar.gz", ".tgz")
FIRST_BYTES = 1024  # by which other files of one name and size are told apart
Report = Callable[[str], None]


@dataclass(frozen=True)
class Shard:
    """A unit of work.

    Args:
        name: A file name without suffix, no other shard's.
        pictures: Gives the pictures; what cannot be read at all is told to the function it is given. A picture's name
            is a relative path, no other picture's of the source.
        count: How many there are, if that is known without reading.
        origin: What tells the shard from another one of its name: looks of files, or an address.
    """

    name: str
    pictures: Callable[[Report], Iterator[Picture]]
    count: int | None = None
    origin: str = ""


def find_label_shards(
    source: str, pictures_per_shard: int = 100, split: str = "train", column: str = "image"
) -> list[Shard]:
    """The shards of a source.

    Args:
        source: A folder of pictures, of tars or of parquet files; a tar, a pattern or an address of tars, as
            `data.shards.find_shards` takes them; `FILE.parquet`, or a pattern of that; or `OWNER/NAME` of a data set
            on the Hub.
        pictures_per_shard: For a folder of pictures.
        split: Of a data set.
        column: Of a data set, where its pictures are.

    Raises:
        FileNotFoundError: if there is nothing at the source, or no picture.
        ValueError: if it is something else, or two shards would have one name.
    """
    if Path(source).is_dir():
        shards = shards_of_folder(Path(source), pictures_per_shard, split, column)
    elif source.endswith(".parquet"):
        shards = shards_of_dataset("parquet", source, split, column)
    elif glob.has_magic(source) and source.lower().endswith(picture_suffixes()):
        raise ValueError(
            f"{source} is a pattern of pictures: wanted their folder, or a pattern of tars or parquet files"
        )
    elif source.endswith(TARS) or is_streamed(source):
        shards = [shard_of_tar(address) for address in find_shards([source])]
    elif Path(source).is_file():
        raise ValueError(f"{source} is a single file, wanted a folder, a tar, parquet files or a data set of the Hub")
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        shards = shards_of_dataset(source, None, split, column)
    else:
        raise FileNotFoundError(f"nothing at {source}: wanted a folder, tars, parquet files or the Hub's OWNER/NAME")
    names = [shard.name for shard in shards]
    doubles = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if doubles:
        raise ValueError(f"every shard wants a name of its own: found two called {doubles[0]!r}")
    return shards


def shards_of_folder(folder: Path, pictures_per_shard: int, split: str, column: str) -> list[Shard]:
    """Runs of the folder's pictures by name; or its tars, or its parquet files, if that is what it has.

    Raises:
        ValueError: if it has two of these kinds.
    """
    blobs = find_blobs(folder, "pictures")
    suffixes = picture_suffixes()
    pictures = [Picture(name, blob) for name, blob in sorted(blobs.items()) if name.lower().endswith(suffixes)]
    tars = sorted(name for name in blobs if name.endswith(TARS))
    tables = [name for name in blobs if name.endswith(".parquet")]
    counts = {"pictures": len(pictures), "tars": len(tars), "parquet files": len(tables)}
    found = [f"{count} {kind}" for kind, count in counts.items() if count]
    if len(found) > 1:
        raise ValueError(f"{folder} has {' and '.join(found)}: wanted one kind, or a pattern of the tars or tables")
    if tars:
        return [shard_of_tar(str(folder / name)) for name in tars]
    if tables:
        return shards_of_dataset("parquet", str(folder / "**/*.parquet"), split, column)
    if not pictures:
        raise FileNotFoundError(f"no picture, tar or parquet file in {folder}: found {len(blobs)} other files")
    runs = [pictures[start : start + pictures_per_shard] for start in range(0, len(pictures), pictures_per_shard)]
    return [Shard(f"pictures_{number:05}", partial(listed, run), len(run)) for number, run in enumerate(runs)]


def listed(pictures: list[Picture], report: Report) -> Iterator[Picture]:
    """Pictures that are known already."""
    return iter(pictures)


# --------------------------------------------------------------------------------------------------------------------
# Tars


def shard_of_tar(address: str) -> Shard:
    """A tar by its path or address; its pictures are called `TAR/MEMBER`."""
    name = re.sub(r"\.(tar|tar\.gz|tgz)$", "", address.rstrip("/").rpartition("/")[2].partition("?")[0])
    return Shard(name, partial(tar_pictures, address, name), origin=look_of(address))


def look_of(place: str) -> str:
    """Of a file its name, size and first bytes, wherever it lies, or the address of something else."""
    path = Path(place)
    if "://" in place or not path.is_file():
        return place
    # Sizes of tars are multiples of 10240; their first bytes are a member's header.
    with path.open("rb") as file:
        return f"{path.name} {path.stat().st_size} {file.read(FIRST_BYTES).hex()}"


def tar_pictures(address: str, shard: str, report: Report) -> Iterator[Picture]:
    """The pictures of a tar, compressed or not, in its order.

    Raises:
        OSError: if a tar on a network ends too soon, which another try may mend; one on a disk is reported.
    """
    suffixes = picture_suffixes()
    with closing(open_shard(address)) as file:
        try:
            with tarfile.open(fileobj=file, mode="r|*", tarinfo=WholeHeader) as archive:
                for member in archive:
                    if not member.name.lower().endswith(suffixes):
                        continue
                    if member.islnk():
                        report(
                            f"{shard}/{safe_path(member.name)}: a hard link to {member.linkname}, which is labelled"
                        )
                    elif member.isfile():
                        content = archive.extractfile(member).read()  # type: ignore[union-attr]
                        blob = Member(Path(address), member.offset_data, member.size, content)
                        yield Picture(f"{shard}/{safe_path(member.name)}", blob)
        except (tarfile.ReadError, zlib.error, EOFError) as error:
            fault = f"{address} is cut short or no tar: {error}"
            if "://" in address:
                raise OSError(fault) from error
            report(fault)


def safe_path(name: str) -> str:
    """A member's path, without what would lead out of the folder that labels are written to."""
    return "/".join(part for part in PurePosixPath(name).parts if part not in ("..", "/", "."))


# --------------------------------------------------------------------------------------------------------------------
# Data sets


def shards_of_dataset(name: str, files: str | None, split: str, column: str) -> list[Shard]:
    """The shards of what `datasets` loads as a stream; pictures are called by shard, number and their own name."""
    from datasets import Image, load_dataset

    stream = load_dataset(name, data_files=files, split="train" if files else split, streaming=True)
    columns = stream.column_names
    if columns is not None and column not in columns:
        raise ValueError(f"no column {column!r} in {files or name}: found {', '.join(columns)}")
    stream = stream.cast_column(column, Image(decode=False))
    total = stream.num_shards

    def pictures_of(number: int, report: Report) -> Iterator[Picture]:
        part = stream.shard(num_shards=total, index=number).select_columns([column])
        for row, record in enumerate(part):
            yield dataset_picture(record[column] or {}, number, row)

    named = sorted(named_by(files)) if files else [name, split]
    origin = "\n".join([column, *map(look_of, named)])
    return [Shard(f"shard_{number:05}", partial(pictures_of, number), origin=origin) for number in range(total)]


def dataset_picture(cell: dict[str, Any], shard: int, row: int) -> Picture:
    """A cell of a data set's column, where bytes or a path may be missing.

    Raises:
        OSError: for an address that does not answer, which another try may mend.
    """
    address = cell.get("path") or ""
    path = Path(address.partition("::")[0])  # of zip://PATH::ARCHIVE the first part
    name = f"{shard:05}/{row:06}" + (f"_{path.name}" if path.name else "")
    try:
        content = cell_bytes(cell)
    except OSError:
        if "://" in address:
            raise
        content = b""
    return Picture(name, Member(path, content=content))
