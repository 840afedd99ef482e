"""The feature cache: what is read is what the teacher would say, whoever wrote it and however often it was cut off."""

import json
import pickle

import pytest
import torch
from test_images import picture_file, spoil
from test_pretraining import losses_in, options
from test_pretraining import run as run  # a fixture
from test_sami_model import sami_config
from test_teachers import small_sam
from torch.testing import assert_close
from typer.testing import CliRunner

from efficientsam_cli import app
from efficientsam_hf.data.crops import Crop, RandomResizedCrop, SampleMaker, cut
from efficientsam_hf.data.images import UnlabelledImages, find_pictures
from efficientsam_hf.training.feature_cache import (
    CacheSettings,
    FeatureCache,
    cached_channels,
    crop_features,
    write_cache,
)
from efficientsam_hf.training.teachers import SamTeacher

MAKER = SampleMaker(size=32, patches=16, crops=2)
WHOLE = CacheSettings(grid=8, pictures_per_shard=2)
CROPS = CacheSettings(grid=4, crops=2, pictures_per_shard=2)


@pytest.fixture
def folder(tmp_path):
    for number in range(5):
        path = tmp_path / "set" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture_file(number))
    return tmp_path / "set"


@pytest.fixture
def teacher() -> SamTeacher:
    return SamTeacher(small_sam(), 64)


def write(cache, folder, teacher, settings=WHOLE, **options) -> list[int]:
    return list(write_cache(cache, find_pictures([folder]), teacher, MAKER, settings, batch_size=3, **options))


def test_kept_crops_are_what_the_teacher_says_of_the_samples(folder, teacher, tmp_path):
    assert write(tmp_path / "cache", folder, teacher, CROPS) == [0, 1, 2]
    pictures = find_pictures([folder])
    cache = FeatureCache(tmp_path / "cache", pictures, 4, MAKER, teacher.identity())
    samples = UnlabelledImages(pictures, 20, SampleMaker(32, 16, crops=2, teacher_size=64), features=cache)
    for number in range(20):
        sample = samples[number]
        wanted = teacher(sample["teacher_pixels"][None] / 255, 4)[0]
        assert_close(sample["features"], wanted, rtol=2e-3, atol=2e-3)
    assert cached_channels(tmp_path / "cache") == 5


def test_whole_pictures_are_kept_as_seen(folder, teacher, tmp_path):
    write(tmp_path / "cache", folder, teacher)
    pictures = find_pictures([folder])
    cache = pickle.loads(pickle.dumps(FeatureCache(tmp_path / "cache", pictures, 8, MAKER)))
    for number, picture in enumerate(pictures):
        image = picture.read()
        everything = Crop(0, 0, *image.size, False)
        wanted = teacher(cut(image, everything, 64)[None] / 255, 8)[0]
        assert_close(cache(number, image.size, everything, 0), wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("flip", [False, True])
def test_features_are_cropped_where_the_pixels_are(flip):
    """A ramp's crop is a ramp; and a crop of whole cells is those cells, averaged where there are more of them."""
    ramp = torch.stack(torch.meshgrid(torch.arange(16.0) + 0.5, torch.arange(16.0) + 0.5, indexing="xy"))
    crop = Crop(40, 24, 64, 32, flip)
    found = crop_features(ramp, (160, 160), crop, 4)
    steps = (torch.arange(4) + 0.5) / 4
    x = 4 + (1 - steps if flip else steps) * 6.4
    assert_close(found[0], x.expand(4, 4))
    assert_close(found[1], (2.4 + steps * 3.2)[:, None].expand(4, 4))
    noise = torch.randn(3, 16, 16)
    cells = crop_features(noise, (160, 160), Crop(0, 0, 160, 160, flip), 16)
    assert_close(cells, noise.flip(2) if flip else noise)


def test_what_a_kill_left_is_done_again(folder, teacher, tmp_path):
    cache = tmp_path / "cache"
    write(cache, folder, teacher)
    before = {path.name: path.read_bytes() for path in cache.iterdir()}
    assert write(cache, folder, teacher) == []
    (cache / "features_00000.json").unlink()
    (cache / "features_00001.safetensors").write_bytes(before["features_00001.safetensors"][:-7])
    assert write(cache, folder, teacher) == [0, 1]
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == before


def test_processes_share_the_work(folder, teacher, tmp_path):
    write(tmp_path / "one", folder, teacher)
    shards = [write(tmp_path / "two", folder, teacher, rank=rank, processes=2) for rank in (0, 1)]
    assert shards == [[0, 2], [1]]
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_a_corrupt_picture_has_no_features_and_is_not_asked_for(folder, teacher, tmp_path):
    (folder / "class_1").mkdir()
    (folder / "3.png").rename(folder / "class_1" / "3.png")
    spoil(folder)
    write(tmp_path / "cache", folder, teacher)
    pictures = find_pictures([folder])
    samples = UnlabelledImages(pictures, 5, MAKER, features=FeatureCache(tmp_path / "cache", pictures, 4, MAKER))
    assert [samples[number]["features"].shape for number in range(5)] == [(5, 4, 4)] * 5


def test_other_teachers_pictures_and_crops_are_refused_and_both_named(folder, teacher, tmp_path):
    cache, pictures = tmp_path / "cache", find_pictures([folder])
    write(cache, folder, teacher, CROPS)
    other = SamTeacher(small_sam(), 32).identity()
    named = r"has teacher \{'name': 'sam after the neck', 'image_size': 64, .*wanted \{.*'image_size': 32"
    with pytest.raises(ValueError, match=named):
        FeatureCache(cache, pictures, 4, MAKER, other)
    with pytest.raises(ValueError, match=named):
        write(cache, folder, SamTeacher(small_sam(), 32), CROPS)
    with pytest.raises(ValueError, match=r"has settings .*'crops': 2.*, wanted .*'crops': 0"):
        write(cache, folder, teacher)
    with pytest.raises(ValueError, match="has count 5, wanted 4"):
        FeatureCache(cache, pictures[:4], 4, MAKER)
    with pytest.raises(ValueError, match=r"has pictures .*, wanted"):
        FeatureCache(cache, pictures[::-1], 4, MAKER)
    with pytest.raises(ValueError, match=r"holds the crops \{'grid': 4.*'seed': 0.*wanted .*'seed': 9"):
        FeatureCache(cache, pictures, 4, SampleMaker(seed=9, crops=2))
    with pytest.raises(ValueError, match=r"'smallest_area': 0\.2.*wanted .*'smallest_area': 0\.5"):
        FeatureCache(cache, pictures, 4, SampleMaker(crops=2, crop=RandomResizedCrop(0.5)))
    (cache / "features_00001.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 3 shards of .* are missing, as 1"):
        FeatureCache(cache, pictures, 4, MAKER)
    with pytest.raises(FileNotFoundError, match=r"no feature cache in .*: `efficientsam cache-features` makes one"):
        FeatureCache(tmp_path, pictures, 4, MAKER)


def test_from_the_command_to_the_training(folder, run, tmp_path):
    small_sam().save_pretrained(tmp_path / "teacher")
    (tmp_path / "student.json").write_text(json.dumps(sami_config().to_dict()))
    command = ["cache-features", str(folder), "--teacher", str(tmp_path / "teacher"), "--output", str(tmp_path / "c")]
    command += ["--image-size", "64", "--grid", "4", "--crops", "2", "--device", "cpu"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert f"features of 5 pictures: {tmp_path / 'c'}" in result.output
    inputs = {"config": str(tmp_path / "student.json"), "sources": str(folder), "teacher": str(tmp_path / "teacher")}
    more = ["--max_steps", "2", "--report_to", "none", "--cached_crops", "2"]
    online = run(*options(inputs, tmp_path / "online", *more))
    given = [
        text for text in options(inputs, tmp_path / "cached", *more) if text not in ("--teacher", inputs["teacher"])
    ]
    cached = run(*given, "--cache", str(tmp_path / "c"))
    assert losses_in(cached) == pytest.approx(losses_in(online), rel=1e-3)
    with pytest.raises(ValueError, match="give no --mae, --dataset or --teacher with it"):
        run(*options(inputs, tmp_path / "bad", *more), "--cache", str(tmp_path / "c"))
