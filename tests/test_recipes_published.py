"""The recipes' trackers and uploads: what is told is filed, and what arrives at the Hub can be loaded from there."""

import pytest
import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_publishing import stand_in  # noqa: F401  # the fixture
from test_recipes import classes_options, coco_options, room, run, semantic_options  # noqa: F401  # the fixtures
from transformers import AutoImageProcessor, AutoModelForImageClassification, AutoModelForUniversalSegmentation

from efficientsam_hf.training.encoders import find_backbone

RECIPES = {
    "classification": (classes_options, [], AutoModelForImageClassification, {"accuracy", "top5_accuracy"}),
    "detection": (coco_options, ["--head", "mask2former"], AutoModelForUniversalSegmentation, {"AP", "AP_box"}),
    "semantic_segmentation": (semantic_options, [], AutoModelForUniversalSegmentation, {"mean_iou"}),
}


@pytest.mark.parametrize("task", RECIPES)
def test_what_is_told_is_filed_and_what_is_pushed_loads(task, room, run, stand_in, tmp_path):  # noqa: F811
    options, more, auto, figures = RECIPES[task]
    given = options(room, tmp_path / "run", *more, "--max_steps", "2", "--log_every", "1")
    run(f"finetune_{task}", *given, "--report_to", "tensorboard", "--push_to_hub", f"someone/{task}")

    filed = EventAccumulator(str(tmp_path / "run" / task)).Reload()
    assert set(filed.Tags()["scalars"]) >= {"loss", "learning_rate", "images_per_second", *figures}
    assert [event.step for event in filed.Scalars("loss")] == [1, 2]

    downloaded = snapshot_download(f"someone/{task}", cache_dir=tmp_path / "cache")
    ours, theirs = (load_file(f"{folder}/model.safetensors") for folder in (tmp_path / "run" / "model", downloaded))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    model, report = auto.from_pretrained(downloaded, output_loading_info=True)
    assert not report["missing_keys"]
    assert task == "classification" or find_backbone(model)
    assert AutoImageProcessor.from_pretrained(downloaded)
