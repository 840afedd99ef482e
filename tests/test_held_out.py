"""The few figures that training looks at are those of the evaluation."""

import json

import pytest
from synthetic import encode_scene, make_folder, make_scene, scene_files

from efficientsam_hf import EfficientSamProcessor
from efficientsam_hf.data.sources import find_labelled_pictures
from efficientsam_hf.evaluation.held_out import score_held_out
from efficientsam_hf.evaluation.interactive import evaluate_interactive


def test_the_figures_are_those_of_the_protocols(model, tmp_path):
    pictures = find_labelled_pictures(str(make_folder(tmp_path, scene_files(2))))
    processor = EfficientSamProcessor.from_model_config(model.config)
    model.train()
    scores = score_held_out(model, processor, pictures, clicks=(1, 3, 9))
    assert model.training
    # Nine clicks have no place in six slots.
    assert list(scores) == ["box", "clicks_1", "clicks_3"]
    assert scores["box"] == evaluate_interactive(model, processor, pictures, "box")["at"]["1"]["miou"]
    assert scores["clicks_3"] == evaluate_interactive(model, processor, pictures, "sam", (3,))["at"]["3"]["miou"]


def test_processes_share_the_pictures(model, tmp_path):
    pictures = find_labelled_pictures(str(make_folder(tmp_path, scene_files(3))))
    processor = EfficientSamProcessor.from_model_config(model.config)
    whole, shares = score_held_out(model, processor, pictures), []
    for rank in (1, 0):  # the last one to come has what the other found
        found = score_held_out(model, processor, pictures[rank::2], gather=lambda own: shares.extend(own) or shares)
    assert len(shares) == 3
    assert found == pytest.approx(whole)


def test_pictures_without_masks_are_said(model, tmp_path):
    picture, record = encode_scene(0, *make_scene(0))
    record = json.dumps({**json.loads(record), "annotations": []}).encode()
    pictures = find_labelled_pictures(str(make_folder(tmp_path, {"sa_0.jpg": picture, "sa_0.json": record})))
    with pytest.raises(ValueError, match="wanted pictures with masks to measure on, found none in 1 pictures"):
        score_held_out(model, EfficientSamProcessor.from_model_config(model.config), pictures)
