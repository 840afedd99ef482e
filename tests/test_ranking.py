"""Which of a prompt's masks is the best: the same one wherever it is asked."""

import numpy as np
import pytest
import torch
from PIL import Image

from efficientsam_hf import EfficientSamConfig, EfficientSamProcessor, SegmentationStream, segment
from efficientsam_hf.evaluation.predictor import EfficientSamPredictor, Prompts, ZoomingPredictor
from efficientsam_hf.masks_efficientsam import stability_score
from efficientsam_hf.ranking_efficientsam import box_agreement, rank_masks

BOXES = [[4.0, 2, 60, 40], [20, 10, 40, 30], [50, 28, 74, 44], [0, 0, 79, 47], [30, 30, 35, 44]]
CLICKS = [[[30.0, 20], [50, 36]], [[25, 28], [36, 12]], [[60, 30], [70, 40]], [[3, 3], [70, 9]], [[32, 31], [34, 42]]]
WAYS = ["rank_by_stability", "rank_by_box"]


def asked(box=(2, 1, 6, 5)):
    """A click, and a box, as the model takes them: in pixels of patches of 4, which are cells of the masks, too."""
    prompts = {"input_points": torch.tensor([[[[3.5, 2.5]]]]), "input_labels": torch.tensor([[[1]]])}
    return prompts if box is None else {**prompts, "input_boxes": torch.tensor([[box]]).float()}


def rank_one(mask, prompts):
    """What agreement alone makes of one mask (8, 8)."""
    config = EfficientSamConfig(vision_config={"patch_size": 4, "image_size": 8}, rank_by_box=True)
    logits = torch.where(mask, 1.0, -1.0)[None, None, None]
    return rank_masks(logits, torch.ones(1, 1, 1).half(), config, prompts).item()


def painted(x0, y0, x1, y1):
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[y0:y1, x0:x1] = True
    return mask


def test_ranks_are_predicted_iou_or_that_times_stability():
    masks, scores = torch.randn(1, 2, 3, 8, 8), torch.rand(1, 2, 3).half()
    plain, stable = EfficientSamConfig(), EfficientSamConfig(rank_by_stability=True)
    assert torch.equal(rank_masks(masks, scores, plain, asked()), scores.float())
    assert torch.equal(rank_masks(masks, scores, stable, {}), scores.float() * stability_score(masks))


def test_a_mask_loses_what_its_box_lacks_of_the_one_asked_for():
    assert rank_one(painted(2, 1, 6, 5), asked()) == 1
    assert rank_one(painted(2, 1, 4, 5), asked()) == 0.5
    assert rank_one(painted(2, 1, 6, 5) & ~painted(3, 3, 6, 5), asked()) == 1  # its own box is the same
    assert rank_one(painted(6, 5, 8, 8), asked()) == 0
    assert rank_one(painted(0, 0, 0, 0), asked()) == 0


def test_a_mask_loses_nothing_where_no_box_was_asked_for():
    for nothing in ({"input_points": None}, asked(box=None), asked(box=(-1, -1, -1, -1))):
        assert rank_one(painted(6, 5, 8, 8), nothing) == 1


def test_a_prompt_s_agreement_does_not_depend_on_the_others():
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(2, 3, 4, 8, 8, dtype=torch.bool)
    for place in np.ndindex(2, 3, 4):
        masks[place] = painted(*torch.randint(0, 9, (2, 2), generator=generator).sort(0).values.flatten().tolist())
    points = torch.randint(0, 8, (2, 3, 5, 2), generator=generator).float().sort(dim=2).values
    labels = torch.tensor([[2, 3, 1, 0, -1], [-1, -1, -1, -1, -1], [1, 0, 1, 2, 3]]).expand(2, -1, -1)
    together = box_agreement(masks, points, labels)
    for row in range(2):
        for prompt in range(3):
            place = slice(row, row + 1), slice(prompt, prompt + 1)
            assert torch.equal(box_agreement(masks[place], points[place], labels[place])[0, 0], together[row, prompt])
    assert (together[:, 1] == 1).all()
    assert len(together.unique()) > 3


@pytest.mark.parametrize("way", WAYS)
def test_a_config_keeps_how_to_rank(tmp_path, way):
    assert not getattr(EfficientSamConfig(), way)
    EfficientSamConfig(**{way: True}).save_pretrained(tmp_path)
    assert getattr(EfficientSamConfig.from_pretrained(tmp_path), way)


def cut_masks(decoder, arguments, output):
    """Masks of a random decoder reach all over the picture: the first two keep its left and its upper half."""
    output.pred_masks[:, :, 0, :, 8:] = output.pred_masks[:, :, 1, 8:] = -10.0
    output.iou_scores.fill_(0.5)
    return output


@pytest.fixture(params=WAYS)
def ranking(model, photo, request):
    """A model that ranks one way, its processor, and which masks are the best; some are not by predicted IoU."""
    setattr(model.config, request.param, True)
    if request.param == "rank_by_box":
        model.mask_decoder.register_forward_hook(cut_masks)
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
        factors = box_agreement(outputs.pred_masks >= 0, slots * 4 / model.config.vision_config.patch_size, labels)
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
