"""COCO's average precision of instances, by faster-coco-eval."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..masks_efficientsam import encode_rle, masks_to_boxes

# In the order of COCO's summary.
FIGURES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")


def instance_ap(
    truth: str | Path | dict[str, Any], rows: Sequence[dict[str, Any]], pictures: Sequence[int], kind: str = "segm"
) -> dict[str, float]:
    """Average precision of masks ("segm") or boxes ("bbox"); -1 where there is no true instance of a size.

    Args:
        truth: COCO's JSON, or what it holds.
        rows: Results: `image_id`, `category_id`, `score` and `segmentation`, whose boxes are compared if there is no
            `bbox`.
        pictures: Ids of those that were looked at.
        kind: What is compared.

    Raises:
        ImportError: if faster-coco-eval is not installed.
        ValueError: if a row is of a picture or a category that the truth does not have.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    known = COCO(str(truth) if isinstance(truth, Path) else truth)
    for key, there in (("image_id", set(known.getImgIds())), ("category_id", set(known.getCatIds()))):
        wrong = next((row[key] for row in rows if row[key] not in there), None)
        if wrong is not None:
            raise ValueError(f"a result has {key} {wrong}: wanted one of the {len(there)} in the annotations")
    if not rows:
        return dict.fromkeys(FIGURES, 0.0)
    evaluation = COCOeval_faster(
        known, known.loadRes([dict(row) for row in rows]), iouType=kind, print_function=lambda *_: None
    )
    evaluation.params.imgIds = list(pictures)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return {name: float(value) for name, value in zip(FIGURES, evaluation.stats, strict=False)}


def truth_of(items: Sequence, names: Sequence[str]) -> dict[str, Any]:
    """The annotations of pictures, as `data.instances` gives them, in COCO's format; classes are numbered from 0."""
    images: list[dict] = []
    annotations: list[dict] = []
    for picture in items:
        height, width = picture.masks.shape[1:]
        images.append({"id": picture.number, "height": height, "width": width})
        for mask, label in zip(picture.masks, picture.labels.tolist(), strict=True):
            x0, y0, x1, y1 = masks_to_boxes(mask).tolist()
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": picture.number,
                    "category_id": label,
                    "segmentation": encode_rle(mask),
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": number, "name": name} for number, name in enumerate(names)]
    return {"images": images, "annotations": annotations, "categories": categories}
