"""Boxes, true or a detector's, to instance masks, and masks to COCO's and LVIS's average precision.

faster-coco-eval does the matching. Pictures are numbered by their place in the list; Q boxes of one H x W picture.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.sa1b import LabelledPicture
from ..masks_efficientsam import encode_rle
from .ground_truth import TruePicture, picture_hash, read_or_note, sound_annotations
from .metrics import LARGE, SMALL
from .predictor import Predictor, Prompts, ask
from .skips import Skips
from .stopwatch import Stopwatch

LVIS_DETECTIONS = 300  # of a picture, all categories together
AREAS = {"small": [0, SMALL], "medium": [SMALL, LARGE], "large": [LARGE, 1e10]}
NAMES = {"AP_all": "AP", "AP_50": "AP50", "AP_75": "AP75", "AP_small": "APs", "AP_medium": "APm", "AP_large": "APl"}
FREQUENCIES = ("APr", "APc", "APf")


def true_dataset(
    pictures: Sequence[LabelledPicture], sizes: Sequence[tuple[int, int] | None], categories: Sequence[dict] = ()
) -> dict[str, Any]:
    """What is true of these pictures, in COCO's format, without the annotations that an evaluation leaves out.

    Args:
        pictures: Of any source; numbered by their places.
        sizes: (H, W) of each; None leaves the picture out.
        categories: COCO's or LVIS's; without them all objects are of one.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (picture, size) in enumerate(zip(pictures, sizes, strict=True)):
        if size is None:
            continue
        entry = picture.entry if isinstance(picture, TruePicture) else {}
        images.append({**entry, "id": number, "height": size[0], "width": size[1]})
        for record, rle in sound_annotations(picture, size, Skips()):
            kept = {
                "id": len(annotations) + 1,
                "image_id": number,
                "category_id": record["category_id"] if categories else 1,
                "bbox": record.get("bbox", [0, 0, 0, 0]),
                "area": record["area"],
                "iscrowd": record["iscrowd"],
                "segmentation": as_strings(rle),
            }
            annotations.append(kept)
    named = list(categories) or [{"id": 1, "name": "object"}]
    return {"info": {}, "images": images, "annotations": annotations, "categories": named}


def as_strings(rle: dict[str, Any]) -> dict[str, Any]:
    """Run lengths with compressed counts, as text."""
    from pycocotools import mask as coco_mask

    if isinstance(rle["counts"], list):
        rle = coco_mask.frPyObjects(rle, *rle["size"])
    counts = rle["counts"]
    return {"size": list(rle["size"]), "counts": counts.decode() if isinstance(counts, bytes) else counts}


def average_precision(
    dataset: dict[str, Any], results: Sequence[dict[str, Any]], boundary: bool = False
) -> dict[str, float | None]:
    """AP of masks, in the ways of COCO, or in LVIS's if the pictures say which categories were looked for.

    Args:
        dataset: As `true_dataset` gives it.
        results: `image_id`, `category_id`, `segmentation` (run lengths), `score`.
        boundary: Match by the lesser of mask IoU and boundary IoU (Cheng et al., 2021).

    Returns:
        `AP`, `AP50`, `AP75`, `APs`, `APm`, `APl`, for LVIS `APr`, `APc`, `APf`; None where there is no object.
    """
    lvis = is_lvis(dataset)
    names = [*NAMES.values(), *(FREQUENCIES if lvis else ())]
    if not results:
        return dict.fromkeys(names, 0.0 if dataset["annotations"] else None)
    engine = match(dataset, results, "boundary" if boundary else "segm", lvis_style=lvis)
    found = {NAMES.get(name, name): value for name, value in engine.stats_as_dict.items()}
    return {name: None if found[name] < 0 else round(found[name], 6) for name in names}


def is_lvis(dataset: dict[str, Any]) -> bool:
    """Whether pictures say for which categories annotators looked at them."""
    return any("neg_category_ids" in image for image in dataset["images"])


def match(
    dataset: dict[str, Any],
    results: Sequence[dict[str, Any]],
    kind: str,
    lvis_style: bool = False,
    most: Sequence[int] | None = None,
    agnostic: bool = False,
) -> Any:
    """faster-coco-eval's evaluation, done.

    Args:
        dataset: The truth.
        results: The answers, at least one.
        kind: "segm" or "boundary".
        lvis_style: Count a false answer only where its category was looked for.
        most: Answers of a picture that count, best first.
        agnostic: Whether categories play no part.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    # The engine writes into what it is given.
    truth = COCO(dataset, use_deepcopy=True)
    answers = truth.loadRes([dict(result) for result in (most_trusted(results) if lvis_style else results)])
    engine = COCOeval_faster(truth, answers, kind, ranges=AREAS, lvis_style=lvis_style, print_function=lambda *_: None)
    engine.params.imgIds = sorted(image["id"] for image in dataset["images"])
    if most or lvis_style:
        engine.params.maxDets = list(most or [LVIS_DETECTIONS])
    if agnostic:
        engine.params.useCats = 0
    engine.run()
    return engine


def most_trusted(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """LVIS's 300 best answers of each picture, of whatever category."""
    of_picture: dict[int, list[dict[str, Any]]] = {}
    for result in results:
        of_picture.setdefault(result["image_id"], []).append(result)
    ordered = (sorted(found, key=lambda result: -result["score"]) for found in of_picture.values())
    return [result for found in ordered for result in found[:LVIS_DETECTIONS]]


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


__all__ = ["average_precision", "read_detections", "segment_detections", "true_dataset"]
