import itertools
import json

import numpy as np
import pytest
import torch
from conftest import make_model, tiny_config
from oracles import Oracle, write_coco

from efficientsam_hf import EfficientSamProcessor
from efficientsam_hf.evaluation.ground_truth import find_true_pictures
from efficientsam_hf.evaluation.interactive import Settings, evaluate_interactive, evaluate_picture
from efficientsam_hf.evaluation.predictor import EfficientSamPredictor, Prompts, module_hash
from efficientsam_hf.evaluation.protocols import PROTOCOLS, find_protocol
from efficientsam_hf.evaluation.summary import summarize


@pytest.fixture
def scenes(tmp_path):
    path, masks_of = write_coco(tmp_path, 3)
    return find_true_pictures(tmp_path / "images", path), masks_of


def run(predictor, pictures, name, **settings):
    records = [
        evaluate_picture(predictor, picture, [find_protocol(name)], Settings(**settings)) for picture in pictures
    ]
    return records, summarize(records, find_protocol(name), predictor.most_clicks)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_an_oracle_scores_one_by_every_protocol(scenes, name):
    pictures, masks_of = scenes
    oracle = Oracle(masks_of)
    _, result = run(oracle, pictures, name, boundary=True)
    assert (result["pictures"], result["masks"], result["protocol"]) == (3, 9, name)
    for figures in result["at"].values():
        assert {figures[key] for key in ("miou", "miou_of_pictures", "oracle_miou", "boundary_iou", "small")} == {1.0}
        assert figures["small_masks"] + figures["medium_masks"] + figures["large_masks"] == 9
    for noc in result.get("noc", {}).values():
        assert noc == {"clicks": 1.0, "failures": 0}
    assert oracle.encoded == 3


def test_all_objects_of_a_picture_are_asked_in_one_call(scenes):
    pictures, masks_of = scenes
    oracle = Oracle(masks_of)
    run(oracle, pictures, "box")
    assert oracle.calls == [3, 3, 3]


def test_several_protocols_share_an_encoding(scenes):
    pictures, masks_of = scenes
    oracle = Oracle(masks_of)
    evaluate_picture(oracle, pictures[0], PROTOCOLS.values(), Settings())
    assert oracle.encoded == 1


def test_a_moved_answer_scores_what_is_reckoned_by_hand(scenes):
    """A box of 24 x 20 pixels moved by 5 shares 15 columns of 25; the pixel moved by 5 shares nothing."""
    pictures, masks_of = scenes
    records, _ = run(Oracle(masks_of, shift=5), pictures, "box")
    for record in records:
        assert record["masks"][0]["box"]["iou"] == [15 / 25]
        assert record["masks"][2]["box"]["iou"] == [0.0]
        assert record["masks"][0]["box"]["oracle"] == [15 / 25]


def test_clicks_follow_the_error_and_failures_count_twenty(scenes):
    pictures, masks_of = scenes
    records, result = run(Oracle(masks_of, shift=5), pictures, "ritm")
    assert result["noc"]["90"] == {"clicks": 20.0, "failures": 9}
    clicks, labels = records[0]["masks"][0]["ritm"]["points"], records[0]["masks"][0]["ritm"]["labels"]
    truth, answer = masks_of[0][0], np.roll(masks_of[0][0], 5, axis=-1)
    assert len(clicks) == 20
    for (x, y), label in zip(clicks[1:], labels[1:], strict=True):
        assert truth[y, x] != answer[y, x]
        assert label == truth[y, x]


def test_the_last_answer_is_shown_with_the_next_click(scenes):
    """Each object's own, as the model gave it; never with the first click, and not at all unless it is asked for."""
    pictures, masks_of = scenes

    class Watched(Oracle):
        def decode(self, embedded, prompts):
            answer = super().decode(embedded, prompts)
            seen.append((prompts.masks, answer.logits[:, 1]))
            return answer

    seen: list = []
    run(Watched(masks_of, shift=5), pictures[:1], "sam", show_answer=True)
    assert len(seen) == 9
    assert seen[0][0] is None
    for (_, before), (shown, _) in itertools.pairwise(seen):
        assert torch.equal(shown, before)
    seen.clear()
    run(Watched(masks_of, shift=5), pictures[:1], "sam")
    assert all(shown is None for shown, _ in seen)


@pytest.mark.parametrize("option", ["refine", "show_answer"])
def test_a_model_without_mask_prompts_is_refused_before_it_is_asked(scenes, option):
    pictures, masks_of = scenes
    oracle = Oracle(masks_of)
    oracle.mask_prompts = False
    with pytest.raises(ValueError, match=f"takes no mask prompts, which --{option.replace('_', '-')} gives it"):
        run(oracle, pictures, "sam", **{option: True})
    assert not oracle.calls


def test_no_background_click_for_a_model_that_never_learnt_them(scenes):
    pictures, masks_of = scenes
    records, _ = run(Oracle(masks_of, shift=5, background=False), pictures, "sam")
    assert all(label == 1 for record in records for row in record["masks"] for label in row["sam"]["labels"])


def test_more_clicks_than_the_model_has_slots_give_no_figure(scenes):
    pictures, masks_of = scenes
    _, result = run(Oracle(masks_of, shift=5, most_clicks=4), pictures, "sam")
    assert result["at"]["3"]["miou"] is not None
    assert result["at"]["5"] is None
    assert result["at"]["9"] is None


def test_random_clicks_depend_on_seed_and_picture_alone(scenes):
    pictures, masks_of = scenes
    every, _ = run(Oracle(masks_of), pictures, "paper", seed=3)
    alone, _ = run(Oracle(masks_of), pictures[2:], "paper", seed=3)
    other, _ = run(Oracle(masks_of), pictures, "paper", seed=4)
    assert every[2]["masks"] == alone[0]["masks"]
    assert every[2]["masks"] != other[2]["masks"]


def test_records_are_json(scenes):
    pictures, masks_of = scenes
    records, result = run(Oracle(masks_of), pictures, "ritm")
    assert json.loads(json.dumps(records)) == json.loads(json.dumps(records))
    assert len(records[0]["sha256"]) == 64
    json.dumps(result)


def test_during_training_the_model_stays_in_training(scenes):
    pictures, _ = scenes
    model = make_model(tiny_config()).train()
    processor = EfficientSamProcessor.from_model_config(model.config)
    result = evaluate_interactive(model, processor, pictures, "sam", prompts=(1, 2), seed=1)
    assert model.training
    assert set(result["at"]) == {"1", "2"}
    assert 0 <= result["at"]["1"]["miou"] <= result["at"]["1"]["oracle_miou"] <= 1
    assert result == evaluate_interactive(model, processor, pictures, "sam", prompts=(1, 2), seed=1)


def test_objects_in_one_call_are_as_each_alone(scenes):
    pictures, _ = scenes
    model = make_model(tiny_config())
    predictor = EfficientSamPredictor(model, EfficientSamProcessor.from_model_config(model.config))
    embedded = predictor.embed(pictures[0].read_image())
    prompts = Prompts(boxes=np.array([[4, 5, 30, 33], [40, 2, 70, 50], [1, 1, 79, 59]], dtype=np.float32))
    together = predictor.decode(embedded, prompts)
    alone = [predictor.decode(embedded, prompts[at : at + 1]) for at in range(3)]
    assert torch.allclose(together.logits, torch.cat([one.logits for one in alone]), atol=1e-5)
    assert predictor.at_size(embedded, together.best_logits()).shape == (3, 60, 80)


def test_the_hash_is_of_the_weights():
    model, other = make_model(tiny_config()), make_model(tiny_config(), seed=1)
    assert module_hash(model) == module_hash(make_model(tiny_config()))
    assert module_hash(model) != module_hash(other)
    assert module_hash(make_model(tiny_config()).double()) == module_hash(model)


def test_most_masks_of_a_picture(scenes):
    pictures, masks_of = scenes
    records, _ = run(Oracle(masks_of), pictures, "box", masks=2)
    assert [[row["id"] for row in record["masks"]] for record in records] == [[1, 3], [11, 13], [21, 23]]
