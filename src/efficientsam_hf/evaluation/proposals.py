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
        As `coco_ap.segment_detections`, all of one category.
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
    """AR at 10, 100 and 1000 masks a picture, and at 1000 of small, medium and large objects; no categories.

    Args:
        dataset: As `coco_ap.true_dataset` gives it.
        results: `image_id`, `category_id`, `segmentation`, `score`.
    """
    sizes = {"AR_small": "ARs@1000", "AR_medium": "ARm@1000", "AR_large": "ARl@1000"}
    names = {**{f"AR_{count}": f"AR@{count}" for count in MOST}, **sizes}
    if not results:
        return dict.fromkeys(names.values(), 0.0 if dataset["annotations"] else None)
    found = match(dataset, results, "segm", most=MOST, agnostic=True).stats_as_dict
    return {title: None if found[name] < 0 else round(found[name], 6) for name, title in names.items()}


__all__ = ["SAM_LVIS", "average_recall", "propose"]
