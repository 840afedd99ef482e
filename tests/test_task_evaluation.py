"""Figures of instances and of pixel classes against slow obvious versions, and against answers that are the truth."""

import numpy as np
import pytest
import torch
from PIL import Image
from test_recipes import room  # noqa: F401  # the fixture

from efficientsam_hf.data.coco import read_dataset
from efficientsam_hf.data.instances import CocoInstances, InstancePicture
from efficientsam_hf.evaluation.coco_ap import average_precision, truth_of
from efficientsam_hf.evaluation.mask_sets import (
    best_instances,
    instance_rows,
    masks_at_full_size,
    pixel_classes,
    predict_instances,
)
from efficientsam_hf.evaluation.semantic import ConfusionMatrix
from efficientsam_hf.training.mask_rcnn import MaskRcnnOutput


def logits_of(picture, queries: int = 5, classes: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """What a model would say that knows the picture's instances, and has queries left for nothing."""
    masks = torch.full((queries, *picture.masks.shape[1:]), -5.0)
    scores = torch.zeros(queries, classes + 1)
    scores[:, -1] = 9
    for number, (mask, label) in enumerate(zip(picture.masks, picture.labels, strict=True)):
        masks[number][torch.from_numpy(mask)] = 5.0
        scores[number, -1], scores[number, label] = 0, 9
    return scores, masks


def test_the_truth_scores_one_and_a_shifted_truth_less(room):  # noqa: F811
    path = room / "coco" / "instances.json"
    items = CocoInstances(path, room / "coco" / "pictures")
    figures = {}
    for shift in (0, 2, 40):
        rows = []
        for picture in (items[0], items[1]):
            scores, masks = logits_of(picture)
            rows += instance_rows(scores, masks.roll(shift, -1), picture.number, items.category_ids)
        figures[shift] = average_precision(read_dataset(path), rows)
    assert figures[0]["AP"] == figures[0]["AP50"] == 1
    assert 0.1 < figures[2]["AP"] < 1
    assert figures[2]["AP50"] == 1
    assert figures[40]["AP"] < 0.1
    by_hand = truth_of([items[0], items[1]], items.names)
    rows = [row for p in (items[0], items[1]) for row in instance_rows(*logits_of(p), p.number, [0, 1])]
    assert average_precision(by_hand, rows)["AP"] == 1
    before = [dict(row) for row in rows]
    assert average_precision(by_hand, rows, "bbox")["AP"] == 1
    assert rows == before
    assert average_precision(by_hand, [])["AP"] == average_precision(by_hand, [], "bbox")["AP"] == 0


def test_results_of_nowhere_are_named(room):  # noqa: F811
    path = room / "coco" / "instances.json"
    picture = CocoInstances(path, room / "coco" / "pictures")[0]
    with pytest.raises(ValueError, match="has image_id 9: wanted one of the 2"):
        average_precision(read_dataset(path), instance_rows(*logits_of(picture), 9, [3, 7]))
    with pytest.raises(ValueError, match="has category_id 1: wanted one of the 2"):
        average_precision(read_dataset(path), instance_rows(*logits_of(picture), 0, [1, 7]))


def test_best_instances_as_an_obvious_version_says():
    generator = torch.Generator().manual_seed(0)
    scores, masks = torch.randn(4, 4, generator=generator), torch.randn(4, 6, 7, generator=generator)
    masks[2] = -1
    wanted = []
    for query in range(4):
        mask = masks[query] > 0
        if mask.any():
            sure = masks[query].sigmoid()[mask].mean().item()
            shares = scores[query].softmax(0)
            wanted += [(shares[label].item() * sure, label, query) for label in range(3)]
    found, values, labels = best_instances(scores, masks, limit=100)
    wanted.sort(reverse=True)
    assert values.tolist() == pytest.approx([score for score, _, _ in wanted], abs=1e-6)
    assert labels.tolist() == [label for _, label, _ in wanted]
    assert all(torch.equal(mask, masks[query] > 0) for mask, (_, _, query) in zip(found, wanted, strict=True))
    few, _, _ = best_instances(scores, masks, limit=2)
    assert len(few) <= 2


def test_masks_come_back_to_the_picture_s_own_place():
    """A square of logits that is positive over the placed picture's left half."""
    logits = torch.full((1, 16, 16), -1.0)
    logits[..., :8] = 1
    masks = masks_at_full_size(logits, frame=(64, 64), placed=(40, 64), original=(80, 128)) > 0
    assert masks.shape == (1, 80, 128)
    assert torch.equal(masks[0], (torch.arange(128) < 64).expand(80, 128))
    below = torch.full((1, 16, 16), -1.0)
    below[:, 10:] = 1
    assert not (masks_at_full_size(below, (64, 64), placed=(38, 64), original=(38, 64)) > 0).any()


def test_pixels_take_the_class_that_most_speaks_for_them():
    scores = torch.tensor([[9.0, 0, 0], [0, 9.0, 0], [0, 0, 9.0]])
    masks = torch.tensor([[[5.0, -5]], [[-5, 5]], [[9, 9]]])
    assert pixel_classes(scores, masks).tolist() == [[0, 1]]


def test_confusion_as_an_obvious_version_says():
    generator = np.random.default_rng(0)
    true, guessed = generator.integers(4, size=(2, 9, 8)), generator.integers(3, size=(2, 9, 8))
    true[0, :2] = 255
    matrix = ConfusionMatrix(6)
    for one, two in zip(guessed, true, strict=True):
        matrix.add(torch.from_numpy(one), torch.from_numpy(two))
    known = true != 255
    ious, accuracies = [], []
    for label in range(4):
        mine, theirs = (true == label) & known, (guessed == label) & known
        ious.append((mine & theirs).sum() / (mine | theirs).sum())
        accuracies.append((mine & theirs).sum() / mine.sum())
    wanted = {
        "mean_iou": np.mean(ious),
        "mean_accuracy": np.mean(accuracies),
        "overall_accuracy": (true == guessed)[known].mean(),
    }
    assert matrix.figures() == pytest.approx(wanted)


def test_confusion_out_of_range_is_named():
    matrix = ConfusionMatrix(3)
    with pytest.raises(ValueError, match="classes must be from 0 to 2, got from 0 to 3"):
        matrix.add(torch.tensor([0, 1]), torch.tensor([3, 1]))
    with pytest.raises(ValueError, match="must have one shape"):
        matrix.add(torch.zeros(2), torch.zeros(3))


def test_boxes_of_a_detector_are_its_own(model_that_detects):
    """Also where its masks are smaller, or empty."""
    rows = predict_instances(
        model_that_detects, torch.zeros(1, 3, 64, 64), 7, [3, 5], frame=(64, 64), placed=(48, 64), original=(96, 128)
    )
    assert [row["bbox"] for row in rows] == [[16, 8, 64, 40], [0, 0, 128, 96]]
    assert [row["category_id"] for row in rows] == [3, 5]
    truth = truth_of([InstancePicture(7, Image.new("RGB", (128, 96)), box_mask(), np.array([0]))], ["box", "other"])
    truth["categories"] = [{"id": 3, "name": "box"}, {"id": 5, "name": "other"}]
    truth["annotations"][0]["category_id"] = 3
    assert average_precision(truth, rows, "bbox")["AP"] == 1
    assert average_precision(truth, rows)["AP"] == 0, "its mask is half of the object"


def box_mask() -> np.ndarray:
    mask = np.zeros((1, 96, 128), bool)
    mask[0, 8:48, 16:80] = True
    return mask


@pytest.fixture
def model_that_detects():
    """A whole box with half a mask, and a box that reaches out of the picture, without any."""
    masks = torch.zeros(2, 1, 64, 64)
    masks[0, 0, 4:24, 8:22] = 1
    boxes = torch.tensor([[8.0, 4, 40, 24], [-3, 0, 64, 60]])
    found = {"boxes": boxes, "labels": torch.tensor([1, 2]), "scores": torch.tensor([0.9, 0.8]), "masks": masks}
    return lambda pixel_values: MaskRcnnOutput(detections=[found])
