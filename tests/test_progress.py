"""What stops a run, what is its best state, and what one looks at while it goes."""

import json
import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_config
from synthetic import make_folder, scene_files
from torch import nn

from efficientsam_hf import EfficientSamProcessor
from efficientsam_hf.data.sources import find_labelled_pictures, split_pictures
from efficientsam_hf.training.checkpoints import Checkpoints
from efficientsam_hf.training.finetuning import InteractiveSegmentation
from efficientsam_hf.training.overlays import answer_boxes, draw_answers, find_examples
from efficientsam_hf.training.progress import BestScore, LossMeter
from efficientsam_hf.training.weights import averaged_model, trained_model, twin_for_shards


@pytest.fixture
def checkpoints(tmp_path) -> Checkpoints:
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(nn.Linear(2, 2))
    return Checkpoints(accelerator, tmp_path)


def losses(loss: float, iou: float = 0.1) -> dict[str, torch.Tensor]:
    return {"loss": torch.tensor(loss), "iou": torch.tensor(iou)}


def test_losses_are_averaged_and_forgotten(checkpoints):
    meter = LossMeter(checkpoints.accelerator, checkpoints)
    for value in (1.0, 2.0, 6.0):
        meter.add(losses(value))
    assert meter.read(3) == pytest.approx({"loss": 3.0, "iou": 0.1})
    meter.add(losses(5.0, 0.5))
    assert meter.read(4) == pytest.approx({"loss": 5.0, "iou": 0.5})


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_names_the_last_good_state(bad, checkpoints):
    meter = LossMeter(checkpoints.accelerator, checkpoints)
    meter.add(losses(bad))
    with pytest.raises(FloatingPointError, match=r"loss is -?(nan|inf) at step 7: no good state was saved before"):
        meter.read(7)
    checkpoints.save(3), checkpoints.save(5)
    # Nothing has yet been computed with the weights after step 5: they may be what is wrong.
    meter = LossMeter(checkpoints.accelerator, checkpoints)
    meter.add(losses(bad)), meter.add(losses(1.0))
    with pytest.raises(FloatingPointError, match=r"at step 7: .* is .*step_3; go on there, without step_5, with a"):
        meter.read(7)
    meter = LossMeter(checkpoints.accelerator, checkpoints)
    meter.add(losses(1.0))
    meter.read(6)
    meter.add(losses(bad))
    with pytest.raises(
        FloatingPointError, match=r"at step 7: the last good state is .*step_5; go on there with a lower"
    ):
        meter.read(7)


def test_an_exploding_iou_stops_too(checkpoints):
    meter = LossMeter(checkpoints.accelerator, checkpoints, most={"iou": 10.0})
    meter.add(losses(100.0, 9.9))
    meter.read(1)
    meter.add(losses(1.0, 10.1))
    with pytest.raises(FloatingPointError, match=r"iou is 10\.1 at step 2: no good state"):
        meter.read(2)


def test_the_best_score_knows_when_to_stop():
    best = BestScore(patience=2)
    assert [best.add(score, step) for step, score in enumerate((0.2, 0.5, 0.4, math.nan), start=1)] == [1, 1, 0, 0]
    assert best.is_over
    assert (best.best, best.step) == (0.5, 2)
    resumed = BestScore(patience=2)
    resumed.load_state_dict(best.state_dict())
    assert resumed.is_over
    assert not resumed.add(0.5, 5)
    assert resumed.add(0.6, 6)
    assert not resumed.is_over


def test_without_patience_a_run_never_stops():
    best = BestScore()
    for step in range(99):
        best.add(1.0, step)
    assert not best.is_over


@pytest.mark.parametrize("hold_out", [0, 1, 2, 3])
def test_a_picture_is_trained_on_or_held_out(hold_out, tmp_path):
    pictures = find_labelled_pictures(str(make_folder(tmp_path, scene_files(5))))
    train, held = split_pictures(pictures, hold_out)
    assert sorted([*train, *held], key=lambda picture: picture.name) == pictures
    assert held == (pictures[::hold_out] if hold_out else [])


def test_overlays_show_truth_and_answers_side_by_side(model, tmp_path):
    pictures = find_labelled_pictures(str(make_folder(tmp_path, scene_files(3))))
    examples = find_examples(pictures, count=2, objects=2)
    assert [len(example.masks) for example in examples] == [2, 2]
    # Nearly everything is left out; the largest come first.
    assert examples[0].masks[0].sum() >= examples[0].masks[1].sum()
    processor = EfficientSamProcessor.from_model_config(model.config)
    model.train()
    answers = [answer_boxes(model, processor, example) for example in examples]
    assert model.training
    assert answers[0].shape == examples[0].masks.shape
    drawn = draw_answers(
        examples, [[example.masks, answer] for example, answer in zip(examples, answers, strict=True)], 60
    )
    assert (drawn.shape, drawn.dtype) == ((2 * 64, 3 * 84, 3), np.uint8)
    # The second column is the first without its boxes.
    first, second = drawn[:60, :80].astype(int), drawn[:60, 84:164].astype(int)
    assert 0 < (abs(first - second).max(-1) > 30).mean() < 0.5


def test_pictures_whose_masks_do_not_fit_are_not_drawn(tmp_path):
    files = scene_files(2)
    content = json.loads(files["sa_0.json"])
    for record in content["annotations"]:
        record["segmentation"] = {"size": [80, 60], "counts": [100, 300, 4400]}
    turned, good = find_labelled_pictures(
        str(make_folder(tmp_path, {**files, "sa_0.json": json.dumps(content).encode()}))
    )
    assert find_examples([turned]) == []
    assert len(find_examples([turned, good])) == 1
    assert (draw_answers([], []) == 255).all()


def test_the_trained_model_is_found_behind_wrapper_average_and_shards(model):
    accelerator = Accelerator(cpu=True)
    average = averaged_model(accelerator, model, decay=0.5)
    assert averaged_model(accelerator, model, decay=0.0) is None
    assert twin_for_shards(accelerator, model) is None
    task = accelerator.prepare(InteractiveSegmentation(model))
    assert trained_model(accelerator, task) is model
    before = model.mask_decoder.mask_tokens.detach().clone()
    average.update_parameters(model)
    with torch.no_grad():
        model.mask_decoder.mask_tokens += 1
    average.update_parameters(model)
    torch.testing.assert_close(trained_model(accelerator, task, average).mask_decoder.mask_tokens, before + 0.5)
    twin = type(model)(tiny_config())
    assert trained_model(accelerator, task, twin=twin) is twin
    assert torch.equal(twin.mask_decoder.mask_tokens, model.mask_decoder.mask_tokens)
