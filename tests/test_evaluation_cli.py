import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_model, tiny_config
from oracles import write_coco
from PIL import Image
from synthetic import make_folder, scene_files
from typer.testing import CliRunner

from efficientsam_cli import app
from efficientsam_hf import EfficientSamProcessor, save_for_hub
from efficientsam_hf.evaluation import campaign


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model = make_model(tiny_config())
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return str(save_for_hub(model, EfficientSamProcessor.from_model_config(model.config), folder))


@pytest.fixture
def room(tmp_path, monkeypatch):
    write_coco(tmp_path, 4)
    monkeypatch.chdir(tmp_path)
    return tmp_path


COCO = ["--images", "images", "--annotations", "instances.json", "--device", "cpu"]


def run(*arguments):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def told(path="results.json"):
    return json.loads(Path(path).read_text())


def test_a_sheet_that_cannot_be_written_is_refused_before_the_work(room, checkpoint):
    result = run("boxes", *COCO, "--model", checkpoint, "--sheet", "worst.foo")
    assert result.exit_code == 2
    assert "worst.foo: wanted the suffix of a picture" in result.output
    assert not list(Path().glob("*results*"))
    assert run("boxes", *COCO, "--model", checkpoint, "--sheet", "new/worst.png").exit_code == 0
    assert Image.open("new/worst.png").width > 700


def test_points_by_several_protocols(room, checkpoint):
    result = run("points", *COCO, "--model", checkpoint, "--protocol", "sam", "--protocol", "ritm", "--boundary")
    assert result.exit_code == 0, result.output
    (found,) = told()["results"]
    assert [one["protocol"] for one in found["protocols"]] == ["sam", "ritm"]
    assert found["model"]["name"] == "tiny"
    assert len(found["model"]["weights_sha256"]) == len(found["data"]["annotations_sha256"]) == 64
    assert found["data"]["pictures"] == 4
    assert found["protocols"][0]["masks"] == 12
    assert {"encode", "decode", "metrics", "clicks"} <= found["ms_a_picture"].keys()
    assert "NoC@90" in result.output
    assert "| tiny | " in result.output
    assert Image.open("results_worst.png").width > 700
    assert len(Path("results_masks.jsonl").read_text().splitlines()) == 4
    assert not list(Path().glob(".results*"))


def test_a_missing_package_is_one_line(room, checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    result = run("points", *COCO, "--model", checkpoint)
    assert result.exit_code == 2
    assert "efficientsam: wanted the package opencv-python-headless, found none: install it" in result.output


def test_the_worst_are_those_after_the_clicks_that_are_told(room, checkpoint, monkeypatch):
    shown = []
    draw = campaign.draw_sheet
    monkeypatch.setattr(
        campaign, "draw_sheet", lambda cases, heading: shown.append((cases, heading)) or draw(cases, heading)
    )
    result = run("points", *COCO, "--model", checkpoint, "--prompts", "3", "--masks", "1")
    assert result.exit_code == 0, result.output
    ((cases, heading),) = shown
    assert heading.endswith("protocol sam, 3 clicks")
    records = [json.loads(line) for line in Path("results_masks.jsonl").read_text().splitlines()]
    walks = [[row["sam"]["iou"] for row in record["masks"]] for record in records]
    first, wanted = (sorted(min(walk[:clicks][-1] for walk in rows) for rows in walks) for clicks in (1, 3))
    assert first != wanted
    assert [case.title.split(",")[0] for case in cases] == [f"IoU {iou:.2f}" for iou in wanted]


def test_boxes_have_ap_and_sa1bs_layout_has_none(room, checkpoint):
    assert run("boxes", *COCO, "--model", checkpoint, "--limit", 2).exit_code == 0
    assert told()["results"][0]["ap"].keys() >= {"AP", "APs"}
    assert told()["results"][0]["data"]["pictures"] == 2
    make_folder(room / "pairs", scene_files(2))
    result = run("boxes", "--images", "pairs", "--model", checkpoint, "--device", "cpu", "--output", "out/sa.json")
    assert result.exit_code == 0, result.output
    assert "ap" not in told("out/sa.json")["results"][0]
    assert told("out/sa.json")["results"][0]["task"] == "boxes"
    assert told("out/sa.json")["results"][0]["protocols"][0]["masks"] == 8


def test_detections_and_everything(room, checkpoint):
    boxes = [{"image_id": 1, "category_id": 1, "bbox": [5, 5, 30, 30], "score": 0.5}]
    Path("found.json").write_text(json.dumps(boxes))
    assert run("detections", *COCO, "--detections", "found.json", "--model", checkpoint).exit_code == 0
    assert told()["results"][0]["boxes"] == 1
    result = run("everything", *COCO, "--model", checkpoint, "--points-per-side", 4, "--limit", 2)
    assert result.exit_code == 0, result.output
    assert 0 <= told()["results"][0]["ar"]["AR@1000"] <= 1
    rows = [line.split(" | ") for line in result.output.splitlines() if line.startswith("| ")]
    assert rows[0][2:] == ["masks a picture", "best", "AR", "ARs", "ARm", "ARl |"]
    assert [row[3] for row in rows[1:]] == ["10", "100", "1,000"]


def test_several_models_in_one_table(room, checkpoint):
    result = run("boxes", *COCO, "--model", checkpoint, "--model", checkpoint, "--limit", 1)
    assert result.exit_code == 0, result.output
    assert len(told()["results"]) == 2
    assert result.output.count("| tiny | ") == 4  # mean IoU and AP


def test_a_part_of_the_masks_has_no_ap_and_a_protocol_named_twice_is_asked_once(room, checkpoint):
    result = run("boxes", *COCO, "--model", checkpoint, "--masks", 1, "--limit", 1)
    assert "no AP: it is of all objects, and --masks asked for a part of them" in result.output
    assert "no AP" not in run("boxes", *COCO, "--model", checkpoint, "--limit", 1).output
    assert run("points", *COCO, "--model", checkpoint, "--protocol", "sam", "--protocol", "sam").exit_code == 0
    assert len(told()["results"][0]["protocols"]) == 1


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("processor_config.json", {"image_processor": {"image_mean": [0.9, 0.1, 0.5]}}),
        ("config.json", {"mask_decoder_config": {"hidden_act": "tanh"}}),
    ],
)
def test_models_of_one_name_and_weights_with_other_settings_are_apart(room, checkpoint, file, change):
    folders = [shutil.copytree(checkpoint, room / place / "best") for place in "ab"]
    content = json.loads((folders[1] / file).read_text())
    for part, fields in change.items():
        content[part].update(fields)
    (folders[1] / file).write_text(json.dumps(content))
    for name, models in (("both", folders), ("one", folders[:1]), ("other", folders[1:])):
        options = [word for model in models for word in ("--model", model)]
        assert run("boxes", *COCO, *options, "--limit", 2, "--output", f"{name}.json").exit_code == 0
    both, (one,), (other,) = (told(f"{name}.json")["results"] for name in ("both", "one", "other"))
    assert [found["protocols"] for found in both] == [one["protocols"], other["protocols"]]
    assert one["protocols"] != other["protocols"]
    assert both[0]["model"]["weights_sha256"] == both[1]["model"]["weights_sha256"]
    assert both[0]["model"]["settings_sha256"] != both[1]["model"]["settings_sha256"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["points", *COCO, "--protocol", "bocs"], "unknown protocol 'bocs', wanted one of box, paper, sam"),
        (["points", *COCO, "--prompts", "1,x"], "--prompts must be numbers such as 1,3,5, got '1,x'"),
        (["points", *COCO, "--limit", "0"], "limit must be 1 or more, got 0"),
        (["points", "--images", "nowhere", "--annotations", "instances.json"], "nothing at nowhere"),
        (["points", "--images", "images", "--annotations", "none.json"], "nothing at none.json"),
        (["points", "--images", "images", "--annotations", "images/0.png"], "no JSON of COCO's"),
        (["boxes", *COCO, "--device", "gpu"], "device gpu: no such device here: Expected one of cpu, cuda"),
        (["points", *COCO, "--masks", "0"], "masks must be 1 or more of a picture, got 0"),
        (["boxes", *COCO, "--refine"], "takes no mask prompts"),
        (["points", *COCO, "--show-answer"], "takes no mask prompts, which --show-answer gives it"),
        (["boxes", *COCO, "--output", "images"], "images is a folder, wanted a file"),
        (["boxes", *COCO, "--output", "instances.json"], "instances.json would be written over instances.json"),
        (["boxes", *COCO, "--sheet", "images/1.png"], "images/1.png would be written over images/1.png"),
        (["boxes", *COCO, "--model", "other"], "holds a model of type 'vit', wanted efficientsam, sam"),
        (["boxes", *COCO, "--model", "a.onnx,b.onnx"], "wanted ENCODER.onnx,DECODER.onnx, nothing at 'a.onnx'"),
        (["detections", *COCO, "--detections", "none.json"], "nothing at none.json"),
    ],
    ids=lambda value: " ".join(value)[-30:] if isinstance(value, list) else "",
)
def test_bad_input_is_one_clear_line(room, checkpoint, arguments, message):
    Path("other").mkdir()
    Path("other/config.json").write_text('{"model_type": "vit"}')
    model = [] if "--model" in arguments else ["--model", checkpoint]
    result = run(*arguments, *model)
    assert result.exit_code == 2, result.output
    lines = [line for line in result.output.strip().splitlines() if line.startswith("efficientsam: ")]
    assert len(lines) == 1, result.output
    assert message in lines[0]
    assert "Traceback" not in result.output
    assert not Path("results.json").exists()


@pytest.mark.slow
def test_two_processes_find_what_one_finds(room, checkpoint):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "efficientsam_cli", "evaluate", "points", *COCO, "--model", checkpoint, "--protocol", "centroid"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*launch, *command, "--output", "two.json"], check=True, capture_output=True, env=environment, timeout=240
    )
    assert run(*command[3:], "--output", "one.json").exit_code == 0
    (one,), (two,) = told("one.json")["results"], told("two.json")["results"]
    for result in (one, two):
        del result["ms_a_picture"]
    assert one == two
    without_time = [
        [{**json.loads(line), "seconds": 0} for line in Path(name).read_text().splitlines()]
        for name in ("one_masks.jsonl", "two_masks.jsonl")
    ]
    assert without_time[0] == without_time[1]
    assert not list(Path().glob(".two*"))
