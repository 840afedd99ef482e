"""The checkpoint that comes with the package: small, whole, and better than no model at all."""

import json
import runpy
import subprocess
import sys
import zipfile
from hashlib import sha256

import numpy as np
import pytest
import torch
from conftest import REPOSITORY

from efficientsam_hf import default_checkpoint, load_checkpoint, read_photo, segment
from efficientsam_hf.data.sa1b import find_pairs
from efficientsam_hf.masks_efficientsam import decode_rle, mask_iou, masks_to_boxes

PHOTO = REPOSITORY / "examples" / "images" / "coffee.jpg"


@pytest.fixture(scope="module")
def default():
    return load_checkpoint(device="cpu")


def test_it_is_small_and_carries_no_code():
    files = {path.name: path.stat().st_size for path in default_checkpoint().iterdir()}
    assert files.keys() == {"config.json", "processor_config.json", "model.safetensors", "README.md"}
    assert files["model.safetensors"] <= 12_000_000
    assert "auto_map" not in (default_checkpoint() / "config.json").read_text()


@pytest.fixture(scope="module")
def card_of():
    return runpy.run_path(str(REPOSITORY / "benchmarks" / "checkpoint_card.py"))["card"]


def test_its_card_is_made_of_figures_of_these_weights(card_of):
    text = (default_checkpoint() / "README.md").read_text()
    assert text == card_of(default_checkpoint())
    assert sha256((default_checkpoint() / "model.safetensors").read_bytes()).hexdigest() in text


def test_figures_of_other_weights_make_no_card(card_of, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"others")
    with pytest.raises(ValueError, match=r"evaluation\.json has figures of weights \w{8}, wanted "):
        card_of(tmp_path)


def test_it_is_in_the_wheel(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    folder = "efficientsam_hf/checkpoints/efficientsam-nano-512"
    assert {f"{folder}/{path.name}" for path in default_checkpoint().iterdir()} <= set(names)
    assert "efficientsam_cli/__init__.py" in names


def test_processor_and_model_say_the_same(default):
    model, processor = default
    prompts = model.config.prompt_encoder_config
    assert processor.max_prompt_points == prompts.max_prompt_points
    assert processor.negative_points == prompts.negative_points
    assert processor.image_processor.size["height"] == model.config.vision_config.image_size


def test_weights_are_stored_in_half_precision():
    config = json.loads((default_checkpoint() / "config.json").read_text())
    assert config["dtype"] == "float16"


def test_a_box_on_the_cup_gives_about_what_is_in_the_box(default):
    answer = segment(*default, read_photo(PHOTO), boxes=[75, 15, 480, 385])
    x0, y0, x1, y1 = masks_to_boxes(answer.masks[0, 0]).tolist()
    assert np.abs(np.array([x0, y0, x1, y1]) - [75, 15, 480, 385]).max() < 60
    table = torch.zeros(400, 600, dtype=torch.bool)
    table[300:, 500:] = True
    assert not (answer.masks[0, 0] & table).any()


def test_background_clicks_take_away(default):
    model, processor = default
    photo = read_photo(PHOTO)
    first = segment(model, processor, photo, boxes=[75, 15, 480, 385])
    spot = (200, 440)  # row and column, on the saucer right of the cup
    second = segment(
        model, processor, photo, boxes=[75, 15, 480, 385], points=[[spot[1], spot[0]]], labels=[0],
        image_embeddings=first.image_embeddings,
    )  # fmt: skip
    around = (slice(spot[0] - 8, spot[0] + 8), slice(spot[1] - 8, spot[1] + 8))
    assert first.masks[0, 0][around].float().mean() > second.masks[0, 0][around].float().mean()


def ellipse_in_box(box, shape):
    y, x = np.mgrid[: shape[0], : shape[1]] + 0.5
    across = (2 * x - box[0] - box[2]) / (box[2] - box[0])
    down = (2 * y - box[1] - box[3]) / (box[3] - box[1])
    return torch.from_numpy(across**2 + down**2 <= 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grabcut", "berkeley"])
def test_it_beats_the_trivial_answers(default, shared, name):
    """On every fifth photo: better than the ellipse in the box, and by far."""
    found, trivial = [], []
    for pair in find_pairs(shared / "data" / name)[::5]:
        for record in pair.read_annotations():
            mask = decode_rle(record["segmentation"])
            box = masks_to_boxes(mask).tolist()
            known = ~decode_rle(record["ignore"]) if "ignore" in record else torch.ones_like(mask)
            answer = segment(*default, pair.read_image(), boxes=box).masks[0, 0]
            found.append(float(mask_iou(answer & known, mask & known)))
            trivial.append(float(mask_iou(ellipse_in_box(box, mask.shape) & known, mask & known)))
    assert np.mean(found) > np.mean(trivial) + 0.1
