"""Files and folders that are there whole or not at all."""

import json
import os
import secrets
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

LONGEST_NAME = 255  # bytes, in most file systems


@contextmanager
def written_together(paths: list[Path]) -> Iterator[list[Path]]:
    """Files beside the wanted ones to write to; renamed at the end if all went well, taken away if not.

    Raises:
        ValueError: if two of them are one file.
        OSError: as `check_place` does.
    """
    places = [check_place(path) for path in paths]
    if len(set(places)) < len(places):
        raise ValueError(f"wanted different files to write, found {', '.join(map(str, paths))}")
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
    beside = [hidden_beside(place) for place in places]
    try:
        yield beside
        for partial, place in zip(beside, places, strict=True):
            partial.replace(place)
    finally:
        for partial in beside:
            partial.unlink(missing_ok=True)


def hidden_beside(place: Path) -> Path:
    """A hidden name beside a file's, of the same suffix and nobody else's; without its own where that is too long."""
    own = secrets.token_hex(4)  # or two that write the same file would take away each other's
    name = f".{place.stem}.{own}.part{place.suffix}"
    return place.with_name(name if len(os.fsencode(name)) <= LONGEST_NAME else f".{own}.part{place.suffix}")


def check_place(path: Path) -> Path:
    """Refuse a place where no file can be written; a link stays, and what it leads to is returned.

    Raises:
        NotADirectoryError: if the place to write into is a file.
        IsADirectoryError: if the place to write is a folder.
        FileExistsError: if it is a device or a pipe, which a new file would replace.
        PermissionError: if nothing may be written there.
    """
    place = path.resolve()
    folder = next(parent for parent in place.parents if parent.exists())
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, wanted a folder to write {path.name} into")
    if place.is_dir():
        raise IsADirectoryError(f"{path} is a folder, wanted a file to write")
    if place.exists() and not place.is_file():
        raise FileExistsError(f"{path} is a device or a pipe, wanted a file to write")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{path} cannot be written: no permission to write into {folder}")
    return place


def check_outputs(photo: str | Path, overlay: Path, *others: Path) -> None:
    """Refuse, before any work, to write over the photo, and an overlay of a kind that Pillow does not write.

    Raises:
        ValueError: naming the file.
        OSError: as `check_place` does.
    """
    if not overlay.is_dir() and Image.registered_extensions().get(overlay.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"{overlay}: wanted the suffix of a picture, as .png or .jpg, found {overlay.suffix!r}")
    for path in (overlay, *others):
        if os.path.exists(photo) and path.exists() and os.path.samefile(photo, path):
            raise ValueError(f"{path} is the photo itself: wanted another file to write")
        check_place(path)


def refuse_overwriting(outputs: Iterable[Path], inputs: Collection[Path]) -> None:
    """Refuse, before any work, to write over what is read.

    Raises:
        ValueError: naming both.
    """
    for path in (path for path in outputs if path.exists()):
        same = next((other for other in inputs if other.exists() and os.path.samefile(path, other)), None)
        if same is not None:
            raise ValueError(f"{path} would be written over {same}, which is read: wanted another file to write")


@contextmanager
def written_beside(folder: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to write into, which becomes `folder` at the end, or vanishes if something is raised before.

    Raises:
        FileExistsError: if there is something in `folder` that may not be overwritten.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not overwrite):
        raise FileExistsError(f"wanted a new or an empty folder (or overwrite), found {folder} with content")
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


def keep_settings(note: Path, wanted: dict[str, Any], results: Iterable[Path], kind: str) -> None:
    """Note in a folder of results what they depend on, or check that those there depend on the same.

    Args:
        note: A JSON in that folder.
        wanted: What they depend on, as JSON.
        results: Files that are where results will be; without a note they are somebody's.
        kind: What errors call the results.

    Raises:
        FileExistsError: if somebody's files are there.
        ValueError: if the results depend on something else.
    """
    if not note.is_file():
        somebodys = next(iter(results), None)
        # Another process that began at the same time writes its note first.
        if somebodys is not None and not note.is_file():
            raise FileExistsError(f"{somebodys} is not from this command: wanted another folder, or a new one")
        with written_by_several(note) as path:
            path.write_text(json.dumps(wanted, indent=1) + "\n")
    try:
        found = json.loads(note.read_text())
    except ValueError:
        found = None
    if not isinstance(found, dict) or not found.keys() & wanted.keys():
        raise FileExistsError(f"{note} is not from this command: wanted another folder, or a new one")
    for key in {**wanted, **found}:
        if found.get(key) != wanted.get(key):
            other = f"{kind} with {key} {found.get(key)!r}, wanted {wanted.get(key)!r}"
            raise ValueError(f"{note.parent} holds {other}: choose another folder")
