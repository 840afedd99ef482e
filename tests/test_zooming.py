"""A closer look: the same prompt on a crop around the object, put back where it belongs."""

import json

import numpy as np
import pytest
import torch
from conftest import make_model, tiny_config
from PIL import Image
from transformers import SamConfig

from efficientsam_cli.predictors import load_predictor
from efficientsam_hf import EfficientSamProcessor, load_checkpoint, segment
from efficientsam_hf.evaluation.predictor import Prompts, ZoomingPredictor
from efficientsam_hf.masks_efficientsam import mask_iou
from efficientsam_hf.zooming import Pointed, look_closer, window_around

SIZE = (100, 200)


@pytest.fixture(scope="module")
def model():
    return make_model(tiny_config(negative_points=True, mask_prompts=True))


@pytest.fixture(scope="module")
def processor(model):
    return EfficientSamProcessor.from_model_config(model.config)


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 255, (*SIZE, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@pytest.mark.parametrize("zoom", [1.0, 2.0, 3.5])
@pytest.mark.parametrize("box", [(50, 40, 70, 60), (0, 0, 3, 2), (190, 95, 200, 100), (10, 50, 60, 52)], ids=str)
def test_a_window_holds_its_box_and_lies_in_the_picture(box, zoom):
    left, top, right, bottom = window_around(box, SIZE, zoom)
    assert 0 <= left <= box[0]
    assert box[2] <= right <= SIZE[1]
    assert 0 <= top <= box[1]
    assert box[3] <= bottom <= SIZE[0]


def test_a_window_is_so_many_times_its_box_and_not_too_narrow():
    left, top, right, bottom = window_around((80, 40, 100, 60), SIZE, 2.0)
    assert (right - left, bottom - top) == (41, 41)
    left, top, right, bottom = window_around((80, 50, 120, 52), SIZE, 2.0)
    assert (right - left, bottom - top) == (81, 41)


def test_what_fills_the_picture_is_not_looked_at_again():
    assert window_around((0, 0, 200, 100), SIZE, 1.0) is None
    assert window_around((40, 20, 160, 80), SIZE, 2.0) is None
    assert window_around((-50, -50, -40, -40), SIZE, 2.0) is None


def test_clicks_move_with_the_window_and_those_outside_stay_out():
    pointed = Pointed([[30, 20], [150, 90], [31, 22]], [1, 0, -1], [20, 10, 40, 30])
    assert pointed.inside((10, 5, 60, 50), (100, 200)) == Pointed([[20, 15]], [1], [10, 5, 30, 25])


def test_a_picture_s_far_edges_belong_to_the_window_that_ends_there():
    pointed = Pointed([[60, 50], [60, 20], [30, 50]], [1, 1, 1])
    assert pointed.inside((10, 5, 60, 50), (50, 60)).points == [[50, 45], [50, 15], [20, 45]]
    assert pointed.inside((10, 5, 60, 50), (51, 61)).points == []


def test_a_click_on_the_far_edge_is_answered():
    model, processor = load_checkpoint(device="cpu")
    y, x = np.mgrid[:400, :600]
    disc = (x - 590) ** 2 + (y - 200) ** 2 < 30**2
    photo = np.full((400, 600, 3), 120, np.uint8)
    photo[disc] = (200, 30, 30)
    answer = segment(model, processor, photo, points=[[600, 200], [560, 180]], labels=[1, 0], zoom=2)
    assert mask_iou(answer.masks[0, 0], torch.from_numpy(disc)) > 0.5


def test_the_region_is_the_box_or_else_the_first_mask_with_the_clicks_on_the_object():
    mask = torch.zeros(SIZE, dtype=torch.bool)
    mask[20:30, 40:50] = True
    assert Pointed([[60, 25], [199, 99]], [1, 0]).region(mask) == [40, 20, 61, 30]
    assert Pointed([[60, 25]], [1], [10, 10, 20, 20]).region(mask) == [10, 10, 61, 26]
    for label in (0, 1):
        assert Pointed([[60, 25]], [label]).region(~mask & mask) is None


def test_a_mask_that_is_given_says_where_to_look_and_goes_with_the_window():
    answer, mask = torch.zeros(2, *SIZE, dtype=torch.bool)
    mask[20:30, 40:50], answer[80:90, 180:190] = True, True
    pointed = Pointed([[45, 25], [199, 99]], [1, 0], mask=mask)
    window = pointed.window(answer, 2.0)
    assert window == window_around([40, 20, 50, 30], SIZE, 2.0)
    left, top, right, bottom = window
    assert torch.equal(pointed.inside(window, (100, 200)).mask, mask[top:bottom, left:right])
    # One that fills the picture shows nothing larger.
    assert Pointed([[185, 85]], [1], mask=~mask).window(answer, 2.0) == window_around([180, 80, 190, 90], SIZE, 2.0)


def test_a_mask_without_a_click_on_its_object_says_nothing_of_where_that_ends():
    answer, mask = torch.zeros(2, *SIZE, dtype=torch.bool)
    mask[20:30, 40:50], answer[60:70, 150:160] = True, True
    around = window_around([150, 60, 161, 71], SIZE, 2.0)
    for earlier in (mask, mask & ~mask):
        assert Pointed([[160, 70]], [1], mask=earlier).window(answer, 2.0) == around
        assert Pointed([[SIZE[1], SIZE[0]]], [1], mask=earlier).window(mask & ~mask, 2.0) is None


def test_only_what_a_window_shows_larger_is_asked_again():
    """Object 0 is small, 1 fills the picture, of 2 nothing is known but the background, and 3 has a large box."""
    logits, scores = torch.full((4, 1, *SIZE), -1.0), torch.zeros(4, 1)
    logits[1], drawn = 1.0, []
    seen = []

    def draw(rows):
        drawn.append(rows)
        return rows >= 0

    def ask(part, pointed):
        seen.append((part, pointed))
        return torch.ones(1, *part.shape[1:], dtype=torch.bool), torch.ones(1)

    objects = [
        Pointed(box=[50, 40, 60, 50]),
        Pointed([[3, 3]], [1]),
        Pointed([[3, 3]], [0]),
        Pointed(box=[0, 0, *SIZE]),
    ]
    picture = torch.arange(SIZE[0] * SIZE[1]).view(1, *SIZE)
    found, found_scores = look_closer(picture, logits, scores, objects, 2.0, draw, ask)
    left, top, right, bottom = window_around([50, 40, 60, 50], SIZE, 2.0)
    ((part, pointed),) = seen
    assert torch.equal(part, picture[:, top:bottom, left:right])
    assert pointed == Pointed([], [], [50 - left, 40 - top, 60 - left, 50 - top])
    assert found[0, 0, top:bottom, left:right].all()
    assert found[0].sum() == (right - left) * (bottom - top)
    assert torch.equal(found[1:], logits[1:] >= 0)
    assert found_scores.flatten().tolist() == [1, 0, 0, 0]
    assert [len(rows) for rows in drawn] == [3], "what a box says is looked at closer is not drawn before"


def test_the_answer_is_that_of_the_crop(model, processor, photo):
    box = [120, 30, 150, 60]
    left, top, right, bottom = window_around(box, SIZE, 2.0)
    moved = [box[0] - left, box[1] - top, box[2] - left, box[3] - top]
    wanted = segment(model, processor, photo.crop((left, top, right, bottom)), boxes=moved)
    found = segment(model, processor, photo, boxes=box, zoom=2.0)
    assert torch.equal(found.masks[0, :, top:bottom, left:right], wanted.masks[0])
    assert torch.equal(found.scores, wanted.scores)
    plain = segment(model, processor, photo, boxes=box)
    assert torch.equal(found.image_embeddings, plain.image_embeddings)


def test_objects_do_not_depend_on_each_other(model, processor, photo):
    clicks, labels, box = [[30.0, 30.0], [34.0, 31.0]], [1, 0], [120, 30, 150, 60]
    both = segment(model, processor, photo, [clicks, None], [labels, None], [None, box], zoom=2.0)
    alone = (
        segment(model, processor, photo, clicks, labels, zoom=2.0),
        segment(model, processor, photo, boxes=box, zoom=2.0),
    )
    for row, answer in enumerate(alone):
        torch.testing.assert_close(both.scores[row], answer.scores[0])
        assert (both.masks[row] != answer.masks[0]).float().mean() < 1e-3


@pytest.mark.parametrize(
    ("over", "clipped"),
    [
        ([-500, 40, 30, 60], [0, 40, 30, 60]),
        ([170, 40, 900, 60], [170, 40, 200, 60]),
        ([90, -70, 110, 20], [90, 0, 110, 20]),
        ([90, 80, 110, 400], [90, 80, 110, 100]),
        ([-90, -90, 30, 20], [0, 0, 30, 20]),
    ],
)
def test_a_box_over_the_edge_is_the_part_on_the_picture(model, processor, photo, over, clipped):
    wanted = segment(model, processor, photo, boxes=clipped, zoom=2.0)
    found = segment(model, processor, photo, boxes=over, zoom=2.0)
    assert torch.equal(found.masks, wanted.masks)
    assert torch.equal(found.scores, wanted.scores)
    assert not torch.equal(found.scores, segment(model, processor, photo, boxes=clipped, zoom=0).scores)


def test_a_padded_box_is_no_box(model, processor, photo):
    points, box = [[[130.0, 40.0]], None], [120, 30, 150, 60]
    wanted = segment(model, processor, photo, points, boxes=[None, box], zoom=1.0)
    found = segment(model, processor, photo, points, boxes=[[-1, -1, -1, -1], box], zoom=1.0)
    assert torch.equal(found.masks, wanted.masks)


@pytest.mark.parametrize("points", [np.array([[30.0, 30.0]]), [np.array([30.0, 30.0])], ((30.0, 30.0),)])
def test_prompts_may_be_arrays_and_tuples(model, processor, photo, points):
    wanted = segment(model, processor, photo, points=[[30.0, 30.0]], zoom=2.0)
    assert torch.equal(segment(model, processor, photo, points=points, zoom=2.0).masks, wanted.masks)


def test_a_mask_is_looked_at_closely_at_once(model, processor, photo):
    """On the window around it, wherever the answer to the clicks alone would be."""
    mask = torch.zeros(SIZE, dtype=torch.bool)
    mask[30:60, 120:150] = True
    left, top, right, bottom = window_around([120, 30, 150, 60], SIZE, 2.0)
    found = segment(model, processor, photo, points=[[130, 40]], masks=mask, zoom=2.0)
    crop, part = photo.crop((left, top, right, bottom)), mask[top:bottom, left:right]
    wanted = segment(model, processor, crop, points=[[130 - left, 40 - top]], masks=part)
    assert torch.equal(found.masks[0, :, top:bottom, left:right], wanted.masks[0])
    assert found.masks.sum() == wanted.masks.sum()
    assert torch.equal(found.scores, wanted.scores)
    alone = segment(model, processor, photo, masks=mask, zoom=2.0)
    assert torch.equal(alone.scores, segment(model, processor, crop, masks=part).scores)


def test_where_there_is_nothing_to_look_at_closely_the_clicks_are_asked_alone(model, processor, photo):
    """But a mask without clicks is shown, having nothing else."""
    everywhere = torch.ones(SIZE, dtype=torch.bool)
    plain = segment(model, processor, photo, points=[[130, 40]])
    window = Pointed([[130, 40]], [1]).window(plain.masks[0, 0], 1.0)
    assert window is None, "the answer fills the picture"
    assert torch.equal(
        segment(model, processor, photo, points=[[130, 40]], masks=everywhere, zoom=1.0).scores, plain.scores
    )
    shown = segment(model, processor, photo, masks=everywhere, zoom=1.0)
    assert torch.equal(shown.scores, segment(model, processor, photo, masks=everywhere).scores)
    both = segment(model, processor, photo, [[[130, 40]], None], masks=torch.stack([everywhere] * 2), zoom=1.0)
    torch.testing.assert_close(both.scores[1], shown.scores[0])


@pytest.mark.parametrize("zoom", [0.5, -1, float("nan"), float("inf"), "2", [2]])
def test_a_zoom_that_shrinks_is_refused(model, processor, photo, zoom):
    with pytest.raises(ValueError, match="zoom wants 0 or a number from 1 on"):
        segment(model, processor, photo, points=[[30, 30]], zoom=zoom)


def test_the_config_says_what_suits_the_weights(model, processor, photo, tmp_path, monkeypatch):
    monkeypatch.setattr(model.config, "zoom", 2.0)
    closer, plain = (segment(model, processor, photo, boxes=[120, 30, 150, 60], zoom=zoom) for zoom in (None, 0))
    assert not torch.equal(closer.scores, plain.scores)
    model.config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["zoom"] == 2.0
    assert type(model.config).from_pretrained(tmp_path).zoom == 2.0


def test_what_is_evaluated_is_what_segment_answers(model, processor, photo):
    predictor = ZoomingPredictor(model, processor, "closer", 2.0)
    boxes = np.array([[120.0, 30, 150, 60], [5, 5, 20, 25]])
    embedded = predictor.embed(photo)
    answer = predictor.decode(embedded, Prompts(boxes=boxes))
    wanted = segment(model, processor, photo, boxes=boxes, zoom=2.0)
    np.testing.assert_array_equal(predictor.at_size(embedded, answer.logits[:, 0]), wanted.masks[:, 0].numpy())
    assert predictor.mask_prompts
    answer = predictor.decode(embedded, Prompts(boxes=boxes, masks=answer.best_logits()))
    wanted = segment(model, processor, photo, boxes=boxes, zoom=2.0, masks=wanted.masks[:, 0])
    np.testing.assert_array_equal(predictor.at_size(embedded, answer.logits[:, 0]), wanted.masks[:, 0].numpy())


def test_the_bundled_checkpoint_sees_small_objects_only_so():
    """A disc of 24 pixels in a picture of 960 x 720: by the box without a closer look, and with it."""
    y, x = np.mgrid[:720, :960]
    disc = (x - 700) ** 2 + (y - 200) ** 2 <= 12**2
    picture = np.where(disc[..., None], [210, 60, 40], [70, 120, 90]).astype(np.uint8)
    model, processor = load_checkpoint(device="cpu")
    assert model.config.zoom == 2.0
    processor.image_processor.edge_radius = 0  # which finds this disc in either answer
    answers = (segment(model, processor, picture, boxes=[688, 188, 713, 213], zoom=zoom) for zoom in (0, None))
    plain, closer = (answer.masks[0, 0].numpy() for answer in answers)
    ious = [(mask & disc).sum() / (mask | disc).sum() for mask in (plain, closer)]
    assert ious[1] > max(0.7, ious[0] + 0.1), ious


def test_the_command_that_evaluates_looks_closer_where_it_is_told_to(model, processor, tmp_path):
    model.save_pretrained(tmp_path / "tiny")
    processor.save_pretrained(tmp_path / "tiny")
    closer, plain = (load_predictor(str(tmp_path / "tiny"), "cpu", zoom) for zoom in (2.0, 0))
    assert isinstance(closer, ZoomingPredictor)
    assert not isinstance(plain, ZoomingPredictor)
    assert closer.name == "tiny, zoom 2"
    SamConfig().save_pretrained(tmp_path / "sam")
    for peer in (str(tmp_path / "sam"), "encoder.onnx,decoder.onnx"):
        with pytest.raises(ValueError, match="--zoom is for this package's models"):
            load_predictor(peer, "cpu", 2.0)
