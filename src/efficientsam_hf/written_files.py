"""Files and folders that are there whole or not at all."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_together(paths: list[Path]) -> Iterator[list[Path]]:
    """Files beside the wanted ones to write to; renamed at the end if all went well, taken away if not.

    Raises:
        NotADirectoryError: if the place to write into is a file.
        IsADirectoryError: if the place to write is a folder.
    """
    for path in paths:
        if path.parent.is_file():
            raise NotADirectoryError(f"{path.parent} is a file, wanted a folder to write {path.name} into")
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder, wanted a file to write")
        path.parent.mkdir(parents=True, exist_ok=True)
    beside = [path.with_name(f".{path.stem}.part{path.suffix}") for path in paths]
    try:
        yield beside
        for partial, path in zip(beside, paths, strict=True):
            partial.replace(path)
    finally:
        for partial in beside:
            partial.unlink(missing_ok=True)


@contextmanager
def written_beside(folder: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to write into, which becomes `folder` at the end, or vanishes if something is raised before.

    Raises:
        FileExistsError: if there is something in `folder` that may not be overwritten.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not overwrite):
        raise FileExistsError(f"wanted a new or an empty folder (or overwrite=True), found {folder} with content")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as room:
        new, old = Path(room) / "new", Path(room) / "old"
        new.mkdir()
        yield new
        try:
            if folder.is_dir():
                folder.rename(old)
            new.rename(folder)
        except BaseException:  # an interrupt, too: the room goes, and the old one with it
            if old.is_dir() and not folder.is_dir():
                old.rename(folder)
            raise


@contextmanager
def written_by_several(path: Path) -> Iterator[Path]:
    """A file that several processes may write at one time, all the same; it becomes `path` at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.stem}-", dir=path.parent) as room:
        yield Path(room) / path.name
        (Path(room) / path.name).replace(path)
