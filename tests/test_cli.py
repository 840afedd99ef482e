import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from conftest import make_model, tiny_config
from PIL import Image
from typer.testing import CliRunner

from efficientsam_cli import app, one_line_errors
from efficientsam_cli.arguments import file_name_of
from efficientsam_hf import VARIANTS, EfficientSamConfig, EfficientSamModel, EfficientSamProcessor, save_for_hub
from efficientsam_hf.masks_efficientsam import decode_rle


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny model that knows no background clicks."""
    model = make_model(tiny_config())
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return str(save_for_hub(model, EfficientSamProcessor.from_model_config(model.config), folder))


@pytest.fixture
def room(tmp_path, photo, monkeypatch):
    Image.fromarray(photo).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_predict_writes_overlay_and_records(room, checkpoint, photo):
    result = run(
        "predict", "photo.png", "--point", "24,20", "--point", "30,20,1", "--box", "50,28,74,44",
        "--box", "10,8,40,30", "--model", checkpoint, "--output", "out/o.png", "--json", "out/j.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert Image.open("out/o.png").size == (80, 48)
    content = json.loads(Path("out/j.json").read_text())
    assert content["image"] == {"file_name": "photo.png", "width": 80, "height": 48}
    assert len(content["annotations"]) == 3
    assert all(decode_rle(record["segmentation"]).shape == (48, 80) for record in content["annotations"])
    assert "out/o.png" in result.output
    assert "out/j.json" in result.output
    assert sorted(os.listdir("out")) == ["j.json", "o.png"]


def test_predict_writes_a_mask_and_a_cut_out(room, checkpoint, photo):
    asked = ["predict", "photo.png", "--model", checkpoint, "--mask", "m.png", "--cutout", "c.png", "--json", "j.json"]
    result = run(*asked, "--point", "24,20")
    assert result.exit_code == 0, result.output
    assert "mask:    m.png\ncut-out: c.png\nmasks:   j.json" in result.output
    (record,) = json.loads(Path("j.json").read_text())["annotations"]
    mask = decode_rle(record["segmentation"]).numpy()
    assert np.array_equal(np.asarray(Image.open("m.png")), mask)
    cutout = np.asarray(Image.open("c.png"))
    assert np.array_equal(cutout[..., 3] == 255, mask)
    assert np.array_equal(cutout[..., :3], photo)
    assert run(*asked, "--box", "50,28,74,44", "--box", "2,3,20,30").exit_code == 0
    numbers = np.asarray(Image.open("m.png"))
    records = json.loads(Path("j.json").read_text())["annotations"]
    assert len(records) == 2
    masks = [decode_rle(record["segmentation"]).numpy() for record in records]
    assert np.array_equal(numbers > 0, masks[0] | masks[1])
    assert np.array_equal(np.asarray(Image.open("c.png"))[..., 3] == 255, masks[0] | masks[1])


def test_mask_and_cut_out_are_pngs_of_their_own(room, checkpoint):
    asked = ["predict", "photo.png", "--point", "24,20", "--model", checkpoint]
    result = run(*asked, "--cutout", "c.jpg")
    assert (result.exit_code, "c.jpg: masks and cut-outs are PNG files" in result.output) == (2, True)
    result = run(*asked, "--cutout", "c.png", "--mask", "c.png")
    assert (result.exit_code, "different files to write, found photo_overlay.png, c.png, c.png" in result.output) == (
        2,
        True,
    )


def test_predict_has_a_default_output(room, checkpoint):
    assert run("predict", "photo.png", "--point", "24,20", "--model", checkpoint).exit_code == 0
    assert Path("photo_overlay.png").exists()


def seven_points():
    return [word for x in range(7) for word in ("--point", f"{x},{x}")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.jpg", "--point", "1,2"], "missing.jpg"),
        (["text.jpg", "--point", "1,2"], "text.jpg: cannot be read as a picture"),
        (["cut.png", "--point", "1,2"], "cut.png: cannot be read as a picture"),
        (["photo.png"], "at least one --point X,Y or --box"),
        (["photo.png", "--point", "1"], "--point must be X,Y or X,Y,LABEL, got '1'"),
        (["photo.png", "--point", "a,b"], "got 'a,b'"),
        (["photo.png", "--box", "1,2,3"], "--box must be X0,Y0,X1,Y1, got '1,2,3'"),
        (["photo.png", "--point", "900,2"], "900"),
        (["photo.png", "--point", "-3,2"], "-3"),
        (["photo.png", "--point", "nan,2"], "nan"),
        (["photo.png", "--point", "1,2,5"], "wanted labels 1 (object), 0 (background)"),
        (["photo.png", "--point", "1,2,0.5"], "found 0.5"),
        (["photo.png", "--point", "1,2,-1"], "wanted labels 1 (object), 0 (background), found -1"),
        (["photo.png", "--point", "1,2", "--model", "text.jpg"], "text.jpg is a file, wanted a model folder"),
        pytest.param(
            ["photo.png", "--point", "1,2", "--json", "pipe"],
            "pipe is a device or a pipe, wanted a file",
            marks=pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names here"),
        ),
        (["photo.png", "--point", "1,2", "--output", "photo.png/deep/o.png"], "photo.png is a file, wanted a folder"),
        (["photo.png", "--point", "1,2,0"], "never learnt background clicks"),
        (["photo.png", *seven_points()], "at most 6 slots, found 7"),
        (["photo.png", "--box", "40,8,10,30"], "40"),
        (["photo.png", "--box", "10,8,10,30"], "10"),
        (["photo.png", "--point", "1,2", "--model", "nowhere/at/all"], "nowhere/at/all"),
        (["photo.png", "--point", "1,2", "--model", "other"], "holds a model of type 'vit', wanted 'efficientsam'"),
        (["photo.png", "--point", "1,2", "--model", "cut"], "its weights cannot be read"),
        (["photo.png", "--point", "1,2", "--output", "photo.png/o.png"], "photo.png is a file, wanted a folder"),
        (["photo.png", "--point", "1,2", "--output", "folder"], "folder is a folder, wanted a file"),
        (["photo.png", "--point", "1,2", "--json", "photo.png/j.json"], "photo.png is a file"),
        (["photo.png", "--point", "1,2", "--output", "folder/../photo.png"], "photo.png is the photo itself"),
        (["photo.png", "--point", "1,2", "--json", "photo.png"], "photo.png is the photo itself"),
        (["photo.png", "--point", "1,2", "--output", "x.png", "--json", "x.png"], "different files to write, found x"),
        (["photo.png", "--point", "1,2", "--output", "x.txt"], "x.txt: wanted the suffix of a picture, as .png"),
    ],
    ids=lambda value: "_".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_input_is_one_clear_line_and_leaves_nothing(room, checkpoint, arguments, message):
    Path("text.jpg").write_text("this is no picture")
    Path("cut.png").write_bytes(Path("photo.png").read_bytes()[:900])
    Path("folder").mkdir()
    if hasattr(os, "mkfifo"):
        os.mkfifo("pipe")
    Path("other").mkdir()
    Path("other/config.json").write_text('{"model_type": "vit"}')
    Path("cut").mkdir()
    for name in ("config.json", "processor_config.json"):
        (Path("cut") / name).write_bytes((Path(checkpoint) / name).read_bytes())
    Path("cut/model.safetensors").write_bytes((Path(checkpoint) / "model.safetensors").read_bytes()[:5000])
    before, photo = sorted(os.listdir()), Path("photo.png").read_bytes()
    model = [] if "--model" in arguments else ["--model", checkpoint]
    result = run("predict", *arguments, *model)
    assert result.exit_code == 2, result.output
    lines = [line for line in result.output.strip().splitlines() if line.startswith("efficientsam: ")]
    assert len(lines) == 1, result.output
    assert message in lines[0]
    assert "Traceback" not in result.output
    assert sorted(os.listdir()) == before
    assert Path("photo.png").read_bytes() == photo


def test_clicks_on_the_background_alone_are_no_object(room):
    """The bundled checkpoint learnt them, and would answer with nearly nothing."""
    result = run("predict", "photo.png", "--box", "10,8,40,30", "--point", "60,40,0")
    assert result.exit_code == 2
    assert "give at least one --point on the object, got background alone (a --box is another" in result.output
    assert not Path("photo_overlay.png").exists()


@pytest.mark.parametrize("command", [["predict", "--box", "10,8,40,30"], ["everything", "--points-per-side", "3"]])
def test_an_overlay_is_of_the_kind_that_its_name_says(room, checkpoint, command):
    for name, kind in (("o.png", "PNG"), ("o.JPG", "JPEG"), ("o.webp", "WEBP")):
        result = run(*command, "photo.png", "--model", checkpoint, "--output", name)
        assert result.exit_code == 0, result.output
        assert Image.open(name).format == kind


@pytest.mark.parametrize(("limit", "message"), [(3000, "wanted at most 3000"), (1000, "could be decompression bomb")])
def test_a_decompression_bomb_is_refused(room, checkpoint, monkeypatch, limit, message):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)  # Pillow itself refuses from twice the limit on
    result = run("predict", "photo.png", "--point", "1,2", "--model", checkpoint)
    assert result.exit_code == 2
    assert message in result.output


def test_a_picture_cannot_be_written_where_there_is_no_place(room, checkpoint):
    result = run("predict", "photo.png", "--point", "1,2", "--model", checkpoint, "--output", "/proc/o.png")
    assert result.exit_code == 2
    assert result.output.startswith("efficientsam: ")


def test_what_a_link_leads_to_is_written(room, checkpoint):
    Path("link.png").symlink_to("real/overlay.png")  # of which not even the folder is there
    result = run("predict", "photo.png", "--point", "1,2", "--model", checkpoint, "--output", "link.png")
    assert result.exit_code == 0, result.output
    assert Path("link.png").is_symlink()
    assert Image.open("real/overlay.png").format == "PNG"
    assert os.listdir("real") == ["overlay.png"]


def test_a_folder_without_permission_is_named_before_the_work(room, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    result = run("predict", "photo.png", "--point", "1,2", "--model", "nowhere", "--output", "new/o.png")
    assert result.exit_code == 2
    assert "new/o.png cannot be written: no permission to write into" in result.output


def test_a_file_is_called_as_the_address_says():
    names = {
        "http://h/photo.jpg?x=/a/b": "photo.jpg",
        "http://host/": "host",
        "a/b#1.jpg": "b#1.jpg",
        "https://h/a.b/c%20d.png": "c%20d.png",
    }
    assert {source: str(file_name_of(source)) for source in names} == names


def test_convert_there_and_back(room):
    from efficientsam_hf.conversion import to_official

    torch.manual_seed(0)
    fields = {"vision_config": {**VARIANTS["tiny"], "num_hidden_layers": 1}}
    official = to_official(EfficientSamModel(EfficientSamConfig(**fields)).state_dict())
    torch.save({"model": official}, "efficient_sam_vitt.pt")
    assert run("convert", "efficient_sam_vitt.pt", "model").exit_code == 0
    assert {"config.json", "model.safetensors", "processor_config.json"} <= set(os.listdir("model"))
    assert EfficientSamProcessor.from_pretrained("model").max_prompt_points == 6
    assert run("convert", "model", "back.pt").exit_code == 0
    back = torch.load("back.pt", weights_only=True)["model"]
    assert all(torch.equal(back[key], official[key]) for key in official)


def test_convert_refuses_other_checkpoints(room):
    Path("photo.pt").write_bytes(Path("photo.png").read_bytes())
    for source in ("photo.pt", "missing.pt"):
        result = run("convert", source, "out")
        assert result.exit_code == 2
        assert result.output.startswith("efficientsam: ")
        assert len(result.output.strip().splitlines()) == 1
        assert not Path("out").exists()


def test_an_error_without_a_text_is_called_by_its_name(capsys):
    def fail() -> None:
        raise TimeoutError

    with pytest.raises(typer.Exit):
        one_line_errors(fail)()
    assert capsys.readouterr().err == "efficientsam: TimeoutError\n"


def test_help_does_not_wait_for_torch():
    code = (
        "import sys; from efficientsam_cli import app; app(['--help'], standalone_mode=False);"
        "print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "predict" in result.stdout
    assert result.stdout.strip().endswith("False")


def test_overlay_shows_the_mask(room, checkpoint, photo):
    run("predict", "photo.png", "--box", "10,8,40,30", "--model", checkpoint, "--output", "o.png", "--json", "j.json")
    record = json.loads(Path("j.json").read_text())["annotations"][0]
    mask = decode_rle(record["segmentation"]).numpy()
    drawn = np.asarray(Image.open("o.png")).astype(int)
    assert 0 < mask.mean() < 1, "the box must give a mask to look at"
    assert np.abs(drawn - photo)[mask].mean() > 10


# --------------------------------------------------------------------------------------------------------------------
# Everything

LOOSE = [
    "--points-per-side",
    "3",
    "--pred-iou-thresh",
    "0",
    "--stability-score-thresh",
    "0",
    "--box-nms-thresh",
    "0.9",
]


def test_everything_draws_a_picture_and_writes_coco(room, checkpoint, photo):
    result = run("everything", "photo.png", "--model", checkpoint, "--json", "coco.json", *LOOSE)
    assert result.exit_code == 0, result.output
    assert Image.open("photo_everything.png").size == (photo.shape[1], photo.shape[0])
    dataset = json.loads(Path("coco.json").read_text())
    (image,) = dataset["images"]
    assert image == {"id": 1, "file_name": "photo.png", "width": photo.shape[1], "height": photo.shape[0]}
    assert len(dataset["annotations"]) > 0
    assert f"{len(dataset['annotations'])} masks" in result.output
    for number, record in enumerate(dataset["annotations"], start=1):
        assert (record["id"], record["image_id"], record["category_id"], record["iscrowd"]) == (number, 1, 1, 0)
        assert decode_rle(record["segmentation"]).sum() == record["area"]


def test_coco_tools_read_it(room, checkpoint):
    coco = pytest.importorskip("pycocotools.coco")
    run("everything", "photo.png", "--model", checkpoint, "--json", "coco.json", *LOOSE)
    loaded = coco.COCO("coco.json")
    for record in loaded.loadAnns(loaded.getAnnIds(imgIds=[1])):
        assert loaded.annToMask(record).sum() == record["area"]


def test_everything_of_a_folder_goes_on_where_it_stopped(room, checkpoint, photo):
    Path("set").mkdir()
    for name in ("a.png", "b.jpg"):
        Image.fromarray(photo).save(Path("set", name))
    Path("set", "c.jpg").write_text("no picture")
    Path("set", "notes.txt").write_text("left alone")
    result = run("everything", "set", "--model", checkpoint, *LOOSE)
    assert result.exit_code == 2
    assert "c.jpg" in result.output
    assert "Traceback" not in result.output
    made = sorted(path.name for path in Path("set_masks").iterdir())
    assert made == ["a.json", "a.png", "b.json", "b.png", "coco.json", "everything.json"]
    before = Path("set_masks", "a.json").stat().st_mtime_ns
    Path("set", "c.jpg").unlink()
    Path("set_masks", "b.json").unlink()
    assert run("everything", "set", "--model", checkpoint, *LOOSE).exit_code == 0
    assert Path("set_masks", "a.json").stat().st_mtime_ns == before
    dataset = json.loads(Path("set_masks", "coco.json").read_text())
    assert [image["file_name"] for image in dataset["images"]] == ["a.png", "b.jpg"]
    assert {record["image_id"] for record in dataset["annotations"]} == {1, 2}
    ids = [record["id"] for record in dataset["annotations"]]
    assert ids == list(range(1, len(ids) + 1))


def test_masks_of_other_options_and_somebody_s_files_are_refused(room, checkpoint, photo):
    Path("set").mkdir()
    Image.fromarray(photo).save("set/a.png")
    given = ["everything", "set", "--model", checkpoint, "--output", "out"]
    assert run(*given, *LOOSE).exit_code == 0
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    for more, message in (
        ([*LOOSE, "--min-mask-region-area", "9"], "out holds masks with options {'points_per_side': 3"),
        (["--model", f"{checkpoint}/../tiny", *LOOSE], "out holds masks with model"),
    ):
        result = run(*given, *more)
        assert (result.exit_code, message in result.output) == (2, True), result.output
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == before
    # Another picture's file, which another program wrote since.
    Image.fromarray(photo).save("set/b.png")
    Path("out/b.json").write_text('{"shapes": [], "imagePath": "b.png"}')
    result = run(*given, *LOOSE)
    assert (result.exit_code, "out/b.json is not from this command" in result.output) == (2, True), result.output
    for name in ("a.json", "a.png", "coco.json", "everything.json"):
        Path("hand").mkdir(exist_ok=True)
        Path("hand", name).write_text('{"shapes": []}')
        result = run("everything", "set", "--model", checkpoint, "--output", "hand")
        assert (result.exit_code, f"hand/{name} is not from this command" in result.output) == (2, True), result.output
        assert Path("hand", name).read_text() == '{"shapes": []}'
        Path("hand", name).unlink()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["photo.png", "--points-per-side", "0"], "points_per_side must be 1 or more, got 0"),
        (["photo.png", "--pred-iou-thresh", "1.5"], "pred_iou_thresh must be 0 to 1, got 1.5"),
        (["photo.png", "--strategy", "fast"], "strategy must be"),
        (["missing.png"], "missing.png"),
        (["empty"], "no picture in empty"),
        (["empty", "--json", "x.json"], "--json is for one picture"),
        (["twice"], "two pictures are called a in twice"),
        (["once", "--output", "once"], "the pictures of once would be written over"),
        (["once", "--output", "twice/../once"], "the pictures of once would be written over"),
        (["named"], "named/coco.png: coco.json will hold the masks of all"),
        (["noted"], "noted/everything.png: everything.json will hold the settings"),
        (["photo.png", "--output", "photo.png"], "photo.png is the photo itself"),
        (["photo.png", "--output", "x.png", "--json", "x.png"], "different files to write, found x.png, x.png"),
    ],
)
def test_everything_says_what_is_wrong(room, checkpoint, photo, arguments, message):
    Path("empty").mkdir()
    Path("twice").mkdir()
    for name in ("a.png", "a.jpg"):
        Image.fromarray(photo).save(Path("twice", name))
    for name in ("once/a.png", "named/coco.png", "noted/everything.png"):
        Path(name).parent.mkdir()
        Image.fromarray(photo).save(name)
    before = sorted(Path().rglob("*"))
    result = run("everything", *arguments, "--model", checkpoint)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert sorted(Path().rglob("*")) == before
