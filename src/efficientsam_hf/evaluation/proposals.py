"""Segment everything scored by what it finds: average recall of the best 10, 100 and 1000 masks of a picture."""

from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from ..data.sa1b import LabelledPicture
from .coco_ap import match
from .ground_truth import picture_hash, read_or_note
from .skips import Skips
from .stopwatch import Stopwatch

MOST = (10, 100, 1000)
SIZES = ("AR", "ARs", "ARm", "ARl")  # as the engine has its areas: all, small, medium, large
FREQUENCIES = ("r", "c", "f")
#: Kirillov et al., 2023, D.3: about 900 masks a picture, of which the order decides.
SAM_LVIS: dict[str, Any] = {
    "points_per_side": 64,
    "pred_iou_thresh": 0.0,
    "stability_score_thresh": 0.0,
    "box_nms_thresh": 0.9,
    "crop_n_layers": 0,
}


def propose(
    find: Callable[[Image.Image], list[dict[str, Any]]],
    picture: LabelledPicture,
    skips: Skips | None = None,
    watch: Stopwatch | None = None,
) -> dict[str, Any]:
    """The best 1000 masks of a picture, in the order of the mean of predicted IoU and stability (as SAM's, D.3).

    Args:
        find: Photo -> records as `segment_everything` gives them.
        picture: Of any source.
        skips: Takes note of a picture that cannot be read.
        watch: Takes the time.

    Returns:
        As `detections.segment_detections`, all of one category.
    """
    skips, watch = skips or Skips(), watch or Stopwatch()
    with watch("read"):
        photo, digest = read_or_note(picture, skips), picture_hash(picture)
    with watch("everything"):
        records = find(photo) if photo else []
    rows = [
        {
            "category_id": 1,
            "score": (record["predicted_iou"] + record["stability_score"]) / 2,
            "segmentation": record["segmentation"],
        }
        for record in records
    ]
    return {
        "picture": picture.name,
        "sha256": digest,
        "size": photo and [photo.height, photo.width],
        "skipped": skips.record(),
        "seconds": dict(watch.seconds),
        "masks": sorted(rows, key=lambda row: -row["score"])[: max(MOST)],
    }


def average_recall(dataset: dict[str, Any], results: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """AR of the best 10, 100 and 1000 masks of a picture, whatever their categories.

    Args:
        dataset: As `coco_ap.true_dataset` gives it.
        results: `image_id`, `segmentation` and `score`.

    Returns:
        For each number, as 1000: `AR@1000`, `ARs@1000`, `ARm@1000` and `ARl@1000` of small, medium and large objects,
        and where categories have a frequency, as LVIS's do, `ARr@1000`, `ARc@1000` and `ARf@1000`, of rare, common and
        frequent ones, measured against the objects of these alone (Kirillov et al., 2023, D.3). None where there is no
        object.
    """
    found = recall_of(dataset["annotations"], dataset, results, SIZES)
    groups = {category["id"]: category["frequency"] for category in dataset["categories"] if "frequency" in category}
    for group in FREQUENCIES if groups else ():
        some = [item for item in dataset["annotations"] if groups.get(item["category_id"]) == group]
        found |= recall_of(some, dataset, results, (f"AR{group}",))
    return {f"{name}@{most}": found[name, most] for most in MOST for name in dict.fromkeys(name for name, _ in found)}


def recall_of(
    annotations: Sequence[dict[str, Any]],
    dataset: dict[str, Any],
    results: Sequence[dict[str, Any]],
    names: Sequence[str],
) -> dict[tuple[str, int], float | None]:
    """The recall of these annotations, all of one category, by the engine's areas (called `names`) and by `MOST`."""
    if not annotations:
        return {(name, most): None for name in names for most in MOST}
    truth = {
        "info": {},
        "images": dataset["images"],
        "annotations": [{**item, "category_id": 1} for item in annotations],
        "categories": [{"id": 1, "name": "object"}],
    }
    engine = match(truth, [{**result, "category_id": 1} for result in results], "segm", most=MOST)
    means = {}
    for area, name in enumerate(names):
        for place, most in enumerate(MOST):
            recall = engine.eval["recall"][:, 0, area, place]  # by IoU; -1 where there is no object
            means[name, most] = None if recall.max() < 0 else round(float(recall.mean()), 6)
    return means


__all__ = ["SAM_LVIS", "average_recall", "propose"]
