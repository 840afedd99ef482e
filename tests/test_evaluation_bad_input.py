"""What is wrong with annotations, pictures and results: left out, named and counted, or, in strict mode, the end."""

import json

import numpy as np
import pytest
from oracles import Oracle, write_coco
from PIL import Image
from synthetic import make_folder, make_scene, scene_files
from test_evaluation_coco import MODEL, campaign, write_detections

from efficientsam_hf.data.blobs import find_blobs
from efficientsam_hf.data.coco import read_dataset
from efficientsam_hf.data.sa1b import LabelledPicture
from efficientsam_hf.evaluation.campaign import Campaign, score_detections, score_interactive, score_proposals
from efficientsam_hf.evaluation.ground_truth import read_or_note
from efficientsam_hf.evaluation.interactive import Settings
from efficientsam_hf.evaluation.protocols import find_protocol
from efficientsam_hf.evaluation.skips import Skips
from efficientsam_hf.masks_efficientsam import encode_rle
from efficientsam_hf.pictures_efficientsam import read_picture


@pytest.fixture
def coco(tmp_path):
    return (tmp_path, *write_coco(tmp_path, 3))


def spoil(coco, **changes):
    """The data set with its first annotation changed."""
    _, path, _ = coco
    content = read_dataset(path)
    content["annotations"][0].update(changes)
    path.write_text(json.dumps(content))


BAD = [
    ({"segmentation": [[1, 2, 3, 4]]}, "a polygon of fewer than three points", 8),
    ({"segmentation": {"size": [61, 80], "counts": [61 * 80]}}, "run lengths of another size than the picture", 8),
    ({"segmentation": {"size": [60, 80], "counts": "0"}}, "a segmentation that cannot be read", 8),
    ({"segmentation": []}, "an empty mask", 8),
    ({"segmentation": None}, "an empty mask", 8),  # a box alone
    ({"segmentation": [[1, 1, 9, float("nan"), 9, 9]]}, "a segmentation that cannot be read", 8),
    ({"segmentation": [[1, 1, 9e12, 5, 9, 9]]}, "a segmentation that cannot be read", 8),
    ({"segmentation": [[500, 500, 900, 500, 900, 900]]}, "an empty mask", 8),
    ({"bbox": [70, 50, 30, 30]}, "a box that reaches outside the picture; its mask was used", 9),
    ({"bbox": [1, 2, 3]}, "a box that is not four finite numbers; its mask was used", 9),
    ({"area": "large"}, "an area that is no finite number; pixels were counted", 9),
    ({"category_id": 77}, "an annotation of an unknown category", 8),
    ({"image_id": 77}, "an annotation of a picture that the JSON does not have", 8),
]


@pytest.mark.parametrize(("changes", "reason", "masks"), BAD, ids=lambda value: str(value)[:30])
def test_bad_annotations_are_counted_or_stop_everything(coco, changes, reason, masks):
    spoil(coco, **changes)
    asked = campaign(coco)
    score_interactive(asked, Oracle(coco[2]), MODEL, [find_protocol("box")], Settings())
    (result,) = asked.results
    assert result["skipped"][reason]["count"] == 1
    assert "annotation" in result["skipped"][reason]["such_as"][0]
    assert result["protocols"][0]["masks"] == masks
    assert result["protocols"][0]["at"]["1"]["miou"] == result["ap"]["AP"] == 1.0
    with pytest.raises(ValueError, match=reason):
        score_interactive(
            campaign(coco, strict=True), Oracle(coco[2]), MODEL, [find_protocol("box")], Settings(seed=1)
        )


@pytest.mark.parametrize("changes", [{"iscrowd": None}, {"iscrowd": False}, {"bbox": None}, {"area": None}])
def test_nulls_are_what_is_left_out(coco, changes):
    spoil(coco, **changes)
    asked = campaign(coco)
    score_interactive(asked, Oracle(coco[2]), MODEL, [find_protocol("box")], Settings())
    assert asked.results[0]["ap"]["AP"] == 1.0
    assert not asked.results[0]["skipped"]


def test_null_categories_and_ids_of_two_kinds_are_no_fault(coco):
    _, path, _ = coco
    content = read_dataset(path)
    first = content["images"][0]["id"]
    for entries, key in ((content["images"], "id"), (content["annotations"], "image_id")):
        for entry in entries:
            entry[key] = "a" if entry[key] == first else entry[key]
    path.write_text(json.dumps({**content, "categories": None}))
    asked = campaign(coco)
    score_interactive(asked, Oracle(coco[2]), MODEL, [find_protocol("box")], Settings())
    assert asked.results[0]["protocols"][0]["masks"] == 9


@pytest.mark.parametrize("ignore", [0, 1, True, None, []])
def test_an_ignore_that_is_no_mask_is_no_fault(coco, ignore):
    spoil(coco, ignore=ignore)
    asked = campaign(coco, strict=True)
    score_interactive(asked, Oracle(coco[2]), MODEL, [find_protocol("ritm")], Settings())
    assert asked.results[0]["protocols"][0]["masks"] == 9
    assert asked.results[0]["protocols"][0]["at"]["1"]["miou"] == 1.0


def test_missing_pictures_are_counted_or_stop_everything(coco):
    (coco[0] / "images" / "1.png").unlink()
    asked = campaign(coco)
    score_interactive(asked, Oracle(coco[2]), MODEL, [find_protocol("sam")], Settings())
    assert asked.results[0]["skipped"]["no such picture"]["count"] == 1
    assert asked.results[0]["data"]["pictures"] == 2
    with pytest.raises(ValueError, match=r"1\.png in .*: no such picture"):
        campaign(coco, strict=True)
    for left in (coco[0] / "images").iterdir():
        left.unlink()
    with pytest.raises(FileNotFoundError, match=r"no picture of .*instances\.json in .*: 3 x no such picture"):
        campaign(coco)


def test_a_broken_picture_is_counted_or_stops_everything(coco):
    (coco[0] / "images" / "1.png").write_bytes((coco[0] / "images" / "1.png").read_bytes()[:80])
    asked = campaign(coco)
    score_interactive(asked, Oracle(coco[2]), MODEL, [find_protocol("box")], Settings())
    assert asked.results[0]["skipped"]["a picture that cannot be read"]["count"] == 1
    assert asked.results[0]["protocols"][0]["masks"] == 6
    assert asked.results[0]["ap"]["AP"] == 1.0
    with pytest.raises(ValueError, match=r"1\.png in .* is no readable picture"):
        score_interactive(
            campaign(coco, strict=True), Oracle(coco[2]), MODEL, [find_protocol("box")], Settings(seed=1)
        )
    other = campaign(coco)
    score_detections(other, Oracle(coco[2]), MODEL, write_detections(coco))
    assert other.results[0]["ap"]["AP"] == 1.0


def test_a_picture_of_another_size_is_left_out_of_every_figure(coco):
    path, reason = coco[0] / "images" / "1.png", "a picture of another size than its entry says"
    with Image.open(path) as image:
        image.resize((40, 30), Image.Resampling.NEAREST).save(path)

    def find(photo):
        masks = coco[2][photo.getpixel((0, 0))[0]]
        return [{"segmentation": encode_rle(mask), "predicted_iou": 1.0, "stability_score": 1.0} for mask in masks]

    asked = campaign(coco)
    score_interactive(asked, Oracle(coco[2]), MODEL, [find_protocol("box")], Settings())
    score_detections(asked, Oracle(coco[2]), MODEL, write_detections(coco))
    score_proposals(asked, find, MODEL, {})
    assert [result["skipped"][reason]["count"] for result in asked.results] == [1, 1, 1]
    assert asked.results[0]["protocols"][0]["masks"] == 6
    assert asked.results[0]["ap"]["AP"] == asked.results[1]["ap"]["AP"] == asked.results[2]["ar"]["AR@10"] == 1.0
    with pytest.raises(ValueError, match=rf"1\.png \(40 x 30, 80 x 60\): {reason}"):
        score_detections(campaign(coco, strict=True), Oracle(coco[2]), MODEL, write_detections(coco))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"bbox": [90, 5, 10, 10]}, "a box beside the picture"),
        ({"bbox": [5, 5, 0, 10]}, "a box without an area"),
        ({"bbox": [30.0, 5, 1e-7, 10]}, "a box without an area"),  # in float32, as the models that follow
        ({"bbox": [79.9999999, 5, 10, 10]}, "a box beside the picture"),
        ({"bbox": [-5.0, 5, 5.00000001, 10]}, "a box beside the picture"),
        ({"bbox": [5, 5, 1e39, 10]}, "a box that is not four finite numbers"),
        ({"bbox": [5, 5, 10]}, "a box that is not four finite numbers"),
        ({"category_id": 77}, "a result of an unknown category"),
        ({"score": None}, "a score that is no finite number"),
        ({"score": float("nan")}, "a score that is no finite number"),
        ({"image_id": 77}, "a result for a picture that is not evaluated"),
        ({"image_id": [0]}, "a result for a picture that is not evaluated"),
    ],
)
def test_bad_detections_are_counted_or_stop_everything(coco, changes, reason):
    path = write_detections(coco)
    found = json.loads(path.read_text())
    found.append({**found[0], **changes})
    path.write_text(json.dumps(found))
    asked = campaign(coco)
    score_detections(asked, Oracle(coco[2]), MODEL, path)
    assert asked.results[0]["skipped"][reason]["count"] == 1
    assert asked.results[0]["ap"]["AP"] == 1.0
    with pytest.raises(ValueError, match=f"result 9.*{reason}"):
        score_detections(campaign(coco, strict=True), Oracle(coco[2]), MODEL, path)


def test_an_empty_results_file_is_zero_or_stops(coco):
    path = coco[0] / "detections.json"
    path.write_text("[]")
    asked = campaign(coco)
    score_detections(asked, Oracle(coco[2]), MODEL, path)
    assert asked.results[0]["ap"]["AP"] == 0.0
    assert asked.results[0]["skipped"]["an empty results file"]["count"] == 1
    with pytest.raises(ValueError, match="an empty results file"):
        score_detections(campaign(coco, strict=True), Oracle(coco[2]), MODEL, path)
    path.write_text('{"a": 1}')
    with pytest.raises(ValueError, match="is no list of image_id, category_id, bbox and score"):
        score_detections(campaign(coco), Oracle(coco[2]), MODEL, path)


def test_what_is_wrong_with_results_is_counted_for_each_model_alone(coco):
    path = write_detections(coco, category_id=77)
    asked = campaign(coco)
    for _ in range(2):
        score_detections(asked, Oracle(coco[2]), MODEL, path)
    assert [result["skipped"]["a result of an unknown category"]["count"] for result in asked.results] == [9, 9]


def test_results_beyond_the_limit_are_no_fault(coco):
    asked = campaign(coco, limit=2, strict=True)
    score_detections(asked, Oracle(coco[2]), MODEL, write_detections(coco))
    assert asked.results[0]["boxes"] == 6
    assert asked.results[0]["ap"]["AP"] == 1.0


def test_two_annotations_of_one_id_keep_their_categories(coco):
    spoil(coco, id=2)
    asked = campaign(coco)
    score_interactive(asked, Oracle(coco[2]), MODEL, [find_protocol("box")], Settings())
    assert asked.results[0]["ap"]["AP"] == 1.0


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="masks must be 1 or more of a picture, got 0"):
        Settings(masks=0)
    with pytest.raises(ValueError, match="seed must be 0 or more, got -1"):
        Settings(seed=-1)


def test_crowds_are_an_option(coco):
    spoil(coco, iscrowd=1)
    for crowds, masks in ((False, 8), (True, 9)):
        asked = campaign(coco)
        score_interactive(asked, Oracle(coco[2]), MODEL, [find_protocol("sam")], Settings(crowds=crowds))
        assert asked.results[0]["protocols"][0]["masks"] == masks


def test_no_model_hears_which_side_exif_data_says_is_up(tmp_path):
    """Truths are masks of the pixels as they are stored, whatever is asked of a picture."""
    pixels = np.random.default_rng(0).integers(0, 255, (30, 40, 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # lying on its side
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    stored = np.asarray(Image.open(tmp_path / "turned.jpg"))
    picture = LabelledPicture("turned.jpg", find_blobs(tmp_path, "pictures")["turned.jpg"])
    seen = read_picture(read_or_note(picture, Skips()))
    assert np.array_equal(seen.permute(1, 2, 0), stored)


def masks_in_png(folder, count=2):
    """A folder of `images/` and `masks/`, and the true masks by number."""
    _, masks_of = write_coco(folder, count)
    (folder / "masks").mkdir()
    for number in range(count):
        Image.fromarray(masks_of[number][0]).save(folder / "masks" / f"{number}.png")
    return masks_of


@pytest.mark.parametrize("layout", ["png", "sa1b"])
def test_one_file_of_masks_that_cannot_be_read_is_counted_or_stops_everything(layout, tmp_path):
    if layout == "png":
        masks_of, broken, masks = masks_in_png(tmp_path), tmp_path / "masks" / "1.png", 1
    else:
        make_folder(tmp_path, scene_files(2))
        masks_of, broken, masks = dict.fromkeys(range(25, 35), make_scene(0)[1]), tmp_path / "sa_1.json", 4
    hashes = set()
    for content in (b"junk", b'{"annotations": [3]}', b'{"annotations": null}'):
        broken.write_bytes(content)
        asked = Campaign(tmp_path, None, tmp_path / "results.json")
        score_interactive(asked, Oracle(masks_of), MODEL, [find_protocol("box")], Settings())
        skipped = asked.results[0]["skipped"]["annotations that cannot be read"]
        assert skipped["count"] == 1
        assert "no readable" in skipped["such_as"][0]
        assert " object at 0x" not in skipped["such_as"][0]
        assert asked.results[0]["protocols"][0]["masks"] == masks
        hashes.add(asked.truth_hash)
    assert len(hashes) == 3
    asked = Campaign(tmp_path, None, tmp_path / "results.json", strict=True)
    with pytest.raises(ValueError, match="annotations that cannot be read"):
        score_interactive(asked, Oracle(masks_of), MODEL, [find_protocol("box")], Settings())


def test_a_photo_that_exif_turns_is_scored_as_stored_and_noted(tmp_path):
    masks_of, exif = masks_in_png(tmp_path), Image.Exif()
    exif[274] = 3
    for path in (tmp_path / "images").iterdir():
        Image.open(path).save(path, exif=exif)
    asked = Campaign(tmp_path, None, tmp_path / "results.json", strict=True)
    score_interactive(asked, Oracle(masks_of), MODEL, [find_protocol("box")], Settings())
    (noted,) = asked.results[0]["skipped"].items()
    assert noted[0].startswith("a picture that its EXIF data turns")
    assert (noted[1]["count"], asked.results[0]["protocols"][0]["masks"]) == (2, 2)


def test_nothing_that_is_read_is_written_over(coco):
    folder, path, _ = coco
    with pytest.raises(ValueError, match=r"instances.json would be written over .*instances.json, which is read"):
        Campaign(folder / "images", path, path)
    (folder / "linked_masks.jsonl").symlink_to(path)
    with pytest.raises(ValueError, match=r"linked_masks.jsonl would be written over .*instances.json"):
        Campaign(folder / "images", path, folder / "linked.json")
    with pytest.raises(ValueError, match=r"0.png would be written over .*0.png"):
        Campaign(folder / "images", path, folder / "images" / "0.png", limit=1)
    results = folder / "results.json"
    results.write_text("[]")
    asked = Campaign(folder / "images", path, results, unlabelled=True)
    with pytest.raises(ValueError, match=r"results.json would be written over .*results.json"):
        score_detections(asked, Oracle({}), MODEL, results)
    assert results.read_text() == "[]"
