"""True masks with what an evaluation asks of them: their ids, categories, sizes, crowds, and what is to be ignored.

Every layout comes in: COCO's and LVIS's JSON beside a folder of pictures, and whatever `find_labelled_pictures` reads.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from ..data.coco import PictureFiles, file_names, read_dataset, run_lengths
from ..data.sa1b import LabelledPicture
from ..data.sources import find_labelled_pictures
from ..masks_efficientsam import decode_rle, masks_to_boxes, read_counts, rle_area
from ..pictures_efficientsam import LARGEST_PICTURE
from .skips import Skips


@dataclass(frozen=True)
class TruePicture(LabelledPicture):
    """A picture of a COCO or LVIS JSON with its entry and its annotations as they stand there, crowds too."""

    entry: dict
    records: tuple[dict, ...]

    def read_annotations(self) -> list[dict]:
        """The JSON's records, polygons and run lengths alike."""
        return list(self.records)


@dataclass(frozen=True)
class TrueObject:
    """One object of a picture of H x W pixels.

    Args:
        id: The annotation's; its place in the list where it has none.
        mask: (H, W), booleans; never empty.
        box: x0, y0, x1, y1, the tightest around the mask.
        area: What the annotation says, by which COCO calls it small, medium or large; else the mask's pixels.
        category: The annotation's, if it has one.
        ignore: (H, W), pixels that count for nothing.
    """

    id: Any
    mask: np.ndarray
    box: tuple[int, int, int, int]
    area: float
    category: int | None = None
    ignore: np.ndarray | None = None


def find_true_pictures(
    images: str | Path, annotations: str | Path | None = None, skips: Skips | None = None, unlabelled: bool = False
) -> list[LabelledPicture]:
    """The pictures to evaluate on, in the order of their ids or names.

    Args:
        images: Folder or uncompressed tar of the pictures; without `annotations`, of pictures and masks in any layout
            that `find_labelled_pictures` reads.
        annotations: COCO's or LVIS's JSON.
        skips: Takes note of pictures that are named but not there, or too large.
        unlabelled: Keep pictures without annotations, on which a detector can only be wrong.

    Raises:
        FileNotFoundError: if there is nothing there, or no picture is left.
        ValueError: if the JSON is none of COCO's or LVIS's; in strict mode for what would be skipped.
    """
    skips = skips or Skips()
    if annotations is None:
        return find_labelled_pictures(str(images))
    dataset = read_dataset(annotations)
    files = PictureFiles(images, dataset["images"])
    of_image: dict[Any, list[dict]] = {image["id"]: [] for image in dataset["images"]}
    categories = {category["id"] for category in dataset.get("categories") or []}
    for record in dataset["annotations"]:
        if record["image_id"] not in of_image:
            skips.add("an annotation of a picture that the JSON does not have", f"annotation {record.get('id')}")
        elif categories and record.get("category_id") not in categories:
            skips.add("an annotation of an unknown category", f"annotation {record.get('id')}")
        else:
            of_image[record["image_id"]].append(record)
    found = []
    for image in dataset["images"]:
        name, blob = file_names(image)[0], files.find(image)
        if not of_image[image["id"]] and not unlabelled:
            continue
        if blob is None:
            skips.add("no such picture", f"{name} in {images}")
        elif image["width"] * image["height"] > LARGEST_PICTURE:
            skips.add(f"a picture of more than {LARGEST_PICTURE:,} pixels", name)
        else:
            found.append(TruePicture(name, blob, image, tuple(of_image[image["id"]])))
    if not found:
        raise FileNotFoundError(
            f"no picture of {annotations} in {images}: {describe(skips) or 'nothing is annotated'}"
        )
    return list(found)


def true_objects(
    picture: LabelledPicture, size: tuple[int, int], skips: Skips, crowds: bool = False
) -> list[TrueObject]:
    """The objects of a picture of `size` (H, W) whose masks can be trusted; others are noted in `skips`.

    Args:
        picture: Of any source.
        size: Of the picture as decoded.
        skips: Takes note.
        crowds: Whether groups that are annotated as one are objects, too.
    """
    found = []
    for record, rle in sound_annotations(picture, size, skips):
        if record["iscrowd"] and not crowds:
            continue
        mask = decode_rle(rle).numpy()
        ignore = record.get("ignore")  # COCO's own field of this name is a number, and counts for nothing
        hidden = read_run_lengths(ignore, size, picture.name, skips) if isinstance(ignore, dict | list) else None
        found.append(
            TrueObject(
                id=record["id"],
                mask=mask,
                box=tuple(masks_to_boxes(mask).tolist()),
                area=float(record["area"]),
                category=record.get("category_id"),
                ignore=decode_rle(hidden).numpy() if hidden else None,
            )
        )
    return found


def sound_annotations(
    picture: LabelledPicture, size: tuple[int, int], skips: Skips
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The annotations of a picture of `size` (H, W) that have a mask, and its run lengths; notes in `skips`.

    Records have at least `id`, `iscrowd`, and `area` (what they say, or else the mask's pixels).
    """
    try:
        records = picture.read_annotations()
    except ValueError as error:
        skips.add("annotations that cannot be read", str(error))
        return
    for number, record in enumerate(records):
        record = {"id": number, **record, "iscrowd": int(bool(record.get("iscrowd")))}
        name = f"{picture.name}, annotation {record['id']}"
        rle = read_run_lengths(record.get("segmentation"), size, name, skips)
        pixels = rle_area(rle) if rle else 0
        if rle and not pixels:
            skips.add("an empty mask", name)
        elif rle:
            check_box(record.get("bbox"), size, name, skips)
            yield {**record, "area": sound_area(record.get("area"), pixels, name, skips)}, rle


def read_run_lengths(segmentation: Any, size: tuple[int, int], name: str, skips: Skips) -> dict[str, Any] | None:
    """Polygons or run lengths -> run lengths of `size` (H, W); None, and a note, if nothing can be made of them."""
    if isinstance(segmentation, dict) and list(segmentation.get("size", [])) != list(size):
        skips.add("run lengths of another size than the picture", f"{name} ({segmentation.get('size')}, {list(size)})")
        return None
    if isinstance(segmentation, list) and any(is_no_polygon(polygon) for polygon in segmentation):
        skips.add("a polygon of fewer than three points", name)
        segmentation = [polygon for polygon in segmentation if not is_no_polygon(polygon)]
    try:
        rle = run_lengths(segmentation or [], size) or {"size": list(size), "counts": [size[0] * size[1]]}
        read_counts(rle)
    except (ValueError, KeyError, TypeError):
        rle = None
    if rle is None:
        skips.add("a segmentation that cannot be read", name)
    return rle


def is_no_polygon(polygon: Any) -> bool:
    """Whether these are not the x, y of three points or more."""
    return not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2 == 1


def check_box(box: Sequence[float] | None, size: tuple[int, int], name: str, skips: Skips) -> None:
    """Note an annotation whose box (x, y, width, height) lies outside the picture, by more than a pixel's rounding."""
    if box is None:
        return
    if not is_four_numbers(box):
        skips.add("a box that is not four finite numbers; its mask was used", f"{name}, {box}")
        return
    x, y, width, height = box
    if x < -1 or y < -1 or x + width > size[1] + 1 or y + height > size[0] + 1:
        skips.add("a box that reaches outside the picture; its mask was used", name)


def is_four_numbers(box: Any) -> bool:
    """Whether this may be x, y, width, height."""
    return isinstance(box, list | tuple) and len(box) == 4 and all(map(is_finite, box))


def is_finite(value: Any) -> bool:
    """Whether this is a number, and a finite one."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def sound_area(area: Any, pixels: int, name: str, skips: Skips) -> float:
    """What an annotation says of its area, or, if it says nothing or no number, its pixels."""
    if area and not is_finite(area):
        skips.add("an area that is no finite number; pixels were counted", f"{name}, {area}")
        return pixels
    return area or pixels


def dataset_hash(pictures: Iterable[LabelledPicture]) -> str:
    """SHA-256 over the names and annotations of these pictures: what was asked, whatever file it came from."""
    digest = hashlib.sha256()
    for picture in pictures:
        digest.update(picture.name.encode(errors="surrogateescape"))
        digest.update(annotations_as_bytes(picture))
    return digest.hexdigest()


def annotations_as_bytes(picture: LabelledPicture) -> bytes:
    """A picture's annotations as JSON; of those that cannot be read the files, whatever is in them."""
    try:
        return json.dumps(picture.read_annotations(), sort_keys=True, default=as_text).encode()
    except ValueError:
        return b"".join(blob.read() for blob in picture.label_blobs())


def files_hash(pictures: Iterable[LabelledPicture]) -> str:
    """SHA-256 over where these pictures lie and how large they are; other ones may have come in their place."""
    digest = hashlib.sha256()
    for picture in pictures:
        blob = picture.image
        digest.update(f"{os.path.abspath(blob.path)} {blob.offset} {blob.count()}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def read_or_note(picture: LabelledPicture, skips: Skips) -> Image.Image | None:
    """The picture in RGB; None, and a note, if it cannot be read or has another size than its entry.

    Truths are masks of the pixels as they are stored: whichever side EXIF data says is up, no model hears of it.
    """
    try:
        photo = picture.read_image()
    except ValueError as error:
        skips.add("a picture that cannot be read", str(error))
        return None
    if photo.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        skips.note(
            "a picture that its EXIF data turns; its masks were taken for those of the stored pixels", picture.name
        )
    photo = Image.fromarray(np.asarray(photo))
    return photo if is_of_its_size(picture, photo, skips) else None


def is_of_its_size(picture: LabelledPicture, photo: Image.Image, skips: Skips) -> bool:
    """Whether the picture's entry, if it has one, tells its size; else a note."""
    entry = picture.entry if isinstance(picture, TruePicture) else None
    if entry is None or photo.size == (entry["width"], entry["height"]):
        return True
    named = f"{picture.name} ({photo.width} x {photo.height}, {entry['width']} x {entry['height']})"
    skips.add("a picture of another size than its entry says", named)
    return False


def picture_hash(picture: LabelledPicture) -> str:
    """SHA-256 of the picture's bytes."""
    return hashlib.sha256(picture.image.read()).hexdigest()


def as_text(value: Any) -> Any:
    """Run lengths as bytes, which JSON does not know."""
    return value.decode() if isinstance(value, bytes) else str(value)


def describe(skips: Skips) -> str:
    """In a line: how many were left out for each reason, and the first."""
    return "; ".join(f"{count} x {reason}, as {skips.names[reason][0]}" for reason, count in skips.counts.items())


__all__ = [
    "TrueObject",
    "TruePicture",
    "dataset_hash",
    "describe",
    "files_hash",
    "find_true_pictures",
    "is_finite",
    "is_four_numbers",
    "picture_hash",
    "read_or_note",
    "sound_annotations",
    "true_objects",
]
