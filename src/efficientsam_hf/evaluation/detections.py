"""Boxes, true or a detector's, to instance masks.

Pictures are numbered by their place in the list; Q boxes of one H x W picture.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.sa1b import LabelledPicture
from ..masks_efficientsam import encode_rle
from .ground_truth import TruePicture, picture_hash, read_or_note
from .predictor import Predictor, Prompts, ask
from .skips import Skips
from .stopwatch import Stopwatch


def read_detections(
    path: str | Path, pictures: Sequence[LabelledPicture], categories: Sequence[dict], skips: Skips
) -> list[list[dict[str, Any]]]:
    """A detector's COCO results file -> its boxes by picture, without those that mean nothing.

    Args:
        path: JSON list of `image_id`, `category_id`, `bbox` (x, y, width, height) and `score`.
        pictures: Of the same data set.
        categories: The data set's.
        skips: Takes note of unknown pictures and categories, and of boxes beside the picture or without area.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no such list; in strict mode for what would be skipped.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"nothing at {path}: wanted a detector's results in COCO's format")
    try:
        found = [
            {key: item[key] for key in ("image_id", "category_id", "bbox", "score")}
            for item in json.loads(Path(path).read_bytes())
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no list of image_id, category_id, bbox and score: found {error!r}") from error
    if not found:
        skips.add("an empty results file", str(path))
    entries = {
        picture.entry["id"]: (place, picture.entry)
        for place, picture in enumerate(pictures)
        if isinstance(picture, TruePicture)
    }
    known = {category["id"] for category in categories}
    boxes: list[list[dict[str, Any]]] = [[] for _ in pictures]
    for number, item in enumerate(found):
        name = f"{path}, result {number}"
        if item["image_id"] not in entries:
            skips.add("a result for a picture that is not evaluated", f"{name}, image_id {item['image_id']}")
        elif item["category_id"] not in known:
            skips.add("a result of an unknown category", f"{name}, category_id {item['category_id']}")
        else:
            place, entry = entries[item["image_id"]]
            if is_box(item["bbox"], (entry["height"], entry["width"]), name, skips):
                boxes[place].append(item)
    return boxes


def is_box(box: Any, size: tuple[int, int], name: str, skips: Skips) -> bool:
    """Whether x, y, width, height lie at least partly on a picture of `size` (H, W); a note if not."""
    if (
        not isinstance(box, list)
        or len(box) != 4
        or not all(isinstance(n, int | float) and math.isfinite(n) for n in box)
    ):
        skips.add("a box that is not four finite numbers", f"{name}, {box}")
        return False
    x, y, width, height = box
    if width <= 0 or height <= 0:
        skips.add("a box without an area", f"{name}, {box}")
        return False
    if x >= size[1] or y >= size[0] or x + width <= 0 or y + height <= 0:
        skips.add("a box beside the picture", f"{name}, {box}")
        return False
    return True


def segment_detections(
    predictor: Predictor,
    picture: LabelledPicture,
    detections: Sequence[dict[str, Any]],
    refine: bool = False,
    skips: Skips | None = None,
    watch: Stopwatch | None = None,
) -> dict[str, Any]:
    """The masks of a detector's boxes on one picture, all of them asked for in one call.

    Returns:
        `picture`, `sha256`, `size` (H, W), `skipped`, `seconds`, and `masks`: `category_id`, `score` (the detector's),
        `segmentation`.
    """
    skips, watch = skips or Skips(), watch or Stopwatch()
    with watch("read"):
        photo, digest = read_or_note(picture, skips), picture_hash(picture)
    rows = []
    if photo and detections:
        with watch("encode"):
            embedded = predictor.embed(photo)
        corners = np.array([item["bbox"] for item in detections], dtype=np.float32)
        corners[:, 2:] += corners[:, :2]
        with watch("decode"):
            answer = ask(predictor, embedded, Prompts(boxes=corners), refine)
            masks = predictor.at_size(embedded, answer.best_logits())
        with watch("metrics"):
            for item, mask in zip(detections, masks, strict=True):
                kept = {key: item[key] for key in ("category_id", "score")}
                rows.append({**kept, "segmentation": encode_rle(mask)})
    return {
        "picture": picture.name,
        "sha256": digest,
        "size": photo and [photo.height, photo.width],
        "skipped": skips.record(),
        "seconds": dict(watch.seconds),
        "masks": rows,
    }


__all__ = ["read_detections", "segment_detections"]
