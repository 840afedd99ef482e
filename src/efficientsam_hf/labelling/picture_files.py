"""Formats with a file a picture: labelme's JSON, Ultralytics' text, label maps.

A shard that is begun again writes them again, with the same content.
"""

import base64
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from ..visualization import label_map
from ..written_files import written_by_several, written_together
from .outlines import joined, outlines_of
from .writing import Format, LabelledPhoto


class Labelme(Format):
    """labelme's JSON, a polygon for each part of a mask; parts of one mask share their `group_id`."""

    by_stem = True
    patterns, taken = ("**/*.json",), ("labels", "report", "progress/*")

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
        content: dict[str, Any] = {"version": "5.5.0", "flags": {}, "shapes": shapes, **image_fields(photo, path)}
        with written_together([path]) as (part,):
            part.write_text(json.dumps({**content, "imageHeight": height, "imageWidth": width}))


def image_fields(photo: LabelledPhoto, label: Path) -> dict[str, str | None]:
    """Where labelme finds the picture: on the disk, or, if it lies in a tar or a data set, in the JSON itself."""
    blob = photo.picture.blob
    if blob.size < 0 and blob.path.is_file():
        # Behind a link `..` leads elsewhere than the path says.
        place = blob.path.parent.resolve() / blob.path.name
        return {"imagePath": os.path.relpath(place, label.parent.resolve()), "imageData": None}
    return {"imagePath": Path(photo.picture.name).name, "imageData": base64.b64encode(photo.content).decode()}


class Yolo(Format):
    """Ultralytics' labels for segmentation: category's number and polygon, in parts of width and height."""

    by_stem = True
    patterns = ("labels/**/*.txt", "data.yaml")

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
        """data.yaml, for pictures in `images` beside it; a `path` in it would be one from the working directory."""
        names = "".join(f"  {number}: {json.dumps(item['name'])}\n" for number, item in enumerate(categories))
        with written_by_several(folder / "data.yaml") as path:
            path.write_text(f"train: images\nval: images\nnames:\n{names}")
        return [folder / "data.yaml"]


class Png(Format):
    """Label maps: 0 is no object, and a small object lies over a large one."""

    by_stem = True
    patterns = ("masks/**/*.png",)

    def add(self, photo: LabelledPhoto) -> None:
        """Write masks/NAME.png; an object's number is its place among the records, from 1 on."""
        with written_together([photo.beside(self.folder / "masks", ".png")]) as (part,):
            label_map(photo.records, photo.size).save(part, format="PNG")
