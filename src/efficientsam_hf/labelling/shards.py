"""Shards of pictures in, shards of labels out: resumed after any end, divided among any number of processes.

A shard counts once its note lies in `progress`; the note is written after the labels, so that a shard which was cut
off is done again, over what was left of it. Processes take shards in turn and ask each other nothing.
"""

import hashlib
import io
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import PIL.Image
from torch import Tensor

from ..data.images import Picture
from ..pictures_efficientsam import read_picture
from ..written_files import keep_settings, written_by_several, written_together
from .formats import FORMATS
from .sources import Shard
from .writing import ONE_CATEGORY, Format, LabelledPhoto, PartlyLabelledError

# Picture's name and pixels (3, H, W) -> its records, or None if it is not to be labelled.
Labeller = Callable[[str, Tensor], list[dict[str, Any]] | None]


@dataclass
class Note:
    """What became of a shard: counts, what could not be read or labelled with the reasons, and seconds of work."""

    pictures: int = 0
    masks: int = 0
    left_out: int = 0
    skipped: list[str] = field(default_factory=list)
    seconds: float = 0.0


class LabelFolder:
    """The folder that labels go to.

    Args:
        folder: Without files where the labels are to be, or that of an earlier run over the same shards with the
            same settings.
        format: One of `FORMATS`.
        shards: All of them, the same in every process.
        settings: What the labels depend on beside the pictures, such as the model's name and options; as JSON.
        categories: COCO's, of what the labeller finds.

    Raises:
        FileExistsError: if somebody's files are where the labels are to be.
        ValueError: for an unknown format, for labels of other shards, pictures or settings, and if a picture's labels
            would have the file name of another's, or of the folder's notes.
    """

    def __init__(
        self,
        folder: str | Path,
        format: str,
        shards: Sequence[Shard],
        settings: dict[str, Any],
        categories: list[dict[str, Any]] | None = None,
    ):
        if format not in FORMATS:
            raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
        self.folder = Path(folder)
        self.format: type[Format] = FORMATS[format]
        self.shards = list(shards)
        self.categories = categories or ONE_CATEGORY
        if self.format.by_stem:
            check_stems(self.shards, self.format)
        noted = {"format": format, **settings, "shards": len(shards), "digest_of_pictures": digest_of(self.shards)}
        keep_settings(self.folder / "labels.json", noted, self.format.files_in(self.folder), "labels")
        for shard in self.shards:
            self.check_pictures(shard)

    def note_of(self, shard: Shard) -> Path:
        """The file whose being there says that the shard is done."""
        return self.folder / "progress" / f"{shard.name}.json"

    def check_pictures(self, shard: Shard) -> None:
        """Refuse a shard that is done, but of other pictures."""
        note = self.note_of(shard)
        if note.is_file() and json.loads(note.read_text()).get("digest") != digest_of_content(shard):
            raise ValueError(
                f"{self.folder} has in {shard.name} labels of other pictures (by sizes or place): choose another "
                f"folder, or take {note} away if these pictures are the same ones, mended"
            )

    def label(
        self, label: Labeller, rank: int = 0, processes: int = 1, progress: Callable[[], Any] = lambda: None
    ) -> Iterator[str]:
        """Do this process's part of the shards that are not done; gives the name of each when it is.

        Args:
            label: The work on one picture. A ValueError says why a picture cannot be labelled, a PartlyLabelledError
                what of it cannot.
            rank: Number of this process.
            processes: How many there are.
            progress: Called after each picture.
        """
        for number in range(rank, len(self.shards), processes):
            shard = self.shards[number]
            if self.note_of(shard).is_file():
                continue
            writer = self.format(self.folder, shard.name, number, self.categories)
            note = label_shard(shard, writer, label, progress)
            with written_together([self.note_of(shard)]) as (part,):
                part.write_text(json.dumps({**asdict(note), "digest": digest_of_content(shard)}) + "\n")
            yield shard.name

    def report(self) -> tuple[Note, list[str]]:
        """Sums over the shards that are done, and the names of those that are not."""
        total, missing = Note(), []
        for shard in self.shards:
            if not self.note_of(shard).is_file():
                missing.append(shard.name)
                continue
            note = json.loads(self.note_of(shard).read_text())
            for name in asdict(total):
                setattr(total, name, getattr(total, name) + note[name])
        return total, missing

    def conclude(self) -> list[Path]:
        """Write what there is one of: report.json, and what the format has; gives the format's files.

        Wanted once `report` misses nothing; several processes may do it at one time.
        """
        files = self.format.conclude(self.folder, [shard.name for shard in self.shards], self.categories)
        with written_by_several(self.folder / "report.json") as path:
            path.write_text(json.dumps(asdict(self.report()[0]), indent=1) + "\n")
        return files


def label_shard(shard: Shard, writer: Format, label: Labeller, progress: Callable[[], Any]) -> Note:
    """Label the pictures of a shard one by one."""
    note, start, stems = Note(), time.monotonic(), set()
    for picture in shard.pictures(note.skipped.append):
        try:
            stem = writer.stem_of(picture)
            if writer.by_stem and stem in stems:
                raise ValueError(f"{picture.name}: its labels would have the file name of another picture's")
            content, pixels = read_upright(picture)
            records = records_of(picture, pixels, label, note.skipped.append)
        except ValueError as error:
            note.skipped.append(" ".join(str(error).split()))
        else:
            stems.add(stem)
            if records is None:
                note.left_out += 1
            else:
                writer.add(LabelledPhoto(picture, content, pixels, records))
                note.pictures += 1
                note.masks += len(records)
        progress()
    writer.finish()
    note.seconds = round(time.monotonic() - start, 3)
    return note


def records_of(
    picture: Picture, pixels: Tensor, label: Labeller, report: Callable[[str], Any]
) -> list[dict[str, Any]] | None:
    """What the labeller finds; what it cannot label is said with the picture's name."""
    try:
        return label(picture.name, pixels)
    except PartlyLabelledError as error:
        report(f"{picture.name}: {error}")
        return error.records
    except ValueError as error:
        raise ValueError(f"{picture.name}: {error}") from error


def read_upright(picture: Picture) -> tuple[bytes, Tensor]:
    """The bytes of a picture's file, and its pixels (3, H, W), turned as its EXIF data says.

    Raises:
        ValueError: naming it, if it cannot be read.
    """
    try:
        content = picture.blob.read()
        image = PIL.Image.open(io.BytesIO(content))
    except PIL.UnidentifiedImageError as error:  # whose own words are about the object in memory
        raise ValueError(f"{picture.name}: cannot be read as a picture: no format that Pillow knows") from error
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(f"{picture.name}: cannot be read as a picture: {error}") from error
    return content, read_picture(image, picture.name)


def check_stems(shards: Sequence[Shard], format: type[Format]) -> None:
    """Refuse a.jpg beside a.png, and names that are taken, where that can be known without reading."""
    seen: dict[str, str] = {}
    for shard in shards:
        for picture in known_pictures(shard):
            stem = format.stem_of(picture)
            if stem in seen:
                raise ValueError(f"labels of {seen[stem]} and {picture.name} would have one file name")
            seen[stem] = picture.name


def known_pictures(shard: Shard) -> Iterator[Picture]:
    """The pictures of a shard, if they are known without reading."""
    return shard.pictures(lambda text: None) if shard.count is not None else iter(())


def digest_of(shards: Sequence[Shard]) -> str:
    """A fingerprint of the shards' names, and of their pictures' where those are known without reading."""
    return fingerprint(
        name for shard in shards for name in (shard.name, *(item.name for item in known_pictures(shard)))
    )


def digest_of_content(shard: Shard) -> str:
    """A fingerprint of where a shard comes from and of its pictures' sizes, which other ones of its name differ in."""
    return fingerprint([shard.origin, *(f"{item.name} {item.blob.count()}" for item in known_pictures(shard))])


def fingerprint(lines: Iterable[str]) -> str:
    """Of some text, in 16 letters."""
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode(errors="surrogateescape")).hexdigest()[:16]
