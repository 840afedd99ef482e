"""Arguments that commands share: every command computes where it is told to, or says that there is no such place."""

import pytest
import torch
from conftest import make_model, tiny_config
from oracles import write_coco
from typer.testing import CliRunner

from efficientsam_cli import app
from efficientsam_cli.arguments import place_of
from efficientsam_hf import EfficientSamProcessor, hub, load_checkpoint, save_for_hub

COMMANDS = {
    "predict": ["predict", "images/0.png", "--point", "3,3"],
    "everything": ["everything", "images/0.png"],
    "label": ["label", "images", "--output", "labels"],
    "demo": ["demo", "--no-open"],
    "cache-features": ["cache-features", "images", "--teacher", "nothing", "--output", "cache"],
    "probe": ["probe", "images", "images"],
    "evaluate": ["evaluate", "boxes", "--images", "images", "--annotations", "instances.json"],
}


@pytest.fixture
def room(tmp_path, monkeypatch):
    write_coco(tmp_path, 1)
    model = make_model(tiny_config())
    save_for_hub(model, EfficientSamProcessor.from_model_config(model.config), tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(name: str, *more: str):
    model = [] if name == "cache-features" else ["--model", "tiny"]
    return CliRunner().invoke(app, [*COMMANDS[name], *model, *more])


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_one_line(name, device, room):
    result = run(name, "--device", device)
    assert result.exit_code == 2, result.output
    lines = [line for line in result.output.splitlines() if line.startswith("efficientsam: ")]
    assert len(lines) == 1
    assert lines[0].startswith(f"efficientsam: device {device}: no such device here: ")
    with pytest.raises(ValueError, match=f"device {device}: no such device here"):
        load_checkpoint("tiny", device=device)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("told", [["--device", "cuda"], []])
def test_each_process_of_torchrun_has_a_gpu_of_its_own(name, told, room, monkeypatch):
    def find_device(device):
        raise ValueError(f"asked for {device}")

    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(hub, "find_device", find_device)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
    result = run(name, *told)
    assert "asked for cuda:3" in result.output, result.output


def test_places(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert place_of("cpu") == "cpu"
    monkeypatch.setattr(hub, "find_device", lambda device: device)
    assert place_of("cuda:1") == "cuda:1"
    monkeypatch.delenv("LOCAL_RANK")
    assert place_of("cuda") == "cuda:0"
    # Where torch was built for CUDA, and there is none.
    monkeypatch.setattr(
        torch.accelerator,
        "current_accelerator",
        lambda check_available=False: None if check_available else torch.device("cuda"),
    )
    assert place_of(None) == "cpu"
    (tmp_path / "export.json").write_text("{}")
    assert place_of("tensorrt", str(tmp_path)) == "tensorrt"
    assert place_of(None, str(tmp_path)) is None
