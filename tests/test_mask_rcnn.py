"""Mask R-CNN, where torchvision is: in the environment, or in a folder that a Python of its own is shown.

`make .venv/torchvision` makes that folder; EFFICIENTSAM_TORCHVISION names another. The rest of the suite shall not see
it, for the package does without, and so does transformers in most places where it is not there.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, tiny_config
from test_examples import PLAIN, steps_in
from test_recipes import coco_options, figure, room, run  # noqa: F401  # the fixtures

from efficientsam_hf import EfficientSamBackbone, EfficientSamModel
from efficientsam_hf.data.coco import read_dataset
from efficientsam_hf.data.instances import CocoInstances
from efficientsam_hf.data.scale_jitter import WholePicture
from efficientsam_hf.evaluation.coco_ap import average_precision
from efficientsam_hf.evaluation.mask_sets import predict_instances
from efficientsam_hf.training.classification import normalize_pixels
from efficientsam_hf.training.mask_rcnn import MaskRcnn, build_mask_rcnn, load_mask_rcnn, mask_rcnn_inputs

FOLDER = Path(os.environ.get("EFFICIENTSAM_TORCHVISION", Path(sys.prefix) / "torchvision"))
HERE = importlib.util.find_spec("torchvision") is not None
with_torchvision = pytest.mark.skipif(not HERE, reason="run by test_beside_torchvision, where torchvision is seen")
# Proposals in numbers that torchvision's operators written in Python can bear, and narrow heads.
SMALL = {f"rpn_{which}_nms_top_n_{mode}": 30 for which in ("pre", "post") for mode in ("train", "test")}
SMALL |= {"box_batch_size_per_image": 16, "box_detections_per_img": 5, "rpn_batch_size_per_image": 64}
SMALL |= {"head_channels": 32}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(HERE, reason="torchvision is there, and all below runs as it stands")
def test_beside_torchvision():
    if not (FOLDER / "torchvision").is_dir():
        pytest.skip(f"no torchvision in {FOLDER}: make .venv/torchvision puts it there")
    path = os.pathsep.join([str(REPOSITORY / "src"), str(FOLDER)])
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    environment = {**os.environ, **PLAIN, "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    assert " passed, 1 skipped" in done.stdout


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """With a pyramid that is narrow, too."""
    config = tiny_config()
    config.vision_config.pyramid_channels = 32
    folder = tmp_path_factory.mktemp("narrow")
    torch.manual_seed(0)
    EfficientSamModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def options(room, checkpoint, tmp_path):  # noqa: F811
    """The recipe's, for an output folder."""
    head = tmp_path / "head.json"
    head.write_text(json.dumps(SMALL))

    def given(output: Path, *more: str) -> list[str]:
        found = coco_options(room, output, *more, "--image_size", "128")
        found[found.index("--model") + 1] = str(checkpoint)
        found[found.index("--head_config") + 1] = str(head)
        return found

    return given


def measured_precision(model: MaskRcnn, room: Path) -> float:  # noqa: F811
    items = CocoInstances(room / "coco" / "instances.json", room / "coco" / "pictures")
    rows, whole = [], WholePicture(128)
    for picture in (items[0], items[1]):
        placed = whole(picture.image)
        pixels = normalize_pixels(placed.pop("pixels")[None])
        rows += predict_instances(model, pixels, picture.number, items.category_ids, **placed)
    return average_precision(read_dataset(room / "coco" / "instances.json"), rows)["AP"]


@with_torchvision
def test_the_recipe_learns_two_pictures_by_heart(room, run, options, tmp_path):  # noqa: F811
    more = ["--max_steps", "120", "--learning_rate", "3e-3", "--max_grad_norm", "1", "--drop_path", "0"]
    printed = run("finetune_detection", *options(tmp_path / "run", *more, "--weight_decay", "0.01"))
    assert figure(printed, "AP") > 0.9
    assert figure(printed, "AP_box") > 0.9
    again = load_mask_rcnn(tmp_path / "run" / "model")
    assert measured_precision(again, room) == pytest.approx(figure(printed, "AP"), abs=1e-4)
    assert again.names == ["box", "disc"]
    backbone, pixels = EfficientSamBackbone.from_pretrained(tmp_path / "run" / "model"), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        own, other = (model(pixels).feature_maps for model in (backbone, again.detector.backbone.backbone))
    assert all(torch.equal(one, two) for one, two in zip(own, other, strict=True))


@with_torchvision
def test_half_precision_goes_on_bit_for_bit(run, options, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    more = ["--max_steps", "2", "--log_every", "1", "--gradient_checkpointing", "--ema", "0.5"]
    whole = run("finetune_detection", *options(tmp_path / "whole", *more))
    run("finetune_detection", *options(tmp_path / "parts", *more, "--stop_at", "1"))
    resumed = run("finetune_detection", *options(tmp_path / "parts", *more))
    assert steps_in(resumed) == steps_in(whole)[1:] != []


@with_torchvision
def test_a_picture_without_instances_trains(checkpoint):
    model = build_mask_rcnn(checkpoint, ["a"], 64, **SMALL).train()
    nothing = [torch.zeros(0, 64, 64, dtype=torch.bool)]
    batch = {"pixels": torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "mask_labels": nothing}
    outputs = model(**mask_rcnn_inputs({**batch, "class_labels": [torch.zeros(0, dtype=torch.int64)]}))
    outputs.loss.backward()
    assert outputs.loss.isfinite()
    assert set(outputs.losses) >= {"loss_mask", "loss_classifier", "loss_objectness"}


@with_torchvision
def test_a_folder_without_mask_rcnn_is_named(checkpoint):
    with pytest.raises(FileNotFoundError, match=r"no Mask R-CNN: wanted .*, found no mask_rcnn\.safetensors"):
        load_mask_rcnn(checkpoint)


@with_torchvision
@pytest.mark.parametrize("ratio", [2, -1])
def test_regions_are_aligned_as_torchvision_does_it(ratio):
    """The tests' own operator against torchvision's in Python, before anything compiles it."""
    from torchvision_operators import align_regions

    module = sys.modules["torchvision.ops.roi_align"]
    source = Path(module.__file__).read_text().replace("@lazy_compile(dynamic=True)\n", "")
    names = {"__name__": module.__name__, "__package__": module.__package__}
    exec(compile(source, module.__file__, "exec"), names)
    maps = torch.randn(2, 3, 25, 37, generator=torch.Generator().manual_seed(0))
    corners = [[0, 2, 3, 20, 18], [1, -9, -9, 10, 12], [0, 4, 3, 36, 24], [1, 5, 5, 5, 5], [0, -6, 2, 40, 8]]
    given = (maps, torch.tensor(corners, dtype=torch.float32), 0.9, 4, 3, ratio, False)
    torch.testing.assert_close(align_regions(*given), names["_roi_align"](*given), rtol=0, atol=1e-5)
