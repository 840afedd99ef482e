"""AP and AR on LVIS against LVIS's own evaluation, where false answers count only if their category was looked for."""

import json

import numpy as np
import pytest

from efficientsam_hf.evaluation.coco_ap import average_precision
from efficientsam_hf.evaluation.proposals import MOST, average_recall
from efficientsam_hf.masks_efficientsam import encode_rle

HEIGHT, WIDTH = 120, 160
CATEGORIES = [{"id": 3 * number + 1, "name": f"kind {number}", "frequency": "rcf"[number % 3]} for number in range(9)]
IDS = [category["id"] for category in CATEGORIES]


def rectangle(generator, near=None):
    """A mask of any size; `near` (x0, y0, x1, y1) one that overlaps."""
    if near is None:
        x0, y0 = generator.integers(0, WIDTH - 4), generator.integers(0, HEIGHT - 4)
        box = [x0, y0, generator.integers(x0 + 3, WIDTH + 1), generator.integers(y0 + 3, HEIGHT + 1)]
    else:
        box = [int(side + generator.integers(-4, 5)) for side in near]
    x0, y0, x1, y1 = (max(0, int(side)) for side in box)
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)] = True
    return mask, box


def lvis_like(seed, pictures=12, objects=7, answers=30):
    """A data set with objects of all sizes and frequencies, and answers of which half are near an object."""
    generator = np.random.default_rng(seed)
    images, annotations, results = [], [], []
    for number in range(pictures):
        boxes = []
        for _ in range(generator.integers(1, objects)):
            mask, box = rectangle(generator)
            kind = int(generator.choice(IDS))
            boxes.append((box, kind))
            record = {"id": len(annotations) + 1, "image_id": number, "category_id": kind, "iscrowd": 0}
            record |= {"bbox": [0, 0, 1, 1], "area": int(mask.sum()), "segmentation": encode_rle(mask)}
            annotations.append(record)
        there = {kind for _, kind in boxes}
        absent = [kind for kind in IDS if kind not in there]
        image = {"id": number, "height": HEIGHT, "width": WIDTH}
        image["neg_category_ids"] = [int(kind) for kind in generator.choice(absent, 2, replace=False)]
        image["not_exhaustive_category_ids"] = [kind for kind in sorted(there) if generator.random() < 0.3]
        images.append(image)
        for _ in range(generator.integers(0, answers)):
            box, kind = boxes[generator.integers(len(boxes))]
            guess = generator.random() < 0.5
            mask, _ = rectangle(generator, None if guess else box)
            result = {"image_id": number, "category_id": int(generator.choice(IDS)) if guess else kind}
            results.append({**result, "segmentation": encode_rle(mask), "score": float(generator.random())})
    return {"info": {}, "images": images, "annotations": annotations, "categories": CATEGORIES}, results


@pytest.fixture
def reference(tmp_path, monkeypatch):
    """LVIS's own evaluation: data set, results, most masks of a picture -> its figures by name."""
    lvis = pytest.importorskip("lvis", reason="the reference needs: pip install --no-deps lvis")
    monkeypatch.setattr(np, "float", float, raising=False)  # as numpy had it when lvis was written

    def figures(dataset, results, most=300):
        path = tmp_path / "lvis.json"
        path.write_text(json.dumps(dataset))
        truth = lvis.LVIS(str(path))
        answers = lvis.LVISResults(truth, json.loads(json.dumps(results)), max_dets=most)
        engine = lvis.LVISEval(truth, answers, "segm")
        engine.params.max_dets = most
        engine.run()
        return {name: None if value < 0 else float(value) for name, value in engine.get_results().items()}

    return figures


def alone(dataset, frequency=None):
    """The objects of a frequency, all of one category: what AR is measured against."""
    kept = {item["id"] for item in dataset["categories"] if frequency in (None, item["frequency"])}
    images = [{**image, "neg_category_ids": [1], "not_exhaustive_category_ids": []} for image in dataset["images"]]
    annotations = [{**item, "category_id": 1} for item in dataset["annotations"] if item["category_id"] in kept]
    named = [{"id": 1, "name": "object", "frequency": "f"}]
    return {"info": {}, "images": images, "annotations": annotations, "categories": named}


def same(found, wanted):
    """Equal to six decimals, and nothing in one place where there is nothing in the other."""
    assert {name for name, value in found.items() if value is None} == {name for name in found if wanted[name] is None}
    for name, value in found.items():
        if value is not None:
            assert value == pytest.approx(wanted[name], abs=1e-6), name


@pytest.mark.parametrize("seed", range(4))
def test_ap_is_lvis_own_to_six_decimals(reference, seed):
    dataset, results = lvis_like(seed)
    found = average_precision(dataset, results)
    assert 0.02 < found["AP"] < 0.9
    assert None not in (found["APr"], found["APc"], found["APf"])
    same(found, reference(dataset, results))


def test_answers_of_categories_that_nobody_looked_for_count_for_nothing(reference):
    """Also where they are all of a picture's, which has no object either."""
    dataset, results = lvis_like(1)
    plain = average_precision(dataset, results)
    empty = {
        "id": 99,
        "height": HEIGHT,
        "width": WIDTH,
        "neg_category_ids": IDS[:1],
        "not_exhaustive_category_ids": [],
    }
    dataset["images"].append(empty)
    beside = {**results[0], "image_id": 99, "category_id": IDS[1], "score": 1.0}
    assert average_precision(dataset, [*results, beside]) == plain
    stray = {**dataset["annotations"][0], "id": 999, "image_id": 777}  # of a picture that is not there
    assert average_precision({**dataset, "annotations": [*dataset["annotations"], stray]}, results) == plain
    same(plain, reference(dataset, [*results, beside]))
    false = {**beside, "category_id": IDS[0]}
    found = average_precision(dataset, [*results, false])
    assert found["AP"] < plain["AP"]
    same(found, reference(dataset, [*results, false]))


def test_ap_counts_lvis_300_best_masks_of_a_picture(reference):
    dataset, results = lvis_like(5, pictures=2, answers=900)
    assert len(results) > 400
    same(average_precision(dataset, results), reference(dataset, results))


def test_ap_on_lvis_photos_is_lvis_own(reference, lvis_sample):
    dataset, results = lvis_sample
    found = average_precision(dataset, results)
    assert 0.1 < found["AP"] < 0.9
    same(found, reference(dataset, results))


def wanted_recall(reference, dataset, results):
    """AR by every size and frequency after every number of masks, by LVIS's own evaluation."""
    results = [{**result, "category_id": 1} for result in results]
    wanted = {}
    for most in MOST:
        every = reference(alone(dataset), results, most)
        wanted |= {f"{name}@{most}": every[f"{name}@{most}"] for name in ("AR", "ARs", "ARm", "ARl")}
        for frequency in "rcf":
            wanted[f"AR{frequency}@{most}"] = reference(alone(dataset, frequency), results, most)[f"AR@{most}"]
    return wanted


@pytest.mark.parametrize("seed", range(3))
def test_ar_is_lvis_own_to_six_decimals(reference, seed):
    dataset, results = lvis_like(seed, answers=60)
    found = average_recall(dataset, results)
    assert list(found)[:7] == ["AR@10", "ARs@10", "ARm@10", "ARl@10", "ARr@10", "ARc@10", "ARf@10"]
    assert found["AR@10"] < found["AR@100"] <= found["AR@1000"] < 1
    same(found, wanted_recall(reference, dataset, results))


def test_ar_on_lvis_photos_is_lvis_own(reference, lvis_sample):
    dataset, results = lvis_sample
    same(average_recall(dataset, results), wanted_recall(reference, dataset, results))


def test_ar_of_a_frequency_is_measured_against_its_objects_alone():
    """A rare and a frequent object, of which the rare one is found: by hand."""
    dataset, _ = lvis_like(0, pictures=1, objects=2)
    masks = [np.zeros((HEIGHT, WIDTH), bool) for _ in range(2)]
    masks[0][:20, :20], masks[1][20:, 50:] = True, True
    dataset["annotations"] = [
        {"id": place + 1, "image_id": 0, "category_id": kind, "iscrowd": 0, "bbox": [0, 0, 1, 1]}
        | {"area": int(mask.sum()), "segmentation": encode_rle(mask)}
        for place, (kind, mask) in enumerate(zip((IDS[0], IDS[2]), masks, strict=True))
    ]
    found = average_recall(dataset, [{"image_id": 0, "segmentation": encode_rle(masks[0]), "score": 0.5}])
    assert [found[f"AR{group}@10"] for group in ("", "s", "m", "l", "r", "c", "f")] == [0.5, 1, None, 0, 1, None, 0]
    nothing = average_recall(dataset, [])
    assert [nothing[f"AR{group}@10"] for group in ("", "s", "m", "l", "r", "c", "f")] == [0, 0, None, 0, 0, None, 0]


def test_data_sets_without_frequencies_have_none():
    dataset, results = lvis_like(0, pictures=2)
    dataset["categories"] = [{"id": item["id"], "name": item["name"]} for item in CATEGORIES]
    assert set(average_recall(dataset, results)) == {
        f"{name}@{most}" for name in ("AR", "ARs", "ARm", "ARl") for most in MOST
    }
    dataset["annotations"] = []
    assert set(average_recall(dataset, results).values()) == {None}


@pytest.fixture
def lvis_sample(shared):
    """The truth of the sample, and answers that are the truth pushed aside."""
    from test_evaluation_coco import fed_back, moved, real

    dataset = real(shared, "lvis_val_sub", "lvis_v0.5_val_subset.json")
    return dataset, moved(fed_back(dataset), np.random.default_rng(0))
