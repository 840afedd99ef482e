"""Pictures with classes, instances and pixel classes: what is read, how it is changed, and what is refused."""

import io
import json
import math
import re

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from test_recipes import COLORS, room  # noqa: F401  # the fixture

from efficientsam_hf.data.classified_images import ClassColumn, ClassFolder, TrainingCrop, open_classified
from efficientsam_hf.data.crops import RandomResizedCrop
from efficientsam_hf.data.epochs import EpochSamples
from efficientsam_hf.data.images import CorruptPictureError
from efficientsam_hf.data.instances import CocoInstances, InstanceColumn, InstanceSample, keep_lists
from efficientsam_hf.data.randaugment import CHANGES, RandAugment
from efficientsam_hf.data.scale_jitter import GREY, Placement, ScaleJitter, WholePicture
from efficientsam_hf.data.semantic import (
    SemanticColumn,
    SemanticFolder,
    SemanticPicture,
    SemanticSample,
    class_map,
    read_names,
)


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def noise(height: int = 40, width: int = 60, seed: int = 0) -> Image.Image:
    return Image.fromarray(generator(seed).integers(256, size=(height, width, 3), dtype=np.uint8))


# --------------------------------------------------------------------------------------------------------------------
# By number


def test_an_epoch_has_every_item_once_and_a_resumed_run_the_same_samples():
    def make(item, random):
        return {"item": item, "drawn": random.random()}

    whole = EpochSamples("abcde", make, length=12, seed=3)
    samples = [whole[index] for index in range(len(whole))]
    assert sorted(sample["item"] for sample in samples[:5]) == list("abcde")
    assert sorted(sample["item"] for sample in samples[5:10]) == list("abcde")
    assert [sample["item"] for sample in samples[:5]] != [sample["item"] for sample in samples[5:10]]
    assert len({sample["drawn"] for sample in samples}) == 12
    resumed = EpochSamples("abcde", make, length=12, seed=3, first=4)
    assert [resumed[index] for index in range(len(resumed))] == samples[4:]


def test_an_item_that_cannot_be_read_is_skipped_and_named(caplog):
    def make(item, random):
        if item in "bd":
            raise CorruptPictureError("b.jpg is no readable picture") if item == "b" else OSError("no such disk")
        return {"item": item}

    samples = EpochSamples("abcde", make, length=10)
    assert {samples[index]["item"] for index in range(5)} == set("ace")
    assert "b.jpg is no readable picture" in caplog.text
    assert "no such disk" in caplog.text
    with pytest.raises(ValueError, match="wanted an item that can be read, found none among 100 in a row"):
        EpochSamples("bd", make, length=2)[0]


# --------------------------------------------------------------------------------------------------------------------
# Classes of whole pictures


def test_folders_are_classes(room):  # noqa: F811
    items = open_classified(str(room / "classes"), "train")
    assert items.names == sorted(COLORS)
    assert len(items) == 6
    for image, label in (items[index] for index in range(6)):
        assert np.abs(np.asarray(image).mean((0, 1)) - COLORS[items.names[label]]).max() < 8
    assert len(open_classified(str(room / "classes" / "train"), "test", whole=True)) == 6
    with pytest.raises(FileNotFoundError, match=r"has no folder 'Train' for its split: found .*train"):
        open_classified(str(room / "classes"), "Train")
    with pytest.raises(ValueError, match=r"folders named by class, found .*0\.png"):
        ClassFolder(room / "classes" / "train" / "red")


def sixteen_bits() -> Image.Image:
    return Image.fromarray(np.linspace(0, 65535, 40 * 60).reshape(40, 60).astype(np.uint16))


def test_grey_of_16_bits_in_a_column_keeps_its_shades():
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat"])})
    rows = datasets.Dataset.from_dict({"image": [sixteen_bits()], "label": [0]}, features=features)
    assert len(np.unique(np.asarray(ClassColumn(rows)[0][0]))) == 256


def test_columns_are_classes_and_numbers_out_of_range_are_named():
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"])})
    rows = datasets.Dataset.from_dict({"picture": [noise(), noise().convert("L")], "kind": [1, 0]}, features=features)
    items = ClassColumn(rows, "picture", "kind")
    assert (items.names, items.labels) == (["cat", "dog"], [1, 0])
    assert items[1][0].mode == "RGB"
    with pytest.raises(ValueError, match="no column 'image' in the data set: found picture, kind"):
        ClassColumn(rows)
    with pytest.raises(ValueError, match="labels must be from 0 to 0, got 1 in column 'kind'"):
        ClassColumn(rows, "picture", "kind", names=["cat"])
    with pytest.raises(ValueError, match="has no names of classes"):
        ClassColumn(rows.cast_column("kind", datasets.Value("int64")), "picture", "kind")


def test_training_crop_is_the_crop_that_was_drawn():
    image = noise()
    crop = RandomResizedCrop(0.3)
    sample = TrainingCrop(32, crop, augment=None)((image, 7), generator(5))
    drawn = crop.draw(60, 40, generator(5))
    box = (drawn.left, drawn.top, drawn.left + drawn.width, drawn.top + drawn.height)
    wanted = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC, box=box))
    wanted = wanted[:, ::-1] if drawn.flip else wanted
    assert torch.equal(sample["pixels"], torch.from_numpy(wanted.copy()).permute(2, 0, 1))
    assert sample["labels"] == 7


@pytest.mark.parametrize("name", CHANGES)
def test_a_stronger_change_changes_more(name):
    change, signed = CHANGES[name]
    smooth = Image.fromarray(np.fromfunction(lambda y, x, c: 40 + 3 * y + x + 20 * c, (40, 60, 3)).astype(np.uint8))
    for sign in (1, -1) if signed else (1,):
        moved = [
            np.abs(np.asarray(change(smooth, sign * strength)).astype(int) - np.asarray(smooth)).mean()
            for strength in (0.0, 0.5, 1.0)
        ]
        assert all(math.isfinite(value) for value in moved)
        if name in ("autocontrast", "equalize", "invert"):
            assert moved[0] == moved[1] == moved[2] > 0
        else:
            assert moved[0] <= moved[1] <= moved[2]
            assert moved[0] < moved[2]
        # Those of shape and enhancement leave the picture alone at strength 0.
        assert not signed or moved[0] < 0.01


def test_randaugment_is_drawn_from_its_generator_alone():
    image = noise()
    first, again, other = (np.asarray(RandAugment()(image, generator(seed))) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert np.array_equal(RandAugment(count=0)(image, generator()), image)
    assert RandAugment(count=9)(image, generator()).size == image.size
    with pytest.raises(ValueError, match="magnitude must be from 0 to 10, got 11"):
        RandAugment(magnitude=11)


# --------------------------------------------------------------------------------------------------------------------
# Squares


@pytest.mark.parametrize("flip", [False, True])
def test_picture_and_labels_are_moved_alike(flip):
    """A mask drawn in the picture's own colour lies on that colour afterwards."""
    pixels = np.zeros((40, 60, 3), dtype=np.uint8)
    mask = np.zeros((40, 60), dtype=bool)
    mask[8:24, 20:44] = True
    pixels[mask] = 255
    placed = Placement(size=64, height=80, width=120, top=10, left=23, flip=flip)
    image, labels = placed.place_picture(Image.fromarray(pixels)), placed.place_labels(mask, outside=False)
    assert image.shape == (64, 64, 3)
    assert labels.any()
    assert np.array_equal(image[..., 0] > 127, labels)
    stacked = placed.place_labels(np.stack([mask, ~mask]), outside=False)
    assert np.array_equal(stacked, np.stack([labels, ~labels]))


def test_what_is_outside_the_picture_is_grey_and_of_no_class():
    placed = Placement(size=32, height=20, width=28)
    image = placed.place_picture(noise(20, 28))
    labels = placed.place_labels(np.zeros((20, 28), dtype=np.int64), outside=255)
    assert np.array_equal(image[:20, :28], np.asarray(noise(20, 28)))
    assert (image[20:] == GREY).all() & (image[:, 28:] == GREY).all()
    assert (labels[20:] == 255).all() & (labels[:, 28:] == 255).all() & (labels[:20, :28] == 0).all()


@pytest.mark.parametrize(("by", "side"), [("long", 60), ("short", 40)])
def test_scales_are_of_the_side_that_is_named(by, side):
    jitter = ScaleJitter(size=32, smallest=0.5, largest=2.0, by=by)
    drawn = [jitter.draw((40, 60), generator(seed)) for seed in range(200)]
    scales = [max(placed.height, placed.width) / 60 * side / 32 for placed in drawn]
    assert 0.48 < min(scales) < 0.6
    assert 1.9 < max(scales) < 2.05
    assert all(abs(placed.width / placed.height - 1.5) < 0.12 for placed in drawn)
    for placed in drawn:
        assert 0 <= placed.top <= max(placed.height - 32, 0)
        assert 0 <= placed.left <= max(placed.width - 32, 0)
    assert 60 < sum(placed.flip for placed in drawn) < 140


def test_jitter_out_of_range_is_named():
    with pytest.raises(ValueError, match="'long' or 'short', got 'wide'"):
        ScaleJitter(by="wide")
    with pytest.raises(ValueError, match=r"above 0 and rise, got 2 to 1"):
        ScaleJitter(smallest=2, largest=1)


def test_whole_picture_fits_its_frame():
    long = WholePicture(64)(noise(40, 60))
    assert (long["frame"], long["placed"], long["original"]) == ((64, 64), (43, 64), (40, 60))
    short = WholePicture(64, by="short")(noise(40, 60))
    assert (short["frame"], short["placed"]) == ((64, 96), (64, 96))
    odd = WholePicture(50, by="short")(noise(50, 70))
    assert (odd["frame"], odd["placed"]) == ((64, 96), (50, 70))
    assert np.array_equal(odd["pixels"][:, :50, :70].permute(1, 2, 0), noise(50, 70))
    assert (odd["pixels"][:, 50:] == torch.tensor(GREY)[:, None, None]).all()


# --------------------------------------------------------------------------------------------------------------------
# Instances


def test_coco_gives_masks_and_classes_by_number(room):  # noqa: F811
    items = CocoInstances(room / "coco" / "instances.json", room / "coco" / "pictures")
    assert (items.names, items.category_ids) == (["box", "disc"], [3, 7])
    picture = items[1]
    assert (picture.number, picture.labels.tolist(), picture.masks.shape) == (1, [0, 1], (2, 64, 64))
    colors = [np.asarray(picture.image)[mask] for mask in picture.masks]
    assert all((color == color[0]).all() for color in colors[1:])


def change_json(room, path, change) -> None:  # noqa: F811
    content = json.loads((room / "coco" / "instances.json").read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda c: c["annotations"][0].update(category_id=4), ValueError, "an instance of category 4: wanted one of"),
        (lambda c: c.update(categories=[]), ValueError, "has no categories"),
        (lambda c: c["images"][0].update(file_name="9.png"), FileNotFoundError, "names 9.png: found no such picture"),
        (lambda c: c.update(annotations=[]), FileNotFoundError, "no picture with masks"),
    ],
)
def test_wrong_annotations_are_named(change, error, words, room, tmp_path):  # noqa: F811
    change_json(room, tmp_path / "wrong.json", change)
    with pytest.raises(error, match=words):
        CocoInstances(tmp_path / "wrong.json", room / "coco" / "pictures")


def test_pictures_without_instances_are_for_evaluation(room, tmp_path):  # noqa: F811
    change_json(room, tmp_path / "half.json", lambda c: c.update(annotations=c["annotations"][:2]))
    given = (tmp_path / "half.json", room / "coco" / "pictures")
    assert len(CocoInstances(*given)) == 1
    items = CocoInstances(*given, with_masks=False)
    assert items[1].masks.shape == (0, 64, 64)
    sample = InstanceSample(ScaleJitter(32))(items[1], generator())
    assert (sample["mask_labels"].shape, sample["class_labels"].shape) == ((0, 32, 32), (0,))


def test_a_picture_of_another_size_is_named(room, tmp_path):  # noqa: F811
    change_json(room, tmp_path / "wrong.json", lambda c: c["images"][0].update(height=32))
    items = CocoInstances(tmp_path / "wrong.json", room / "coco" / "pictures")
    with pytest.raises(CorruptPictureError, match=r"0\.png: the picture is 64 x 64, the JSON has 32 x 64"):
        items[0]


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ([1, 1, 9, 1, 9, 9], "0.png: wanted polygons [[x, y, ...], ...] or run lengths, found [1, 1, 9, 1, 9, 9]"),
        ([None], "0.png: wanted polygons"),
        ({"counts": "abc"}, "0.png: run lengths want size and counts, found {'counts': 'abc'}"),
        ({"size": [64, 64], "counts": None}, "0.png: run lengths want size and counts"),
        ({"size": [64, 64], "counts": [None]}, "0.png: a mask is broken, found TypeError"),
        ([["a", "b", "c", "d", "e", "f"]], "0.png: corners of polygons must be numbers"),
        ({"size": [64, 64], "counts": [10, 20]}, "0.png: run lengths of a 64 x 64 mask want to add up to 4096"),
        ({"size": [32, 64], "counts": [2048]}, "0.png: the mask is 32 x 64, the JSON has 64 x 64"),
    ],
)
def test_a_broken_shape_costs_its_picture_alone(shape, words, room, tmp_path):  # noqa: F811
    change_json(room, tmp_path / "wrong.json", lambda c: c["annotations"][0].update(segmentation=shape))
    items = CocoInstances(tmp_path / "wrong.json", room / "coco" / "pictures")
    with pytest.raises(CorruptPictureError, match=re.escape(words)):
        items[0]
    assert EpochSamples(items, InstanceSample(ScaleJitter(32)), length=1)[0]


def test_instances_of_a_data_set_of_the_hub():
    drawn = np.full((40, 60, 3), 255, dtype=np.uint8)
    drawn[:10, :10] = (1, 1, 0)
    drawn[20:30, :10] = (1, 2, 0)
    drawn[20:30, 30:] = (0, 1, 0)
    rows = datasets.Dataset.from_dict({"image": [noise()], "annotation": [Image.fromarray(drawn)]})
    rows = rows.cast_column("image", datasets.Image()).cast_column("annotation", datasets.Image())
    picture = InstanceColumn(rows, ["cat", "dog"])[0]
    assert picture.labels.tolist() == [0, 1, 1]
    assert [int(mask.sum()) for mask in picture.masks] == [300, 100, 100]
    with pytest.raises(ValueError, match="labels must be from 0 to 0, got 1 in row 0"):
        InstanceColumn(rows, ["cat"])[0]
    with pytest.raises(ValueError, match="no column 'annotation'"):
        InstanceColumn(rows.remove_columns("annotation"), ["cat"])


@pytest.mark.parametrize("column", [InstanceColumn, SemanticColumn])
def test_pictures_of_columns_are_those_that_were_drawn_on(column):
    """As stored, in all their shades, and of the map's size."""
    turned, exif = io.BytesIO(), Image.Exif()
    exif[274] = 6
    noise().save(turned, "PNG", exif=exif)
    drawn = Image.new("RGB" if column is InstanceColumn else "L", (60, 40))
    cells = [
        {"bytes": turned.getvalue(), "path": None},
        sixteen_bits(),
        noise(40, 40),
        {"bytes": b"junk", "path": None},
    ]
    features = datasets.Features({"image": datasets.Image(), "annotation": datasets.Image()})
    items = column(datasets.Dataset.from_dict({"image": cells, "annotation": [drawn] * 4}, features=features), ["x"])
    assert np.array_equal(items[0].image, noise())
    assert len(np.unique(np.asarray(items[1].image))) == 256
    with pytest.raises(CorruptPictureError, match="row 2 is 40 x 60, wanted 40 x 40"):
        items[2]
    with pytest.raises(CorruptPictureError, match="row 3 is no readable picture"):
        items[3]


def test_instances_that_the_square_misses_are_dropped(room):  # noqa: F811
    picture = CocoInstances(room / "coco" / "instances.json", room / "coco" / "pictures")[0]
    counts = set()
    for seed in range(40):
        sample = InstanceSample(ScaleJitter(32, 2.0, 4.0), smallest=9)(picture, generator(seed))
        assert len(sample["mask_labels"]) == len(sample["class_labels"])
        assert all(int(mask.sum()) >= 9 for mask in sample["mask_labels"])
        counts.add(len(sample["class_labels"]))
    assert counts >= {0, 1}
    batch = keep_lists([InstanceSample(ScaleJitter(32))(picture, generator(seed)) for seed in range(2)])
    assert batch["pixels"].shape == (2, 3, 32, 32)
    assert [len(batch[key]) for key in ("mask_labels", "class_labels")] == [2, 2]


# --------------------------------------------------------------------------------------------------------------------
# Classes of pixels


def test_zero_is_no_class_unless_it_is():
    drawn = Image.fromarray(np.array([[0, 1, 2], [255, 3, 3]], dtype=np.uint8))
    assert class_map(drawn, 3, "x", reduce=True).tolist() == [[255, 0, 1], [255, 2, 2]]
    assert class_map(drawn, 4, "x", reduce=False).tolist() == [[0, 1, 2], [255, 3, 3]]
    with pytest.raises(ValueError, match="x has class 3: wanted 1 to 2, or 255 for none"):
        class_map(drawn, 2, "x", reduce=True)
    with pytest.raises(ValueError, match="x has class 3: wanted 0 to 2"):
        class_map(drawn, 3, "x", reduce=False)


def test_a_map_says_numbers_and_no_colours():
    drawn = np.array([[0, 1], [1, 0]], dtype=bool)
    assert class_map(Image.fromarray(drawn), 2, "x", reduce=False).tolist() == [[0, 1], [1, 0]]
    deep = Image.fromarray(np.array([[0, 254]], dtype=np.uint16))
    assert class_map(deep, 255, "x", reduce=False).tolist() == [[0, 254]]
    for mode in ("RGB", "RGBA"):
        with pytest.raises(ValueError, match=rf"x has colours \({mode}\): wanted grey or a palette"):
            class_map(Image.new(mode, (2, 2)), 2, "x", reduce=False)
    for reduce, most in ((False, 255), (True, 254)):
        with pytest.raises(ValueError, match=f"wanted at most {most} classes, found {most + 1}: 255 in a map is none"):
            class_map(deep, most + 1, "x", reduce)


def test_maps_belong_to_pictures_by_their_paths(tmp_path):
    for place, shade in (("a", 1), ("b", 2)):
        for kind, suffix in (("images", "jpg"), ("annotations", "png")):
            (tmp_path / kind / "training" / place).mkdir(parents=True)
            Image.new("L", (8, 8), shade).save(tmp_path / kind / "training" / place / f"1.{suffix}")
    items = SemanticFolder(tmp_path, "training", ["x", "y", "z"], reduce=False)
    assert [np.unique(items[number].classes).tolist() for number in range(2)] == [[1], [2]]
    (tmp_path / "annotations" / "training" / "b" / "1.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"no classes of .*training/b/1.jpg in .*annotations/training"):
        SemanticFolder(tmp_path, "training", ["x", "y", "z"])


def test_ade_layout(room, tmp_path):  # noqa: F811
    items = SemanticFolder(room / "ade", "training", ["box", "disc", "ground"])
    picture = items[0]
    assert set(np.unique(picture.classes)) == {0, 1, 2, 255}
    assert (picture.classes[:3] == 255).all()
    sample = SemanticSample(ScaleJitter(64, 1, 1, by="short", flip=0))(picture, generator())
    assert sample["class_labels"].tolist() == [0, 1, 2]
    assert torch.equal(sample["mask_labels"].sum(0), torch.from_numpy(picture.classes != 255).long())
    (tmp_path / "images" / "training").mkdir(parents=True)
    (tmp_path / "annotations" / "training").mkdir(parents=True)
    noise().save(tmp_path / "images" / "training" / "7.jpg")
    noise(20, 20).convert("L").save(tmp_path / "annotations" / "training" / "8.png")
    with pytest.raises(FileNotFoundError, match=r"no classes of .*7.jpg in .*annotations.training"):
        SemanticFolder(tmp_path, "training", ["x"])
    (tmp_path / "annotations" / "training" / "8.png").rename(tmp_path / "annotations" / "training" / "7.png")
    with pytest.raises(ValueError, match=r"7.png is 20 x 20, wanted 40 x 60"):
        SemanticFolder(tmp_path, "training", ["x"] * 254, reduce=True)[0]


def test_semantic_columns_and_a_sample_of_nothing():
    rows = datasets.Dataset.from_dict({"image": [noise()], "annotation": [Image.new("L", (60, 40))]})
    rows = rows.cast_column("image", datasets.Image()).cast_column("annotation", datasets.Image())
    picture = SemanticColumn(rows, ["x"])[0]
    assert isinstance(picture, SemanticPicture)
    sample = SemanticSample(ScaleJitter(32))(picture, generator())
    assert (sample["mask_labels"].shape, sample["class_labels"].shape) == ((0, 32, 32), (0,))
    with pytest.raises(ValueError, match="no column 'annotation'"):
        SemanticColumn(rows.remove_columns("annotation"), ["x"])


def test_names_of_classes(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("wall\nbuilding, edifice\n\n")
    assert read_names(path) == ["wall", "building, edifice"]
    path.write_text("Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0.1\t1\t1\t1\twall\n2\t0.1\t1\t1\t1\tbuilding, edifice\n")
    assert read_names(path) == ["wall", "building, edifice"]
    path.write_text("\n")
    with pytest.raises(ValueError, match="no names of classes"):
        read_names(path)
