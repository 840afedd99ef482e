"""Unlabelled pictures: what a sample is depends on its number alone, and what cannot be read is counted."""

import io
import logging
import shutil
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from datasets.distributed import split_dataset_by_node
from PIL import Image as PillowImage
from torch.utils.data import DataLoader

from efficientsam_hf.data.crops import Crop, RandomResizedCrop, SampleMaker, cut
from efficientsam_hf.data.images import (
    CorruptPictures,
    StreamedImages,
    UnlabelledImages,
    decode_picture,
    find_pictures,
)
from efficientsam_hf.pictures_efficientsam import as_stored, read_picture

MAKER = SampleMaker(size=16, patches=4, seed=5)


def picture_file(number: int, kind: str = "PNG") -> bytes:
    """The picture of this number: noise whose red tells the number."""
    pixels = np.random.default_rng(number).integers(0, 255, (20 + number, 30, 3), dtype=np.uint8)
    pixels[..., 0] = number
    file = io.BytesIO()
    PillowImage.fromarray(pixels).save(file, kind)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Six pictures in two folders, one of them corrupt, and a file that is none."""
    for number in range(6):
        path = tmp_path / "set" / f"class_{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture_file(number))
    (tmp_path / "set" / "class_0" / "notes.txt").write_text("no picture")
    return tmp_path / "set"


def spoil(folder) -> None:
    path = folder / "class_1" / "3.png"
    path.write_bytes(path.read_bytes()[:200])


def reds(samples) -> list[int]:
    """Numbers of the pictures of samples."""
    return [int(sample["pixels"][0].float().mean().round()) for sample in samples]


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[key], other[key]) if isinstance(one[key], torch.Tensor) else one[key] == other[key]
        for key in one
    )


# --------------------------------------------------------------------------------------------------------------------
# Where they are


def test_folders_and_tars_hold_the_same(folder, tmp_path):
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        archive.add(folder, arcname=".")
    loose, packed = find_pictures([folder]), find_pictures([tmp_path / "set.tar"])
    assert [picture.name.split("/")[-1] for picture in loose] == ["0.png", "2.png", "4.png", "1.png", "3.png", "5.png"]
    assert len(find_pictures([folder, tmp_path / "set.tar"])) == 12
    for one, other in zip(loose, packed, strict=True):
        assert one.read().tobytes() == other.read().tobytes()


def test_sources_without_pictures_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(FileNotFoundError, match=r"no picture \(\.jpg, .*found 1 other files"):
        find_pictures([tmp_path])
    with pytest.raises(FileNotFoundError, match=r"nothing at .*missing: wanted a folder or a tar of pictures"):
        find_pictures([tmp_path / "missing"])
    with pytest.raises(ValueError, match="no uncompressed tar of pictures"):
        find_pictures([tmp_path / "notes.txt"])


# --------------------------------------------------------------------------------------------------------------------
# Crops


def test_crops_lie_inside_and_have_the_area_and_shape_that_was_asked_for():
    law, generator = RandomResizedCrop(smallest_area=0.3), np.random.default_rng(0)
    crops = [law.draw(200, 150, generator) for _ in range(2000)]
    assert all(0 <= crop.left <= 200 - crop.width and 0 <= crop.top <= 150 - crop.height for crop in crops)
    areas = np.array([crop.width * crop.height / 30_000 for crop in crops])
    assert 0.29 < areas.min() < 0.32
    assert areas.max() > 0.95
    ratios = np.array([crop.width / crop.height for crop in crops])
    assert 0.73 < ratios.min() < 0.77
    assert 1.30 < ratios.max() < 1.36
    assert 0.45 < np.mean([crop.flip for crop in crops]) < 0.55
    assert len({(crop.left, crop.top) for crop in crops}) > 1000


@pytest.mark.parametrize(("width", "height", "wanted"), [(1, 1, (1, 1)), (100, 3, (4, 3)), (3, 100, (3, 4))])
def test_pictures_that_no_crop_fits_give_their_middle(width, height, wanted):
    crop = RandomResizedCrop(smallest_area=1.0).draw(width, height, np.random.default_rng(0))
    assert (crop.width, crop.height) == wanted
    assert (crop.left, crop.top) == ((width - wanted[0]) // 2, (height - wanted[1]) // 2)


def test_a_crop_is_cut_where_it_says():
    pixels = np.random.default_rng(0).integers(0, 255, (12, 20, 3), dtype=np.uint8)
    image = PillowImage.fromarray(pixels)
    part = torch.from_numpy(pixels[2:10, 5:13]).permute(2, 0, 1)
    assert torch.equal(cut(image, Crop(5, 2, 8, 8, False), 8), part)
    assert torch.equal(cut(image, Crop(5, 2, 8, 8, True), 8), part.flip(2))
    assert cut(image, Crop(5, 2, 4, 8, False), 16).shape == (3, 16, 16)


def test_the_teacher_gets_the_same_square():
    image = PillowImage.fromarray(np.kron(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4, np.ones((8, 8), np.uint8)))
    sample = SampleMaker(size=16, patches=4, teacher_size=32, seed=1).make(image.convert("RGB"), 0, 0)
    small = torch.nn.functional.interpolate(sample["teacher_pixels"][None].float(), (16, 16), mode="area")[0]
    assert (small - sample["pixels"].float()).abs().mean() < 6
    assert "teacher_pixels" not in SampleMaker(size=16, teacher_size=16).make(image.convert("RGB"), 0, 0)


def test_crops_repeat_where_they_are_counted_and_the_hidden_patches_never_do():
    image = PillowImage.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    maker = SampleMaker(size=8, patches=4, crops=2)
    epochs = [maker.make(image, 3, epoch) for epoch in range(4)]
    assert torch.equal(epochs[0]["pixels"], epochs[2]["pixels"])
    assert not torch.equal(epochs[0]["pixels"], epochs[1]["pixels"])
    assert len({tuple(sample["noise"].tolist()) for sample in epochs}) == 4
    assert not torch.equal(epochs[0]["pixels"], maker.make(image, 4, 0)["pixels"])


# --------------------------------------------------------------------------------------------------------------------
# Samples by number


def test_an_epoch_takes_every_picture_once_in_an_order_of_its_own(folder):
    samples = UnlabelledImages(find_pictures([folder]), 18, MAKER)
    epochs = [reds(samples[6 * epoch + place] for place in range(6)) for epoch in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(6))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_a_sample_is_its_number(folder):
    pictures = find_pictures([folder])
    whole, rest = UnlabelledImages(pictures, 18, MAKER), UnlabelledImages(pictures, 18, MAKER, first=7)
    assert len(rest) == 11
    assert all(same(rest[index], whole[7 + index]) for index in (10, 0, 4))
    assert not same(whole[0], UnlabelledImages(pictures, 18, SampleMaker(size=16, patches=4, seed=6))[0])
    batches = DataLoader(whole, batch_size=6, num_workers=2)
    loaded = torch.cat([batch["noise"] for batch in batches])
    assert torch.equal(loaded, torch.stack([whole[number]["noise"] for number in range(18)]))


def test_cached_features_are_those_of_the_sample(folder):
    def features(number, size, crop, epoch):
        return torch.tensor([number, *size, crop.left, crop.top, crop.width, crop.height, crop.flip, epoch])

    pictures = find_pictures([folder])
    samples = UnlabelledImages(pictures, 12, MAKER, features=features)
    for index in range(12):
        sample = samples[index]
        number, width, height, *box, epoch = sample["features"].tolist()
        image = pictures[number].read()
        assert (width, height) == image.size
        assert epoch == index // 6
        assert torch.equal(sample["pixels"], cut(image, Crop(*box), 16))


def test_a_corrupt_picture_is_skipped_and_named(folder, caplog):
    spoil(folder)
    samples = UnlabelledImages(find_pictures([folder]), 6, MAKER)
    with caplog.at_level(logging.WARNING):
        drawn = [samples[number] for number in range(6)]
    assert Counter(reds(drawn)).most_common(1)[0][1] == 2
    assert 3 not in reds(drawn)
    assert sorted(sample["corrupt"] for sample in drawn)[-1] == f"{folder}/class_1/3.png"
    assert "skipped" in caplog.text
    assert "class_1/3.png is no readable picture" in caplog.text


def test_a_picture_that_has_gone_is_skipped_as_a_corrupt_one(folder, caplog):
    samples = UnlabelledImages(find_pictures([folder]), 6, MAKER)
    (folder / "class_1" / "3.png").unlink()
    assert 3 not in reds(samples[number] for number in range(6))
    assert "class_1/3.png cannot be read: " in caplog.text


def test_nothing_but_corrupt_pictures_stops(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"none")
    with pytest.raises(ValueError, match=r"found 1 corrupt ones in a row, such as .*a\.jpg"):
        UnlabelledImages(find_pictures([tmp_path]), 1, MAKER)[0]


def test_too_many_corrupt_pictures_stop():
    count = CorruptPictures(pictures=200)
    count.add(["a.jpg\nb.jpg", "", "a.jpg"], seen=3)
    with pytest.raises(ValueError, match=r"3 of 200 pictures are corrupt, wanted at most 1%: a\.jpg, b\.jpg, c\.jpg"):
        count.add(["c.jpg"], seen=1)
    stream = CorruptPictures()
    stream.add(["a.jpg"], seen=1)
    with pytest.raises(ValueError, match="2 of 150 pictures are corrupt"):
        stream.add(["b.jpg"], seen=149)
    stream.add([], seen=51)


# --------------------------------------------------------------------------------------------------------------------
# Samples of a stream


@pytest.fixture
def stream():
    contents = [picture_file(number) for number in range(11)]
    contents[4] = contents[4][:100]
    features = Features({"image": Image(), "label": Value("int64")})
    records = [
        {"image": {"bytes": content, "path": f"{number}.png"}, "label": 0} for number, content in enumerate(contents)
    ]
    return Dataset.from_list(records, features=features).to_iterable_dataset(num_shards=3)


def take(count: int, workers: int, *args, **kwargs) -> list[dict]:
    loader = iter(DataLoader(StreamedImages(*args, **kwargs, batch_size=2), batch_size=2, num_workers=workers))
    return [next(loader) for _ in range(count)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_gives_each_readable_picture_once_an_epoch(stream, workers):
    batches = take(5, workers, stream, MAKER, buffer=4)
    counts = Counter(round(float(pixels[0].float().mean())) for batch in batches for pixels in batch["pixels"])
    assert 4 not in counts
    if not workers:
        assert counts == Counter(set(range(11)) - {4})
    assert "4.png" in {name for batch in take(8, workers, stream, MAKER, buffer=4) for name in batch["corrupt"]}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_goes_on_where_it_stopped(stream, workers):
    whole = take(9, workers, stream, MAKER, buffer=4)
    for done in (3, 6):
        rest = take(9 - done, workers, stream, MAKER, buffer=4, first_batch=done)
        for one, other in zip(rest, whole[done:], strict=True):
            assert torch.equal(one["pixels"], other["pixels"])
            assert torch.equal(one["noise"], other["noise"])


def test_each_process_hides_other_patches_of_its_part_of_a_stream(stream):
    parts = [split_dataset_by_node(stream, rank, 3) for rank in range(3)]
    batches = [take(2, 2, part, MAKER, rank=rank, ranks=3) for rank, part in enumerate(parts)]
    noise = torch.cat([batch["noise"] for own in batches for batch in own])
    assert len(noise.unique(dim=0)) == len(noise) == 3 * 2 * 2


def test_a_row_without_a_picture_is_skipped_and_named():
    features = Features({"image": Image()})
    records = [
        {"image": None if number == 2 else {"bytes": picture_file(number), "path": None}} for number in range(5)
    ]
    stream = Dataset.from_list(records, features=features).to_iterable_dataset()
    batches = take(4, 0, stream, MAKER, buffer=1)
    assert 2 not in reds([{"pixels": pixels} for batch in batches for pixels in batch["pixels"]])
    named = [name for batch in batches for name in batch["corrupt"] if name]
    assert named
    assert all(name.startswith("picture ") for name in named)


def test_a_stream_of_files_reads_them(folder, tmp_path):
    spoil(folder)
    archive = shutil.make_archive(str(tmp_path / "packed"), "zip", folder)
    paths = [str(folder / f"class_{number % 2}" / f"{number}.png") for number in range(6)]
    paths[4] = f"zip://class_0/4.png::{archive}"
    (tmp_path / "set [1]").symlink_to(folder)
    paths[5] = str(tmp_path / "set [1]" / "class_1" / "5.png")  # a name, and no pattern
    rows = Dataset.from_list([{"image": {"path": path, "bytes": None}} for path in paths])
    stream = rows.cast_column("image", Image(decode=False)).to_iterable_dataset()
    samples = [pixels for batch in take(5, 0, stream, MAKER) for pixels in batch["pixels"]]
    counts = Counter(round(float(pixels[0].float().mean())) for pixels in samples)
    assert counts == dict.fromkeys((0, 1, 2, 4, 5), 2), "two epochs"


@pytest.mark.parametrize("path", [None, "/nowhere/a.png"])
def test_a_stream_of_nothing_readable_ends(path):
    rows = Dataset.from_list([{"image": {"path": path, "bytes": None if path else b"?"}}] * 3)
    stream = rows.cast_column("image", Image(decode=False)).to_iterable_dataset()
    with pytest.raises(ValueError, match="wanted a readable picture, found 100 corrupt ones in a row, such as"):
        take(1, 0, stream, MAKER)


def test_16_bits_are_scaled_where_they_are_read_as_stored():
    pixels = np.linspace(0, 65535, 600).reshape(20, 30).astype(np.uint16)
    file = io.BytesIO()
    PillowImage.fromarray(pixels).save(file, "PNG")
    found = np.asarray(decode_picture("a.png", file.getvalue()))
    assert (found[..., 0] == read_picture(PillowImage.open(file))[0].numpy()).all()
    assert found.min() == 0
    assert found[:10].max() < 128 <= found[10:].min()


def test_a_stream_without_the_column_is_refused(stream):
    with pytest.raises(ValueError, match="no column 'picture' in the data set: found image, label"):
        StreamedImages(stream, MAKER, batch_size=2, column="picture")


def test_an_array_of_integers_is_the_same_as_the_picture_that_pillow_makes_of_it():
    grey = np.arange(256, dtype=np.int32).reshape(16, 16)
    assert torch.equal(read_picture(PillowImage.fromarray(grey)), read_picture(grey))
    assert np.array_equal(np.asarray(as_stored(PillowImage.fromarray(grey)))[..., 0], grey)
