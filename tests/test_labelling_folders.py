"""The folder of labels: nothing of somebody's is written over, and no picture's labels are lost under another name."""

import io
import json
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from synthetic import make_folder, make_tar, scene_files

from efficientsam_hf.labelling.formats import FORMATS
from efficientsam_hf.labelling.shards import LabelFolder
from efficientsam_hf.labelling.sources import find_label_shards
from efficientsam_hf.masks_efficientsam import encode_rle

JPEG = scene_files(1)["sa_0.jpg"]


def draw_mask(name: str, pixels: torch.Tensor) -> list[dict]:
    """A labeller without a model."""
    mask = np.zeros(pixels.shape[1:], bool)
    mask[4:20, 6:30] = True
    return [{"segmentation": encode_rle(mask), "area": int(mask.sum()), "bbox": [6, 4, 24, 16]}]


def label(source, output, format="coco") -> LabelFolder:
    folder = LabelFolder(output, format, find_label_shards(str(source)), {})
    list(folder.label(draw_mask))
    folder.conclude()
    return folder


OTHERS = scene_files(9)["sa_8.jpg"]


def lay(room: Path, kind: str, content: bytes) -> Path:
    """One picture in a folder, a tar or a table, always of the same name."""
    if kind == "folder":
        return make_folder(room / "set", {"a.jpg": content})
    room.mkdir()
    if kind == "tar":
        make_tar(room / "set.tar", {"a.jpg": content})
        return room / "set.tar"
    cells = [{"bytes": content, "path": "a.jpg"}]
    datasets.Dataset.from_dict({"image": cells, "photo": cells}).to_parquet(room / "set.parquet")
    return room / "set.parquet"


@pytest.mark.parametrize("kind", ["folder", "tar", "parquet"])
def test_other_pictures_of_the_same_names_are_refused_and_the_same_ones_elsewhere_are_not(kind, tmp_path):
    mine, others = lay(tmp_path / "mine", kind, JPEG), lay(tmp_path / "others", kind, JPEG + OTHERS)
    folder = label(mine, tmp_path / "out")
    with pytest.raises(ValueError, match=r"of other pictures \(by sizes or place\): choose another folder"):
        label(others, tmp_path / "out")
    assert label(mine.rename(tmp_path / mine.name), tmp_path / "out").report() == folder.report()
    # Where no shard is done nothing is mistaken; so is a mended picture's labelled anew.
    folder.note_of(folder.shards[0]).unlink()
    assert label(others, tmp_path / "out").report()[0].pictures == 1


def test_another_column_is_other_pictures(tmp_path):
    table = lay(tmp_path / "mine", "parquet", JPEG)
    label(table, tmp_path / "out")
    with pytest.raises(ValueError, match="of other pictures"):
        LabelFolder(tmp_path / "out", "coco", find_label_shards(str(table), column="photo"), {})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("format", "file"),
    [
        ("coco", "coco.json"),
        ("coco", "parts/pictures_00000.jsonl"),
        ("coco", "report.json"),
        ("coco", "progress/pictures_00000.json"),
        ("sa1b", "pictures_00000.tar"),
        ("labelme", "a.json"),
        ("labelme", "deep/er.json"),
        ("yolo", "labels/a.txt"),
        ("yolo", "data.yaml"),
        ("png", "masks/a.png"),
        ("parquet", "pictures_00000.parquet"),
        ("coco", "labels.json"),
    ],
)
def test_nothing_of_somebody_s_is_written_over(format, file, tmp_path):
    folder = make_folder(tmp_path / "ds", {"images/a.jpg": JPEG, file: b'{"drawn": "by hand"}'})
    before = contents(folder)
    with pytest.raises(FileExistsError, match=f"ds/{file} is not from this command"):
        label(folder / "images", folder, format)
    assert contents(folder) == before


@pytest.mark.parametrize("format", FORMATS)
def test_pictures_beside_the_labels_are_no_hindrance_and_own_labels_none(format, tmp_path):
    folder = make_folder(tmp_path / "ds", {"images/a.jpg": JPEG, "notes.txt": b"left alone"})
    label(folder / "images", folder, format)
    before = contents(folder)
    label(folder / "images", folder, format)
    assert contents(folder) == before


def test_a_file_that_a_kill_left_half_written_is_nobody_s(tmp_path):
    folder = make_folder(tmp_path / "ds", {"images/a.jpg": JPEG, ".labels-x1/labels.json": b"{"})
    assert label(folder / "images", folder, "labelme").report()[0].pictures == 1


@pytest.mark.parametrize("name", ["report.jpg", "labels.jpg", "progress/a.jpg"])
def test_labels_of_no_picture_take_the_place_of_a_note(name, tmp_path):
    make_folder(tmp_path / "set", {name: JPEG, "a.jpg": JPEG})
    note = name.removesuffix("jpg") + "json"
    with pytest.raises(ValueError, match=f"{name}: {note} is a note on all labels, wanted another name"):
        label(tmp_path / "set", tmp_path / "out", "labelme")
    assert not (tmp_path / "out").exists()
    for format in FORMATS.keys() - {"labelme"}:
        assert label(tmp_path / "set", tmp_path / format, format).report()[0].pictures == 2
    # In a folder, and in a tar, they are nobody's.
    make_folder(tmp_path / "deep", {f"set/{name}": JPEG})
    assert label(tmp_path / "deep", tmp_path / "deep_out", "labelme").report()[0].pictures == 1


def test_of_a_stream_such_a_picture_is_skipped(tmp_path):
    make_tar(tmp_path / "progress.tar", {"a.jpg": JPEG})
    total, _ = label(tmp_path / "progress.tar", tmp_path / "out", "labelme").report()
    assert total.skipped == ["progress/a.jpg: progress/a.json is a note on all labels, wanted another name"]
    assert json.loads((tmp_path / "out" / "progress" / "progress.json").read_text())["pictures"] == 0


def test_pictures_of_every_kind_are_labelled_as_everything_does(tmp_path):
    picture = Image.open(io.BytesIO(JPEG))
    names = [f"a{suffix}" for suffix in (".GIF", ".avif", ".jfif", ".jp2", ".mpo", ".tga", ".tif")]
    names = [name for name in names if Path(name).suffix.lower() in Image.registered_extensions()]
    (tmp_path / "set").mkdir()
    for name in names:
        picture.save(tmp_path / "set" / name)
    for name in ("h.pdf", "i.h5", "notes.txt"):
        (tmp_path / "set" / name).write_text("left alone")
    label(tmp_path / "set", tmp_path / "out")
    content = json.loads((tmp_path / "out" / "coco.json").read_text())
    assert [image["file_name"] for image in content["images"]] == names
    make_tar(tmp_path / "t.tar", {path.name: path.read_bytes() for path in (tmp_path / "set").iterdir()})
    assert label(tmp_path / "t.tar", tmp_path / "tar_out").report()[0].pictures == len(names)


def test_a_hard_link_in_a_tar_is_told(tmp_path):
    make_folder(tmp_path / "set", {"a.jpg": JPEG})
    (tmp_path / "set" / "b.jpg").hardlink_to(tmp_path / "set" / "a.jpg")
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        archive.add(tmp_path / "set", arcname=".")
    total, _ = label(tmp_path / "t.tar", tmp_path / "out").report()
    assert (total.pictures, len(total.skipped)) == (1, 1)
    assert "a hard link to ./" in total.skipped[0]


def test_labelme_finds_pictures_from_behind_a_link(tmp_path):
    make_folder(tmp_path / "set", {"a.jpg": JPEG})
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "deep" / "er")
    label(tmp_path / "set", tmp_path / "out", "labelme")
    path = json.loads((tmp_path / "out" / "a.json").read_text())["imagePath"]
    assert (tmp_path / "deep" / "er" / path).read_bytes() == JPEG


def test_yolo_s_pictures_are_beside_its_data_yaml_wherever_one_trains(tmp_path):
    make_folder(tmp_path / "set", {"a.jpg": JPEG})
    label(tmp_path / "set", tmp_path / "out", "yolo")
    assert (tmp_path / "out" / "data.yaml").read_text().startswith("train: images\nval: images\nnames:\n")


def test_a_folder_of_two_kinds_and_a_pattern_of_pictures_are_refused(tmp_path):
    make_folder(tmp_path / "set", {"a.jpg": JPEG, "1.parquet": b"", "2.parquet": b""})
    make_tar(tmp_path / "set" / "t.tar", {"a.jpg": JPEG})
    with pytest.raises(ValueError, match="set has 1 pictures and 1 tars and 2 parquet files: wanted one kind"):
        find_label_shards(str(tmp_path / "set"))
    with pytest.raises(
        ValueError, match=r"\*.JPG is a pattern of pictures: wanted their folder, or a pattern of tars"
    ):
        find_label_shards(str(tmp_path / "set" / "*.JPG"))
