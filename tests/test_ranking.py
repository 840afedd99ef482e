"""Which of a prompt's masks is the best: the same one wherever it is asked."""

import numpy as np
import pytest
import torch
from PIL import Image

from efficientsam_hf import EfficientSamConfig, EfficientSamProcessor, SegmentationStream, segment
from efficientsam_hf.evaluation.predictor import EfficientSamPredictor, Prompts, ZoomingPredictor
from efficientsam_hf.masks_efficientsam import stability_score
from efficientsam_hf.ranking_efficientsam import prompt_agreement, rank_masks

BOXES = [[4.0, 2, 60, 40], [20, 10, 40, 30], [50, 28, 74, 44], [0, 0, 79, 47], [30, 30, 35, 44]]
CLICKS = [[[30.0, 20], [50, 36]], [[25, 28], [36, 12]], [[60, 30], [70, 40]], [[3, 3], [70, 9]], [[32, 31], [34, 42]]]
WAYS = ["rank_by_stability", "rank_by_prompt"]


def box_and_clicks(box=(2, 1, 6, 5), clicks=((3, 2, 1), (7, 7, 0))):
    """One prompt as the model takes it, in pixels of patches of 4, so that they are cells of the masks, too."""
    points = torch.tensor([[[[x + 0.5, y + 0.5] for x, y, _ in clicks]]])
    prompts = {"input_points": points, "input_labels": torch.tensor([[[label for _, _, label in clicks]]])}
    return prompts if box is None else {**prompts, "input_boxes": torch.tensor([[box]]).float()}


def rank_one(mask, prompts):
    """What agreement alone makes of one mask (8, 8)."""
    config = EfficientSamConfig(vision_config={"patch_size": 4, "image_size": 8}, rank_by_prompt=True)
    logits = torch.where(mask, 1.0, -1.0)[None, None, None]
    return rank_masks(logits, torch.ones(1, 1, 1).half(), config, prompts).item()


def painted(x0, y0, x1, y1):
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[y0:y1, x0:x1] = True
    return mask


def test_ranks_are_predicted_iou_or_that_times_stability():
    masks, scores = torch.randn(1, 2, 3, 8, 8), torch.rand(1, 2, 3).half()
    plain, stable = EfficientSamConfig(), EfficientSamConfig(rank_by_stability=True)
    assert torch.equal(rank_masks(masks, scores, plain, box_and_clicks()), scores.float())
    assert torch.equal(rank_masks(masks, scores, stable, {}), scores.float() * stability_score(masks))


def test_a_mask_that_does_what_was_asked_loses_nothing():
    assert rank_one(painted(2, 1, 6, 5), box_and_clicks()) == 1
    assert rank_one(painted(0, 0, 1, 1), {"input_points": None}) == 1
    assert rank_one(painted(3, 2, 8, 6), box_and_clicks(box=None)) == 1


def test_a_mask_loses_what_its_box_lacks_of_the_one_asked_for():
    assert rank_one(painted(2, 1, 4, 5), box_and_clicks()) == 0.5
    assert rank_one(painted(2, 1, 6, 5) & ~painted(3, 3, 6, 5), box_and_clicks()) == 1  # its own box is the same
    assert rank_one(painted(6, 5, 8, 8), box_and_clicks()) == 0
    assert rank_one(painted(0, 0, 0, 0), box_and_clicks()) == 0


def test_a_mask_loses_half_of_the_share_of_clicks_that_it_misses():
    assert rank_one(painted(3, 2, 8, 8), box_and_clicks(box=None)) == 0.75
    assert rank_one(painted(6, 6, 8, 8), box_and_clicks(box=None)) == 0.5
    assert rank_one(painted(2, 1, 4, 5), box_and_clicks(clicks=((5, 2, 1),))) == 0.25
    # Padding is no click, and one at the picture's edge is on its last cell.
    assert rank_one(painted(3, 2, 8, 6), box_and_clicks(box=None, clicks=((3, 2, 1), (-1.5, -1.5, -1)))) == 1
    assert rank_one(painted(6, 6, 8, 8), box_and_clicks(box=None, clicks=((7.5, 7.5, 1),))) == 1


def test_a_prompt_s_agreement_does_not_depend_on_the_others():
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(2, 3, 4, 8, 8, generator=generator) > 0.7
    points = torch.randint(0, 8, (2, 3, 5, 2), generator=generator).float().sort(dim=2).values
    labels = torch.tensor([[2, 3, 1, 0, -1], [-1, -1, -1, -1, -1], [1, 0, 1, 2, 3]]).expand(2, -1, -1)
    together = prompt_agreement(masks, points, labels)
    for row in range(2):
        for prompt in range(3):
            place = slice(row, row + 1), slice(prompt, prompt + 1)
            assert torch.equal(
                prompt_agreement(masks[place], points[place], labels[place])[0, 0], together[row, prompt]
            )
    assert (together[:, 1] == 1).all()
    assert len(together.unique()) > 4


@pytest.mark.parametrize("way", WAYS)
def test_a_config_keeps_how_to_rank(tmp_path, way):
    assert not getattr(EfficientSamConfig(), way)
    EfficientSamConfig(**{way: True}).save_pretrained(tmp_path)
    assert getattr(EfficientSamConfig.from_pretrained(tmp_path), way)


@pytest.fixture(params=WAYS)
def ranking(model, photo, request):
    """A model that ranks one way, its processor, and which masks are the best; some are not by predicted IoU."""
    setattr(model.config, request.param, True)
    if request.param == "rank_by_prompt":  # among random scores, which may be below 0, one mask would always be ahead
        torch.nn.init.zeros_(model.mask_decoder.iou_head.layers[-1].weight)
        torch.nn.init.constant_(model.mask_decoder.iou_head.layers[-1].bias, 0.5)
    processor = EfficientSamProcessor.from_model_config(model.config)
    inputs = processor(photo, input_boxes=[BOXES], input_points=[CLICKS])
    del inputs["original_sizes"]
    with torch.inference_mode():
        outputs = model(**inputs)
    if request.param == "rank_by_stability":
        factors = stability_score(outputs.pred_masks)
    else:
        slots = torch.cat([inputs["input_boxes"].unflatten(-1, (2, 2)), inputs["input_points"]], dim=2)
        labels = torch.tensor([2, 3, 1, 1]).expand(1, len(BOXES), 4)
        factors = prompt_agreement(outputs.pred_masks >= 0, slots * 4 / model.config.vision_config.patch_size, labels)
    best = (outputs.iou_scores * factors)[0].argmax(1)
    assert not torch.equal(best, outputs.iou_scores[0].argmax(1))
    return model, processor, inputs, outputs, best


def test_the_model_s_single_mask_is_the_best(ranking):
    model, _, inputs, outputs, best = ranking
    with torch.inference_mode():
        single = model(**inputs, multimask_output=False)
    rows = torch.arange(len(BOXES))
    assert torch.allclose(single.pred_masks[0, :, 0], outputs.pred_masks[0, rows, best], atol=1e-5)
    assert torch.allclose(single.iou_scores[0, :, 0], outputs.iou_scores[0, rows, best], atol=1e-5)


def test_segment_and_a_stream_give_the_best_first(ranking, photo):
    model, processor, _, outputs, best = ranking
    answer = segment(model, processor, photo, CLICKS, boxes=BOXES)
    (streamed,) = SegmentationStream(model, processor)([(photo, {"boxes": BOXES, "points": CLICKS})])
    sizes = [list(photo.shape[:2])]
    wanted = processor.post_process_masks(outputs.pred_masks, sizes)[0][torch.arange(len(BOXES)), best]
    for found in (answer, streamed):
        assert torch.equal(found.masks[:, 0], wanted)
        assert torch.allclose(found.scores[:, 0], outputs.iou_scores[0, torch.arange(len(BOXES)), best], atol=1e-5)


def test_what_is_evaluated_is_the_best(ranking, photo):
    model, processor, _, _, best = ranking
    picture, prompts = Image.fromarray(photo), Prompts(np.array(CLICKS), np.ones((len(BOXES), 2)), np.array(BOXES))
    predictor = EfficientSamPredictor(model, processor)
    assert torch.equal(predictor.decode(predictor.embed(picture), prompts).best(), best)
    closer = ZoomingPredictor(model, processor, "closer", 2.0)
    assert closer.decode(closer.embed(picture), prompts).best().tolist() == [0] * len(BOXES)
