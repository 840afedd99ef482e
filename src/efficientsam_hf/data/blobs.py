"""Files of a folder, or members of a tar: where their bytes lie, to be read when asked for."""

import logging
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Blob:
    """Some bytes of a file: all of it, or one member of a tar."""

    path: Path
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        """The bytes, read anew each time: an open file would not survive the way into a worker."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def count(self) -> int:
        """How many bytes they are."""
        return self.path.stat().st_size if self.size < 0 else self.size


class WholeHeader(tarfile.TarInfo):
    """A member's header. Only zeros end a tar; `tarfile` alone would take missing or broken bytes for its end, too."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "WholeHeader":
        """The next header of an archive."""
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error


def files_in(folder: Path) -> Iterator[Path]:
    """All files of a folder to its depth, then those behind links to other folders; no folder is entered twice."""
    entered: set[str] = set()
    waiting = [str(folder)]
    while waiting:
        for place, folders, names in os.walk(waiting.pop(0)):
            real = os.path.realpath(place)
            folders.sort()
            if real in entered:
                folders.clear()
                continue
            entered.add(real)
            waiting += (path for name in folders if os.path.islink(path := os.path.join(place, name)))
            yield from (path for path in (Path(place, name) for name in names) if path.is_file())


def find_blobs(source: str | Path, wanted: str) -> dict[str, Blob]:
    """Every file of a folder or a tar by its path therein; `wanted` says in errors what was hoped for.

    Of a tar that is cut short it is those until then, and the log says so.

    Raises:
        FileNotFoundError: if there is nothing at `source`.
        ValueError: if it is a file, but no uncompressed tar.
    """
    source = Path(source)
    if source.is_dir():
        return {str(path.relative_to(source)): Blob(path) for path in files_in(source)}
    if not source.is_file():
        raise FileNotFoundError(f"nothing at {source}: wanted a folder or a tar of {wanted}")
    found: dict[str, Blob] = {}
    try:
        with tarfile.open(source, "r:", tarinfo=WholeHeader) as archive:
            for item in archive:
                if item.isfile():
                    found[item.name] = Blob(source, item.offset_data, item.size)
                elif item.islnk() and item.linkname in found:  # a file that tar has met under another name
                    found[item.name] = found[item.linkname]
    except tarfile.ReadError as error:
        if not found:
            raise ValueError(f"{source} is no uncompressed tar of {wanted}: {error}") from error
        logger.warning("%s is cut short, %d files into it: %s", source, len(found), error)
    return found
