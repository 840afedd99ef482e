"""The feature cache: what is read is what the teacher would say, whoever wrote it and however often it was cut off."""

import json
import os
import pickle
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, get_ident

import pytest
import torch
from safetensors.torch import save_file
from test_checkpoints import fork, kill_at
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
    cutting_as_cached,
    write_cache,
)
from efficientsam_hf.training.teachers import SamTeacher, Teacher

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
    save_file({}, tmp_path / "cache" / "features_00000-.safetensors")  # of a shard of corrupt pictures
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


def test_a_picture_that_was_corrupt_when_cached_is_skipped_by_name(folder, teacher, tmp_path, caplog):
    whole = (folder / "3.png").read_bytes()
    (folder / "3.png").write_bytes(whole[:200].ljust(len(whole), b"x"))
    write(tmp_path / "cache", folder, teacher)
    assert "3.png is no readable picture" in caplog.text
    (folder / "3.png").write_bytes(whole)
    pictures = find_pictures([folder])
    samples = UnlabelledImages(pictures, 5, MAKER, features=FeatureCache(tmp_path / "cache", pictures, 4, MAKER))
    corrupt = [samples[number]["corrupt"] for number in range(5)]
    assert sorted(corrupt) == ["", "", "", "", str(folder / "3.png")]
    assert "3.png has no features in" in caplog.text


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
    kept = (folder / "3.png").read_bytes()
    (folder / "3.png").write_bytes(kept + b"more")
    with pytest.raises(ValueError, match=r"has pictures .*, wanted"):
        FeatureCache(cache, find_pictures([folder]), 4, MAKER)
    (folder / "3.png").write_bytes(kept)
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
    command += ["--teacher-size", "64", "--grid", "4", "--crops", "2", "--device", "cpu"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert f"features of 5 pictures: {tmp_path / 'c'}" in result.output
    inputs = {"config": str(tmp_path / "student.json"), "sources": str(folder), "teacher": str(tmp_path / "teacher")}
    more = ["--max_steps", "2", "--report_to", "none", "--teacher_size", "64"]
    online = run(*options(inputs, tmp_path / "online", *more, "--crops", "2"))
    cached = run(*options(inputs, tmp_path / "cached", *more, "--cache", str(tmp_path / "c")))
    assert losses_in(cached) == pytest.approx(losses_in(online), rel=1e-3)
    # The cache knows its crops, whatever the seed of the run; and no teacher need be there.
    given = [text for text in options(inputs, tmp_path / "other", *more[:4]) if text != inputs["teacher"]]
    given.remove("--teacher")
    assert losses_in(run(*given, "--cache", str(tmp_path / "c"), "--seed", "5")) != losses_in(cached)
    half = CliRunner().invoke(app, [*command[:5], str(tmp_path / "half"), *command[6:], "--dtype", "bfloat16"])
    assert half.exit_code == 0, half.output
    assert losses_in(run(*options(inputs, tmp_path / "h", *more, "--cache", str(tmp_path / "half")))) == pytest.approx(
        losses_in(online), rel=0.05
    )
    changed = small_sam()
    changed.vision_encoder.pos_embed.data += 1
    changed.save_pretrained(tmp_path / "changed")
    inputs["teacher"] = str(tmp_path / "changed")
    with pytest.raises(ValueError, match=r"has teacher \{'name': .*teacher after the neck.*wanted .*changed after"):
        run(*options(inputs, tmp_path / "bad", *more), "--cache", str(tmp_path / "c"))
    with pytest.raises(ValueError, match="give no --mae or --dataset with it"):
        run(*options(inputs, tmp_path / "bad", "--mae"), "--cache", str(tmp_path / "c"))


def test_a_cache_of_whole_pictures_leaves_the_crops_alone(folder, teacher, tmp_path):
    write(tmp_path / "whole", folder, teacher)
    assert cutting_as_cached(MAKER, tmp_path / "whole") == MAKER
    kept = CacheSettings(grid=4, crops=3, seed=7, smallest_area=0.5)
    write(tmp_path / "crops", folder, teacher, kept)
    maker = cutting_as_cached(MAKER, tmp_path / "crops")
    assert (maker.crops, maker.crop_seed, maker.crop.smallest_area, maker.seed) == (3, 7, 0.5, MAKER.seed)


def test_processes_that_begin_together_write_one_index(folder, teacher, tmp_path):
    """What each finds between looking for the index and writing its own is the other's."""
    cache = tmp_path / "cache"
    writers = [
        write_cache(cache, find_pictures([folder]), teacher, MAKER, WHOLE, rank=rank, processes=2) for rank in (0, 1)
    ]
    indexed = Barrier(2)
    opened = Path.is_file

    def is_file(path: Path) -> bool:
        there = opened(path)
        if path.name == "index.json" and not there:
            indexed.wait(timeout=10)
        return there

    with pytest.MonkeyPatch.context() as patched, ThreadPoolExecutor(2) as pool:
        patched.setattr(Path, "is_file", is_file)
        patched.setattr(os, "getpid", get_ident)
        list(pool.map(next, writers))
    assert [path.name for path in cache.glob("*index*")] == ["index.json"]


class Mean(Teacher):
    """The mean colour of the cells, by nothing but a pooling: no threads, which a fork would not take along."""

    def __init__(self):
        super().__init__("mean", 32, [0.0] * 3, [1.0] * 3)

    def features(self, pixel_values):
        return pixel_values[:, :, ::8, ::8]


def test_killed_at_any_moment_a_cache_is_finished_to_the_same_bytes(folder, tmp_path):
    # In a process of its own: of the threads that other tests have started, a fork takes the locks along.
    code = "import sys, pathlib, test_feature_cache as t; t.kill_and_finish(*map(pathlib.Path, sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(folder), str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def kill_and_finish(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "whole", folder, Mean(), CROPS)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    moment, status, done = 0, -signal.SIGKILL, set()
    while status:
        cache = tmp_path / f"cache_{moment}"

        def write_here(moment: int = moment, cache: Path = cache) -> None:
            kill_at(moment, cache)
            write(cache, folder, Mean(), CROPS)

        status = fork(write_here)
        assert status in (0, -signal.SIGKILL)
        done.add(len(write(cache, folder, Mean(), CROPS)))
        assert {path.name: path.read_bytes() for path in cache.iterdir() if not path.name.startswith(".")} == whole
        moment += 2
    assert done == {0, 1, 2, 3}
