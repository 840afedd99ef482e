import json
import re

import numpy as np
import pytest
import torch
from conftest import make_model, tiny_config
from PIL import Image

from efficientsam_hf import (
    EfficientSamProcessor,
    SegmentationStream,
    draw_segmentation,
    read_photo,
    segment,
    segment_everything,
    to_supervision,
)
from efficientsam_hf.masks_efficientsam import decode_rle


@pytest.fixture
def processor(config):
    return EfficientSamProcessor.from_model_config(config)


def test_best_mask_comes_first_at_the_photos_size(model, processor, photo):
    answer = segment(model, processor, photo, points=[[24, 20], [30, 22]])
    assert answer.masks.shape == (1, 3, 48, 80)
    assert answer.masks.dtype == torch.bool
    assert (answer.scores.diff(dim=-1) <= 0).all()
    inputs = processor(photo, input_points=[[[[24, 20], [30, 22]]]])
    sizes = inputs.pop("original_sizes")
    outputs = model(**inputs)
    best = int(outputs.iou_scores[0, 0].argmax())
    assert torch.equal(answer.masks[0, 0], processor.post_process_masks(outputs.pred_masks, sizes)[0][0, best])


@pytest.mark.parametrize(
    ("prompts", "objects"),
    [
        ({"points": [[24, 20]]}, 1),
        ({"points": [[24, 20]], "labels": [1]}, 1),
        ({"points": [[[24, 20]], [[60, 30], [62, 33]]]}, 2),
        ({"points": [[[24, 20]], [[60, 30], [62, 33]]], "labels": [[1], [1, 1]]}, 2),
        ({"boxes": [10, 8, 40, 30]}, 1),
        ({"boxes": [[10, 8, 40, 30], [50, 28, 74, 44]]}, 2),
        ({"points": [[24, 20]], "boxes": [10, 8, 40, 30]}, 1),
        ({"points": [[[24, 20]], None], "boxes": [None, [50, 28, 74, 44]]}, 2),
        ({"points": torch.tensor([[24.0, 20.0]])}, 1),
    ],
)
def test_prompts_as_people_write_them(model, processor, photo, prompts, objects):
    assert segment(model, processor, photo, **prompts).masks.shape == (objects, 3, 48, 80)


def test_embeddings_of_something_else_are_named(model, processor, photo):
    embeddings = segment(model, processor, photo, points=[[24, 20]]).image_embeddings
    array = embeddings.numpy()
    few = {"points_per_side": 1, "pred_iou_thresh": 0, "stability_score_thresh": 0}
    assert segment_everything(model, processor, photo, image_embeddings=array, **few) == segment_everything(
        model, processor, photo, image_embeddings=embeddings, **few
    )
    with pytest.raises(ValueError, match=r"image_embeddings wants \(1, 16, 4, 4\), found \(16, 4, 4\)"):
        segment_everything(model, processor, photo, image_embeddings=embeddings[0], **few)
    with pytest.raises(ValueError, match=r"image_embeddings wants \(1, 16, 4, 4\), found \(1, 5, 4, 4\)"):
        segment(model, processor, photo, points=[[24, 20]], image_embeddings=embeddings[:, :5])
    with pytest.raises(ValueError, match=r"image_embeddings wants \(1, 16, 4, 4\), found \(1, 16, 4, 2\)"):
        segment(model, processor, photo, points=[[24, 20]], image_embeddings=embeddings[..., :2])
    with pytest.raises(ValueError, match="wanted the embeddings of one picture, found those of 2"):
        segment(model, processor, photo, points=[[24, 20]], image_embeddings=embeddings.expand(2, -1, -1, -1))


def test_earlier_masks_come_in_any_form(photo):
    model = make_model(tiny_config(mask_prompts=True))
    processor = EfficientSamProcessor.from_model_config(model.config)
    mask = np.zeros((48, 80), bool)
    mask[10:30, 10:40] = True
    wanted = segment(model, processor, photo, points=[[24, 20]], masks=mask, zoom=0)
    for given in (Image.fromarray(mask), [Image.fromarray(mask)], [torch.from_numpy(mask)]):
        assert torch.equal(
            segment(model, processor, photo, points=[[24, 20]], masks=given, zoom=0).masks, wanted.masks
        )
    with pytest.raises(ValueError, match="masks wants arrays, tensors or pictures of one size, found others"):
        segment(model, processor, photo, points=[[24, 20]], masks=[None, mask])
    maps = [processor(photo, segmentation_maps=maps)["labels"] for maps in (Image.fromarray(mask), [mask])]
    assert torch.equal(*maps)


def test_answers_are_compared_as_objects(model, processor, photo):
    one, other = (segment(model, processor, photo, points=[[24, 20]]) for _ in range(2))
    assert one == one
    assert one != other


def test_a_size_that_is_set_later_may_be_a_dictionary(model, processor, photo):
    processor.image_processor.size = {"height": 64, "width": 64}
    answer = segment(model, processor, photo, points=[[24, 20]])
    again = segment(model, processor, photo, points=[[24, 20]], image_embeddings=answer.image_embeddings)
    assert torch.equal(again.masks, answer.masks)
    assert processor.image_processor.generate_crop_boxes(photo, 64)


@pytest.mark.parametrize("nothing", [None, []])
def test_what_no_object_has_may_stand_in_the_lists(model, processor, photo, nothing):
    boxes = [[10, 8, 40, 30], [50, 28, 74, 44]]
    wanted = segment(model, processor, photo, boxes=boxes)
    found = segment(model, processor, photo, points=[nothing] * 2, labels=[nothing] * 2, boxes=boxes)
    assert torch.equal(found.masks, wanted.masks)
    wanted = segment(model, processor, photo, points=[[24, 20]])
    assert torch.equal(segment(model, processor, photo, points=[[[24, 20]]], boxes=[nothing]).masks, wanted.masks)


@pytest.mark.parametrize("zoom", [0, 2.0])
@pytest.mark.parametrize(
    "prompts",
    [
        {"boxes": []},
        {"points": []},
        {"points": [], "labels": [], "boxes": []},
        {"boxes": np.zeros((0, 4))},
        {"masks": torch.zeros(0, 48, 80, dtype=torch.bool)},
        {"boxes": [], "masks": np.zeros((0, 48, 80), bool)},
    ],
)
def test_empty_lists_are_answered_with_no_objects(model, processor, photo, prompts, zoom):
    found, some = (segment(model, processor, photo, **given, zoom=zoom) for given in (prompts, {"points": [[24, 20]]}))
    assert found.masks.shape == (0, 3, 48, 80)
    assert found.masks.dtype == torch.bool
    assert found.scores.shape == (0, 3)
    assert torch.equal(found.image_embeddings, some.image_embeddings)
    assert found.records() == []
    assert repr(found) == "Segmentation(0 objects, 3 masks each, 48 x 80, best scores: )"
    assert found._repr_html_().count("<tr>") == 1
    assert found.show(photo, boxes=[]) == draw_segmentation(photo, np.zeros((0, 48, 80), bool))
    again = segment(model, processor, photo, **prompts, zoom=zoom, image_embeddings=found.image_embeddings)
    assert again.masks.shape == found.masks.shape


def test_no_prompt_at_all_is_an_error(model, processor, photo):
    with pytest.raises(ValueError, match="got no prompt"):
        segment(model, processor, photo)


def test_objects_together_are_as_each_alone(model, processor, photo):
    both = segment(model, processor, photo, points=[[[24, 20]], None], boxes=[None, [50, 28, 74, 44]])
    click = segment(model, processor, photo, points=[[24, 20]])
    box = segment(model, processor, photo, boxes=[50, 28, 74, 44])
    assert torch.equal(both.masks, torch.cat([click.masks, box.masks]))


def test_a_second_click_on_the_stored_embedding(model, processor, photo, monkeypatch):
    first = segment(model, processor, photo, points=[[24, 20]])
    fresh = segment(model, processor, photo, points=[[60, 35]])
    monkeypatch.setattr(model.vision_encoder, "forward", None)  # must not run again
    second = segment(model, processor, photo, points=[[60, 35]], image_embeddings=first.image_embeddings)
    assert torch.equal(second.masks, fresh.masks)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_an_embedding_of_another_precision(model, processor, photo, dtype):
    known = segment(model, processor, photo, points=[[24, 20]]).image_embeddings.to(dtype)
    found = segment(model, processor, photo, points=[[60, 35]], image_embeddings=known)
    wanted = segment(model, processor, photo, points=[[60, 35]], image_embeddings=known.float())
    assert torch.equal(found.scores, wanted.scores)
    assert found.image_embeddings.dtype == model.dtype


def test_records_are_what_they_say(model, processor, photo):
    answer = segment(model, processor, photo, boxes=[[10, 8, 40, 30], [50, 28, 74, 44]])
    records = json.loads(json.dumps(answer.records()))
    assert [record["id"] for record in records] == [0, 1]
    for record, mask in zip(records, answer.masks[:, 0], strict=True):
        assert torch.equal(decode_rle(record["segmentation"]), mask)
        assert record["area"] == mask.sum()
        x, y, width, height = record["bbox"]
        assert mask[y : y + height, x : x + width].sum() == mask.sum()


def test_paths_and_pictures_alike(model, processor, photo, tmp_path):
    Image.fromarray(photo).save(tmp_path / "photo.png")
    answers = [
        segment(model, processor, source, points=[[24, 20]]).masks
        for source in (photo, Image.fromarray(photo), tmp_path / "photo.png", str(tmp_path / "photo.png"))
    ]
    assert all(torch.equal(answers[0], other) for other in answers[1:])


def test_a_photo_of_floats(model, processor, photo):
    floats = photo.astype(np.float32)
    for source in (floats / 255, torch.from_numpy(photo.astype(np.float64) / 255)):
        assert np.array_equal(np.asarray(read_photo(source)), photo)
    for read in (read_photo, lambda source: segment(model, processor, source, points=[[24, 20]])):
        for wrong in (floats, floats - 300, floats * np.nan, Image.fromarray(floats[..., 0])):
            with pytest.raises(ValueError, match="floats want 0 to 1, found"):
                read(wrong)


@pytest.mark.parametrize("zoom", [0, 1.0])
def test_answers_may_be_written_into_and_trained_on(model, processor, photo, zoom):
    prompts = {"boxes": [[10, 8, 20, 16], [50, 28, 74, 44]]}
    stream = SegmentationStream(model, processor, zoom=zoom)([(photo, prompts)] * 2)
    first = segment(model, processor, photo, **prompts, zoom=zoom)
    known = segment(model, processor, photo, **prompts, zoom=zoom, image_embeddings=first.image_embeddings)
    for answer in (first, known, *stream):
        answer.masks[0, 0][:5] = True
        answer.scores[0] *= 2
        answer.image_embeddings[0, 0] += 1
        weight = torch.ones((), requires_grad=True)
        (answer.image_embeddings * weight).sum().backward()
        torch.testing.assert_close(weight.grad, answer.image_embeddings.sum())


def test_labels_that_the_weights_never_learnt(processor, model, photo):
    with pytest.raises(ValueError, match="never learnt background clicks"):
        segment(model, processor, photo, points=[[24, 20]], labels=[0])
    taught = make_model(tiny_config(negative_points=True))
    known = EfficientSamProcessor.from_model_config(taught.config)
    answer = segment(taught, known, photo, points=[[24, 20], [30, 20]], labels=[0, 1])
    assert answer.masks.shape == (1, 3, 48, 80)
    with pytest.raises(ValueError, match=r"object 1: wanted a click on it or a box, found .* background alone"):
        segment(taught, known, photo, points=[[[30, 20]], [[24, 20]]], labels=[[1], [0]])
    boxed = segment(taught, known, photo, points=[[24, 20]], labels=[0], boxes=[20, 10, 40, 30])
    assert boxed.masks.shape == (1, 3, 48, 80)


def test_one_click_needs_no_list_around_it(processor, model, photo):
    alone = segment(model, processor, photo, points=[24, 20])
    assert torch.equal(alone.scores, segment(model, processor, photo, points=[[24, 20]]).scores)
    marked = segment(model, processor, photo, points=(24, 20), labels=1)
    assert torch.equal(alone.scores, marked.scores)


# --------------------------------------------------------------------------------------------------------------------
# Going on from what was found


@pytest.fixture
def taught() -> tuple:
    model = make_model(tiny_config(mask_prompts=True))
    return model, EfficientSamProcessor.from_model_config(model.config)


def test_a_mask_is_shown_with_the_next_click(taught, photo):
    model, processor = taught
    clicks, mask = [[24, 20], [60, 35]], torch.zeros(48, 80, dtype=torch.bool)
    mask[10:30, 20:50] = True
    found = segment(model, processor, photo, points=clicks, masks=mask)
    inputs = processor(photo, input_points=[[clicks]], input_masks=mask[None, None])
    sizes = inputs.pop("original_sizes")
    outputs = model(**inputs)
    best = int(outputs.iou_scores[0, 0].argmax())
    assert torch.equal(found.masks[0, 0], processor.post_process_masks(outputs.pred_masks, sizes)[0][0, best])
    assert not torch.equal(found.scores, segment(model, processor, photo, points=clicks).scores)
    backwards = mask.numpy()[:, ::-1].copy()[:, ::-1]
    for same in (mask.numpy(), backwards, mask[None], mask.numpy().astype(np.uint8) * 255):
        assert torch.equal(segment(model, processor, photo, points=clicks, masks=same).masks, found.masks)


def test_each_object_has_a_mask_of_its_own(taught, photo):
    before = segment(*taught, photo, boxes=[[10, 8, 40, 30], [50, 28, 74, 44]])
    points, masks = [[[24, 20]], [[60, 35]]], before.masks[:, 0]
    both = segment(*taught, photo, points=points, masks=masks)
    for row in range(2):
        alone = segment(*taught, photo, points=points[row], masks=masks[row])
        torch.testing.assert_close(both.scores[row], alone.scores[0])


def test_a_mask_alone_can_be_gone_on_from(taught, photo):
    first = segment(*taught, photo, points=[[24, 20]])
    assert segment(*taught, photo, masks=first.masks[:, 0]).masks.shape == (1, 3, 48, 80)


MISFITS = {
    "logits": (torch.zeros(48, 80), "found a mask of torch.float32, wanted booleans"),
    "another size": (
        np.zeros((80, 48), bool),
        r"masks wants booleans of the photo's size \(48, 80\), .* \(1, 80, 48\)",
    ),
    "all candidates": (np.zeros((1, 3, 48, 80), bool), r"one an object, found \(1, 3, 48, 80\)"),
    "one too many": (np.zeros((2, 48, 80), bool), r"\(images, objects, h, w\) = \(1, 1\), found \[\(2, 48, 80\)\]"),
}


@pytest.mark.parametrize(("masks", "message"), MISFITS.values(), ids=MISFITS)
def test_a_mask_that_does_not_fit_is_refused(taught, photo, masks, message):
    with pytest.raises(ValueError, match=message):
        segment(*taught, photo, points=[[24, 20]], masks=masks)


def test_weights_that_never_learnt_masks_refuse_them(model, processor, photo):
    with pytest.raises(ValueError, match="never learnt mask prompts"):
        segment(model, processor, photo, points=[[24, 20]], masks=np.ones((48, 80), bool))


# --------------------------------------------------------------------------------------------------------------------
# In a notebook


def test_an_answer_says_what_it_is(processor, model, photo):
    answer = segment(model, processor, photo, boxes=[[10, 8, 40, 30], [50, 28, 74, 44]])
    first, second = answer.scores[:, 0].tolist()
    assert repr(answer) == f"Segmentation(2 objects, 3 masks each, 48 x 80, best scores: {first:.2f}, {second:.2f})"
    rows = re.findall(r"<tr><td>(.*?)</td></tr>", answer._repr_html_())
    assert [row.split("</td><td>")[0] for row in rows] == ["0", "1"]
    assert [int(row.split("</td><td>")[2].replace(",", "")) for row in rows] == [r["area"] for r in answer.records()]


def test_show_draws_the_best_masks(processor, model, photo, tmp_path):
    box = [10, 8, 40, 30]
    answer = segment(model, processor, photo, boxes=box)
    drawn = answer.show(photo, boxes=box)
    assert drawn == draw_segmentation(photo, answer.masks[:, 0].numpy(), boxes=[box])
    Image.fromarray(photo).save(tmp_path / "photo.png")
    assert answer.show(tmp_path / "photo.png", boxes=[box]) == drawn
    with pytest.raises(ValueError, match="like the photo"):
        answer.show(photo[:40])


def test_records_become_supervision_s_detections(processor, model, photo):
    supervision = pytest.importorskip("supervision", reason="needs the extra [supervision]")
    answer = segment(model, processor, photo, boxes=[[10, 8, 40, 30], [50, 28, 74, 44]])
    found = answer.to_supervision()
    assert isinstance(found, supervision.Detections)
    assert np.array_equal(found.mask, answer.masks[:, 0].numpy())
    assert np.allclose(found.confidence, answer.scores[:, 0], atol=1e-4)
    assert np.array_equal(found.area, [record["area"] for record in answer.records()])
    assert found.data["id"] == [0, 1]
    # Its own reading of SAM's records, of which ours are a kind, agrees.
    records = [{**r, "segmentation": decode_rle(r["segmentation"]).numpy()} for r in answer.records()]
    theirs = supervision.Detections.from_sam(sorted(records, key=lambda record: -record["area"]))
    order = np.argsort(-found.area, kind="stable")
    assert np.array_equal(theirs.mask, found.mask[order])
    widths = theirs.xyxy[:, 2:] - theirs.xyxy[:, :2]
    assert np.array_equal(widths, (found.xyxy[:, 2:] - found.xyxy[:, :2])[order])
    labelled = to_supervision([{**record, "category_id": 7} for record in answer.records()])
    assert labelled.class_id.tolist() == [7, 7]
    assert supervision.MaskAnnotator().annotate(photo.copy(), found).shape == photo.shape
    assert len(to_supervision([])) == 0


@pytest.mark.parametrize("nothing", [{"boxes": [-1, -1, -1, -1]}, {"points": [[-1, -1]], "labels": [-1]}])
def test_padding_alone_is_no_prompt(model, photo, nothing):
    processor = EfficientSamProcessor.from_model_config(model.config)
    with pytest.raises(ValueError, match="object 0: wanted a click on it or a box, found neither"):
        segment(model, processor, photo, **nothing)


def test_a_mask_is_asked_with_where_nothing_else_is(photo):
    model = make_model(tiny_config(mask_prompts=True))
    processor = EfficientSamProcessor.from_model_config(model.config)
    mask = np.ones((48, 80), dtype=bool)  # too large for a closer look
    plain = segment(model, processor, photo, masks=mask, zoom=0)
    padded = segment(model, processor, photo, [[-1, -1]], [-1], masks=mask, zoom=2)
    assert torch.allclose(padded.scores, plain.scores, atol=1e-5)
