import contextlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from oracles import Oracle, write_coco

from efficientsam_hf.data.coco import read_dataset
from efficientsam_hf.evaluation.campaign import Campaign, score_detections, score_interactive, score_proposals
from efficientsam_hf.evaluation.coco_ap import average_precision, true_dataset
from efficientsam_hf.evaluation.ground_truth import find_true_pictures
from efficientsam_hf.evaluation.interactive import Settings
from efficientsam_hf.evaluation.journal import Journal, Share, answer_all
from efficientsam_hf.evaluation.proposals import average_recall
from efficientsam_hf.evaluation.protocols import find_protocol
from efficientsam_hf.evaluation.skips import Skips
from efficientsam_hf.masks_efficientsam import decode_rle, encode_rle

MODEL = {"name": "oracle", "parameters": 0, "source": "here"}
REFERENCE = ["AP", "AP50", "AP75", "APs", "APm", "APl"]


@pytest.fixture
def coco(tmp_path):
    return (tmp_path, *write_coco(tmp_path, 3))


def fed_back(dataset, score=1.0):
    keys = ("image_id", "category_id", "segmentation")
    return [{**{key: item[key] for key in keys}, "score": score} for item in dataset["annotations"]]


def real(shared, folder, name):
    path = shared / "data" / folder / name
    skips = Skips()
    pictures = find_true_pictures(path.parent / "images", path, skips, unlabelled=True)
    sizes = [(picture.entry["height"], picture.entry["width"]) for picture in pictures]
    assert not skips.record()
    return true_dataset(pictures, sizes, read_dataset(path)["categories"])


@pytest.mark.parametrize(
    ("folder", "name", "more"),
    [
        ("coco_train", "instances_train2017_subset.json", ()),
        ("lvis_val_sub", "lvis_v0.5_val_subset.json", ("APr", "APc", "APf")),
    ],
)
def test_the_truth_fed_back_has_ap_one(shared, folder, name, more):
    dataset = real(shared, folder, name)
    found = average_precision(dataset, fed_back(dataset))
    assert found == dict.fromkeys([*REFERENCE, *more], 1.0)
    assert average_recall(dataset, fed_back(dataset))["AR@1000"] == 1.0
    assert average_precision(dataset, []) == dict.fromkeys([*REFERENCE, *more], 0.0)


def moved(results, generator):
    """Masks pushed aside by up to 12 pixels, with random scores."""
    found = []
    for result in results:
        mask = np.roll(decode_rle(result["segmentation"]).numpy(), int(generator.integers(-12, 13)), axis=1)
        found.append({**result, "segmentation": encode_rle(mask), "score": float(generator.random())})
    return found


def pycocotools_stats(dataset, results, **params):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = json.loads(json.dumps(dataset))
        truth.createIndex()
        engine = COCOeval(truth, truth.loadRes(json.loads(json.dumps(results))), "segm")
        for name, value in params.items():
            setattr(engine.params, name, value)
        engine.evaluate()
        engine.accumulate()
        if params:
            return engine.eval["recall"]
        engine.summarize()
    return engine.stats


def test_ap_is_pycocotools_to_six_decimals(shared):
    dataset = real(shared, "coco_train", "instances_train2017_subset.json")
    dataset["images"] = dataset["images"][:100]
    dataset["annotations"] = [item for item in dataset["annotations"] if item["image_id"] < 100]
    results = moved(fed_back(dataset), np.random.default_rng(0))
    found, wanted = average_precision(dataset, results), pycocotools_stats(dataset, results)
    assert [found[name] for name in REFERENCE] == pytest.approx(wanted[:6], abs=1e-6)
    assert 0.2 < found["AP"] < 0.8
    recall = pycocotools_stats(dataset, results, useCats=0, maxDets=[10, 100, 1000])
    found = average_recall(dataset, results)
    wanted = [np.mean(recall[:, :, 0, place][recall[:, :, 0, place] > -1]) for place in range(3)]
    assert [found[f"AR@{most}"] for most in (10, 100, 1000)] == pytest.approx(wanted, abs=1e-6)


def test_boundary_ap_is_harder(coco):
    folder, path, _ = coco
    pictures = find_true_pictures(folder / "images", path)
    dataset = true_dataset(pictures, [(60, 80)] * 3, read_dataset(path)["categories"])
    results = fed_back(dataset)
    for result in results:
        result["segmentation"] = encode_rle(np.roll(decode_rle(result["segmentation"]).numpy(), 2, axis=1))
    assert average_precision(dataset, results, "boundary")["APs"] < average_precision(dataset, results)["APs"]
    assert average_precision(dataset, fed_back(dataset), "boundary")["AP"] == 1.0


def campaign(coco, **options):
    folder, path, _ = coco
    return Campaign(folder / "images", path, folder / "results.json", **options)


@pytest.mark.parametrize("refine", [False, True])
def test_an_oracle_has_ap_one_by_true_boxes(coco, refine):
    asked, oracle = campaign(coco), Oracle(coco[2])
    score_interactive(asked, oracle, MODEL, [find_protocol("box")], Settings(refine=refine, boundary=True))
    (result,) = asked.results
    assert result["protocols"][0]["at"]["1"]["miou"] == 1.0
    assert result["ap"]["AP"] == result["boundary_ap"]["AP"] == 1.0
    assert result["ap"]["APl"] is None  # no object is that large
    assert oracle.refined == (3 if refine else 0)
    assert oracle.calls == [3, 3, 3] * (2 if refine else 1)


def write_detections(coco, **changes):
    folder, path, _ = coco
    found = [
        {**{key: item[key] for key in ("image_id", "category_id", "bbox")}, "score": 0.9, **changes}
        for item in read_dataset(path)["annotations"]
    ]
    (folder / "detections.json").write_text(json.dumps(found))
    return folder / "detections.json"


def test_an_oracle_has_ap_one_by_a_detectors_boxes(coco):
    asked, oracle = campaign(coco, unlabelled=True), Oracle(coco[2])
    score_detections(asked, oracle, MODEL, write_detections(coco))
    assert asked.results[0]["ap"]["AP"] == 1.0
    assert asked.results[0]["boxes"] == 9
    assert oracle.calls == [3, 3, 3]


def test_an_oracle_has_ar_one(coco):
    _, _, masks_of = coco

    def find(photo):
        masks = masks_of[photo.getpixel((0, 0))[0]]
        return [{"segmentation": encode_rle(mask), "predicted_iou": 1.0, "stability_score": 1.0} for mask in masks]

    asked = campaign(coco)
    score_proposals(asked, find, MODEL, {})
    assert asked.results[0]["ar"]["AR@10"] == asked.results[0]["ar"]["AR@1000"] == 1.0
    assert asked.results[0]["masks_a_picture"] == 3


def test_a_false_box_costs_precision_and_a_missing_one_recall(coco):
    path = write_detections(coco)
    found = json.loads(path.read_text())
    path.write_text(json.dumps(found[3:]))
    asked = campaign(coco)
    score_detections(asked, Oracle(coco[2]), MODEL, path)
    assert 0.5 < asked.results[0]["ap"]["AP"] < 0.7  # a third of the objects cannot be found


def test_refinement_wants_a_model_that_learnt_masks(coco):
    oracle = Oracle(coco[2])
    oracle.mask_prompts = False
    with pytest.raises(ValueError, match="oracle takes no mask prompts, which --refine"):
        score_detections(campaign(coco), oracle, MODEL, write_detections(coco), refine=True)


def test_other_pictures_or_strictness_are_another_question(coco, monkeypatch):
    folder, path, masks_of = coco
    shutil.copytree(folder / "images", folder / "other")

    def encoded(images=folder / "images", **options):
        oracle = Oracle(masks_of)
        asked = Campaign(images, path, folder / "results.json", **options)
        score_interactive(asked, oracle, MODEL, [find_protocol("box")], Settings())
        return oracle.encoded

    assert [encoded(), encoded()] == [3, 0]
    assert [encoded(strict=True), encoded(strict=True)] == [3, 0]
    assert [encoded(folder / "other"), encoded()] == [3, 0]
    monkeypatch.chdir(folder / "other")
    assert encoded(Path("../images")) == 0
    with (folder / "images" / "1.png").open("ab") as file:
        file.write(b"another size")
    assert encoded() == 3


def test_what_was_answered_is_not_asked_again(coco):
    first, oracle = campaign(coco), Oracle(coco[2])
    original = oracle.embed

    def dies(picture):
        if oracle.encoded == 2:
            raise KeyboardInterrupt
        return original(picture)

    oracle.embed = dies
    with pytest.raises(KeyboardInterrupt):
        score_interactive(first, oracle, MODEL, [find_protocol("sam")], Settings())
    journal = next(coco[0].glob(".results.*/0.jsonl"))
    journal.write_text(journal.read_text()[:-30])  # as a kill in the midst of a line leaves it
    again, oracle.embed, oracle.encoded = campaign(coco), original, 0
    score_interactive(again, oracle, MODEL, [find_protocol("sam")], Settings())
    assert oracle.encoded == 2
    whole = campaign(coco)
    score_interactive(whole, Oracle(coco[2]), MODEL, [find_protocol("sam")], Settings(seed=1))
    assert again.results[0]["protocols"] == whole.results[0]["protocols"]
    again.finish()
    assert not journal.exists()
    written = json.loads((coco[0] / "results.json").read_text())
    assert {"torch", "efficientsam-hf", "faster-coco-eval"} <= written["versions"].keys()
    assert len((coco[0] / "results_masks.jsonl").read_text().splitlines()) == 3


def test_annotations_without_a_shape_or_a_box_are_no_end(coco, caplog):
    dataset = read_dataset(coco[1])
    answers, whole = fed_back(dataset), average_precision(dataset, fed_back(dataset))
    boxes = average_precision(dataset, answers, "bbox")
    for item in dataset["annotations"]:
        del item["bbox"]
    assert (average_precision(dataset, answers), average_precision(dataset, answers, "bbox")) == (whole, boxes)
    assert not caplog.text
    dataset["annotations"] += [
        {"id": 99, "image_id": 0, "category_id": 1, "bbox": [1, 1, 5, 5], "area": 25, "iscrowd": 0}
    ]
    assert average_precision(dataset, answers) == whole
    assert "1 annotations have no shape and are not compared" in caplog.text
    assert average_precision(dataset, answers, "bbox")["AP"] < boxes["AP"]


def test_the_same_question_put_twice_at_one_time_is_answered_twice(tmp_path):
    journal = Journal(tmp_path / "results.json", "q" * 16, Share())
    journal.write(0, {"found": 0})

    def work(item: int) -> dict:
        if item == 2:
            journal.forget()  # as the other one does that is done first
        return {"found": (item,)}

    assert answer_all(range(3), work, journal) == [{"found": 0}, {"found": [1]}, {"found": [2]}]
