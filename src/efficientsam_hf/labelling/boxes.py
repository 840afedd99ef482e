"""Boxes that somebody drew, or a detector found, in COCO's JSON: a mask for each."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from ..modeling_efficientsam import EfficientSamModel
from ..prediction import segment
from ..processing_efficientsam import EfficientSamProcessor

# Of a picture of 12 megapixels the masks of so many boxes take a third of a gigabyte.
BOXES_AT_ONCE = 8


class BoxPrompts:
    """The boxes of a JSON by picture.

    Args:
        path: COCO's JSON: `images` with `id` and `file_name`; `annotations` with `image_id`, `bbox` (x, y, width,
            height) and, if they have one, `category_id`; `categories`, which may be missing.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no such JSON.
    """

    def __init__(self, path: str | Path):
        if not Path(path).is_file():
            raise FileNotFoundError(f"nothing at {path}: wanted COCO's JSON with boxes")
        try:
            content = json.loads(Path(path).read_bytes())
            names = {image["id"]: str(image["file_name"]) for image in content["images"]}
            self.boxes: dict[str, list[dict[str, Any]]] = {name: [] for name in names.values()}
            for annotation in content["annotations"]:
                x, y, width, height = annotation["bbox"]
                corners = [x, y, x + width, y + height]
                record = {"box_id": annotation.get("id"), "category_id": annotation.get("category_id", 1)}
                self.boxes[names[annotation["image_id"]]].append({**record, "corners": corners})
            self.categories: list[dict[str, Any]] = content.get("categories") or [{"id": 1, "name": "object"}]
            unknown = {box["category_id"] for found in self.boxes.values() for box in found}
            unknown -= {category["id"] for category in self.categories}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no COCO JSON with boxes: found {error!r}") from error
        if unknown:
            raise ValueError(f"{path} has boxes of category {sorted(unknown)[0]}, which its categories do not name")
        short: dict[str, list[str]] = {}
        for name in self.boxes:
            short.setdefault(Path(name).name, []).append(name)
        self.short = {name: found[0] for name, found in short.items() if len(found) == 1}

    def of(self, picture: str) -> list[dict[str, Any]] | None:
        """The boxes of the picture of this path, or failing that, of this file name; None if the JSON has neither."""
        name = picture if picture in self.boxes else self.short.get(Path(picture).name)
        return None if name is None else self.boxes[name]


def segment_boxes(
    model: EfficientSamModel, processor: EfficientSamProcessor, image: Any, boxes: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The best mask of each box of a picture, as records with `category_id` and `box_id`.

    Raises:
        ValueError: for a box that is none, or that lies outside the picture.
    """
    records: list[dict[str, Any]] = []
    embeddings: Tensor | None = None
    for start in range(0, len(boxes), BOXES_AT_ONCE):
        asked = boxes[start : start + BOXES_AT_ONCE]
        corners = [box["corners"] for box in asked]
        answer = segment(model, processor, image, boxes=corners, image_embeddings=embeddings)
        embeddings = answer.image_embeddings
        for box, record in zip(asked, answer.records(), strict=True):
            records.append({**record, "id": len(records), "category_id": box["category_id"], "box_id": box["box_id"]})
    return records
