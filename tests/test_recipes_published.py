"""The recipes and the Hub: data sets by their id, trackers, and uploads that can be loaded from there."""

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, Image
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


def rows_of_the_hub(room, task: str) -> Dataset:  # noqa: F811
    """The fixture's pictures as a data set of the Hub has them."""
    if task == "classification":
        paths = sorted((room / "classes" / "train").glob("*/*.png"))
        columns = {"image": [str(path) for path in paths], "label": [path.parent.name for path in paths]}
        rows = Dataset.from_dict(columns).cast_column("label", ClassLabel(names=["blue", "green", "red"]))
        return rows.cast_column("image", Image())
    paths = sorted((room / "ade" / "images" / "training").glob("*.png"))
    drawn = [np.array(PIL.Image.open(str(path).replace("images", "annotations"))) for path in paths]
    if task == "detection":
        # Red is the class, green the instance; what is around is neither.
        drawn = [np.stack([np.where(one > 2, 255, one - 1), one, one], axis=-1).astype(np.uint8) for one in drawn]
        drawn = [np.where(one[..., 1:2] == 0, np.uint8(255), one) for one in drawn]
    columns = {"image": [str(path) for path in paths], "annotation": [PIL.Image.fromarray(one) for one in drawn]}
    return Dataset.from_dict(columns).cast_column("image", Image()).cast_column("annotation", Image())


@pytest.mark.parametrize("task", RECIPES)
def test_data_sets_of_the_hub(task, room, run, tmp_path, monkeypatch):  # noqa: F811
    asked = []

    def load_dataset(source: str, split: str) -> Dataset:
        asked.append((source, split))
        return rows_of_the_hub(room, task)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    options, more, _, figures = RECIPES[task]
    given = options(room, tmp_path / "run", *more, "--max_steps", "1")
    if task == "detection":
        begin = given.index("--annotations")
        given[begin : begin + 8] = ["--dataset", "", "--names", str(tmp_path / "names.txt")]
        (tmp_path / "names.txt").write_text("box\ndisc\n")
    given[given.index("--dataset") + 1] = "someone/pictures"
    printed = run(f"finetune_{task}", *given)
    assert all(f"{name} " in printed for name in figures)
    splits = ("training", "validation") if task == "semantic_segmentation" else ("train", "validation")
    assert asked == [("someone/pictures", split) for split in splits]
