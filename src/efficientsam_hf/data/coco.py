"""Instance masks in COCO's and LVIS's JSON, beside a folder of pictures."""

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..masks_efficientsam import rle_area
from ..pictures_efficientsam import LARGEST_PICTURE
from .blobs import Blob, find_blobs
from .sa1b import LabelledPicture

logger = logging.getLogger(__name__)
FARTHEST = 1_000_000  # pixels, of a polygon's corner


@dataclass(frozen=True)
class CocoPicture(LabelledPicture):
    """A picture and its annotations as the JSON has them; categories play no part."""

    size: tuple[int, int]
    annotations: tuple[dict, ...]

    def read_annotations(self) -> list[dict]:
        """Records with `area` and `segmentation`, polygons turned into run lengths of the picture's size (H, W)."""
        records = []
        for annotation in self.annotations:
            rle = run_lengths(annotation["segmentation"], self.size)
            if rle is not None:
                # The area that the JSON names is the polygon's, which the pixels' need not equal.
                records.append({"area": rle_area(rle), "segmentation": rle})
        return records


def run_lengths(segmentation: Any, size: tuple[int, int]) -> dict[str, Any] | None:
    """COCO's polygons `[[x0, y0, x1, y1, ...], ...]`, or run lengths -> run lengths; None of nothing.

    Raises:
        ValueError: for something else, and for a corner that is no number, or farther away than any picture is large.
    """
    if isinstance(segmentation, dict):
        if not (segmentation.get("size") and isinstance(segmentation.get("counts"), list | str | bytes)):
            raise ValueError(f"run lengths want size and counts, found {segmentation!s:.60}")
        return segmentation
    if not (isinstance(segmentation, list) and all(isinstance(polygon, list) for polygon in segmentation)):
        raise ValueError(f"wanted polygons [[x, y, ...], ...] or run lengths, found {segmentation!s:.60}")
    from pycocotools import mask as coco_mask

    # Four numbers are two points, which pycocotools would take for a box.
    polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
    # It would walk there, and take all memory on the way.
    far = [number for polygon in polygons for number in polygon if not is_near(number)]
    if far:
        raise ValueError(f"corners of polygons must be numbers between -{FARTHEST:,} and {FARTHEST:,}, got {far[0]}")
    return coco_mask.merge(coco_mask.frPyObjects(polygons, *size)) if polygons else None


def is_near(coordinate: Any) -> bool:
    """Whether a corner of a polygon can be drawn."""
    return isinstance(coordinate, int | float) and -FARTHEST < coordinate < FARTHEST


def find_coco_pictures(annotations: str | Path, pictures: str | Path) -> list[LabelledPicture]:
    """The pictures of an instance JSON that have masks, in the order of their ids.

    Crowds, which are no single object, and annotations without a shape are left out. A picture without masks, one of
    more than `LARGEST_PICTURE` pixels and one that is not there are left out and counted in the log.

    Args:
        annotations: The JSON: `images` with `id`, `width`, `height` and `file_name` (or LVIS's `coco_url`), and
            `annotations` with `image_id` and `segmentation`. `categories` are not asked for.
        pictures: The folder, or an uncompressed tar, searched to its depth.

    Raises:
        FileNotFoundError: if the JSON or the folder is not there, or no picture is left.
        ValueError: if the JSON is none, or not COCO's.
    """
    content = read_dataset(annotations)
    files = PictureFiles(pictures, content["images"])
    records = single_objects(content["annotations"])
    found, left_out, missing = [], Counter[str](), []
    for image in content["images"]:
        name, blob = file_names(image)[0], files.find(image)
        if image["id"] not in records:
            left_out["without masks"] += 1
        elif image["width"] * image["height"] > LARGEST_PICTURE:
            left_out["too large"] += 1
        elif blob is None:
            left_out["missing"] += 1
            missing.append(name)
        else:
            size = (image["height"], image["width"])
            found.append(CocoPicture(name, blob, size, tuple(records[image["id"]])))
    told = ", ".join(f"{number} {reason}" for reason, number in left_out.items())
    if missing:
        told += f" from {pictures}, such as {', '.join(missing[:3])}"
    if not found:
        raise FileNotFoundError(f"no picture with masks in {annotations}: found {told or 'no pictures'}")
    if told:
        logger.warning("%s: %d pictures, left out: %s", annotations, len(found), told)
    return list(found)


def read_dataset(path: str | Path) -> dict[str, Any]:
    """COCO's or LVIS's JSON, once it is sure that it is one; its pictures in the order of their ids, numbers first.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is another kind of file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"nothing at {path}: wanted a JSON of COCO's or LVIS's instances")
    try:
        content: dict[str, Any] = json.loads(Path(path).read_bytes())
        for image in content["images"]:
            if "id" not in image or not (file_names(image) and image["width"] and image["height"]):
                raise KeyError("id, file_name, width or height")
        ids = Counter(image["id"] for image in content["images"])
        if doubles := [number for number, count in ids.items() if count > 1]:
            raise ValueError(f"two images of id {doubles[0]!r}")
        content["images"].sort(key=lambda image: (isinstance(image["id"], str), image["id"]))
        annotations = content["annotations"]
        if not all("image_id" in annotation for annotation in annotations):
            raise KeyError("image_id")
        # Some may be boxes alone.
        if annotations and not any("segmentation" in annotation for annotation in annotations):
            raise KeyError("segmentation")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no JSON of COCO's or LVIS's instances: found {type(error).__name__}: {error}"
        ) from error
    return content


def single_objects(annotations: Sequence[dict]) -> dict[Any, list[dict]]:
    """The annotations that are shapes of single objects, by their pictures' ids."""
    records: dict[Any, list[dict]] = {}
    for annotation in annotations:
        if annotation.get("segmentation") and not annotation.get("iscrowd"):
            records.setdefault(annotation["image_id"], []).append(annotation)
    return records


def file_names(image: dict[str, Any]) -> list[str]:
    """Paths the picture may have: COCO's `file_name`, and that of its address, `.../train2017/000000391895.jpg`.

    LVIS 1.0 has the address alone; the names of LVIS 0.5 are those of 2014, which no folder of 2017 has.
    """
    named = [image["file_name"]] if image.get("file_name") else []
    named += [name.replace("\\", "/") for name in named if "\\" in name]  # written by Windows
    return named + (["/".join(urlsplit(image["coco_url"]).path.split("/")[-2:])] if "coco_url" in image else [])


class PictureFiles:
    """The pictures of a folder or an uncompressed tar, searched to its depth, by the names that a JSON has for them.

    Args:
        pictures: The folder or tar.
        images: All entries of the JSON.

    Raises:
        FileNotFoundError: if there is nothing.
    """

    def __init__(self, pictures: str | Path, images: Sequence[dict[str, Any]]):
        self.blobs = find_blobs(pictures, "pictures")
        named = {path for image in images for path in file_names(image)}
        self.unnamed: dict[str, list[str]] = {}
        for path in self.blobs.keys() - named:
            self.unnamed.setdefault(Path(path).name, []).append(path)
        self.claims = Counter(name for image in images for name in {Path(path).name for path in file_names(image)})

    def find(self, image: dict[str, Any]) -> Blob | None:
        """The picture of an entry: at one of its paths, or in other folders; None if that is no single one.

        Video frames of one name in many folders are not taken for each other.
        """
        paths = file_names(image)
        for path in paths:
            if path in self.blobs:
                return self.blobs[path]
        for path in paths:
            name = Path(path).name
            alike = self.unnamed.get(name, [])
            found = [other for other in alike if other.endswith(f"/{path}")] or (
                alike if self.claims[name] == 1 else []
            )
            if len(found) == 1:
                return self.blobs[found[0]]
        return None
