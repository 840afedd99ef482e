"""The one door through which labelled pictures of every layout come in."""

import re
from collections.abc import Sequence
from pathlib import Path

from .coco import find_coco_pictures
from .mask_pictures import find_masked_pictures
from .packed_items import PackedItems
from .sa1b import LabelledPicture, find_pairs


def find_labelled_pictures(source: str) -> list[LabelledPicture]:
    """Every picture of a source, numbered by its place in the list.

    Args:
        source: One of

            - a folder or an uncompressed tar of SA-1B's pairs, see `find_pairs`;
            - `instances.json:FOLDER`, COCO's or LVIS's instances and the folder of their pictures, which may be left
              out where it is the JSON's own, see `find_coco_pictures`;
            - a folder of `images/` and `masks/`, see `find_masked_pictures`.

    Raises:
        FileNotFoundError: if there is nothing at the source, or nothing to train on in it.
        ValueError: if it is none of these.
    """
    # Not the first colon, which may be that of a drive.
    coco = re.fullmatch(r"(.+\.json)(?::(.+))?", source)
    if coco:
        return find_coco_pictures(coco[1], coco[2] or Path(coco[1]).parent)
    if (Path(source) / "masks").is_dir():
        return find_masked_pictures(source)
    return list(find_pairs(source))


def split_pictures(
    pictures: list[LabelledPicture], hold_out: int
) -> tuple[Sequence[LabelledPicture], list[LabelledPicture]]:
    """Pictures to train on, and every `hold_out`-th, the first one among them, to choose by; 0 holds out none."""
    held = [picture for number, picture in enumerate(pictures) if hold_out and number % hold_out == 0]
    trained_on = (picture for number, picture in enumerate(pictures) if not hold_out or number % hold_out)
    return PackedItems(trained_on), held
