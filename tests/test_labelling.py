"""Labels of many pictures: nothing lost or doubled by any end, and every format gives the masks back."""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import REPOSITORY, make_model, tiny_config
from PIL import Image
from synthetic import make_folder, make_scene, make_tar, scene_files
from typer.testing import CliRunner

from efficientsam_cli import app
from efficientsam_hf import EfficientSamProcessor, save_for_hub, segment_everything
from efficientsam_hf.data.mask_pictures import find_masked_pictures
from efficientsam_hf.data.sa1b import find_pairs
from efficientsam_hf.labelling.boxes import BoxPrompts, segment_boxes
from efficientsam_hf.labelling.formats import FORMATS
from efficientsam_hf.labelling.outlines import joined, outlines_of
from efficientsam_hf.labelling.shards import LabelFolder
from efficientsam_hf.labelling.sources import dataset_picture, find_label_shards
from efficientsam_hf.masks_efficientsam import decode_rle, encode_rle, masks_to_boxes

LOOSE = {"points_per_side": 2, "pred_iou_thresh": 0, "stability_score_thresh": 0, "box_nms_thresh": 0.9}
LOOSE_OPTIONS = [word for name, value in LOOSE.items() for word in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture(scope="module")
def parts():
    model = make_model(tiny_config())
    return model, EfficientSamProcessor.from_model_config(model.config)


@pytest.fixture(scope="module")
def checkpoint(parts, tmp_path_factory):
    return str(save_for_hub(*parts, tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Seven pictures in folders, and a file that is none."""
    files = {name: content for name, content in scene_files(6).items() if name.endswith(".jpg")}
    make_folder(tmp_path / "set", {**files, "deep/er/sa_9.jpg": files["sa_0.jpg"], "sa_7.jpg": b"no picture"})
    (tmp_path / "set" / "notes.txt").write_text("left alone")
    return tmp_path / "set"


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def draw_masks(name: str, pixels: torch.Tensor) -> list[dict]:
    """A labeller without a model: some masks of this name, always the same."""
    generator = np.random.default_rng(list(os.fsencode(name)))
    _, masks = make_scene(int(generator.integers(1000)), *pixels.shape[1:])
    ones = masks[: int(generator.integers(1, 4))]
    rows = [{"segmentation": encode_rle(mask), "area": int(mask.sum())} for mask in ones]
    boxes = [masks_to_boxes(torch.from_numpy(mask)).tolist() for mask in ones]
    return [{**row, "bbox": [x0, y0, x1 - x0, y1 - y0]} for row, (x0, y0, x1, y1) in zip(rows, boxes, strict=True)]


def label(source, output, format="coco", labeller=draw_masks, **shards) -> LabelFolder:
    folder = LabelFolder(output, format, find_label_shards(str(source), **shards), {})
    list(folder.label(labeller))
    folder.conclude()
    return folder


def contents(folder: Path) -> dict:
    """Every file that is there, without seconds, which differ from run to run."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            if path.parent.name == "progress" or path.name == "report.json":
                content = {**json.loads(content), "seconds": 0}
            found[str(path.relative_to(folder))] = content
    return found


# --------------------------------------------------------------------------------------------------------------------
# Formats: the masks come back


def expected(folder: Path) -> dict[str, list[np.ndarray]]:
    """Masks of each picture by its stem, as the drawing labeller gives them."""
    names = [str(path.relative_to(folder)) for path in folder.rglob("*.jpg") if path.name != "sa_7.jpg"]
    pixels = torch.zeros(3, 60, 80)
    return {
        name[:-4]: [decode_rle(record["segmentation"]).numpy() for record in draw_masks(name, pixels)]
        for name in names
    }


def masks_of_coco(folder: Path, pictures: Path):
    content = json.loads((folder / "coco.json").read_text())
    ids = [record["id"] for record in content["annotations"]]
    assert ids == list(range(1, len(ids) + 1))
    return {
        image["file_name"][:-4]: [
            decode_rle(record["segmentation"]).numpy()
            for record in content["annotations"]
            if record["image_id"] == image["id"]
        ]
        for image in content["images"]
    }


def masks_of_sa1b(folder: Path, pictures: Path):
    pairs = [pair for path in sorted(folder.glob("*.tar")) for pair in find_pairs(path)]
    for pair in pairs:
        assert pair.image.read() == (pictures / f"{pair.name}.jpg").read_bytes()
    return {
        pair.name: [decode_rle(record["segmentation"]).numpy() for record in pair.read_annotations()] for pair in pairs
    }


def masks_of_parquet(folder: Path, pictures: Path):
    datasets = pytest.importorskip("datasets")
    files = sorted(map(str, folder.glob("*.parquet")))
    rows = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(folder / "cache"))
    return {
        row["file_name"][:-4]: [decode_rle(record["segmentation"]).numpy() for record in row["annotations"]]
        for row in rows
    }


@pytest.mark.parametrize("read", [masks_of_coco, masks_of_sa1b, masks_of_parquet], ids=lambda read: read.__name__)
def test_run_lengths_come_back_as_they_were(read, pictures, tmp_path):
    format = read.__name__.removeprefix("masks_of_")
    folder = label(pictures, tmp_path / "out", format, pictures_per_shard=3)
    found, wanted = read(tmp_path / "out", pictures), expected(pictures)
    assert found.keys() == wanted.keys()
    for name, masks in wanted.items():
        assert np.array_equal(found[name], masks)
    total, missing = folder.report()
    assert not missing
    assert (total.pictures, total.masks) == (7, sum(map(len, wanted.values())))
    assert total.skipped == ["sa_7.jpg: cannot be read as a picture: no format that Pillow knows"]


def test_label_maps_are_what_training_reads(pictures, tmp_path):
    label(pictures, tmp_path / "out", "png")
    (pictures / "sa_7.jpg").unlink()
    (tmp_path / "out" / "images").symlink_to(pictures)
    os.rename(pictures, tmp_path / "out" / "moved")
    (tmp_path / "out" / "images").unlink()
    os.rename(tmp_path / "out" / "moved", tmp_path / "out" / "images")
    wanted = expected(tmp_path / "out" / "images")
    for picture in find_masked_pictures(tmp_path / "out"):
        records = picture.read_annotations()
        # Of each mask the part that no smaller one covers.
        areas = [mask.sum() for mask in wanted[picture.name]]
        seen = [
            mask & ~np.any([m for m, a in zip(wanted[picture.name], areas, strict=True) if a < area] or [~mask], 0)
            if min(areas) < area
            else mask
            for mask, area in zip(wanted[picture.name], areas, strict=True)
        ]
        assert [record["area"] for record in records] == [int(mask.sum()) for mask in seen if mask.any()]


def filled(outline: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    import cv2

    canvas = np.zeros(shape, np.uint8)
    cv2.fillPoly(canvas, [np.round(outline).astype(np.int32)], 1)
    return canvas.astype(bool)


def test_polygons_give_masks_back(pictures, tmp_path):
    label(pictures, tmp_path / "me", "labelme")
    label(pictures, tmp_path / "yolo", "yolo")
    wanted = expected(pictures)
    assert {str(p.relative_to(tmp_path / "me"))[:-5] for p in (tmp_path / "me").rglob("sa_*.json")} == wanted.keys()
    for name, masks in wanted.items():
        content = json.loads((tmp_path / "me" / f"{name}.json").read_text())
        assert (content["imageHeight"], content["imageWidth"]) == masks[0].shape
        assert ((tmp_path / "me" / f"{name}.json").parent / content["imagePath"]).resolve() == pictures / f"{name}.jpg"
        for number, mask in enumerate(masks):
            outlines = [np.array(s["points"]) for s in content["shapes"] if s["group_id"] == number]
            assert np.array_equal(np.any([filled(outline, mask.shape) for outline in outlines], 0), mask)
        lines = (tmp_path / "yolo" / "labels" / f"{name}.txt").read_text().splitlines()
        assert len(lines) == len(masks)
        for line, mask in zip(lines, masks, strict=True):
            category, *numbers = map(float, line.split())
            outline = np.array(numbers).reshape(-1, 2) * mask.shape[::-1] - 0.5
            assert category == 0
            assert np.array_equal(filled(outline, mask.shape), mask)
    assert 'names:\n  0: "object"\n' in (tmp_path / "yolo" / "data.yaml").read_text()


def test_parts_of_a_mask_are_joined_without_more_area():
    mask = np.zeros((40, 60), bool)
    mask[2:12, 3:20], mask[20:35, 30:50], mask[38, 5] = True, True, True
    outlines = outlines_of(encode_rle(mask))
    assert [cv2.contourArea(outline) for outline in outlines] == [14 * 19, 9 * 16, 0]
    assert all(len(outline) >= 3 for outline in outlines)
    assert cv2.contourArea(joined(outlines).astype(np.int32)) == 14 * 19 + 9 * 16
    assert outlines_of(encode_rle(np.zeros((4, 4), bool))) == []


def test_bridges_between_parts_are_short():
    """A frame of squares of 6 x 6 pixels, three pixels apart; the first part is in one corner."""
    mask = np.zeros((51, 51), bool)
    for place in range(0, 46, 9):
        for rows, columns in ((0, place), (45, place), (place, 0), (place, 45)):
            mask[rows : rows + 6, columns : columns + 6] = True
    outlines = outlines_of(encode_rle(mask))
    drawn = filled(joined(outlines), mask.shape)
    assert len(outlines) == 20
    assert (drawn >= mask).all()
    assert (drawn & ~mask).sum() == 19 * 3


def test_a_turned_picture_is_labelled_upright(tmp_path):
    image, exif = Image.fromarray(make_scene(0)[0]), Image.Exif()
    exif[274] = 6
    (tmp_path / "set").mkdir()
    image.save(tmp_path / "set" / "turned.jpg", exif=exif)
    image.save(tmp_path / "set" / "deep.png")
    label(tmp_path / "set", tmp_path / "out", "sa1b")
    deep, turned = find_pairs(tmp_path / "out" / "pictures_00000.tar")
    assert (deep.read_image().size, turned.read_image().size) == ((80, 60), (60, 80))
    assert turned.read_image().getexif().get(274, 1) == 1
    assert decode_rle(turned.read_annotations()[0]["segmentation"]).shape == (80, 60)


# --------------------------------------------------------------------------------------------------------------------
# Sources


def test_a_tar_and_a_data_set_give_the_folder_s_masks(tmp_path):
    datasets = pytest.importorskip("datasets")
    files = scene_files(5)
    jpegs = {name: content for name, content in files.items() if name.endswith(".jpg")}
    make_folder(tmp_path / "set", jpegs)
    (tmp_path / "tars").mkdir()
    for number, names in enumerate((list(files)[:6], list(files)[6:])):
        mode = "w:gz" if number else "w"
        make_tar(tmp_path / "tars" / f"a{number}.tar{'.gz' * number}", {name: files[name] for name in names}, mode)
    rows = [{"bytes": content, "path": name} for name, content in jpegs.items()]
    table = datasets.Dataset.from_dict({"picture": rows}).cast_column("picture", datasets.Image())
    table.select(range(3)).to_parquet(tmp_path / "b0.parquet")
    table.select(range(3, 5)).to_parquet(tmp_path / "b1.parquet")

    def numbers(name, pixels):
        return [{"area": int(pixels.sum()), "segmentation": encode_rle(np.ones(pixels.shape[1:], bool))}]

    areas = {}
    for name, source, more in (
        ("folder", tmp_path / "set", {"pictures_per_shard": 2}),
        ("tars", tmp_path / "tars", {}),
        ("pattern", tmp_path / "tars" / "*", {}),
        ("parquet", tmp_path / "*.parquet", {"column": "picture"}),
    ):
        folder = label(source, tmp_path / "out" / name, labeller=numbers, **more)
        content = json.loads((tmp_path / "out" / name / "coco.json").read_text())
        areas[name] = [record["area"] for record in content["annotations"]]
        assert len(folder.shards) == (3 if name == "folder" else 2)
        assert content["images"][1]["file_name"] == {
            "folder": "sa_1.jpg", "tars": "a0/sa_1.jpg", "pattern": "a0/sa_1.jpg", "parquet": "00000/000001_sa_1.jpg"
        }[name]  # fmt: skip
    assert areas["folder"] == areas["tars"] == areas["pattern"] == areas["parquet"]


def test_a_cut_tar_gives_what_it_has_and_is_named(tmp_path):
    path = make_tar(tmp_path / "a.tar", scene_files(4))
    path.write_bytes(path.read_bytes()[:-12000])
    folder = label(path, tmp_path / "out")
    total, _ = folder.report()
    assert 1 <= total.pictures < 4
    assert len(total.skipped) == 1
    assert "a.tar is cut short or no tar" in total.skipped[0]


@pytest.mark.parametrize("format", FORMATS)
def test_no_member_of_a_tar_leaves_the_folder(format, tmp_path):
    jpeg = scene_files(1)["sa_0.jpg"]
    with tarfile.open(tmp_path / "evil.tar", "w") as archive:
        for name in ("../../../out_of_here.jpg", "/out_of_here_too.jpg"):
            member = tarfile.TarInfo(name)
            member.size = len(jpeg)
            archive.addfile(member, io.BytesIO(jpeg))
    label(tmp_path / "evil.tar", tmp_path / "deep" / "er" / "out", format)
    outside = [p for p in tmp_path.rglob("*here*") if not p.is_relative_to(tmp_path / "deep" / "er" / "out")]
    assert not outside
    assert not Path("/out_of_here_too.json").exists()


def test_two_pictures_of_one_stem(tmp_path):
    jpeg = scene_files(1)["sa_0.jpg"]
    make_folder(tmp_path / "set", {"a.jpg": jpeg, "a.jpeg": jpeg})
    shards = find_label_shards(str(tmp_path / "set"))
    with pytest.raises(ValueError, match=r"labels of a\.jpeg and a\.jpg would have one file name"):
        LabelFolder(tmp_path / "out", "yolo", shards, {})
    make_tar(tmp_path / "a.tar", {"a.jpg": jpeg, "a.jpeg": jpeg})
    total, _ = label(tmp_path / "a.tar", tmp_path / "out", "yolo").report()
    assert total.pictures == 1
    assert total.skipped == ["a/a.jpeg: its labels would have the file name of another picture's"]
    assert label(tmp_path / "set", tmp_path / "coco").report()[0].pictures == 2


# --------------------------------------------------------------------------------------------------------------------
# Any end: nothing lost, nothing doubled


def labour(source: Path, output: Path, format: str) -> None:
    """A child's life: slow enough to be killed in the middle of everything."""

    def slowly(name: str, pixels: torch.Tensor) -> list[dict]:
        time.sleep(0.004)
        return draw_masks(name, pixels)

    label(source, output, format, slowly, pictures_per_shard=4)


# One that appends to a part, one that ends a file, one with a file a picture.
@pytest.mark.parametrize("format", ["coco", "sa1b", "png"])
def test_ten_kills_lose_and_double_nothing(format, tmp_path):
    files = {name: content for name, content in scene_files(40).items() if name.endswith(".jpg")}
    source = make_folder(tmp_path / "set", {**files, "sa_70.jpg": b"no picture"})
    moments, killed, finished = random.Random(len(format)), 0, False
    torch.set_num_threads(1)
    for _ in range(200):
        child = os.fork()
        if child == 0:
            # Nothing of pytest's may run in here, whatever happens.
            try:
                labour(source, tmp_path / "out", format)
                os._exit(0)
            except BaseException:
                os._exit(1)
        if killed < 10:
            time.sleep(moments.uniform(0.0, 0.08))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        killed += os.WIFSIGNALED(status)
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            if killed >= 10:
                finished = True
                break
    assert finished
    label(source, tmp_path / "whole", format, pictures_per_shard=4)
    found, wanted = contents(tmp_path / "out"), contents(tmp_path / "whole")
    hidden = [name for name in found if Path(name).name.startswith(".") or any(p[0] == "." for p in Path(name).parts)]
    assert {name: content for name, content in found.items() if name not in hidden} == wanted
    assert json.loads((tmp_path / "out" / "report.json").read_text())["pictures"] == 40


def test_a_shard_cut_off_behind_its_labels_is_done_again(tmp_path, pictures):
    label(pictures, tmp_path / "out", "coco", pictures_per_shard=3)
    wanted = contents(tmp_path / "out")
    (tmp_path / "out" / "progress" / "pictures_00001.json").unlink()
    (tmp_path / "out" / "parts" / ".pictures_00001.jsonl.0a1b2c3d.part").write_text("half of it")
    asked = []
    folder = LabelFolder(tmp_path / "out", "coco", find_label_shards(str(pictures), 3), {})
    assert list(folder.label(lambda name, pixels: asked.append(name) or draw_masks(name, pixels))) == [
        "pictures_00001"
    ]
    assert len(asked) == 3
    folder.conclude()
    assert contents(tmp_path / "out") == wanted


@pytest.mark.parametrize("format", FORMATS)
def test_another_process_at_the_same_shard_costs_no_label(format, tmp_path, pictures):
    label(pictures, tmp_path / "alone", format)
    seen = []

    def interrupted(name: str, pixels: torch.Tensor) -> list[dict]:
        seen.append(name)
        if len(seen) == 3:
            label(pictures, tmp_path / "out", format)
        return draw_masks(name, pixels)

    label(pictures, tmp_path / "out", format, interrupted)
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


@pytest.mark.parametrize("name", ["a\udce9.jpg", "\u5199" * 82 + ".jpg"], ids=["no text", "250 bytes"])
@pytest.mark.parametrize("format", FORMATS)
def test_a_strange_name_is_no_hindrance(format, name, tmp_path):
    make_folder(tmp_path / "set", {"a.jpg": scene_files(1)["sa_0.jpg"]})
    (tmp_path / "set" / "a.jpg").with_name(name).write_bytes(scene_files(2)["sa_1.jpg"])
    label(tmp_path / "set", tmp_path / "out", format)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["pictures"], len(report["skipped"])) == (2, 0)


def test_a_picture_of_a_data_set_that_has_gone_is_bad_and_an_address_that_is_silent_is_not(tmp_path):
    assert dataset_picture({"path": str(tmp_path / "gone.png"), "bytes": None}, 0, 3).blob.read() == b""
    with pytest.raises(FileNotFoundError):
        dataset_picture({"path": f"zip://a.png::{tmp_path / 'gone.zip'}", "bytes": None}, 0, 3)


def test_a_full_disk_is_no_bad_picture(tmp_path, pictures, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(FORMATS["coco"], "add", full)
    with pytest.raises(OSError, match="no space left"):
        label(pictures, tmp_path / "out")
    assert not (tmp_path / "out" / "progress").exists()


@pytest.mark.slow
def test_two_processes_share_the_shards(pictures, checkpoint, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = str(REPOSITORY / "src")
    given = ["label", str(pictures), "--model", checkpoint, "--pictures-per-shard", "2", *LOOSE_OPTIONS]
    efficientsam = str(Path(sys.executable).parent / "efficientsam")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python"]
    done = subprocess.run(
        [*command, efficientsam, *given, "--output", str(tmp_path / "two")],
        env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "7 pictures" in done.stdout
    assert "1 skipped" in done.stdout
    assert run(*given, "--output", tmp_path / "one").exit_code == 0
    two, one = contents(tmp_path / "two"), contents(tmp_path / "one")
    assert two.keys() == one.keys()
    assert two["report.json"] == one["report.json"]
    assert json.loads(two["coco.json"])["images"] == json.loads(one["coco.json"])["images"]


# --------------------------------------------------------------------------------------------------------------------
# The command, with a model


def test_the_command_labels_everything(pictures, parts, checkpoint, tmp_path):
    given = ["label", pictures, "--model", checkpoint, "--output", tmp_path / "out", *LOOSE_OPTIONS]
    result = run(*given)
    assert result.exit_code == 0, result.output
    assert "efficientsam: skipped sa_7.jpg: cannot be read as a picture" in result.output
    assert "7 pictures, " in result.output
    content = json.loads((tmp_path / "out" / "coco.json").read_text())
    # In the order of names, in which `deep/er/sa_9.jpg` comes before `sa_0.jpg`.
    second = [record for record in content["annotations"] if record["image_id"] == 2]
    wanted = segment_everything(*parts, pictures / "sa_0.jpg", **LOOSE)
    assert [record["segmentation"] for record in second] == [record["segmentation"] for record in wanted]
    assert second[0].keys() >= {"predicted_iou", "stability_score", "point_coords", "crop_box", "bbox", "area"}
    before = contents(tmp_path / "out")
    again = run(*given)
    assert again.exit_code == 0
    assert contents(tmp_path / "out") == before
    assert again.stdout == result.stdout


def boxes_json(path: Path, **changes) -> Path:
    images = [{"id": 5, "file_name": "train/sa_0.jpg"}, {"id": 6, "file_name": "sa_1.jpg"}]
    annotations = [
        {"id": number, "image_id": image, "category_id": 3, "bbox": box}
        for number, (image, box) in enumerate([(5, [4, 4, 30, 30]), (5, [40, 20, 30, 30]), (6, [5, 5, 20, 20])] * 4)
    ]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 3, "name": "cup"}], **changes}
    path.write_text(json.dumps(content))
    return path


def test_the_command_labels_boxes(pictures, parts, checkpoint, tmp_path):
    boxes = boxes_json(tmp_path / "boxes.json")
    result = run("label", pictures, "--model", checkpoint, "--output", tmp_path / "out", "--boxes", boxes)
    assert result.exit_code == 0, result.output
    assert "2 pictures, 12 masks (6.0 a picture), 5 without boxes in the JSON left out, 1 skipped" in result.output
    content = json.loads((tmp_path / "out" / "coco.json").read_text())
    assert content["categories"] == [{"id": 3, "name": "cup"}]
    assert [record["box_id"] for record in content["annotations"]] == [0, 1, 3, 4, 6, 7, 9, 10, 2, 5, 8, 11]
    assert {record["category_id"] for record in content["annotations"]} == {3}
    # Eight boxes are asked at a time, and none knows of the others.
    asked = BoxPrompts(boxes, find_label_shards(str(pictures))).of("sa_0.jpg")
    one_by_one = [segment_boxes(*parts, pictures / "sa_0.jpg", [box])[0]["segmentation"] for box in asked]
    assert [record["segmentation"] for record in content["annotations"][:8]] == one_by_one


def test_other_boxes_weights_or_settings_of_the_same_name_are_refused(pictures, checkpoint, tmp_path):
    boxes = boxes_json(tmp_path / "boxes.json")
    model = Path(shutil.copytree(checkpoint, tmp_path / "best"))
    given = ["label", pictures, "--model", model, "--output", tmp_path / "out", "--boxes", boxes]
    assert run(*given).exit_code == 0
    for path in (boxes, model / "model.safetensors", model / "config.json"):
        before = path.read_bytes()
        if path == boxes:
            boxes_json(boxes, annotations=[])
        elif path.suffix == ".json":
            path.write_text(json.dumps({**json.loads(before), "rank_by_stability": True}))
        else:
            make_model(tiny_config(), seed=1).save_pretrained(model)
        result = run(*given)
        assert result.exit_code == 2, path
        assert "out holds labels with " in result.output
        path.write_bytes(before)
    assert run(*given).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["set", "--format", "voc"], "format must be one of coco, sa1b, labelme, yolo, png, parquet, got 'voc'"),
        (["missing"], "nothing at missing: wanted a folder, tars, parquet files or the Hub's OWNER/NAME"),
        (["missing/*.tar"], "no shard at missing/*.tar"),
        (["empty"], "no picture, tar or parquet file in empty: found 0 other files"),
        (["set/sa_0.jpg"], "set/sa_0.jpg is a single file"),
        (["set", "--output", "set/out"], "--output set/out lies in set"),
        (["set", "--boxes", "none.json"], "nothing at none.json: wanted COCO's JSON with boxes"),
        (["set", "--boxes", "photo.json"], "photo.json is no COCO JSON with boxes"),
        (["set", "--boxes", "set/sa_0.jpg"], "sa_0.jpg is no COCO JSON with boxes: found UnicodeDecodeError: 'utf-8'"),
        (["set", "--boxes", "strange.json"], "boxes of category 3, which its categories do not name"),
        (["set", "--boxes", "boxes.json", "--strategy", "grid"], "--boxes and --strategy"),
        (["set", "--points-per-side", "0"], "points_per_side must be 1 or more, got 0"),
        (["set", "--output", "used"], "used holds labels with format 'yolo', wanted 'coco'"),
        (["junk"], "no picture of 1 could be labelled"),
        (["table.parquet", "--column", "photo"], "no column 'photo' in table.parquet: found image"),
    ],
    ids=lambda value: "_".join(value)[:40] if isinstance(value, list) else "",
)
def test_what_is_wrong_is_one_line(arguments, message, pictures, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    make_folder(Path("junk"), {"a.jpg": b"junk"})
    Path("photo.json").write_text('{"image": 1}')
    boxes_json(Path("boxes.json"))
    boxes_json(Path("strange.json"), categories=[{"id": 1, "name": "object"}])
    if "table.parquet" in arguments:
        datasets = pytest.importorskip("datasets")
        datasets.Dataset.from_dict({"image": ["x"]}).to_parquet("table.parquet")
    LabelFolder("used", "yolo", find_label_shards("set"), {"model": "default", "boxes": None, "options": {}})
    output = [] if "--output" in arguments else ["--output", "out"]
    result = run("label", *arguments, "--model", checkpoint, *output)
    assert result.exit_code == 2, result.output
    assert f"efficientsam: {message}" in result.output or message in result.output
    assert "Traceback" not in result.output
