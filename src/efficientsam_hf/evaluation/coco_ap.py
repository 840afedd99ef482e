"""Masks and boxes of instances to COCO's and LVIS's average precision, for evaluations and while detectors train.

faster-coco-eval does the matching.
"""

import logging
from collections.abc import Sequence
from typing import Any

from ..data.coco import run_lengths
from ..data.instances import InstancePicture
from ..data.sa1b import LabelledPicture
from ..masks_efficientsam import encode_rle, masks_to_boxes
from .ground_truth import TruePicture, sound_annotations
from .metrics import LARGE, SMALL
from .skips import Skips

logger = logging.getLogger(__name__)
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
                "bbox": record.get("bbox") or [0, 0, 0, 0],
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


def truth_of(pictures: Sequence[InstancePicture], names: Sequence[str]) -> dict[str, Any]:
    """What is true of pictures as `data.instances` gives them, in COCO's format; classes are numbered from 0."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for picture in pictures:
        height, width = picture.masks.shape[1:]
        images.append({"id": picture.number, "height": height, "width": width})
        for mask, label in zip(picture.masks, picture.labels.tolist(), strict=True):
            x0, y0, x1, y1 = masks_to_boxes(mask).tolist()
            kept = {
                "id": len(annotations) + 1,
                "image_id": picture.number,
                "category_id": label,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": int(mask.sum()),
                "iscrowd": 0,
                "segmentation": encode_rle(mask),
            }
            annotations.append(kept)
    named = [{"id": number, "name": name} for number, name in enumerate(names)]
    return {"info": {}, "images": images, "annotations": annotations, "categories": named}


def average_precision(
    dataset: dict[str, Any], results: Sequence[dict[str, Any]], kind: str = "segm"
) -> dict[str, float | None]:
    """AP in the ways of COCO, or in LVIS's if the pictures say which categories were looked for.

    Args:
        dataset: COCO's or LVIS's, as its JSON has it or as `true_dataset` and `truth_of` give it.
        results: `image_id`, `category_id`, `score` and `segmentation` (run lengths), whose box is compared where there
            is no `bbox`.
        kind: What is compared: "segm", masks; "boundary", the lesser of mask IoU and boundary IoU (Cheng et al.,
            2021); "bbox", boxes.

    Returns:
        `AP`, `AP50`, `AP75`, `APs`, `APm`, `APl`, for LVIS `APr`, `APc`, `APf`; None where there is no object.

    Raises:
        ValueError: if a result is of a picture or a category that the data set does not have.
    """
    check_results(dataset, results)
    dataset = comparable(dataset, kind)
    lvis = is_lvis(dataset)
    names = [*NAMES.values(), *(FREQUENCIES if lvis else ())]
    if not dataset["annotations"]:
        return dict.fromkeys(names)
    engine = match(dataset, results, kind, lvis_style=lvis)
    found = {NAMES.get(name, name): value for name, value in engine.stats_as_dict.items()}
    return {name: None if found[name] < 0 else round(found[name], 6) for name in names}


def comparable(dataset: dict[str, Any], kind: str) -> dict[str, Any]:
    """The data set without annotations that lack what is compared, counted in the log; boxes are made of shapes."""
    sizes = {image["id"]: (image["height"], image["width"]) for image in dataset["images"]}
    whole = []
    for annotation in dataset["annotations"]:
        shape = annotation.get("segmentation")
        if not annotation.get("bbox") and shape and annotation["image_id"] in sizes:
            annotation = {**annotation, "bbox": box_of(shape, sizes[annotation["image_id"]])}
        if annotation.get("bbox") and (shape or kind == "bbox"):
            whole.append(annotation)
    lacking = len(dataset["annotations"]) - len(whole)
    if lacking:
        logger.warning("%d annotations have no %s and are not compared", lacking, "box" if kind == "bbox" else "shape")
    return {**dataset, "annotations": whole}


def box_of(segmentation: Any, size: tuple[int, int]) -> list[float] | None:
    """x, y, width, height around a shape in a picture of `size` (H, W); None of nothing."""
    from pycocotools import mask as coco_mask

    try:
        rle = run_lengths(segmentation, size)
    except ValueError:
        return None
    return coco_mask.toBbox(as_strings(rle)).tolist() if rle else None


def check_results(dataset: dict[str, Any], results: Sequence[dict[str, Any]]) -> None:
    """Refuse results of nowhere, of which the engine would make something."""
    for key, entries in (("image_id", dataset["images"]), ("category_id", dataset["categories"])):
        known = {entry["id"] for entry in entries}
        wrong = next((result[key] for result in results if result[key] not in known), None)
        if wrong is not None:
            raise ValueError(f"a result has {key} {wrong}: wanted one of the {len(known)} in the annotations")


def is_lvis(dataset: dict[str, Any]) -> bool:
    """Whether pictures say for which categories annotators looked at them."""
    return any("neg_category_ids" in image for image in dataset["images"])


def match(
    dataset: dict[str, Any],
    results: Sequence[dict[str, Any]],
    kind: str,
    lvis_style: bool = False,
    most: Sequence[int] | None = None,
) -> Any:
    """faster-coco-eval's evaluation, done.

    Args:
        dataset: The truth, with at least one annotation.
        results: The answers.
        kind: "segm", "boundary" or "bbox".
        lvis_style: Count a false answer only where its category was looked for.
        most: Answers of a picture that count, best first.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    # The engine writes into what it is given, and refuses to compare nothing.
    truth = COCO(dataset, use_deepcopy=True)
    counted = [dict(result) for result in (looked_for(dataset, most_trusted(results)) if lvis_style else results)]
    if kind != "bbox":  # masks count by their own areas, and not by those of a detector's boxes
        counted = [{key: value for key, value in result.items() if key != "bbox"} for result in counted]
    answers = truth.loadRes(counted or [nothing_in(dataset)])
    engine = COCOeval_faster(truth, answers, kind, ranges=AREAS, lvis_style=lvis_style, print_function=lambda *_: None)
    if most or lvis_style:
        engine.params.maxDets = list(most or [LVIS_DETECTIONS])
    engine.run()
    return engine


def nothing_in(dataset: dict[str, Any]) -> dict[str, Any]:
    """An answer that meets no object."""
    image = dataset["images"][0]
    empty = as_strings({"size": [image["height"], image["width"]], "counts": [image["height"] * image["width"]]})
    kind = dataset["categories"][0]["id"]
    return {"image_id": image["id"], "category_id": kind, "segmentation": empty, "bbox": [0, 0, 0, 0], "score": 0.0}


def most_trusted(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """LVIS's 300 best answers of each picture, of whatever category."""
    of_picture: dict[int, list[dict[str, Any]]] = {}
    for result in results:
        of_picture.setdefault(result["image_id"], []).append(result)
    ordered = (sorted(found, key=lambda result: -result["score"]) for found in of_picture.values())
    return [result for found in ordered for result in found[:LVIS_DETECTIONS]]


def looked_for(dataset: dict[str, Any], results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """LVIS's answers that count: of categories that their picture has, or was looked at for in vain.

    The engine leaves others out as well, but fails where none of a picture's remain.
    """
    asked = {image["id"]: set(image.get("neg_category_ids", ())) for image in dataset["images"]}
    for annotation in dataset["annotations"]:
        if annotation["image_id"] in asked:
            asked[annotation["image_id"]].add(annotation["category_id"])
    return [result for result in results if result["category_id"] in asked[result["image_id"]]]


__all__ = ["average_precision", "true_dataset", "truth_of"]
