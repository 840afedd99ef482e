"""Boxes that somebody drew, or a detector found, in COCO's JSON: a mask for each."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..modeling_efficientsam import EfficientSamModel
from ..pictures_efficientsam import read_picture
from ..prediction import segment
from ..processing_efficientsam import EfficientSamProcessor
from ..prompts_efficientsam import clip_box
from .sources import Shard
from .writing import PartlyLabelledError

# Of a picture of 12 megapixels the masks of so many boxes take a third of a gigabyte.
BOXES_AT_ONCE = 8


class Paths:
    """Paths, found by others that have more or fewer folders before them."""

    def __init__(self, paths: Iterable[str]):
        self.all = set(paths)
        self.by_tail: dict[str, list[str]] = {}
        for path in self.all:
            for tail in tails_of(path):
                self.by_tail.setdefault(tail, []).append(path)

    def like(self, path: str) -> set[str]:
        """Those that end with this path, and those that it ends with."""
        return {*self.by_tail.get(path, ()), *(tail for tail in tails_of(path) if tail in self.all)}


def tails_of(path: str) -> list[str]:
    """a/b/c.jpg -> itself, b/c.jpg, c.jpg."""
    parts = path.split("/")
    return ["/".join(parts[start:]) for start in range(len(parts))]


class BoxPrompts:
    """The boxes of a JSON by picture.

    Args:
        path: COCO's JSON: `images` with `id` and `file_name`; `annotations` with `image_id`, `bbox` (x, y, width,
            height) and, if they have one, `category_id`; `categories`, which may
            be missing: then they are called by their numbers.
        shards: Of the pictures that are to be labelled.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no such JSON.
    """

    def __init__(self, path: str | Path, shards: Sequence[Shard]):
        if not Path(path).is_file():
            raise FileNotFoundError(f"nothing at {path}: wanted COCO's JSON with boxes")
        try:
            content = json.loads(Path(path).read_bytes())
            names = {image["id"]: str(image["file_name"]) for image in content["images"]}
            self.boxes: dict[str, list[dict[str, Any]]] = {name: [] for name in names.values()}
            for annotation in content["annotations"]:
                if annotation["image_id"] not in names:
                    found = f"annotation {annotation.get('id')} is of picture {annotation['image_id']!r}"
                    raise ValueError(f"{found}, which its images do not have")
                x, y, width, height = map(float, annotation["bbox"])
                corners = [x, y, x + width, y + height]
                record = {"box_id": annotation.get("id"), "category_id": annotation.get("category_id", 1)}
                self.boxes[names[annotation["image_id"]]].append({**record, "corners": corners})
            # Where they have no names, their numbers are all there is.
            numbers = sorted({box["category_id"] for found in self.boxes.values() for box in found} or {1}, key=str)
            unnamed = [{"id": number, "name": "object" if numbers == [1] else str(number)} for number in numbers]
            self.categories: list[dict[str, Any]] = content.get("categories") or unnamed
            # Formats write the names, so that each must be there.
            known = {category["id"]: category["name"] for category in self.categories}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no COCO JSON with boxes: found {type(error).__name__}: {error}") from error
        for box in (box for found in self.boxes.values() for box in found):
            if not isinstance(box["box_id"], int | None) or not isinstance(box["category_id"], int):
                ids = f"id {box['box_id']!r} and category_id {box['category_id']!r}"
                raise ValueError(f"{path} has a box with {ids}, wanted whole numbers")
            if box["category_id"] not in known:
                raise ValueError(
                    f"{path} has boxes of category {box['category_id']}, which its categories do not name"
                )
        self.names = Paths(self.boxes)
        self.shards = len(shards)
        self.pictures: Paths | None = None  # of a stream nobody knows them before
        if all(shard.count is not None for shard in shards):
            self.pictures = Paths(picture.name for shard in shards for picture in shard.pictures(lambda text: None))

    def of(self, picture: str) -> list[dict[str, Any]] | None:
        """The boxes of a picture; None if the JSON does not name it.

        The JSON may give a name with more or fewer folders before it, as long as it fits one picture alone, and of a
        single tar the names in it.

        Raises:
            ValueError: if the JSON's name may be another picture's.
        """
        if picture in self.boxes:
            return self.boxes[picture]
        if self.pictures is None:
            names = {picture.partition("/")[2]} & self.names.all
            alone = self.shards == 1
        else:
            names = self.names.like(picture) - self.pictures.all
            alone = len(names) == 1 and len(self.pictures.like(min(names))) == 1
        if names and not alone:
            raise ValueError(f"the JSON's {min(names)} may be another picture's, wanted {picture}")
        return self.boxes[names.pop()] if names else None


def segment_boxes(
    model: EfficientSamModel, processor: EfficientSamProcessor, image: Any, boxes: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The best mask of each box of a picture, as records with `category_id` and `box_id`.

    Raises:
        PartlyLabelledError: naming each box that is none or lies outside the picture, with the others' records.
    """
    pixels = read_picture(image)
    faults = [fault_of(box, *pixels.shape[-2:]) for box in boxes]
    good = [box for box, fault in zip(boxes, faults, strict=True) if not fault]
    records: list[dict[str, Any]] = []
    embeddings: Tensor | None = None
    for start in range(0, len(good), BOXES_AT_ONCE):
        asked = good[start : start + BOXES_AT_ONCE]
        corners = [box["corners"] for box in asked]
        answer = segment(model, processor, pixels, boxes=corners, image_embeddings=embeddings)
        embeddings = answer.image_embeddings
        for box, record in zip(asked, answer.records(), strict=True):
            records.append({**record, "id": len(records), "category_id": box["category_id"], "box_id": box["box_id"]})
    if len(good) < len(boxes):
        raise PartlyLabelledError("; ".join(filter(None, faults)), records)
    return records


def fault_of(box: dict[str, Any], height: int, width: int) -> str:
    """What is wrong with a box of a picture; nothing of a good one."""
    try:
        clip_box(f"box {box['box_id']}", box["corners"], height, width)
    except ValueError as error:
        return str(error)
    return ""
