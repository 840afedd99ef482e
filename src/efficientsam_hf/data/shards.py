"""Tar shards of .jpg and .json pairs, read from one end to the other: on a disk, on the Hub, on a web server."""

import glob
import io
import logging
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.request import urlopen

from .blobs import Blob, WholeHeader
from .sa1b import Pair, pair_name

logger = logging.getLogger(__name__)

# Halves of pairs that a shard read over the network may have waiting in memory; SA-1B's pairs lie side by side.
MOST_WAITING = 256


@dataclass(frozen=True)
class Member(Blob):
    """A file of a shard that cannot be read twice, kept in memory."""

    content: bytes = b""

    def read(self) -> bytes:
        """All of it."""
        return self.content

    def count(self) -> int:
        """How many bytes they are."""
        return len(self.content)


def is_streamed(source: str) -> bool:
    """Whether a source is a pattern or an address, whose shards are read as a stream; the others are numbered."""
    return "://" in source or (glob.has_magic(source) and not Path(source).exists())


def find_shards(sources: Sequence[str]) -> list[str]:
    """Paths and addresses of all shards that the sources name, sorted, each once.

    Args:
        sources: Paths, patterns such as `sa_*.tar`, addresses with `http://`, `https://`, or anything that fsspec
            opens: `hf://datasets/OWNER/NAME/sa_*.tar`. On a web server a shard is named in full.

    Raises:
        FileNotFoundError: if a source names no shard.
        OSError: if nobody can be asked.
    """
    shards = set()
    for source in sources:
        found = named_by(source)
        if not found:
            raise FileNotFoundError(f"no shard at {source}: wanted tars of .jpg and .json pairs")
        shards.update(found)
    return sorted(shards)


def named_by(source: str) -> list[str]:
    """The shards of one source."""
    if "://" not in source:
        # A name may have brackets of its own.
        named = [source] if Path(source).exists() else glob.glob(source, recursive=True)
        return [path for path in named if Path(path).is_file()]
    if source.startswith(("http://", "https://")):
        return [source]
    from fsspec.core import url_to_fs

    try:
        system, path = url_to_fs(source)
        found = system.glob(path) if glob.has_magic(path) else [path] * system.exists(path)
    except (ImportError, OSError):
        raise
    except Exception as error:  # each client has its own
        raise OSError(f"nobody tells what lies at {source}: {error}") from error
    return [system.unstrip_protocol(path) for path in found]


def open_shard(shard: str) -> Any:
    """The bytes of a shard, as a file that is open for reading."""
    if "://" not in shard:
        return Path(shard).open("rb")
    if shard.startswith(("http://", "https://")):
        return urlopen(shard, timeout=60)
    import fsspec

    return fsspec.open(shard, "rb").open()


def read_shard(
    shard: str, wanted: Callable[[int], bool] = lambda number: True, report: Callable[[str], None] = logger.warning
) -> Iterator[Pair]:
    """The pairs of a shard in its order. Nothing of a local shard is read but its headers, until a pair is asked.

    Args:
        shard: Path or address.
        wanted: Says of a pair, by the place of its first half among the shard's pairs, whether to give it.
        report: Is told of every half without its other, and of a shard that is cut short, out of reach or no tar.
    """
    local = "://" not in shard
    waiting: dict[str, dict[str, Blob]] = {}
    numbers: dict[str, int] = {}
    # A server may fail at any time, in the words of whatever client asks it; what it gave until then is good.
    failures = tarfile.ReadError if local else Exception
    try:
        with (
            closing(open_shard(shard)) as file,
            tarfile.open(fileobj=file, mode="r:" if local else "r|", tarinfo=WholeHeader) as archive,
        ):
            for member in archive:
                kind = PurePosixPath(member.name).suffix.lower().replace("jpeg", "jpg")
                if not member.isfile() or kind not in (".jpg", ".json"):
                    continue
                name = pair_name(member.name)
                if not wanted(numbers.setdefault(name, len(numbers))):
                    continue
                blob = find_member(archive, member, shard, local)
                if name not in waiting or kind in waiting[name]:
                    waiting[name] = {kind: blob}
                else:
                    halves = {kind: blob, **waiting.pop(name)}
                    yield Pair(name, halves[".jpg"], halves[".json"])
                if not local and len(waiting) > MOST_WAITING:
                    oldest = next(iter(waiting))
                    report_halves(shard, {oldest: waiting.pop(oldest)}, report)
    except failures as error:
        fault = "is cut short or no uncompressed tar" if isinstance(error, tarfile.ReadError) else "is out of reach"
        report(f"{shard} {fault}, {len(numbers)} pairs into it: {error}")
    report_halves(shard, waiting, report)


def find_member(archive: tarfile.TarFile, member: tarfile.TarInfo, shard: str, local: bool) -> Blob:
    """Where the member lies, or what it holds if it cannot be read later."""
    if local:
        return Blob(Path(shard), member.offset_data, member.size)
    content = archive.extractfile(member) or io.BytesIO()
    return Member(Path(shard), member.offset_data, member.size, content.read())


def report_halves(shard: str, waiting: dict[str, dict[str, Blob]], report: Callable[[str], None]) -> None:
    """Say which halves are left over."""
    for name, halves in waiting.items():
        missing = ".json" if ".jpg" in halves else ".jpg"
        report(f"{name} in {shard} has no {missing}")
