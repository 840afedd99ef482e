"""Boxes, true or a detector's, to instance masks.

Pictures are numbered by their place in the list; Q boxes of one H x W picture.
"""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.sa1b import LabelledPicture
from ..masks_efficientsam import encode_rle
from .ground_truth import TruePicture, is_finite, is_four_numbers, picture_hash, read_or_note
from .predictor import Predictor, Prompts, ask
from .skips import Skips
from .stopwatch import Stopwatch


def read_detections(
    path: str | Path,
    pictures: Sequence[LabelledPicture],
    categories: Sequence[dict],
    skips: Skips,
    beyond: Collection[Any] = (),
) -> list[list[dict[str, Any]]]:
    """A detector's COCO results file -> its boxes by picture, without those that mean nothing.

    Args:
        path: JSON list of `image_id`, `category_id`, `bbox` (x, y, width, height) and `score`.
        pictures: Of the same data set.
        categories: The data set's.
        skips: Takes note of unknown pictures and categories, boxes beside the picture or without area, and scores that
            are no numbers.
        beyond: Ids of pictures that are left out on purpose, whose results are no matter.

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
        raise ValueError(
            f"{path} is no list of image_id, category_id, bbox and score: found {type(error).__name__}: {error}"
        ) from error
    if not found:
        skips.add("an empty results file", str(path))
    entries = {
        picture.entry["id"]: (place, picture.entry)
        for place, picture in enumerate(pictures)
        if isinstance(picture, TruePicture)
    }
    there, kinds = {*entries, *beyond}, {category["id"] for category in categories}
    boxes: list[list[dict[str, Any]]] = [[] for _ in pictures]
    for number, item in enumerate(found):
        fault, place = fault_of(item, there, kinds), None
        if not fault and item["image_id"] in entries:
            place, entry = entries[item["image_id"]]
            fault = fault_of_box(item["bbox"], (entry["height"], entry["width"]))
        if fault:
            skips.add(fault, f"{path}, result {number}, {item}")
        elif place is not None:
            boxes[place].append(item)
    return boxes


def fault_of(item: dict[str, Any], pictures: Collection[Any], kinds: Collection[Any]) -> str | None:
    """What is wrong with a result beside its box; `pictures` and `kinds` are the ids that there are."""
    if not isinstance(item["image_id"], int | str) or item["image_id"] not in pictures:
        return "a result for a picture that is not evaluated"
    if not isinstance(item["category_id"], int | str) or item["category_id"] not in kinds:
        return "a result of an unknown category"
    if not is_finite(item["score"]):
        return "a score that is no finite number"
    return None


def fault_of_box(box: Any, size: tuple[int, int]) -> str | None:
    """What is wrong with x, y, width, height, which are to lie at least partly on a picture of `size` (H, W)."""
    if not is_four_numbers(box) or not np.isfinite(corners_of([box])).all():
        return "a box that is not four finite numbers"
    (x0, y0, x1, y1), (height, width) = corners_of([box])[0], size
    if not (x0 < x1 and y0 < y1):
        return "a box without an area"
    if x0 >= width or y0 >= height or x1 <= 0 or y1 <= 0:
        return "a box beside the picture"
    return None


def corners_of(boxes: Sequence[Sequence[float]]) -> np.ndarray:
    """x, y, width, height of each box -> x0, y0, x1, y1, (Q, 4), in float32, as models are asked."""
    with np.errstate(over="ignore", invalid="ignore"):  # what is too large becomes infinite
        corners = np.array(boxes, dtype=np.float32)
        corners[:, 2:] += corners[:, :2]
    return corners


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
        corners = corners_of([item["bbox"] for item in detections])
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
