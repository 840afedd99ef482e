"""Shards read as a stream: every pair once an epoch whoever reads, resumed where it stopped, no loss in silence."""

import functools
import http.server
import json
import re
import socket
import struct
import tarfile
import threading
from collections import Counter
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from synthetic import encode_scene, make_scene, make_tar, scene_files
from torch.utils.data import DataLoader

from efficientsam_hf.data import sa1b
from efficientsam_hf.data.augmentation import Augmentation
from efficientsam_hf.data.numbered_samples import Sa1bSamples
from efficientsam_hf.data.pair_reading import PairReader
from efficientsam_hf.data.sa1b import Pair, find_pairs
from efficientsam_hf.data.shards import find_shards, is_streamed, read_shard
from efficientsam_hf.data.streaming import ShardStream, StreamPosition
from efficientsam_hf.image_processing_efficientsam import EfficientSamImageProcessor


@pytest.fixture
def processor() -> EfficientSamImageProcessor:
    return EfficientSamImageProcessor(size={"height": 64, "width": 64})


def named_files(shard: int, count: int) -> dict[str, bytes]:
    """`count` empty pairs whose names tell the shard and the place in it."""
    names = [f"{shard}_{number}" for number in range(count)]
    return {f"{name}{kind}": b"" for name in names for kind in (".jpg", ".json")}


def make_shards(folder: Path, counts: list[int]) -> list[str]:
    return [str(make_tar(folder / f"sa_{n:06d}.tar", named_files(n, count))) for n, count in enumerate(counts)]


def read_name(pair: Pair, generator: np.random.Generator) -> dict:
    """A sample that is the pair's name and what was drawn for it; pairs called *_13 cannot be read."""
    if pair.name.endswith("_13"):
        raise ValueError(f"{pair.name} is unlucky")
    return {"name": pair.name, "draw": int(generator.integers(2**31))}


def taken(stream: ShardStream, position: StreamPosition, batches: int | None = None, workers: int = 0) -> list[list]:
    """The next batches as lists of (name, draw); `position` follows them."""
    found = []
    loader = DataLoader(stream, batch_size=stream.batch_size, num_workers=workers)
    for batch in loader:
        rest = position.advance(batch)
        found.append(list(zip(rest["name"], rest["draw"].tolist(), strict=True)))
        if len(found) == batches:
            break
    return found


# --------------------------------------------------------------------------------------------------------------------
# Shards


def test_shards_are_found_by_path_pattern_and_address(tmp_path: Path):
    shards = make_shards(tmp_path, [1, 1, 1])
    assert find_shards([str(tmp_path / "sa_*.tar"), shards[1]]) == shards
    for number in range(2):
        with fsspec.open(f"memory://set/sa_{number}.tar", "wb") as file:
            file.write(Path(shards[number]).read_bytes())
    found = find_shards(["memory://set/sa_*.tar"])
    assert len(found) == 2
    assert [pair.name for shard in found for pair in read_shard(shard)] == ["0_0", "1_0"]
    assert find_shards(["https://host/sa_0.tar"]) == ["https://host/sa_0.tar"]
    for nowhere in (str(tmp_path / "none_*.tar"), "memory://set/none_*.tar", "memory://set/none.tar"):
        with pytest.raises(FileNotFoundError, match=f"no shard at {re.escape(nowhere)}"):
            find_shards([shards[0], nowhere])


def test_patterns_and_addresses_are_streamed():
    streamed = [is_streamed(source) for source in ("a/sa_*.tar", "hf://datasets/o/n/a.tar", "sa_1.tar", "folder")]
    assert streamed == [True, True, False, False]


def test_brackets_in_a_name_are_no_pattern(tmp_path: Path):
    (tmp_path / "all[1]").mkdir()
    (shard,) = make_shards(tmp_path / "all[1]", [1])
    assert not is_streamed(shard)
    assert find_shards([shard]) == [shard]
    assert is_streamed(shard.replace("all", "none"))


def test_a_web_server_s_shard_is_that_of_the_disk(tmp_path: Path):
    shard = make_tar(tmp_path / "sa_0.tar", scene_files(3))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        remote = list(read_shard(f"http://127.0.0.1:{server.server_port}/sa_0.tar"))
        server.shutdown()
    contents = [
        [(p.name, p.image.read(), p.read_annotations()) for p in pairs] for pairs in (remote, find_pairs(shard))
    ]
    assert contents[0] == contents[1]
    assert len(remote) == 3


class FailingServer(http.server.BaseHTTPRequestHandler):
    """Knows `half.tar`, of whose bytes (`content`) it gives a part before it hangs up."""

    content = b""

    def do_GET(self) -> None:
        if self.path != "/half.tar":
            return self.send_error(404)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.content)
        # Not closed but reset, which its client hears of as an error.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return self.connection.close()

    def log_message(self, *_) -> None:
        """Nothing."""


def test_a_server_s_failure_ends_its_shard_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    content, told = make_tar(tmp_path / "sa_0.tar", scene_files(6)).read_bytes(), []
    monkeypatch.setattr(FailingServer, "content", content[: len(content) // 2])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), FailingServer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = f"http://127.0.0.1:{server.server_port}"
        pairs = [pair for name in ("none", "half") for pair in read_shard(f"{place}/{name}.tar", report=told.append)]
        server.shutdown()
    assert len(pairs) < 6
    assert told[0] == f"{place}/none.tar is out of reach, 0 pairs into it: HTTP Error 404: Not Found"
    assert re.match(
        rf"{place}/half\.tar is (out of reach|cut short or no uncompressed tar), \d pairs into it", told[1]
    )


def test_a_system_that_nobody_answers_for_is_named(monkeypatch: pytest.MonkeyPatch):
    def fail(*_):
        raise RuntimeError("no way there")

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.glob", fail)
    with pytest.raises(OSError, match=r"nobody tells what lies at memory://set/sa_\*\.tar: no way there"):
        find_shards(["memory://set/sa_*.tar"])


@pytest.mark.parametrize("address", ["{}", "memory://{}"])
def test_half_a_pair_is_named(address: str, tmp_path: Path):
    files = scene_files(4)
    del files["sa_1.json"], files["sa_3.jpg"]
    shard, told = make_tar(tmp_path / "sa_0.tar", {**files, "readme.txt": b""}), []
    place, content = address.format(shard), shard.read_bytes()
    with fsspec.open(place, "wb") as file:
        file.write(content)
    assert [pair.name for pair in read_shard(place, report=told.append)] == ["sa_0", "sa_2"]
    assert told == [f"sa_1 in {place} has no .json", f"sa_3 in {place} has no .jpg"]


def test_halves_may_lie_far_apart(tmp_path: Path):
    files = scene_files(4)
    shard = make_tar(tmp_path / "sa_0.tar", dict(sorted(files.items(), key=lambda item: item[0].endswith(".json"))))
    assert [(p.name, p.image.read()) for p in read_shard(str(shard))] == [
        (f"sa_{number}", files[f"sa_{number}.jpg"]) for number in range(4)
    ]


def test_a_shard_cut_anywhere_gives_what_is_whole_and_is_named(tmp_path: Path):
    shard = make_tar(tmp_path / "sa_0.tar", scene_files(3))
    content = shard.read_bytes()
    with tarfile.open(shard) as archive:
        members = archive.getmembers()
    end = members[-1].offset_data + members[-1].size
    for length in [*range(0, end, 300), *(member.offset for member in members)]:
        whole = sum(member.offset_data + member.size <= length for member in members) // 2
        for cut in (str(tmp_path / "cut.tar"), "memory://cut.tar"):
            with fsspec.open(cut, "wb") as file:
                file.write(content[:length])
            told: list[str] = []
            pairs = list(read_shard(cut, report=told.append))
            assert any("cut.tar is cut short" in line for line in told), length
            # On a disk the last pair may be there by its header alone; reading it then fails by name.
            assert whole <= len(pairs) <= whole + ("memory" not in cut), length


def test_a_broken_header_does_not_end_a_shard_in_silence(tmp_path: Path):
    shard = make_tar(tmp_path / "sa_0.tar", scene_files(3))
    with tarfile.open(shard) as archive:
        offset = archive.getmembers()[2].offset
    content = bytearray(shard.read_bytes())
    content[offset : offset + 512] = bytes(range(256)) * 2
    shard.write_bytes(content)
    told: list[str] = []
    assert [pair.name for pair in read_shard(str(shard), report=told.append)] == ["sa_0"]
    assert len(told) == 1
    assert "1 pairs into it" in told[0]


def test_what_is_no_tar_is_named(tmp_path: Path):
    shard, told = make_tar(tmp_path / "set.tgz", scene_files(1), mode="w:gz"), []
    assert list(read_shard(str(shard), report=told.append)) == []
    assert told[0].startswith(f"{shard} is cut short or no uncompressed tar, 0 pairs into it")


# --------------------------------------------------------------------------------------------------------------------
# Order


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (2, 0), (1, 2), (2, 2)])
@pytest.mark.parametrize("counts", [[5, 9, 14, 1, 7, 3], [23], [6, 2]])
def test_every_pair_comes_once_an_epoch(ranks: int, workers: int, counts: list[int], tmp_path: Path):
    shards = make_shards(tmp_path, counts)
    wanted = Counter(f"{s}_{n}" for s, count in enumerate(counts) for n in range(count) if n != 13)
    found: list[tuple[str, int]] = []
    for rank in range(ranks):
        position = StreamPosition(4)
        stream = ShardStream(shards, read_name, position, 2, rank=rank, ranks=ranks, epochs=3)
        found += [sample for batch in taken(stream, position, workers=workers) for sample in batch]
    assert Counter(name for name, _ in found) == Counter(dict.fromkeys(wanted, 3))
    assert len(set(found)) == len(found), "each time something else is drawn"


def test_epochs_differ_in_their_order(tmp_path: Path):
    shards = make_shards(tmp_path, [2] * 8)
    position = StreamPosition(1)
    names = [n for b in taken(ShardStream(shards, read_name, position, 1, seed=1, epochs=3), position) for n, _ in b]
    orders = {tuple(names[start : start + 16]) for start in (0, 16, 32)}
    assert len(orders) == 3
    other = StreamPosition(1)
    again = [n for b in taken(ShardStream(shards, read_name, other, 1, seed=2, epochs=1), other) for n, _ in b]
    assert tuple(again) not in orders


def test_batches_do_not_depend_on_who_reads(tmp_path: Path):
    shards = make_shards(tmp_path, [5, 9, 14, 3, 7])
    position = StreamPosition(4)
    wanted = taken(ShardStream(shards, read_name, position, 2), position, batches=24)
    for ranks, workers in [(1, 1), (1, 2), (1, 4), (2, 0), (2, 2), (4, 1)]:
        dealt = []
        for rank in range(ranks):
            position = StreamPosition(4)
            stream = ShardStream(shards, read_name, position, 2, rank=rank, ranks=ranks)
            dealt.append(taken(stream, position, batches=24 // ranks, workers=workers))
        assert [batch for step in zip(*dealt, strict=True) for batch in step] == wanted


@pytest.mark.parametrize("stop", [1, 2, 7, 13, 20])
@pytest.mark.parametrize(("before", "after"), [(0, 0), (2, 2), (4, 1), (1, 2)])
def test_resuming_goes_on_in_the_middle_of_a_shard(stop: int, before: int, after: int, tmp_path: Path):
    """Workers read ahead of what was taken; only what was taken counts."""
    shards = make_shards(tmp_path, [5, 9, 14, 3])
    position = StreamPosition(4)
    wanted = taken(ShardStream(shards, read_name, position, 2), position, batches=30)
    position = StreamPosition(4)
    first = taken(ShardStream(shards, read_name, position, 2), position, batches=stop, workers=before)
    resumed = StreamPosition(4)
    resumed.load_state_dict(json.loads(json.dumps(position.state_dict())))
    stream = ShardStream(shards, read_name, resumed, 2, first_batch=stop)
    assert first + taken(stream, resumed, batches=30 - stop, workers=after) == wanted


def test_a_state_is_resumed_by_other_ranks(tmp_path: Path):
    shards = make_shards(tmp_path, [5, 9, 14, 3])
    position = StreamPosition(4)
    wanted = taken(ShardStream(shards, read_name, position, 2), position, batches=20)
    position = StreamPosition(4)
    taken(ShardStream(shards, read_name, position, 2), position, batches=6)
    dealt = []
    for rank in range(2):
        resumed = StreamPosition(4)
        resumed.load_state_dict(position.state_dict())
        stream = ShardStream(shards, read_name, resumed, 2, first_batch=6, rank=rank, ranks=2)
        dealt.append(taken(stream, resumed, batches=7))
    assert [batch for step in zip(*dealt, strict=True) for batch in step] == wanted[6:]


def test_lanes_that_cannot_be_shared_out_are_refused(tmp_path: Path):
    shards = make_shards(tmp_path, [3])
    with pytest.raises(ValueError, match="found 4 lanes for 3 x 1"):
        ShardStream(shards, read_name, StreamPosition(4), 2, ranks=3)
    with pytest.raises(ValueError, match="found 4 lanes for 1 x 3"):
        taken(ShardStream(shards, read_name, StreamPosition(4), 2), StreamPosition(4), 1, workers=3)
    with pytest.raises(ValueError, match="a stream of 4 lanes, found 2 now: give --lanes 4, and"):
        StreamPosition(2).load_state_dict(StreamPosition(4).state_dict())
    with pytest.raises(ValueError, match="at least one shard, found none"):
        ShardStream([], read_name, StreamPosition(4), 2)


def test_what_is_held_out_never_comes(tmp_path: Path):
    shards = make_shards(tmp_path, [7, 4])
    position = StreamPosition(4)
    batches = taken(ShardStream(shards, read_name, position, 1, epochs=2, hold_out=3), position)
    held = {"0_0", "0_3", "0_6", "1_0", "1_3"}
    wanted = {f"{s}_{n}" for s, count in enumerate((7, 4)) for n in range(count)} - held
    assert Counter(name for batch in batches for name, _ in batch) == Counter(dict.fromkeys(wanted, 2))


# --------------------------------------------------------------------------------------------------------------------
# What cannot be used


def test_what_is_left_out_is_counted_and_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    files = named_files(0, 20)
    del files["0_4.json"]
    shards = [str(make_tar(tmp_path / "sa_0.tar", files))]
    position = StreamPosition(2)
    batches = taken(ShardStream(shards, read_name, position, 1, epochs=3), position)
    # What is skipped behind a lane's last sample is in the log alone.
    assert len(batches) == 3 * 18
    assert position.skipped == {"0_13 is unlucky", f"0_4 in {shards[0]} has no .json"}
    assert "skipped: 0_13 is unlucky" in caplog.text


def test_nothing_at_all_to_train_on_is_said(tmp_path: Path):
    shards = [str(make_tar(tmp_path / "sa_0.tar", {"0_13.jpg": b"", "0_13.json": b""}))]
    with pytest.raises(ValueError, match=r"nothing to train on in 100 epochs of lane 0: \['0_13 is unlucky'"):
        taken(ShardStream(shards, read_name, StreamPosition(1), 1), StreamPosition(1), 1)


def spoil(files: dict[str, bytes], kind: str) -> dict[str, bytes]:
    """The first pair made unusable."""
    record = json.loads(files["sa_0.json"])
    if kind == "size":
        record["annotations"][0]["segmentation"] = {"size": [80, 60], "counts": [4800]}
    if kind == "counts":
        for annotation in record["annotations"]:
            annotation["segmentation"]["counts"] = "11"
    if kind == "no counts":
        for annotation in record["annotations"]:
            del annotation["segmentation"]["counts"]
    if kind == "area":
        del record["annotations"][0]["area"]
    if kind == "tiny":
        record["annotations"] = record["annotations"][2:3]
    if kind == "none":
        record["annotations"] = []
    files["sa_0.json"] = {"json": b"{"}.get(kind, json.dumps(record).encode())
    files["sa_0.jpg"] = {"picture": b"no", "cut": files["sa_0.jpg"][:-400]}.get(kind, files["sa_0.jpg"])
    return files


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("size", r"a mask of \(80, 60\) for a picture of \(60, 80\)"),
        ("counts", "run lengths of a 60 x 80 mask want to add up to 4800"),
        ("no counts", r"a mask is broken, found KeyError\('counts'\)"),
        ("area", r"a mask is broken, found KeyError\('area'\)"),
        ("tiny", "none of 1 masks covers between 0.1953% and 90% of the picture"),
        ("none", "none of 0 masks covers between 0.1953% and 90% of the picture"),
        ("json", "has no readable annotations"),
        ("picture", "is no readable picture"),
        ("cut", "is no readable picture: image file is truncated"),
    ],
)
def test_a_spoilt_pair_is_skipped_by_name(kind: str, reason: str, tmp_path: Path, processor):
    shard = str(make_tar(tmp_path / "sa_0.tar", spoil(scene_files(3), kind)))
    position = StreamPosition(1)
    stream = ShardStream([shard], PairReader(processor, 5).read, position, 1, epochs=1)
    batches = [position.advance(batch) for batch in DataLoader(stream, batch_size=1)]
    assert len(batches) == 2
    (told,) = position.skipped
    assert re.search(f"sa_0 in .*sa_0.tar.*{reason}", told)


def test_a_picture_above_the_limit_is_skipped(tmp_path: Path, processor, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sa1b, "LARGEST_PICTURE", 4799)
    (pair,) = read_shard(str(make_tar(tmp_path / "sa_0.tar", scene_files(1))))
    with pytest.raises(ValueError, match=r"sa_0 in .* has 80 x 60 pixels, wanted at most 4,799"):
        PairReader(processor).read(pair, np.random.default_rng(0))


@pytest.mark.parametrize("kind", ["shapes", "objects", "copy_paste"])
def test_pasting_is_refused(kind, processor):
    with pytest.raises(ValueError, match="a stream has no second picture to paste from"):
        PairReader(processor, augmentation=Augmentation(**{kind: 0.5}))


# --------------------------------------------------------------------------------------------------------------------
# Samples


@pytest.fixture
def pairs(tmp_path: Path) -> list[Pair]:
    return list(read_shard(str(make_tar(tmp_path / "sa_0.tar", scene_files(4, height=90, width=130)))))


def sorted_masks(labels: torch.Tensor) -> list:
    return sorted(mask.tolist() for mask in labels if mask.max() >= 0)


def test_a_streamed_sample_is_the_numbered_one(pairs: list[Pair], processor):
    """The same pixels and, in whatever order, the same masks, bit for bit."""
    for pair in pairs:
        numbered = Sa1bSamples([[pair]], processor, length=1, masks_per_image=5)[0]
        streamed = PairReader(processor, 5).read(pair, np.random.default_rng(0))
        assert torch.equal(streamed["pixel_values"], numbered["pixel_values"])
        assert streamed["labels"].shape == numbered["labels"].shape
        assert sorted_masks(streamed["labels"]) == sorted_masks(numbered["labels"]) != []


def test_cropped_and_mirrored_masks_stay_on_their_objects(tmp_path: Path, processor):
    y, x = np.mgrid[:120, :90]
    mask = ((y - 50) ** 2 + (x - 30) ** 2 < 600) | ((y > 70) & (x > 40) & (x < 80))
    picture, annotations = encode_scene(0, np.repeat(255 * mask[..., None].astype(np.uint8), 3, axis=2), mask[None])
    (pair,) = read_shard(str(make_tar(tmp_path / "a.tar", {"a.jpg": picture, "a.json": annotations})))
    reader = PairReader(processor, 1, augmentation=Augmentation(smallest_crop=0.6, flip=0.5))
    for seed in range(20):
        sample = reader.read(pair, np.random.default_rng(seed))
        white = torch.nn.functional.avg_pool2d(sample["pixel_values"].mean(0, keepdim=True), 4)[0] > 0.2
        labels = sample["labels"][0] > 0
        assert (white & labels).sum() / (white | labels).sum() > 0.85


def test_masks_are_drawn_by_the_generator(pairs: list[Pair], processor):
    reader = PairReader(processor, 1)
    drawn = [reader.read(pairs[0], np.random.default_rng(seed))["labels"] for seed in (0, 0, 1, 2, 3, 4, 5)]
    assert torch.equal(drawn[0], drawn[1])
    assert len({labels.numpy().tobytes() for labels in drawn}) == 2, "the box or the disc; the pixel would vanish"


def test_a_jpeg_is_decoded_smaller_only_where_the_processor_smooths(tmp_path: Path):
    picture, annotations = encode_scene(0, *make_scene(0, height=300, width=400))
    (pair,) = read_shard(str(make_tar(tmp_path / "a.tar", {"a.jpg": picture, "a.json": annotations})))
    sizes = {
        antialias: PairReader(EfficientSamImageProcessor(size=128, antialias=antialias)).decode(pair).shape
        for antialias in (False, True)
    }
    assert sizes == {False: (300, 400, 3), True: (150, 200, 3)}
    fast, exact = (
        PairReader(EfficientSamImageProcessor(size=128, antialias=True), augmentation=Augmentation(flip=flip))
        for flip in (0.0, 1e-9)
    )
    pixels = [reader.read(pair, np.random.default_rng(0))["pixel_values"] for reader in (fast, exact)]
    assert not torch.equal(*pixels)
    assert (pixels[0] - pixels[1]).abs().mean() < 0.05
