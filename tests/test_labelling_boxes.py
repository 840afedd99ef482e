"""Boxes from COCO's JSON: each picture gets its own and never another's, and a bad box is named."""

import json
from pathlib import Path

import pytest
from conftest import make_model, tiny_config
from synthetic import make_folder, make_tar, scene_files
from typer.testing import CliRunner

from efficientsam_cli import app
from efficientsam_hf import EfficientSamProcessor, save_for_hub
from efficientsam_hf.labelling.boxes import BoxPrompts
from efficientsam_hf.labelling.sources import find_label_shards

JPEG = scene_files(1)["sa_0.jpg"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model = make_model(tiny_config())
    processor = EfficientSamProcessor.from_model_config(model.config)
    return str(save_for_hub(model, processor, tmp_path_factory.mktemp("model") / "tiny"))


def write_boxes(path: Path, boxes: dict[str, list], **changes) -> Path:
    """COCO's JSON of names and their boxes."""
    images = [{"id": number, "file_name": name} for number, name in enumerate(boxes)]
    rows = [(number, box) for number, found in enumerate(boxes.values()) for box in found]
    annotations = [{"id": 7 + n, "image_id": image, "bbox": box, **changes} for n, (image, box) in enumerate(rows)]
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return path


def label(source, boxes, output, checkpoint, *options):
    given = ["label", source, "--boxes", boxes, "--output", output, "--model", checkpoint, *options]
    return CliRunner().invoke(app, [str(word) for word in given])


def labelled(folder: Path) -> dict[str, list]:
    """Names of pictures, and the numbers of the boxes that they got masks for."""
    content = json.loads((folder / "coco.json").read_text())
    return {
        image["file_name"]: [r["box_id"] for r in content["annotations"] if r["image_id"] == image["id"]]
        for image in content["images"]
    }


# --------------------------------------------------------------------------------------------------------------------
# Whose boxes


def test_a_picture_of_the_same_name_in_another_folder_gets_none(tmp_path, checkpoint):
    make_folder(tmp_path / "set", {"clip1/0001.jpg": JPEG, "clip2/0001.jpg": JPEG})
    boxes = write_boxes(tmp_path / "boxes.json", {"clip1/0001.jpg": [[4, 4, 30, 30]]})
    result = label(tmp_path / "set", boxes, tmp_path / "out", checkpoint)
    assert result.exit_code == 0, result.output
    assert labelled(tmp_path / "out") == {"clip1/0001.jpg": [7]}
    assert "1 without boxes in the JSON left out" in result.output


OTHER = "may be another picture's"


@pytest.mark.parametrize(
    ("pictures", "named", "owners"),
    [
        # More or fewer folders before a name.
        (["a.jpg", "b.jpg"], ["train/a.jpg"], {"a.jpg": "train/a.jpg", "b.jpg": None}),
        (["deep/a.jpg", "b.jpg"], ["a.jpg"], {"deep/a.jpg": "a.jpg", "b.jpg": None}),
        (["x/a.jpg", "y/a.jpg"], ["set/x/a.jpg"], {"x/a.jpg": "set/x/a.jpg", "y/a.jpg": None}),
        # A name that is some picture's is no other's.
        (["a.jpg", "deep/a.jpg"], ["a.jpg"], {"a.jpg": "a.jpg", "deep/a.jpg": None}),
        (["a.jpg", "deep/a.jpg"], ["deep/a.jpg"], {"a.jpg": None, "deep/a.jpg": "deep/a.jpg"}),
        # Folders that differ, and names that end alike.
        (["x/a.jpg"], ["y/a.jpg"], {"x/a.jpg": None}),
        (["aa.jpg"], ["a.jpg"], {"aa.jpg": None}),
        # Nobody knows which.
        (["x/a.jpg", "y/a.jpg"], ["a.jpg"], {"x/a.jpg": OTHER, "y/a.jpg": OTHER}),
        (["a.jpg"], ["x/a.jpg", "y/a.jpg"], {"a.jpg": OTHER}),
    ],
)
def test_boxes_have_one_owner(pictures, named, owners, tmp_path):
    make_folder(tmp_path / "set", dict.fromkeys(pictures, JPEG))
    boxes = write_boxes(tmp_path / "boxes.json", {name: [[1, 1, 5, 5]] for name in named})
    prompts = BoxPrompts(boxes, find_label_shards(str(tmp_path / "set"), pictures_per_shard=1))
    for picture, owner in owners.items():
        if owner is OTHER:
            with pytest.raises(ValueError, match=rf"the JSON's .*a\.jpg {OTHER}, wanted {picture}"):
                prompts.of(picture)
        else:
            assert prompts.of(picture) == (None if owner is None else prompts.boxes[owner])


def test_names_in_tars_are_whole_unless_there_is_one(tmp_path):
    for name in ("t0", "t1"):
        make_tar(tmp_path / f"{name}.tar", {"clip1/a.jpg": JPEG, "a.jpg": JPEG})
    boxes = write_boxes(tmp_path / "boxes.json", {"t1/a.jpg": [[1, 1, 5, 5]], "clip1/a.jpg": [[1, 1, 9, 9]]})
    alone = BoxPrompts(boxes, find_label_shards(str(tmp_path / "t0.tar")))
    assert alone.of("t0/clip1/a.jpg") == alone.boxes["clip1/a.jpg"]
    assert alone.of("t0/a.jpg") is None
    several = BoxPrompts(boxes, find_label_shards(str(tmp_path / "*.tar")))
    assert several.of("t1/a.jpg") == several.boxes["t1/a.jpg"]
    assert several.of("t0/a.jpg") is None
    with pytest.raises(ValueError, match=rf"the JSON's clip1/a\.jpg {OTHER}, wanted t0/clip1/a\.jpg"):
        several.of("t0/clip1/a.jpg")


# --------------------------------------------------------------------------------------------------------------------
# What is wrong with a box


def test_a_bad_box_is_skipped_by_name_and_no_other(tmp_path, checkpoint):
    make_folder(tmp_path / "set", {"clip1/a.jpg": JPEG, "clip2/a.jpg": JPEG, "clip3/a.jpg": JPEG})
    good = [[4, 4, 30, 30], [8, 8, 20, 20]]
    bad = [[10, 10, 0, 20], [300, 4, 20, 20], [4, 4, float("nan"), 9]]
    boxes = {"clip1/a.jpg": good, "clip2/a.jpg": [good[0], *bad, good[1]], "clip3/a.jpg": bad[:1]}
    path = write_boxes(tmp_path / "boxes.json", boxes)
    result = label(tmp_path / "set", path, tmp_path / "out", checkpoint)
    assert result.exit_code == 0, result.output
    assert labelled(tmp_path / "out") == {"clip1/a.jpg": [7, 8], "clip2/a.jpg": [9, 13], "clip3/a.jpg": []}
    first, second = json.loads((tmp_path / "out" / "report.json").read_text())["skipped"]
    assert first.startswith("clip2/a.jpg: box 10: a box wants x0 < x1 and y0 < y1, found [10")
    assert "; box 11: wanted a box on the picture of width 80 and height 60, found [300" in first
    assert "; box 12: a box wants finite numbers, found [4" in first
    assert second.startswith("clip3/a.jpg: box 14: ")
    content = json.loads((tmp_path / "out" / "coco.json").read_text())["annotations"]
    same = [[r["segmentation"] for r in content if r["image_id"] == image] for image in (1, 2)]
    assert same[0] == same[1]


def test_categories_without_names_are_called_by_their_numbers(tmp_path):
    some = write_boxes(tmp_path / "boxes.json", {"a.jpg": [[1, 1, 5, 5]]}, category_id=3)
    assert BoxPrompts(some, []).categories == [{"id": 3, "name": "3"}]
    one = write_boxes(tmp_path / "boxes.json", {"a.jpg": [[1, 1, 5, 5]]})
    assert BoxPrompts(one, []).categories == [{"id": 1, "name": "object"}]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"annotations": [{"id": 4, "image_id": 9, "bbox": [1, 1, 5, 5]}]}, "annotation 4 is of picture 9, which its"),
        ({"annotations": [], "categories": [{"id": 1}]}, "KeyError: 'name'"),
    ],
)
def test_what_the_json_lacks_is_named(content, found, tmp_path):
    (tmp_path / "boxes.json").write_text(json.dumps({"images": [{"id": 1, "file_name": "a.jpg"}], **content}))
    with pytest.raises(ValueError, match=rf"boxes\.json is no COCO JSON with boxes: found .*{found}"):
        BoxPrompts(tmp_path / "boxes.json", [])


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"id": "ann-1"}, "id 'ann-1' and category_id 1"),
        ({"category_id": "cup"}, "id 7 and category_id 'cup'"),
        ({"category_id": None}, "id 7 and category_id None"),
    ],
)
def test_ids_are_whole_numbers(changes, found, tmp_path):
    boxes = write_boxes(tmp_path / "boxes.json", {"a.jpg": [[1, 1, 5, 5]]}, **changes)
    with pytest.raises(ValueError, match=rf"boxes\.json has a box with {found}, wanted whole numbers"):
        BoxPrompts(boxes, [])
