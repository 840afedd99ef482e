"""Formats with one file a shard: COCO's JSON, SA-1B's tars, parquet. All keep run lengths."""

import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import PIL.Image
from torch import Tensor

from ..written_files import written_by_several
from .writing import LabelledPhoto, WholeShards

ORIENTATION = 274  # the EXIF tag


class Coco(WholeShards):
    """A line of JSON a picture; at the end COCO's dataset of all."""

    place, suffix = "parts", ".jsonl"
    patterns = ("coco.json", "parts/*.jsonl")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.file = self.part.open("w")

    def add(self, photo: LabelledPhoto) -> None:
        """Append a line."""
        width, height = photo.size
        image = {"file_name": photo.picture.name, "width": width, "height": height}
        self.file.write(json.dumps({"image": image, "annotations": photo.records}) + "\n")

    def finish(self) -> None:
        """End the file, then rename it."""
        self.file.close()
        super().finish()

    @classmethod
    def conclude(cls, folder: Path, shards: list[str], categories: list[dict[str, Any]]) -> list[Path]:
        """One dataset, read and written a picture at a time."""
        with written_by_several(folder / "coco.json") as path, path.open("w") as file:
            for text in coco_text(lambda: (json.loads(line) for line in lines_of(folder, shards)), categories):
                file.write(text)
        return [folder / "coco.json"]


def lines_of(folder: Path, shards: list[str]) -> Iterator[str]:
    """The lines of all parts."""
    for shard in shards:
        with (folder / Coco.place / f"{shard}{Coco.suffix}").open() as file:
            yield from file


def coco_text(rows: Any, categories: list[dict[str, Any]]) -> Iterator[str]:
    """COCO's dataset in pieces of text; `rows()` gives image and annotations of each picture, twice the same."""
    yield '{"images": ['
    for number, row in enumerate(rows(), start=1):
        yield (", " if number > 1 else "") + json.dumps({"id": number, **row["image"]})
    yield '],\n"annotations": ['
    count = 0
    for number, row in enumerate(rows(), start=1):
        for record in row["annotations"]:
            count += 1
            ids = {"id": count, "image_id": number, "iscrowd": 0}
            yield (",\n" if count > 1 else "\n") + json.dumps({"category_id": 1, **record, **ids})
    yield f'],\n"categories": {json.dumps(categories)}}}\n'


class Sa1b(WholeShards):
    """Tars of pictures and JSON in the layout of SA-1B, for `--sources` of fine-tuning."""

    suffix = ".tar"
    by_stem = True
    patterns = ("*.tar",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.archive = tarfile.open(self.part, "w")  # noqa: SIM115 - closed in `finish`
        self.count = 0

    def add(self, photo: LabelledPhoto) -> None:
        """A JPEG and a JSON."""
        name, (width, height) = PurePosixPath(photo.picture.name), photo.size
        image_id = self.number * 1_000_000 + self.count
        file_name = str(name.with_suffix(".jpg"))
        image = {"image_id": image_id, "width": width, "height": height, "file_name": file_name}
        content = {"image": image, "annotations": [{**r, "id": n} for n, r in enumerate(photo.records)]}
        self.write(file_name, stored_jpeg(photo))
        self.write(str(name.with_suffix(".json")), json.dumps(content).encode())
        self.count += 1

    def write(self, name: str, content: bytes) -> None:
        """A member, the same bytes at every time and by every user."""
        member = tarfile.TarInfo(name)
        member.size = len(content)
        self.archive.addfile(member, io.BytesIO(content))

    def finish(self) -> None:
        """End the tar, then rename it."""
        self.archive.close()
        super().finish()


def stored_jpeg(photo: LabelledPhoto) -> bytes:
    """The picture's own bytes if they are an upright JPEG; otherwise it is written anew, since SA-1B has no other."""
    with PIL.Image.open(io.BytesIO(photo.content)) as image:
        if image.format == "JPEG" and image.getexif().get(ORIENTATION, 1) == 1:
            return photo.content
    written = io.BytesIO()
    as_picture(photo.pixels).save(written, "JPEG", quality=95)
    return written.getvalue()


def as_picture(pixels: Tensor) -> PIL.Image.Image:
    """Pixels (3, H, W), uint8, or floats in 0 to 1."""
    pixels = (pixels * 255).round().byte() if pixels.is_floating_point() else pixels
    return PIL.Image.fromarray(pixels.permute(1, 2, 0).numpy())


class Parquet(WholeShards):
    """A row a picture, with its name, size and annotations."""

    suffix = ".parquet"
    patterns = ("*.parquet",)

    def __post_init__(self) -> None:
        super().__post_init__()
        import pyarrow as pa
        from pyarrow import parquet

        rle = pa.struct([("size", pa.list_(pa.int32())), ("counts", pa.string())])
        lists = {name: pa.list_(pa.float64()) for name in ("bbox", "crop_box")}
        numbers = {name: pa.int64() for name in ("area", "category_id", "box_id")}
        scores = {name: pa.float64() for name in ("predicted_iou", "stability_score")}
        clicks = {"point_coords": pa.list_(pa.list_(pa.float64()))}
        annotation = pa.struct([("segmentation", rle), *{**lists, **numbers, **scores, **clicks}.items()])
        sides = [("width", pa.int32()), ("height", pa.int32())]
        self.schema = pa.schema([("file_name", pa.string()), *sides, ("annotations", pa.list_(annotation))])
        self.to_table = pa.Table.from_pylist
        self.writer = parquet.ParquetWriter(self.part, self.schema)
        self.rows: list[dict[str, Any]] = []

    def add(self, photo: LabelledPhoto) -> None:
        """Keep a row, and write a hundred at a time."""
        width, height = photo.size
        # Its text is UTF-8, which a file's name need not be.
        name = os.fsencode(photo.picture.name).decode(errors="backslashreplace")
        row = {"file_name": name, "width": width, "height": height, "annotations": photo.records}
        self.rows.append(row)
        if len(self.rows) == 100:
            self.flush()

    def flush(self) -> None:
        """Write the rows that were kept."""
        self.writer.write_table(self.to_table(self.rows, schema=self.schema))
        self.rows.clear()

    def finish(self) -> None:
        """Write the rest and the footer, then rename."""
        self.flush()
        self.writer.close()
        super().finish()
