"""The files that labels come in. Each format writes one shard at a time; what it writes is whole or not there.

coco      parts/SHARD.jsonl, and at the end coco.json    run lengths
sa1b      SHARD.tar of pictures and JSON                 run lengths
labelme   NAME.json                                      polygons
yolo      labels/NAME.txt, and at the end data.yaml      polygons
png       masks/NAME.png                                 label maps of 16 bits
parquet   SHARD.parquet                                  run lengths, a row a picture
"""

import base64
import io
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import PIL.Image
from torch import Tensor

from ..data.images import Picture
from ..visualization import label_map
from ..written_files import written_by_several, written_together
from .outlines import joined, outlines_of

ONE_CATEGORY = [{"id": 1, "name": "object"}]
ORIENTATION = 274  # the EXIF tag


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

    def __post_init__(self) -> None:
        """Open what the shard is written to."""

    def add(self, photo: LabelledPhoto) -> None:
        """Write a picture's labels."""
        raise NotImplementedError(f"{type(self).__name__} writes nothing")

    def finish(self) -> None:
        """Make the shard visible."""

    @classmethod
    def conclude(cls, folder: Path, shards: list[str], categories: list[dict[str, Any]]) -> list[Path]:
        """Write what there is one of, once all shards are there; gives its files."""
        return []


class WholeShards(Format):
    """Formats with one file a shard, which takes its name when it is complete."""

    place = "."
    suffix = ""

    def __post_init__(self) -> None:
        self.path = self.folder / self.place / f"{self.shard}{self.suffix}"
        self.part = self.path.with_name(f".{self.path.name}.part")
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def finish(self) -> None:
        """Rename what was written beside."""
        self.part.replace(self.path)


class Coco(WholeShards):
    """A line of JSON a picture; at the end COCO's dataset of all."""

    place, suffix = "parts", ".jsonl"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.part.write_text("")

    def add(self, photo: LabelledPhoto) -> None:
        """Append a line."""
        width, height = photo.size
        image = {"file_name": photo.picture.name, "width": width, "height": height}
        with self.part.open("a") as file:
            file.write(json.dumps({"image": image, "annotations": photo.records}) + "\n")

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
        row = {"file_name": photo.picture.name, "width": width, "height": height, "annotations": photo.records}
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


# --------------------------------------------------------------------------------------------------------------------
# A file a picture: written again with the same content where a shard is begun again


class Labelme(Format):
    """labelme's JSON, a polygon for each part of a mask; parts of one mask share their `group_id`."""

    by_stem = True

    def add(self, photo: LabelledPhoto) -> None:
        """Write NAME.json."""
        (width, height), path = photo.size, photo.beside(self.folder, ".json")
        names = {category["id"]: category["name"] for category in self.categories}
        blank = {"shape_type": "polygon", "flags": {}}
        shapes = [
            {"label": names[record.get("category_id", 1)], "points": outline.tolist(), "group_id": number, **blank}
            for number, record in enumerate(photo.records)
            for outline in outlines_of(record["segmentation"])
        ]
        content = {"version": "5.5.0", "flags": {}, "shapes": shapes, **image_fields(photo, path)}
        with written_together([path]) as (part,):
            part.write_text(json.dumps({**content, "imageHeight": height, "imageWidth": width}))


def image_fields(photo: LabelledPhoto, label: Path) -> dict[str, str | None]:
    """Where labelme finds the picture: on the disk, or, if it lies in a tar or a data set, in the JSON itself."""
    blob = photo.picture.blob
    if blob.size < 0 and blob.path.is_file():
        return {"imagePath": os.path.relpath(blob.path, label.parent), "imageData": None}
    return {"imagePath": Path(photo.picture.name).name, "imageData": base64.b64encode(photo.content).decode()}


class Yolo(Format):
    """Ultralytics' labels for segmentation: category's number and polygon, in parts of width and height."""

    by_stem = True

    def add(self, photo: LabelledPhoto) -> None:
        """Write labels/NAME.txt, a line a mask."""
        numbers = {category["id"]: number for number, category in enumerate(self.categories)}
        lines = []
        for record in photo.records:
            outlines = outlines_of(record["segmentation"])
            if outlines:
                places = np.clip((joined(outlines) + 0.5) / photo.size, 0, 1)
                numbers_text = " ".join(f"{value:.6f}" for value in places.ravel())
                lines.append(f"{numbers[record.get('category_id', 1)]} {numbers_text}\n")
        with written_together([photo.beside(self.folder / "labels", ".txt")]) as (part,):
            part.write_text("".join(lines))

    @classmethod
    def conclude(cls, folder: Path, shards: list[str], categories: list[dict[str, Any]]) -> list[Path]:
        """data.yaml, for pictures that are put into `images`."""
        names = "".join(f"  {number}: {json.dumps(item['name'])}\n" for number, item in enumerate(categories))
        with written_by_several(folder / "data.yaml") as path:
            path.write_text(f"path: .\ntrain: images\nval: images\nnames:\n{names}")
        return [folder / "data.yaml"]


class Png(Format):
    """Label maps: 0 is no object, and a small object lies over a large one."""

    by_stem = True

    def add(self, photo: LabelledPhoto) -> None:
        """Write masks/NAME.png; an object's number is its place among the records, from 1 on."""
        with written_together([photo.beside(self.folder / "masks", ".png")]) as (part,):
            label_map(photo.records, photo.size).save(part, format="PNG")


FORMATS: dict[str, type[Format]] = {
    "coco": Coco,
    "sa1b": Sa1b,
    "labelme": Labelme,
    "yolo": Yolo,
    "png": Png,
    "parquet": Parquet,
}
