"""The recipes for other tasks, run as their docstrings say, learn a handful of drawn pictures by heart."""

import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from conftest import REPOSITORY, tiny_config
from PIL import Image
from safetensors.torch import load_file
from synthetic import make_scene
from test_examples import PLAIN, launch, steps_in
from transformers import HfArgumentParser, pipeline

from efficientsam_hf import EfficientSamModel
from efficientsam_hf.masks_efficientsam import encode_rle, masks_to_boxes

EXAMPLES = REPOSITORY / "examples"
COLORS = {"blue": (30, 30, 220), "green": (30, 200, 30), "red": (220, 30, 30)}
SMALL_HEAD = {
    "feature_size": 32,
    "mask_feature_size": 32,
    "hidden_dim": 32,
    "num_attention_heads": 2,
    "encoder_feedforward_dim": 32,
    "dim_feedforward": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "num_queries": 6,
    "train_num_points": 256,
}


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    """A tiny checkpoint, a small head, and the same pictures in the layout of each task."""
    folder = tmp_path_factory.mktemp("room")
    torch.manual_seed(0)
    EfficientSamModel(tiny_config()).save_pretrained(folder / "model")
    (folder / "head.json").write_text(json.dumps(SMALL_HEAD))
    write_classes(folder / "classes")
    write_instances(folder / "coco")
    write_semantic(folder / "ade")
    return folder


def write_classes(folder: Path) -> None:
    generator = np.random.default_rng(0)
    for name, color in COLORS.items():
        for number in range(2):
            pixels = np.clip(np.array(color) + generator.integers(-20, 20, (64, 72, 3)), 0, 255)
            for split in ("train", "validation"):
                path = folder / split / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.astype(np.uint8)).save(path)


def write_instances(folder: Path) -> None:
    """Two pictures with a box (category 3) and a disc (category 7) each."""
    images, annotations = [], []
    (folder / "pictures").mkdir(parents=True)
    for number in range(2):
        image, masks = make_scene(number, 64, 64)
        Image.fromarray(image).save(folder / "pictures" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": 64, "width": 64})
        for category, mask in zip((3, 7), masks[:2], strict=True):
            x0, y0, x1, y1 = masks_to_boxes(mask).tolist()
            record = {"id": len(annotations) + 1, "image_id": number, "category_id": category, "iscrowd": 0}
            record |= {"segmentation": encode_rle(mask), "area": int(mask.sum()), "bbox": [x0, y0, x1 - x0, y1 - y0]}
            annotations.append(record)
    categories = [{"id": 3, "name": "box"}, {"id": 7, "name": "disc"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(content))


def write_semantic(folder: Path) -> None:
    """The same pictures: 1 is the box, 2 the disc, 3 what is around, and the uppermost rows are of no class."""
    (folder / "names.txt").parent.mkdir(parents=True)
    (folder / "names.txt").write_text("box\ndisc\nground\n")
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (folder / kind / split).mkdir(parents=True)
        for number in range(2):
            image, masks = make_scene(number, 64, 64)
            classes = np.full((64, 64), 3, dtype=np.uint8)
            classes[masks[0]], classes[masks[1]], classes[:3] = 1, 2, 0
            Image.fromarray(image).save(folder / "images" / split / f"{number}.png")
            Image.fromarray(classes).save(folder / "annotations" / split / f"{number}.png")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """`python examples/NAME.py ...` without the start of another Python; gives what it prints."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, value in PLAIN.items():
        monkeypatch.setenv(name, value)

    def run_here(name: str, *arguments: str) -> str:
        path = str(EXAMPLES / f"{name}.py")
        monkeypatch.setattr(sys, "argv", [path, *arguments])
        try:
            runpy.run_path(path, run_name="__main__")
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
        return capsys.readouterr().out

    yield run_here
    torch.set_num_threads(threads)


def classes_options(room: Path, output: Path, *more: str) -> list[str]:
    given = ["--model", str(room / "model"), "--dataset", str(room / "classes"), "--output_dir", str(output)]
    given += ["--image_size", "64", "--total_batch", "6", "--batch_size", "3", "--report_to", "none"]
    return [*given, "--log_every", "1", *more]


def coco_options(room: Path, output: Path, *more: str) -> list[str]:
    given = ["--model", str(room / "model"), "--output_dir", str(output), "--report_to", "none"]
    for prefix in ("", "test_"):
        given += [f"--{prefix}annotations", str(room / "coco" / "instances.json")]
        given += [f"--{prefix}pictures", str(room / "coco" / "pictures")]
    given += ["--head_config", str(room / "head.json"), "--image_size", "64", "--total_batch", "2"]
    return [*given, "--batch_size", "2", "--smallest_scale", "1", "--largest_scale", "1", "--flip", "0", *more]


def semantic_options(room: Path, output: Path, *more: str) -> list[str]:
    given = ["--model", str(room / "model"), "--output_dir", str(output), "--report_to", "none"]
    given += ["--dataset", str(room / "ade"), "--names", str(room / "ade" / "names.txt"), "--head_config"]
    given += [str(room / "head.json"), "--image_size", "64", "--total_batch", "2", "--batch_size", "2"]
    return [*given, "--smallest_scale", "1", "--largest_scale", "1", "--flip", "0", "--color", "0", *more]


def figure(printed: str, name: str) -> float:
    return float(re.findall(rf"evaluation .*\b{name} (\S+?)(?:,|\n)", printed)[-1])


# --------------------------------------------------------------------------------------------------------------------
# By heart


def test_classification_learns_a_batch_by_heart(room, run, tmp_path):
    plain = ["--mixup", "0", "--changes", "0", "--smallest_area", "1", "--label_smoothing", "0", "--drop_path", "0"]
    printed = run("finetune_classification", *classes_options(room, tmp_path, *plain, "--max_steps", "20"))
    assert figure(printed, "accuracy") == 1.0
    found = pipeline("image-classification", model=str(tmp_path / "model"))
    for name in COLORS:
        assert found(str(room / "classes" / "train" / name / "0.png"))[0]["label"] == name


@pytest.mark.slow
def test_detection_learns_two_pictures_by_heart(room, run, tmp_path):
    more = ["--max_steps", "110", "--learning_rate", "3e-3", "--max_grad_norm", "1", "--drop_path", "0"]
    given = coco_options(room, tmp_path, "--head", "mask2former", "--weight_decay", "0.01", *more)
    printed = run("finetune_detection", *given)
    assert figure(printed, "AP") > 0.9
    found = pipeline("image-segmentation", model=str(tmp_path / "model"))
    names = {row["label"] for row in found(str(room / "coco" / "pictures" / "0.png"), subtask="instance")}
    assert names == {"box", "disc"}


@pytest.mark.slow
def test_semantic_segmentation_learns_two_pictures_by_heart(room, run, tmp_path):
    more = ["--max_steps", "80", "--learning_rate", "3e-3", "--max_grad_norm", "1", "--drop_path", "0"]
    given = semantic_options(room, tmp_path, "--encoder_rate", "1", *more)
    printed = run("finetune_semantic_segmentation", *given)
    assert figure(printed, "mean_iou") > 0.9
    assert figure(printed, "overall_accuracy") > 0.95


# --------------------------------------------------------------------------------------------------------------------
# Stopping, going on, several processes, half precision


def test_a_stopped_run_goes_on_bit_for_bit(room, run, tmp_path):
    more = ["--max_steps", "3", "--ema", "0.5", "--pooling", "class_token"]
    whole = run("finetune_classification", *classes_options(room, tmp_path / "whole", *more))
    run("finetune_classification", *classes_options(room, tmp_path / "parts", *more, "--stop_at", "1"))
    first = load_file(tmp_path / "parts" / "model" / "model.safetensors")
    resumed = run("finetune_classification", *classes_options(room, tmp_path / "parts", *more))
    assert "1 of 3 steps done" in resumed
    assert steps_in(resumed) == steps_in(whole)[1:] != []
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], first[name]) for name in one)


def test_moving_averages_are_what_is_saved(room, run, tmp_path):
    more = ["--max_steps", "2", "--drop_path", "0"]
    for decay in ("0", "0.9999999"):
        run("finetune_classification", *classes_options(room, tmp_path / decay, *more, "--ema", decay))
    plain, averaged = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("0", "0.9999999"))
    start = load_file(room / "model" / "model.safetensors")
    name = "vision_encoder.layers.0.mlp.layers.0.weight"
    # The first average is the first update's weights, and hardly moves from there.
    assert 0 < (averaged[name] - start[name]).abs().max() < (plain[name] - start[name]).abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["finetune_detection", "finetune_semantic_segmentation"])
def test_segmentation_in_half_precision_goes_on_bit_for_bit(name, room, run, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    options = semantic_options if "semantic" in name else coco_options
    head = [] if "semantic" in name else ["--head", "mask2former"]
    more = [*head, "--max_steps", "2", "--log_every", "1", "--gradient_checkpointing"]
    whole = run(name, *options(room, tmp_path / "whole", *more))
    run(name, *options(room, tmp_path / "parts", *more, "--stop_at", "1"))
    resumed = run(name, *options(room, tmp_path / "parts", *more))
    assert steps_in(resumed) == steps_in(whole)[1:] != []


@pytest.mark.slow
def test_two_processes_share_the_pictures(room, tmp_path):
    given = coco_options(room, tmp_path, "--head", "mask2former", "--batch_size", "1", "--max_steps", "2")
    printed = launch("torchrun", "--nproc-per-node", "2", str(EXAMPLES / "finetune_detection.py"), *given)
    assert printed.count("2 process(es) of 1 batch(es) a step, 0 of 2 steps done") == 1
    assert printed.count("evaluation after 2: AP ") == 1


# --------------------------------------------------------------------------------------------------------------------
# What is not possible is said


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("finetune_classification", ["--dataset", "x"], "either --model or --variant, got neither"),
        ("finetune_classification", ["--dataset", "x", "--variant", "huge"], "tiny, small, base, got 'huge'"),
        ("finetune_detection", ["--model", "x", "--head", "yolo", "--dataset", "x"], "mask2former, got 'yolo'"),
        ("finetune_detection", ["--model", "x", "--annotations", "x"], "or --dataset and --names"),
        ("finetune_detection", ["--model", "x", "--dataset", "x"], "or --dataset and --names"),
    ],
)
def test_contradictions_are_named(name, given, words):
    arguments = runpy.run_path(str(EXAMPLES / f"{name}.py"))["Arguments"]
    with pytest.raises(ValueError, match=words):
        HfArgumentParser(arguments).parse_args_into_dataclasses(["--output_dir", "x", *given])


def test_a_class_that_training_did_not_have_is_named(room, run, tmp_path):
    other = tmp_path / "classes"
    for split, name in (("train", "red"), ("validation", "violet")):
        (other / split / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(other / split / name / "1.png")
    given = classes_options(room, tmp_path / "run", "--max_steps", "1")
    given[given.index("--dataset") + 1] = str(other)
    with pytest.raises(ValueError, match="has a class 'violet': wanted one of the 1 known ones"):
        run("finetune_classification", *given)


def test_without_torchvision_another_head_is_offered(room, run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.models.detection", None)
    with pytest.raises(ImportError, match=r"wants a torchvision that fits torch .*Mask2Former wants none"):
        run("finetune_detection", *coco_options(room, tmp_path, "--max_steps", "1"), "--head_config", "")
