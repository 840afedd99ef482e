"""SA-1B's layout, read from folders and shards: the same pairs, the right masks, and every sample exactly once."""

import io
import json
import re
import tarfile
from collections import Counter
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from synthetic import encode_scene, make_folder, make_scene, make_tar, scene_files
from torch import Tensor
from torch.utils.data import DataLoader

from efficientsam_hf.data.augmentation import (
    CLOSEST,
    WIDEST,
    Augmentation,
    draw_crop,
    jitter_colors,
    paste_objects,
    paste_shapes,
)
from efficientsam_hf.data.numbered_samples import Sa1bSamples
from efficientsam_hf.data.pair_reading import PairReader
from efficientsam_hf.data.sa1b import Pair, find_pairs
from efficientsam_hf.data.skipped import SkippedPictures
from efficientsam_hf.data.sources import find_labelled_pictures
from efficientsam_hf.image_processing_efficientsam import EfficientSamImageProcessor
from efficientsam_hf.masks_efficientsam import decode_rle

WILD = Augmentation(smallest_crop=0.5, flip=0.5, color=0.3)


@pytest.fixture
def processor() -> EfficientSamImageProcessor:
    return EfficientSamImageProcessor(size={"height": 64, "width": 64})


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return make_tar(tmp_path / "sa_000000.tar", scene_files(3))


def painted(mask: np.ndarray) -> np.ndarray:
    """The picture (H, W, 3) that shows a mask, white on black."""
    return np.repeat(255 * mask[..., None].astype(np.uint8), 3, axis=2)


def contents(pair: Pair) -> tuple[bytes, list[dict]]:
    return np.asarray(pair.read_image()).tobytes(), pair.read_annotations()


# --------------------------------------------------------------------------------------------------------------------
# Pairs


def test_pairs_of_one_name_are_counted(tmp_path, caplog):
    files = scene_files(1)
    make_folder(tmp_path, {f"{place}{name}": content for place in ("", "images/") for name, content in files.items()})
    (tmp_path / "sa_0.jpeg").write_bytes(b"")
    (pair,) = find_pairs(tmp_path)
    assert [blob.path.parent for blob in (pair.image, pair.annotations)] == [tmp_path / "images"] * 2
    assert "left out: 3 files whose pair's name another has, as sa_0.jpeg" in caplog.text


def test_hard_links_in_a_tar_are_followed(tmp_path):
    make_folder(tmp_path / "set", scene_files(1))
    (tmp_path / "set" / "sa_1.jpg").hardlink_to(tmp_path / "set" / "sa_0.jpg")
    (tmp_path / "set" / "sa_1.json").hardlink_to(tmp_path / "set" / "sa_0.json")
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        archive.add(tmp_path / "set", arcname=".")
    first, second = find_pairs(tmp_path / "set.tar")
    assert first.image.read() == second.image.read() == (tmp_path / "set" / "sa_0.jpg").read_bytes()


@pytest.mark.parametrize("layout", ["flat", "parts", "tar", "deep"])
def test_all_layouts_give_the_same_pairs(layout: str, tmp_path: Path):
    files = scene_files(12)
    make = {
        "flat": lambda: make_folder(tmp_path / "set", files),
        "parts": lambda: make_folder(tmp_path / "set", files, parts=True),
        "tar": lambda: make_tar(tmp_path / "set.tar", files),
        "deep": lambda: make_folder(tmp_path / "set" / "images" / "annotations", files).parents[1],
    }
    pairs = find_pairs(make[layout]())
    assert [pair.name for pair in pairs] == sorted(f"sa_{number}" for number in range(12))
    for pair in pairs:
        number = int(pair.name.removeprefix("sa_"))
        picture, annotations = encode_scene(number, *make_scene(number))
        wanted = np.asarray(Image.open(io.BytesIO(picture))).tobytes()
        assert contents(pair) == (wanted, json.loads(annotations)["annotations"])


def test_one_picture_of_each_folder_may_have_the_same_name(tmp_path: Path):
    for part in ("a", "b"):
        make_folder(tmp_path / part, scene_files(1), parts=True)
    assert [pair.name for pair in find_pairs(tmp_path)] == ["a/sa_0", "b/sa_0"]


@pytest.mark.parametrize("missing", ["sa_1.jpg", "sa_1.json"])
def test_half_a_pair_is_left_out(missing: str, tmp_path: Path):
    files = scene_files(3)
    del files[missing]
    assert [pair.name for pair in find_pairs(make_tar(tmp_path / "set.tar", files))] == ["sa_0", "sa_2"]


def test_masks_belong_to_the_stored_pixels(tmp_path: Path):
    """A camera's note that the picture should be turned does not turn it: its masks would stay behind."""
    image, masks = make_scene(0)
    _, annotations = encode_scene(0, image, masks)
    turned, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(image).save(turned, "JPEG", exif=exif)
    pair = find_pairs(make_folder(tmp_path, {"a.jpg": turned.getvalue(), "a.json": annotations}))[0]
    assert pair.read_image().size == (80, 60)


def test_masks_survive_shard_and_run_lengths(shard: Path):
    for number, pair in enumerate(find_pairs(shard)):
        for mask, record in zip(make_scene(number)[1], pair.read_annotations(), strict=True):
            assert np.array_equal(decode_rle(record["segmentation"]).numpy(), mask)


def test_nothing_there_is_said(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"nothing at .*shard\.tar: wanted a folder or a tar"):
        find_pairs(tmp_path / "shard.tar")


def test_no_pair_is_said(tmp_path: Path):
    make_folder(tmp_path, {"a.jpg": b"", "b.json": b"", "c.json": b"", "d.txt": b""})
    with pytest.raises(FileNotFoundError, match=r"no pair .* in .*: found 1 pictures and 2 JSON files"):
        find_pairs(tmp_path)


def test_what_is_no_tar_is_said(tmp_path: Path):
    with pytest.raises(ValueError, match=r"set\.tgz is no uncompressed tar"):
        find_pairs(make_tar(tmp_path / "set.tgz", scene_files(1), mode="w:gz"))


def test_a_shard_cut_short_gives_what_is_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    shard = make_tar(tmp_path / "set.tar", scene_files(3))
    with tarfile.open(shard) as archive:
        members = archive.getmembers()
    content = shard.read_bytes()
    # In the second pair's JSON, and with a broken header in its place.
    for spoilt in (content[: members[3].offset + 600], content[: members[3].offset] + b"?" * 1024):
        shard.write_bytes(spoilt)
        caplog.clear()
        assert [pair.name for pair in find_pairs(shard)][:1] == ["sa_0"]
        assert re.search(r"set\.tar is cut short, [34] files into it", caplog.text)


@pytest.mark.parametrize("content", [b"", b"no picture at all"])
def test_a_spoilt_picture_is_named(content: bytes, tmp_path: Path, processor):
    pairs = find_pairs(make_tar(tmp_path / "set.tar", {**scene_files(1), "sa_0.jpg": content}))
    with pytest.raises(ValueError, match=r"sa_0 in .*set\.tar is no readable picture"):
        Sa1bSamples([pairs], processor, length=1)[0]


def test_a_picture_cut_short_is_named(tmp_path: Path, processor):
    files = scene_files(1)
    files["sa_0.jpg"] = files["sa_0.jpg"][:-400]
    pairs = find_pairs(make_tar(tmp_path / "set.tar", files))
    with pytest.raises(ValueError, match=r"sa_0 in .*set\.tar is no readable picture.*truncated"):
        Sa1bSamples([pairs], processor, length=1)[0]


@pytest.mark.parametrize("content", [b"{", b"{}"])
def test_spoilt_annotations_are_named(content: bytes, tmp_path: Path):
    pairs = find_pairs(make_tar(tmp_path / "set.tar", {**scene_files(1), "sa_0.json": content}))
    with pytest.raises(ValueError, match=r"sa_0 in .*set\.tar has no readable annotations"):
        pairs[0].read_annotations()


def test_masks_of_another_size_are_refused(tmp_path: Path, processor):
    files = scene_files(1)
    files["sa_0.jpg"] = encode_scene(0, *make_scene(0, height=80, width=60))[0]
    pairs = find_pairs(make_folder(tmp_path, files))
    with pytest.raises(ValueError, match=r"sa_0 in .*: a mask of \(60, 80\) for a picture of \(80, 60\)"):
        Sa1bSamples([pairs], processor, length=1)[0]


def test_real_annotations_fit_their_pictures(shared: Path):
    pairs = find_pairs(shared / "data" / "coco_train")
    assert len(pairs) > 250
    for pair in pairs[::100]:
        width, height = pair.read_image().size
        for record in pair.read_annotations():
            mask = decode_rle(record["segmentation"])
            assert mask.shape == (height, width)
            assert mask.sum() == record["area"]


# --------------------------------------------------------------------------------------------------------------------
# Samples


def test_a_sample_is_pixels_and_masks(shard: Path, processor):
    sample = Sa1bSamples([find_pairs(shard)], processor, length=1, masks_per_image=5)[0]
    assert sample["pixel_values"].shape == (3, 64, 64)
    assert sample["labels"].shape == (5, 16, 16)
    assert {*sample["labels"].unique().tolist()} == {-1, 0, 1}
    assert sample["labels"].dtype == torch.int8
    # The box and the disc; the pixel vanishes when shrunk, and nearly everything is too much.
    assert [labels.max().item() for labels in sample["labels"]] == [1, 1, -1, -1, -1]


def test_masks_go_through_shard_and_loader_unharmed(tmp_path: Path, processor):
    """Made of whole cells of a picture that already has the training size, they come out as they went in."""
    cells = np.random.default_rng(0).random((6, 16, 16)) < 0.3
    masks = cells.repeat(4, axis=1).repeat(4, axis=2)
    picture, annotations = encode_scene(0, painted(masks[0]), masks)
    pairs = find_pairs(make_tar(tmp_path / "set.tar", {"a.jpg": picture, "a.json": annotations}))
    labels = Sa1bSamples([pairs], processor, length=1, masks_per_image=6)[0]["labels"]
    assert sorted(map(Tensor.tolist, labels)) == sorted(cells.astype(float).tolist())


def test_samples_are_the_loss_s_labels(shard: Path, processor):
    """As many real prompts as masks, and padding that the loss leaves out."""
    labels = Sa1bSamples([find_pairs(shard)], processor, length=1, masks_per_image=7)[0]["labels"]
    assert (labels >= 0).all((1, 2)).tolist() == [True] * 2 + [False] * 5
    assert (labels == -1).all((1, 2)).tolist() == [False] * 2 + [True] * 5


@pytest.mark.parametrize(
    ("limits", "wanted"),
    [
        ({"largest_share": 1.0}, 3),
        ({}, 2),
        ({"smallest_share": 0.15}, 1),
        ({"largest_share": 0.15, "smallest_share": 0.05}, 1),
    ],
)
def test_masks_beyond_the_limits_are_left_out(limits: dict, wanted: int, tmp_path: Path, processor):
    y, x = np.mgrid[:60, :80]
    masks = np.stack([x < 20, x < 10, (y == 3) & (x == 3), y < 59])  # 25 %, 13 %, a pixel, 98 %
    picture, annotations = encode_scene(0, painted(masks[0]), masks)
    pairs = find_pairs(make_folder(tmp_path, {"a.jpg": picture, "a.json": annotations}))
    labels = Sa1bSamples([pairs], processor, length=1, masks_per_image=5, **limits)[0]["labels"]
    assert (labels >= 0).all((1, 2)).sum() == wanted
    for nothing in ({"smallest_share": 0.5}, {"smallest_share": 1e-9, "largest_share": 0.001}):
        with pytest.raises(
            ValueError, match=r"nothing to train on in 100 draws: \['a in .*: none of 4 masks covers between .*'\]"
        ):
            Sa1bSamples([pairs], processor, length=1, masks_per_image=5, **nothing)[0]


def test_masks_are_drawn_anew_for_every_sample(shard: Path, processor):
    samples = Sa1bSamples([find_pairs(shard)[:1]], processor, length=20, masks_per_image=1, largest_share=1.0)
    areas = {sample["labels"].clamp(min=0).sum().item() for sample in map(samples.__getitem__, range(20))}
    # The box, the disc, nearly everything; where the pixel was drawn, which nobody would see, another draw stands in.
    assert len(areas) == 3


def test_masks_beyond_the_limits_take_no_place(tmp_path: Path, processor):
    large, small, fitting = np.mgrid[:60, :80][0] < 59, np.eye(60, 80, dtype=bool), np.tri(60, 80, dtype=bool)
    masks = np.stack([large, large, large, small, small, small, fitting])
    picture, annotations = encode_scene(0, painted(masks[0]), masks)
    pairs = find_pairs(make_folder(tmp_path, {"a.jpg": picture, "a.json": annotations}))
    samples = Sa1bSamples([pairs], processor, length=10, masks_per_image=1, smallest_share=0.1)
    assert all((samples[number]["labels"] >= 0).all() for number in range(10))


def test_sources_are_drawn_alike_however_large_and_so_are_their_pictures(tmp_path: Path, processor):
    shades = {"small": [0], "large": range(100, 190, 10)}
    for name, values in shades.items():
        for value in values:
            scene = encode_scene(0, np.full((16, 16, 3), value, np.uint8), np.eye(16, dtype=bool)[None])
            make_folder(tmp_path / name, dict(zip((f"{value}.jpg", f"{value}.json"), scene, strict=True)))
    samples = Sa1bSamples([find_pairs(tmp_path / name) for name in shades], processor, length=300)
    pictures = [samples[number]["pixel_values"] for number in range(300)]
    counts = Counter(round(255 * (0.485 + 0.229 * picture[0].mean().item()), -1) for picture in pictures)
    assert counts[0] == pytest.approx(150, abs=35)
    assert {value: 0 < counts[value] < 40 for value in shades["large"]} == dict.fromkeys(shades["large"], True)


def digest(sample: dict[str, Tensor]) -> tuple[bytes, bytes]:
    return sample["pixel_values"].numpy().tobytes(), sample["labels"].numpy().tobytes()


def test_a_sample_depends_on_seed_and_number_alone(shard: Path, processor):
    pairs = find_pairs(shard)
    samples = Sa1bSamples([pairs], processor, length=9, augmentation=WILD, seed=4)
    wanted = [digest(samples[n]) for n in range(9)]
    assert len(set(wanted)) == 9
    torch.manual_seed(1), np.random.seed(1)
    assert [digest(samples[n]) for n in reversed(range(9))] == wanted[::-1]
    later = Sa1bSamples([pairs], processor, length=100, augmentation=WILD, seed=4, first=5)
    assert [digest(later[n]) for n in range(4)] == wanted[5:]
    other = Sa1bSamples([pairs], processor, length=9, augmentation=WILD, seed=5)
    assert not {digest(other[n]) for n in range(9)} & set(wanted)


def test_what_cannot_be_used_is_skipped_by_name(tmp_path: Path, processor):
    """Another picture stands in for it, the same again each time; samples that never met it stay as they were."""
    files = {**scene_files(5), "sa_1.jpg": b"no picture", "sa_2.json": b"[]", "sa_3.json": b'{"annotations": []}'}
    whole, spoilt = (
        Sa1bSamples([find_pairs(make_folder(tmp_path / name, given))], processor, length=20, augmentation=WILD)
        for name, given in (("whole", scene_files(5)), ("spoilt", files))
    )
    drawn, position = [spoilt[number] for number in range(20)], SkippedPictures()
    assert [digest(sample) for sample in drawn] == [digest(spoilt[number]) for number in range(20)]
    for number, sample in enumerate(drawn):
        assert (digest(sample) == digest(whole[number])) == (not sample["skipped"])
        assert sample["labels"].amax() == 1
        left = position.advance({name: [value] for name, value in sample.items()})
        assert left.keys() == {"pixel_values", "labels"}
    first, second, third = sorted(position.skipped)  # each once, however often it was met
    assert re.match(r"sa_1 in .*sa_1\.jpg is no readable picture", first)
    assert re.match(r"sa_2 in .*sa_2\.json has no readable annotations: list indices", second)
    assert re.match(r"sa_3 in .*: none of 0 masks covers between", third)
    assert str(position) == f"3 skipped, such as: {first}; {second}; {third}"
    resumed = SkippedPictures()
    assert str(resumed) == ""
    resumed.load_state_dict(position.state_dict())
    assert resumed.skipped == position.skipped


def test_a_closer_crop_shows_all_of_one_mask_and_shows_it_large():
    """A window around one of the masks, never cut off; where it would be most of the picture, the ordinary crop."""
    image = np.random.default_rng(0).integers(0, 256, (400, 600, 3), dtype=np.uint8)
    masks = np.zeros((3, 400, 600), dtype=bool)  # the last is empty
    masks[0, 10:50, 10:50], masks[1, 340:380, 540:580] = True, True
    shares = set()
    for seed in range(20):
        cut, shown = Augmentation(closer=1.0)(image, masks, np.random.default_rng(seed))
        assert cut.shape[:2] == shown.shape[1:]
        assert sorted(shown.sum((1, 2))) == [0, 0, 1600]
        shares.add((int(shown.sum((1, 2)).argmax()), round(float(shown.mean() * 3), 3)))
    assert {number for number, _ in shares} == {0, 1}
    assert len({share for _, share in shares}) > 10
    assert min(shares, key=lambda drawn: drawn[1])[1] > 0.9 / WIDEST**2
    assert max(shares, key=lambda drawn: drawn[1])[1] <= 1 / CLOSEST**2
    large = np.ones((1, 400, 600), dtype=bool)
    for found in (large, ~large):
        assert Augmentation(closer=1.0)(image, found, np.random.default_rng(0))[0].shape == image.shape


def test_closer_crops_show_masks_that_vanish_in_the_whole_picture(tmp_path: Path, processor):
    """Half a cell of the training size at the most, as of cells under a microscope: a window shows them large."""
    mask = np.zeros((1, 400, 600), dtype=bool)
    mask[0, 200:212, 300:312] = True
    picture, annotations = encode_scene(0, painted(mask[0]), mask)
    pairs = find_pairs(make_tar(tmp_path / "set.tar", {"a.jpg": picture, "a.json": annotations}))
    closer, reader = Augmentation(closer=1.0), partial(PairReader, processor, 1)
    samples = Sa1bSamples([pairs], processor, length=1, masks_per_image=1, augmentation=closer)
    for sample in (samples[0], reader(closer).read(pairs[0], np.random.default_rng(0))):
        assert (sample["labels"] == 1).sum() > 5
    with pytest.raises(ValueError, match="none of 1 masks covers between"):
        reader(Augmentation(flip=0.5)).read(pairs[0], np.random.default_rng(0))


@pytest.mark.parametrize(("first", "wanted"), [(0, 9), (5, 4), (9, 0), (12, 0)])
def test_what_is_left_is_counted(first: int, wanted: int, shard: Path, processor):
    assert len(Sa1bSamples([find_pairs(shard)], processor, length=9, first=first)) == wanted


def drawn_by(samples: Sa1bSamples, rank: int, workers: int) -> list[list[tuple[bytes, bytes]]]:
    """The batches of one of two processes, as Accelerate deals them out."""
    loader = DataLoader(samples, batch_size=2, num_workers=workers)
    loader = prepare_data_loader(loader, num_processes=2, process_index=rank, put_on_device=False)
    return [
        [digest(dict(zip(batch, row, strict=True))) for row in zip(*batch.values(), strict=True)] for batch in loader
    ]


@pytest.fixture
def _fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.usefixtures("_fresh_accelerator")
def test_two_ranks_with_two_workers_draw_every_sample_once(shard: Path, processor):
    pairs = find_pairs(shard)
    samples = Sa1bSamples([pairs], processor, length=16, augmentation=WILD, masks_per_image=3)
    wanted = [digest(samples[n]) for n in range(16)]
    dealt = [drawn_by(samples, rank, workers=2) for rank in range(2)]
    # A step's four samples are the next four numbers, two for each rank.
    steps = [[sample for batch in step for sample in batch] for step in zip(*dealt, strict=True)]
    assert [sample for step in steps for sample in step] == wanted
    # Stopped after step 3, the rest comes to the same ranks in the same order.
    rest = Sa1bSamples([pairs], processor, length=16, augmentation=WILD, masks_per_image=3, first=12)
    assert [drawn_by(rest, rank, workers=0) for rank in range(2)] == [batches[3:] for batches in dealt]


# --------------------------------------------------------------------------------------------------------------------
# Augmentation


@pytest.fixture
def mask() -> np.ndarray:
    """(40, 50), like no turned, mirrored or moved version of itself."""
    return np.random.default_rng(1).random((40, 50)) < 0.5


def test_picture_and_masks_move_together(mask: np.ndarray):
    generator = np.random.default_rng(0)
    augment, shapes, mirrored = Augmentation(smallest_crop=0.6, flip=0.5), set(), 0
    for _ in range(200):
        image, masks = augment(painted(mask), np.stack([mask, ~mask]), generator)
        assert np.array_equal(image[..., 0] > 127, masks[0])
        assert np.array_equal(image[..., 0] < 127, masks[1])
        shapes.add(masks[0].shape)
        windows = np.lib.stride_tricks.sliding_window_view(mask, masks[0].shape)
        straight, flipped = ((windows == part).all((-2, -1)).any() for part in (masks[0], masks[0][:, ::-1]))
        assert straight != flipped
        mirrored += flipped
    assert {min(side) for side in zip(*shapes, strict=True)} == {24, 30}
    assert {max(side) for side in zip(*shapes, strict=True)} == {40, 50}
    assert 70 < mirrored < 130


def test_crops_fall_everywhere():
    generator = np.random.default_rng(0)
    drawn = Counter((part.start, part.stop) for part in (draw_crop(4, 0.5, generator) for _ in range(3000)))
    assert set(drawn) == {(0, 2), (1, 3), (2, 4), (0, 3), (1, 4), (0, 4)}
    # Sizes 2 and 4 are rounded to half as often as 3; of one size all places are alike.
    assert drawn[0, 4] == pytest.approx(750, abs=120)
    assert drawn[0, 3] == pytest.approx(drawn[1, 4], abs=120)
    assert drawn[0, 2] == pytest.approx(drawn[2, 4], abs=80)


def test_without_changes_nothing_changes(mask: np.ndarray):
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    same, masks = Augmentation()(image, mask[None], np.random.default_rng(0))
    assert np.array_equal(same, image)
    assert np.array_equal(masks, mask[None])
    assert np.array_equal(jitter_colors(image, 1.0, 1.0, 1.0), image)


def test_colors_change_pictures_only(mask: np.ndarray):
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    changed, masks = Augmentation(color=0.3)(image, mask[None], np.random.default_rng(0))
    assert not np.array_equal(changed, image)
    assert np.array_equal(masks, mask[None])
    assert np.array_equal(image, np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))


def test_colors_change_as_named():
    image = np.array([[[100, 50, 30], [20, 40, 60]]], dtype=np.uint8)
    assert jitter_colors(image, 2.0, 1.0, 1.0).tolist() == [[[200, 100, 60], [40, 80, 120]]]
    assert jitter_colors(image, 1.0, 0.0, 1.0).tolist() == [[[50] * 3] * 2]
    assert jitter_colors(image, 1.0, 1.0, 0.0).tolist() == [[[60] * 3, [40] * 3]]
    assert jitter_colors(image, 9.0, 1.0, 1.0).max() == 255
    # 29.7 is rounded, or all would darken by half a level.
    assert jitter_colors(np.full((1, 1, 3), 33, np.uint8), 0.9, 1.0, 1.0).tolist() == [[[30] * 3]]


def test_colours_change_as_if_step_by_step():
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (31, 17, 3), dtype=np.uint8)
    for _ in range(20):
        brightness, contrast, saturation = generator.uniform(0.4, 1.6, 3)
        pixels = image * brightness
        pixels = (pixels - pixels.mean()) * contrast + pixels.mean()
        grey = pixels.mean(axis=2, keepdims=True)
        wanted = np.clip((pixels - grey) * saturation + grey, 0, 255)
        changed = jitter_colors(image, brightness, contrast, saturation)
        assert np.abs(changed - wanted).max() < 0.51
        changed[:] = 0  # whoever gets it may write into it


def test_the_same_generator_changes_alike(mask: np.ndarray):
    first, second = (WILD(painted(mask), mask[None], np.random.default_rng(3)) for _ in range(2))
    assert all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))


def test_labels_show_what_the_picture_shows(tmp_path: Path, processor):
    """From JPEG and run lengths to tensors, through crops and flips: the white of the picture is the mask."""
    y, x = np.mgrid[:120, :90]
    mask = ((y - 50) ** 2 + (x - 30) ** 2 < 600) | ((y > 70) & (x > 40) & (x < 80))
    picture, annotations = encode_scene(0, painted(mask), mask[None])
    pairs = find_pairs(make_folder(tmp_path, {"a.jpg": picture, "a.json": annotations}))
    augment = Augmentation(smallest_crop=0.6, flip=0.5)
    samples = Sa1bSamples([pairs], processor, length=30, masks_per_image=1, augmentation=augment)
    for number in range(30):
        sample = samples[number]
        white = torch.nn.functional.avg_pool2d(sample["pixel_values"].mean(0, keepdim=True), 4)[0] > 0.2
        labels = sample["labels"][0] > 0
        assert (white & labels).sum() / (white | labels).sum() > 0.85


def test_pasted_shapes_are_where_their_masks_say():
    noise = np.random.default_rng(0)
    image = noise.integers(0, 60, (60, 90, 3), dtype=np.uint8)
    other = noise.integers(180, 255, (40, 50, 3), dtype=np.uint8)
    seen = 0
    for seed in range(20):
        pasted, masks = paste_shapes(image, other, 3, np.random.default_rng(seed))
        again, same_masks = paste_shapes(image, other, 3, np.random.default_rng(seed))
        assert np.array_equal(pasted, again)
        assert np.array_equal(masks, same_masks)
        assert masks.sum(0).max() <= 1, "a later shape hides what it covers of an earlier one"
        anywhere = masks.any(0)
        assert np.array_equal(pasted[~anywhere], image[~anywhere])
        assert (pasted[anywhere].mean(-1) > 60).all()
        seen += anywhere.sum()
    assert seen > 20 * 100


def test_pasted_objects_are_where_their_masks_say():
    noise = np.random.default_rng(0)
    image = noise.integers(0, 60, (60, 90, 3), dtype=np.uint8)
    part = noise.integers(180, 255, (40, 20, 3), dtype=np.uint8)
    upper = np.repeat(np.arange(40)[:, None] < 25, 20, axis=1)
    areas = []
    for seed in range(20):
        pasted, masks = paste_objects(image, [(part, upper), (part, ~upper)], np.random.default_rng(seed))
        again, same_masks = paste_objects(image, [(part, upper), (part, ~upper)], np.random.default_rng(seed))
        assert np.array_equal(pasted, again)
        assert np.array_equal(masks, same_masks)
        assert masks.shape == (2, 60, 90)
        assert not (masks[0] & masks[1]).any(), "a later object hides what it covers of an earlier one"
        bright = pasted.mean(-1)
        assert (bright[masks.any(0)] > 90).mean() > 0.95
        assert (bright[~masks.any(0)] > 160).mean() < 0.02
        areas.append(masks[1].sum())
    assert max(areas) > 10 * min(areas), "sizes differ"


def test_a_huge_object_is_made_to_fit():
    part = np.full((400, 900, 3), 200, dtype=np.uint8)
    _, masks = paste_objects(
        np.zeros((20, 30, 3), np.uint8), [(part, np.ones((400, 900), bool))], np.random.default_rng(0)
    )
    assert masks.shape == (1, 20, 30)
    assert masks.any()


def test_pasted_objects_hide_what_they_cover_of_the_pictures_own():
    noise = np.random.default_rng(0)
    image = noise.integers(0, 60, (60, 90, 3), dtype=np.uint8)
    own = np.stack([np.ones((60, 90), bool), np.arange(90)[None] < np.full((60, 1), 45)])
    cutouts = [(noise.integers(180, 255, (40, 20, 3), dtype=np.uint8), np.ones((40, 20), bool)) for _ in range(2)]
    for seed in range(20):
        alone, pasted = paste_objects(image, cutouts, np.random.default_rng(seed))
        before = own.copy()
        together, masks = paste_objects(image, cutouts, np.random.default_rng(seed), own)
        assert np.array_equal(together, alone), "the picture's own masks change no pixel"
        assert np.array_equal(masks[2:], pasted)
        assert np.array_equal(masks[:2], own & ~pasted.any(0))
        assert np.array_equal(own, before), "what is given stays as it is"


def test_copy_paste_asks_for_own_and_for_pasted_objects(shard: Path, processor: EfficientSamImageProcessor):
    pairs = [find_pairs(shard)]
    samples = Sa1bSamples(pairs, processor, 4, 4, augmentation=Augmentation(copy_paste=1.0))
    for seed in range(8):
        drawing = np.random.default_rng(seed)
        pair = samples.draw_pair(drawing)
        image, masks = samples.draw_scene(pair, 0.5, deepcopy(drawing))
        own = samples.draw_masks(pair, image.shape[:2], 2, drawing)
        assert len(own) == 2
        assert len(masks) == 4
        assert not (masks[:2] & ~own).any(), "what is seen of an object is part of it"
        assert masks[2:].any((1, 2)).any()
        assert not (masks[:2].any(0) & masks[2:].any(0)).any()
    assert torch.equal(samples[1]["labels"], samples[1]["labels"])


def test_chances_of_pasting_are_of_one_draw():
    with pytest.raises(ValueError, match=r"1 at most together; got 1\.2"):
        Augmentation(shapes=0.2, objects=0.5, copy_paste=0.5)


def test_without_cutouts_nothing_changes():
    image = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    pasted, masks = paste_objects(image, [], np.random.default_rng(0))
    assert np.array_equal(pasted, image)
    assert masks.shape == (0, 20, 30)


def test_a_cutout_is_its_object(shard: Path, processor: EfficientSamImageProcessor):
    samples = Sa1bSamples([find_pairs(shard)], processor, 4)
    (part, mask), *rest = samples.draw_cutout(np.random.default_rng(0))
    assert not rest
    assert part.shape[:2] == mask.shape
    assert mask.any(0).all() or mask.any(1).all()
    assert mask[0].any()
    assert mask[-1].any()
    assert mask[:, 0].any()
    assert mask[:, -1].any()


def test_pictures_without_fitting_masks_give_no_cutout(shard: Path, processor: EfficientSamImageProcessor):
    samples = Sa1bSamples(
        [find_pairs(shard)], processor, 4, 2, augmentation=Augmentation(objects=1.0), smallest_share=0.99
    )
    assert samples.draw_cutout(np.random.default_rng(0)) == []
    assert (samples[0]["labels"] == -1).all()


@pytest.mark.parametrize("kind", ["shapes", "objects", "copy_paste"])
def test_pasting_replaces_drawn_masks(kind: str, shard: Path, processor: EfficientSamImageProcessor):
    pairs = [find_pairs(shard)]
    pasted = Sa1bSamples(pairs, processor, 4, 2, augmentation=Augmentation(**{kind: 1.0}))
    drawn = Sa1bSamples(pairs, processor, 4, 2)
    labels = torch.stack([pasted[number]["labels"] for number in range(4)])
    assert (labels.amax((-2, -1)) == 1).any()
    assert not torch.equal(labels[0], drawn[0]["labels"])
    assert torch.equal(labels[2], pasted[2]["labels"])


def test_a_picture_is_put_on_a_ground_of_its_colour():
    mask = np.zeros((40, 60), dtype=bool)
    mask[10:20, 15:45] = True
    image = np.where(mask[..., None], 200, 20).astype(np.uint8).repeat(3, axis=2)
    places = set()
    for seed in range(20):
        changed, masks = Augmentation(smallest_scale=0.5)(image, mask[None], np.random.default_rng(seed))
        assert changed.shape[:2] == masks.shape[1:]
        assert all(side <= now <= 2 * side for side, now in zip(mask.shape, masks.shape[1:], strict=True))
        assert masks.sum() == mask.sum()
        assert (changed[masks[0]] == 200).all()
        assert (changed[~masks[0]] < 100).all()
        places.add(tuple(np.argwhere(masks[0])[0]))
    assert len(places) > 10
    with pytest.raises(ValueError, match=r"smallest_scale must be 0\.25 to 1, got 0\.1"):
        Augmentation(smallest_scale=0.1)


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        ({"area": 9}, "a mask is broken, found KeyError"),
        ({"area": 90, "segmentation": {"size": [60, 80], "counts": [5]}}, "add up to 4800"),
    ],
)
def test_a_broken_mask_names_its_picture(broken, told, tmp_path, processor):
    picture, record = encode_scene(0, *make_scene(0))
    record = json.dumps({**json.loads(record), "annotations": [broken]}).encode()
    pairs = find_pairs(make_folder(tmp_path, {"sa_0.jpg": picture, "sa_0.json": record}))
    with pytest.raises(ValueError, match=f"sa_0 in .*sa_0.jpg: .*{told}"):
        Sa1bSamples([pairs], processor, length=1)[0]


def test_a_broken_polygon_names_its_picture(tmp_path, processor):
    """A flat list of numbers, as some tools write it."""
    picture, _ = encode_scene(0, *make_scene(0))
    make_folder(tmp_path / "images", {"a.jpg": picture})
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9], "area": 81, "iscrowd": 0}
    annotation["segmentation"] = [1, 1, 9, 1, 9, 9, 1, 9]
    image = {"id": 1, "file_name": "a.jpg", "height": 60, "width": 80}
    text = {"images": [image], "annotations": [annotation], "categories": [{"id": 1, "name": "thing"}]}
    (tmp_path / "instances.json").write_text(json.dumps(text))
    pairs = find_labelled_pictures(f"{tmp_path / 'instances.json'}:{tmp_path / 'images'}")
    with pytest.raises(ValueError, match=r"a\.jpg: wanted polygons"):
        Sa1bSamples([pairs], processor, length=1)[0]


def test_half_pairs_are_counted(tmp_path, caplog):
    make_folder(tmp_path, {**scene_files(2), "sa_8.jpg": b"", "sa_9.json": b""})
    assert len(find_pairs(tmp_path)) == 2
    assert "2 pairs, left out: 2 halves, such as sa_8" in caplog.text
