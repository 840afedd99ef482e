"""Which of a prompt's masks is the best: the same one wherever it is asked."""

import numpy as np
import pytest
import torch
from PIL import Image

from efficientsam_hf import EfficientSamConfig, EfficientSamProcessor, SegmentationStream, segment
from efficientsam_hf.evaluation.predictor import EfficientSamPredictor, Prompts, ZoomingPredictor
from efficientsam_hf.masks_efficientsam import rank_masks, stability_score

BOXES = [[4.0, 2, 60, 40], [20, 10, 40, 30], [50, 28, 74, 44], [0, 0, 79, 47], [30, 30, 35, 44]]


def test_ranks_are_predicted_iou_or_that_times_stability():
    masks, scores = torch.randn(2, 3, 8, 8), torch.rand(2, 3).half()
    assert torch.equal(rank_masks(masks, scores, by_stability=False), scores.float())
    assert torch.equal(rank_masks(masks, scores, by_stability=True), scores.float() * stability_score(masks))


def test_a_config_keeps_how_to_rank(tmp_path):
    assert not EfficientSamConfig().rank_by_stability
    EfficientSamConfig(rank_by_stability=True).save_pretrained(tmp_path)
    assert EfficientSamConfig.from_pretrained(tmp_path).rank_by_stability


@pytest.fixture
def ranking(model, photo):
    """A model that ranks by stability, its processor, and which masks are the best; some are not by predicted IoU."""
    model.config.rank_by_stability = True
    processor = EfficientSamProcessor.from_model_config(model.config)
    inputs = processor(photo, input_boxes=[BOXES])
    del inputs["original_sizes"]
    with torch.inference_mode():
        outputs = model(**inputs)
    best = (outputs.iou_scores[0] * stability_score(outputs.pred_masks[0])).argmax(1)
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
    answer = segment(model, processor, photo, boxes=BOXES)
    (streamed,) = SegmentationStream(model, processor)([(photo, {"boxes": BOXES})])
    sizes = [list(photo.shape[:2])]
    wanted = processor.post_process_masks(outputs.pred_masks, sizes)[0][torch.arange(len(BOXES)), best]
    for found in (answer, streamed):
        assert torch.equal(found.masks[:, 0], wanted)
        assert torch.allclose(found.scores[:, 0], outputs.iou_scores[0, torch.arange(len(BOXES)), best], atol=1e-5)


def test_what_is_evaluated_is_the_best(ranking, photo):
    model, processor, _, _, best = ranking
    picture, prompts = Image.fromarray(photo), Prompts(boxes=np.array(BOXES))
    predictor = EfficientSamPredictor(model, processor)
    assert torch.equal(predictor.decode(predictor.embed(picture), prompts).best(), best)
    closer = ZoomingPredictor(model, processor, "closer", 2.0)
    assert closer.decode(closer.embed(picture), prompts).best().tolist() == [0] * len(BOXES)
