"""The bundled checkpoint's recipe, all of it, on drawn pictures and with a weight update for each part."""

import json
import runpy
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, tiny_config
from safetensors.torch import load_file
from synthetic import make_folder, scene_files
from test_efficientnet import ROWS, random_weights
from test_examples import run  # noqa: F401 - a fixture
from test_teachers import small_sam

from efficientsam_hf import load_checkpoint, segment
from efficientsam_hf.efficientnet import stem_state_dict

RECIPE = REPOSITORY / "examples" / "train_default_checkpoint.py"


@pytest.fixture
def given(tmp_path: Path, run, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[str]]:  # noqa: F811
    """The recipe's arguments, and the names of the scripts that it has launched; they run in this process."""
    make_folder(tmp_path / "photos", scene_files(3))
    config = tiny_config().to_dict()
    config["vision_config"].update(stem_stages=ROWS, stem_channels=5, patch_size=8)
    torch.save(random_weights(), tmp_path / "lite.pth")
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    small_sam().save_pretrained(tmp_path / "teacher")
    launched: list[str] = []

    def run_here(command: list[str], check: bool) -> None:
        script = next(part for part in command if part.endswith(".py"))
        launched.append(Path(script).stem)
        run(*command[command.index(script) + 1 :], script=Path(script))

    monkeypatch.setattr(subprocess, "run", run_here)
    arguments = ["--sources", str(tmp_path / "photos"), "--config", str(tmp_path / "tiny.json")]
    arguments += ["--stem", str(tmp_path / "lite.pth"), "--teacher", str(tmp_path / "teacher")]
    arguments += ["--pretrain_steps", "1", "--steps", *["1"] * 5]
    return [*arguments, "--batch_size", "1", "--more=--report_to none"], launched


def train(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(RECIPE), *arguments])
    runpy.run_path(str(RECIPE), run_name="__main__")


def test_from_photos_to_a_checkpoint_and_no_part_twice(given, tmp_path: Path, monkeypatch):
    arguments, launched = given
    train([*arguments, "--output_dir", str(tmp_path / "run")], monkeypatch)
    assert launched == ["pretrain_sami", *["finetune_sa1b"] * 5]
    room = tmp_path / "run"
    parts = [
        "start/model.safetensors",
        *(f"{name}/model/model.safetensors" for name in ("coarse", "many", "fine", "whole", "again")),
    ]
    weights = [load_file(room / part) for part in parts]
    for before, after in pairwise(weights):
        assert not all(torch.equal(before[name], after[name]) for name in before), "each part teaches something"
    encoder = load_file(room / "pretrained" / "model" / "model.safetensors")
    stem = stem_state_dict(torch.load(tmp_path / "lite.pth"), blocks=3)
    learnt = {name: value for name, value in encoder.items() if ".patch_embedding.conv" in name}
    assert all(
        torch.allclose(value, stem[name.split("patch_embedding.")[1]], atol=0.1) for name, value in learnt.items()
    )
    taught = [name for name in encoder if name.startswith("vision_encoder.")]
    assert taught
    assert all(torch.equal(encoder[name], weights[0][name]) for name in taught), "the start has the pretrained encoder"

    checkpoint = load_file(room / "checkpoint" / "model.safetensors")
    for name, value in checkpoint.items():
        mean = torch.stack([part[name] for part in weights[-2:]]).mean(0)
        torch.testing.assert_close(value, mean.to(value.dtype))
    assert checkpoint["mask_decoder.iou_token"].dtype == torch.float16
    names = {path.name for path in (room / "checkpoint").iterdir()}
    assert names == {"config.json", "model.safetensors", "processor_config.json"}, "no code"
    assert json.loads((room / "checkpoint" / "config.json").read_text())["dtype"] == "float16"
    model, processor = load_checkpoint(room / "checkpoint", device="cpu")
    assert segment(model, processor, torch.zeros(3, 40, 60, dtype=torch.uint8), points=[[5, 5]]).masks.shape[-2:] == (
        40,
        60,
    )

    train([*arguments, "--output_dir", str(room)], monkeypatch)
    assert len(launched) == 6, "what is finished is not done again"
    (room / "again" / "model" / "config.json").unlink()
    train([*arguments, "--output_dir", str(room)], monkeypatch)
    assert launched[6:] == ["finetune_sa1b"]
    again = load_file(room / "checkpoint" / "model.safetensors")
    assert all(torch.equal(again[name], value) for name, value in checkpoint.items())


def test_every_part_has_its_steps(given, monkeypatch):
    with pytest.raises(ValueError, match="--steps wants a number for each of coarse, many, fine, whole, again, got 2"):
        train([*given[0], "--output_dir", "nowhere", "--steps", "1", "1"], monkeypatch)
