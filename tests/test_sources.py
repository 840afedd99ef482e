"""Pictures and masks of every layout come through one door with the same masks, and what is wrong is said."""

import io
import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from synthetic import make_folder, make_scene, scene_files

from efficientsam_hf.data import coco, sa1b
from efficientsam_hf.data.blobs import find_blobs
from efficientsam_hf.data.images import find_pictures
from efficientsam_hf.data.numbered_samples import Sa1bSamples
from efficientsam_hf.data.sa1b import LabelledPicture
from efficientsam_hf.data.sources import find_labelled_pictures
from efficientsam_hf.image_processing_efficientsam import EfficientSamImageProcessor
from efficientsam_hf.masks_efficientsam import decode_rle, encode_rle


def png(pixels: np.ndarray, palette: bool = False) -> bytes:
    image, file = Image.fromarray(pixels), io.BytesIO()
    if palette:
        image.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    image.save(file, "PNG")
    return file.getvalue()


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def masks_of(picture: LabelledPicture) -> list[np.ndarray]:
    records = picture.read_annotations()
    masks = [decode_rle(record["segmentation"]).numpy() for record in records]
    assert [record["area"] for record in records] == [mask.sum() for mask in masks]
    return masks


def assert_same(found: list[np.ndarray], wanted: list[np.ndarray] | np.ndarray) -> None:
    assert sorted(mask.tobytes() for mask in found) == sorted(np.asarray(mask).tobytes() for mask in wanted) != []


# --------------------------------------------------------------------------------------------------------------------
# COCO and LVIS

SQUARE = [10.0, 5.0, 40.0, 5.0, 40.0, 25.0, 10.0, 25.0]


def instances(**changes: object) -> dict:
    """Two pictures of 60 x 80: a square and a mask in run lengths on the first, a square and a crowd on the second."""
    rle = encode_rle(make_scene(0)[1][1])
    content = {
        "images": [{"id": n, "file_name": f"sa_{n}.jpg", "width": 80, "height": 60} for n in range(2)],
        "annotations": [
            {"id": 1, "image_id": 0, "category_id": 3, "area": 600.0, "iscrowd": 0, "segmentation": [SQUARE]},
            {"id": 2, "image_id": 0, "category_id": 3, "area": 1.0, "segmentation": rle},
            {"id": 3, "image_id": 1, "category_id": 9, "area": 600.0, "segmentation": [SQUARE, [0, 0, 3, 0, 3, 3]]},
            {"id": 4, "image_id": 1, "iscrowd": 1, "segmentation": {"size": [60, 80], "counts": [0, 4800]}},
            {"id": 5, "image_id": 1, "segmentation": [[4, 4, 9, 9]]},
            {"id": 6, "image_id": 1, "segmentation": []},
        ],
    }
    return {**content, **changes}


def make_coco(folder: Path, content: dict | bytes) -> str:
    """The JSON and the pictures of scenes 0 and 1, as the source that names them."""
    write(folder / "pictures", {name: data for name, data in scene_files(2).items() if name.endswith(".jpg")})
    (folder / "instances.json").write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return f"{folder / 'instances.json'}:{folder / 'pictures'}"


def test_coco_s_masks_are_pycocotools_masks(tmp_path: Path):
    first, second = find_labelled_pictures(make_coco(tmp_path, instances()))
    assert [first.name, second.name] == ["sa_0.jpg", "sa_1.jpg"]
    square, corner = (
        coco_mask.decode(coco_mask.frPyObjects([p], 60, 80))[..., 0] > 0 for p in (SQUARE, [0, 0, 3, 0, 3, 3])
    )
    assert square.sum() == 600
    assert_same(masks_of(first), [square, make_scene(0)[1][1]])
    # Two polygons are one object; a crowd, two points and nothing are none.
    assert_same(masks_of(second), [square | corner])


def test_lvis_names_pictures_by_their_address(tmp_path: Path):
    """1.0 has no other name, and 0.5 beside it the name of another year."""
    content = instances()
    for number, image in enumerate(content["images"]):
        image["coco_url"] = f"http://images.cocodataset.org/train2017/sa_{number}.jpg"
    del content["images"][0]["file_name"]
    content["images"][1]["file_name"] = "COCO_train2014_sa_1.jpg"
    found = find_labelled_pictures(make_coco(tmp_path, content))
    assert [picture.name for picture in found] == ["train2017/sa_0.jpg", "COCO_train2014_sa_1.jpg"]
    assert [picture.image.path.name for picture in found] == ["sa_0.jpg", "sa_1.jpg"]


def test_pictures_may_lie_beside_their_json(tmp_path: Path):
    make_coco(tmp_path, instances())
    assert len(find_labelled_pictures(str(tmp_path / "instances.json"))) == 2


def test_pictures_that_cannot_be_used_are_counted(tmp_path: Path, caplog, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(coco, "LARGEST_PICTURE", 5000)
    content = instances()
    content["images"] += [
        {"id": 7, "file_name": "gone.jpg", "width": 80, "height": 60},
        {"id": 8, "file_name": "sa_0.jpg", "width": 80, "height": 60},
        {"id": 9, "file_name": "sa_0.jpg", "width": 80, "height": 63},
    ]
    content["annotations"] += [{"image_id": number, "segmentation": [SQUARE]} for number in (7, 9)]
    with caplog.at_level(logging.WARNING):
        assert len(find_labelled_pictures(make_coco(tmp_path, content))) == 2
    told = caplog.messages[0]
    assert "2 pictures, left out: " in told
    assert all(part in told for part in ("1 missing", "1 without masks", "1 too large", "such as gone.jpg"))


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (instances(annotations=[]), FileNotFoundError, "no picture with masks in .*: found 2 without masks"),
        (instances(images=[]), FileNotFoundError, "no picture with masks in .*: found no pictures"),
        (b"{", ValueError, "instances.json is no JSON of COCO's or LVIS's instances: found JSONDecodeError"),
        ({"images": []}, ValueError, r"is no JSON of COCO's or LVIS's instances: found KeyError: 'annotations'"),
        (instances(annotations=[{"image_id": 0, "bbox": [1, 2, 3, 4]}]), ValueError, "found KeyError: 'segmentation'"),
        (instances(annotations=[{"segmentation": [SQUARE]}]), ValueError, "found KeyError: 'image_id'"),
        (
            instances(images=[{"id": 3, "file_name": "a", "width": 1, "height": 1}] * 2),
            ValueError,
            "two images of id 3",
        ),
        (instances(images=[{"id": 0, "file_name": "a"}]), ValueError, r"found KeyError: 'width'"),
        (
            instances(images=[{"id": 0, "width": 1, "height": 1}]),
            ValueError,
            "found KeyError: 'id, file_name, width or height'",
        ),
    ],
)
def test_a_useless_json_is_said(content: dict | bytes, error: type, message: str, tmp_path: Path):
    with pytest.raises(error, match=message):
        find_labelled_pictures(make_coco(tmp_path, content))


@pytest.mark.parametrize(
    ("names", "files", "wanted"),
    [
        (["one/1.jpg", "two/1.jpg"], ["two/1.jpg"], [None, "two/1.jpg"]),
        (["one/1.jpg", "two/1.jpg"], ["x/one/1.jpg", "x/two/1.jpg"], ["x/one/1.jpg", "x/two/1.jpg"]),
        (["one/1.jpg", "two/1.jpg"], ["1.jpg"], [None, None]),
        (["val/1.jpg"], ["1.jpg"], ["1.jpg"]),
        (["val/1.jpg"], ["elsewhere/1.jpg"], ["elsewhere/1.jpg"]),
        (["1.jpg"], ["a/1.jpg", "b/1.jpg"], [None]),
        (["1.jpg", "a/1.jpg"], ["a/1.jpg"], [None, "a/1.jpg"]),
        (["1.jpg"], ["deep/er/1.jpg"], ["deep/er/1.jpg"]),
        (["val\\1.jpg"], ["val/1.jpg"], ["val/1.jpg"]),
        (["one\\1.jpg", "two\\1.jpg"], ["x/one/1.jpg", "x/two/1.jpg"], ["x/one/1.jpg", "x/two/1.jpg"]),
    ],
)
def test_no_picture_is_taken_for_another(names, files, wanted, tmp_path: Path):
    images = [{"id": number, "file_name": name} for number, name in enumerate(names)]
    known = coco.PictureFiles(write(tmp_path, dict.fromkeys(files, b"")), images)
    found = [known.find(image) for image in images]
    assert [blob and str(blob.path.relative_to(tmp_path)) for blob in found] == wanted


def test_boxes_alone_may_stand_among_shapes(tmp_path: Path):
    content, boxed = instances(), instances()
    boxed["annotations"].append({"image_id": 0, "bbox": [1, 2, 3, 4]})
    counts = []
    for number, given in enumerate((content, boxed)):
        found = find_labelled_pictures(make_coco(tmp_path / str(number), given))
        counts.append([len(picture.read_annotations()) for picture in found])
    assert counts[0] == counts[1]


def test_a_json_or_a_folder_that_is_not_there_is_said(tmp_path: Path):
    make_coco(tmp_path, instances())
    with pytest.raises(FileNotFoundError, match=r"nothing at .*other\.json: wanted a JSON of COCO's or LVIS's"):
        find_labelled_pictures(str(tmp_path / "other.json"))
    with pytest.raises(FileNotFoundError, match=r"nothing at .*none: wanted a folder or a tar of pictures"):
        find_labelled_pictures(f"{tmp_path / 'instances.json'}:{tmp_path / 'none'}")


@pytest.mark.parametrize(
    "path", ["lvis_val_sub/lvis_v0.5_val_subset.json", "coco_train/instances_train2017_subset.json"]
)
def test_real_instances_fit_their_pictures(path: str, shared: Path):
    json_path = shared / "data" / path
    pictures = find_labelled_pictures(f"{json_path}:{json_path.parent / 'images'}")
    assert len(pictures) >= 20
    for picture in pictures[::40]:
        assert {mask.shape for mask in masks_of(picture)} == {picture.read_image().size[::-1]}


# --------------------------------------------------------------------------------------------------------------------
# Masks in PNG


def scene() -> tuple[bytes, np.ndarray]:
    """A picture and three masks that do not touch."""
    masks = np.zeros((3, 60, 80), dtype=bool)
    masks[0, 5:20, 5:20], masks[1, 30:50, 10:40], masks[2, 10:30, 50:75] = True, True, True
    return scene_files(1)["sa_0.jpg"], masks


def label_map(masks: np.ndarray, *values: int, kind: type = np.uint8) -> np.ndarray:
    return np.tensordot(np.array(values), masks, 1).astype(kind)


@pytest.mark.parametrize(
    "kind", ["objects", "bits", "grey", "palette", "sixteen bits", "colors", "void", "no void of 16 bits", "pure blue"]
)
def test_mask_pngs_give_their_masks(kind: str, tmp_path: Path):
    picture, masks = scene()
    colors = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [255, 0, 1]], dtype=np.uint8)
    files = {
        "objects": {f"masks/a/{n}.png": png(200 * mask.astype(np.uint8)) for n, mask in enumerate(masks)},
        "bits": {f"masks/a/{n}.png": png(mask) for n, mask in enumerate(masks)},
        "grey": {"masks/a.png": png(label_map(masks, 1, 7, 200))},
        "palette": {"masks/a.png": png(label_map(masks, 1, 2, 3), palette=True)},
        "sixteen bits": {"masks/a.png": png(label_map(masks, 1, 300, 60000, kind=np.uint16))},
        "colors": {"masks/a.png": png(colors[label_map(masks, 1, 2, 3)])},
        "void": {"masks/a.png": png(label_map(masks, 1, 2, 255), palette=True)},
        "no void of 16 bits": {"masks/a.png": png(label_map(masks, 1, 255, 256, kind=np.uint16))},
        "pure blue": {
            "masks/a.png": png(
                np.array([[0] * 3, [255, 0, 0], [0, 0, 255], [9] * 3], np.uint8)[label_map(masks, 1, 2, 3)]
            )
        },
    }[kind]
    (found,) = find_labelled_pictures(str(write(tmp_path, {"images/a.jpg": picture, **files})))
    assert found.name == "a"
    assert found.read_image().size == (80, 60)
    assert_same(masks_of(found), masks[:2] if kind == "void" else masks)


def test_a_single_white_mask_is_an_object(tmp_path: Path):
    picture, masks = scene()
    files = {"images/x/a.png": picture, "masks/x/a.png": png(255 * masks[0].astype(np.uint8))}
    (found,) = find_labelled_pictures(str(write(tmp_path, files)))
    assert found.name == str(Path("x/a"))
    assert_same(masks_of(found), masks[:1])


def test_an_object_s_palette_is_looked_up(tmp_path: Path):
    picture, masks = scene()
    drawn = Image.fromarray(np.uint8(~masks[0]))  # 0 on the object,
    drawn.putpalette([255, 255, 255, 0, 0, 0])  # which is white
    drawn.save(tmp_path / "mask.png")
    write(tmp_path, {"images/a.jpg": picture, "masks/a/1.png": (tmp_path / "mask.png").read_bytes()})
    (found,) = find_labelled_pictures(str(tmp_path))
    assert_same(masks_of(found), masks[:1])


def test_folders_behind_links_are_entered_once(tmp_path: Path):
    picture, masks = scene()
    elsewhere = write(tmp_path / "elsewhere", {"a.jpg": picture})
    folder = write(tmp_path / "set", {"masks/a/1.png": png(masks[0])})
    (folder / "images").symlink_to(elsewhere)
    (folder / "again").symlink_to(folder)
    (elsewhere / "back").symlink_to(folder)
    (folder / "masks" / "twice").symlink_to(folder / "masks" / "a")
    assert sorted(find_blobs(folder, "pictures")) == ["images/a.jpg", "masks/a/1.png"]
    assert [found.name for found in find_labelled_pictures(str(folder))] == ["a"]


@pytest.mark.parametrize("suffix", [".tif", ".TIFF", ".gif"])
def test_pictures_of_every_kind_have_masks(suffix: str, tmp_path: Path):
    for name, kind in ((f"images/a{suffix}", None), ("masks/a.png", "L")):
        (tmp_path / name).parent.mkdir()
        Image.new(kind or "RGB", (8, 8), 1 if kind else "red").save(tmp_path / name)
    assert len(find_labelled_pictures(str(tmp_path))) == 1
    assert [picture.read().size for picture in find_pictures([tmp_path / "images"])] == [(8, 8)]


def test_a_second_picture_of_one_name_is_counted(tmp_path: Path, caplog):
    picture, masks = scene()
    files = {
        "images/a.jpg": picture,
        "images/a.png": png(np.zeros((60, 80, 3), np.uint8)),
        "masks/a/1.png": png(masks[0]),
    }
    with caplog.at_level(logging.WARNING):
        (found,) = find_labelled_pictures(str(write(tmp_path, files)))
    assert found.image.path.name == "a.jpg"
    assert "left out: 1 pictures that another one shares its name with" in caplog.messages[0]


def test_pictures_and_masks_that_stand_alone_are_counted(tmp_path: Path, caplog):
    picture, masks = scene()
    mask = png(masks[0])
    files = {f"images/{name}.jpg": picture for name in ("a", "b")} | {"masks/a/1.png": mask, "masks/c/1.png": mask}
    with caplog.at_level(logging.WARNING):
        assert [found.name for found in find_labelled_pictures(str(write(tmp_path, files)))] == ["a"]
    assert "1 pictures, left out: 1 pictures without masks, 1 masks without a picture" in caplog.messages[0]
    (tmp_path / "masks/a/1.png").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"no picture with masks in .*: found 2 pictures without masks, 1 masks"
    ):
        find_labelled_pictures(str(tmp_path))


def test_what_is_no_mask_is_said(tmp_path: Path):
    picture, masks = scene()
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    write(tmp_path, {"images/a.jpg": picture, "masks/a.png": png(noise)})
    with pytest.raises(ValueError, match=r"masks/a\.png has \d+ values, wanted a label map of at most 1000 objects"):
        find_labelled_pictures(str(tmp_path))[0].read_annotations()
    soft = Image.fromarray(255 * masks[0].astype(np.uint8)).resize((640, 480)).resize((80, 60), Image.Resampling.BOX)
    soft = np.asarray(soft.rotate(30, Image.Resampling.BICUBIC))
    (tmp_path / "masks/a.png").write_bytes(png(soft))
    with pytest.raises(ValueError, match=r"masks/a\.png is mostly 255, with \d+ other values: .* edges are soft"):
        find_labelled_pictures(str(tmp_path))[0].read_annotations()
    (tmp_path / "masks/a.png").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"masks/a\.png in .* is no readable mask"):
        find_labelled_pictures(str(tmp_path))[0].read_annotations()
    write(tmp_path, {"masks/a/1.png": png(masks[0])})
    with pytest.raises(ValueError, match=r"a wants a label map or a folder of masks, found both: masks/a"):
        find_labelled_pictures(str(tmp_path))


# --------------------------------------------------------------------------------------------------------------------
# One door


def test_pairs_come_through_the_same_door(tmp_path: Path):
    folder = make_folder(tmp_path, scene_files(3), parts=True)
    assert [found.name for found in find_labelled_pictures(str(folder))] == ["sa_0", "sa_1", "sa_2"]


def test_every_layout_trains(tmp_path: Path):
    picture, masks = scene()
    pairs = make_folder(tmp_path / "pairs", scene_files(1))
    pngs = write(tmp_path / "pngs", {"images/a.jpg": picture, "masks/a.png": png(label_map(masks, 1, 2, 3))})
    sources = [str(pairs), str(pngs), make_coco(tmp_path / "coco", instances())]
    processor = EfficientSamImageProcessor(size={"height": 64, "width": 64})
    for source, count in zip(sources, (2, 3, 1), strict=True):
        samples = Sa1bSamples([find_labelled_pictures(source)], processor, length=3, masks_per_image=5)
        for number in range(3):
            assert (samples[number]["labels"] >= 0).all((1, 2)).sum() >= count


def test_a_picture_above_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sa1b, "LARGEST_PICTURE", 4799)
    (found,) = find_labelled_pictures(str(make_folder(tmp_path, scene_files(1))))
    with pytest.raises(ValueError, match=r"sa_0 in .* has 80 x 60 pixels, wanted at most 4,799"):
        found.read_image()
    assert re.search("sa_0", found.name)
