"""A stream gives what `segment` gives, and takes pictures no further ahead than it says."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_model, tiny_config
from PIL import Image

from efficientsam_hf import EfficientSamProcessor, SegmentationStream, prediction_stream, segment
from efficientsam_hf.prediction_stream import pinned


@pytest.fixture
def stream(model):
    return SegmentationStream(model, EfficientSamProcessor.from_model_config(model.config), batch_size=2, ahead=1)


@pytest.fixture
def requests(photo, tmp_path):
    Image.fromarray(photo).save(tmp_path / "photo.png")
    return [
        (photo, {"points": [[24, 20]]}),
        (tmp_path / "photo.png", {"boxes": [[10, 8, 40, 30], [50, 28, 74, 44]]}),
        (photo[:32, :50], {"points": [[[24, 20]], None], "boxes": [None, [5, 5, 30, 30]]}),
        (Image.fromarray(photo), {"points": [[24, 20], [30, 22]], "labels": [1, 1]}),
        (photo[8:], {"boxes": [10, 8, 40, 30]}),
    ]


def test_a_stream_answers_as_one_call_for_each(stream, requests):
    answers = list(stream(requests))
    assert len(answers) == len(requests)
    for (picture, prompts), answer in zip(requests, answers, strict=True):
        alone = segment(stream.model, stream.processor, picture, **prompts)
        assert answer.masks.shape == alone.masks.shape
        assert (answer.masks != alone.masks).float().mean() < 1e-3
        assert torch.allclose(answer.scores, alone.scores, atol=1e-5)
        assert torch.allclose(answer.image_embeddings, alone.image_embeddings, atol=1e-4)


@pytest.mark.parametrize("said_by", ["argument", "config"])
def test_a_stream_looks_closer_as_segment_does(stream, requests, monkeypatch, said_by):
    zoom = 1.0
    if said_by == "config":
        monkeypatch.setattr(stream.model.config, "zoom", zoom)
    closer = SegmentationStream(
        stream.model, stream.processor, batch_size=2, zoom=zoom if said_by == "argument" else None
    )
    changed = 0
    for (picture, prompts), answer in zip(requests, closer(requests), strict=True):
        alone = segment(stream.model, stream.processor, picture, **prompts, zoom=zoom)
        assert (answer.masks != alone.masks).float().mean() < 1e-3
        assert torch.allclose(answer.scores, alone.scores, atol=1e-5)
        plain = segment(stream.model, stream.processor, picture, **prompts, zoom=0)
        changed += not torch.allclose(answer.scores, plain.scores, atol=1e-5)
    assert changed == 2, "the others fill their pictures"


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batches_do_not_matter(stream, requests, batch_size):
    other = SegmentationStream(stream.model, stream.processor, batch_size=batch_size)
    for answer, one in zip(other(requests), stream(requests), strict=True):
        assert torch.allclose(answer.scores, one.scores, atol=1e-5)


@pytest.mark.parametrize("zoom", [0, 1.0])
def test_frames_without_objects_are_answered_with_none(stream, requests, photo, zoom):
    stream = SegmentationStream(stream.model, stream.processor, batch_size=2, zoom=zoom)
    nothing = [(photo, {"boxes": []}), (photo, {"points": np.zeros((0, 2))}), (photo, {"points": [], "boxes": []})]
    wanted, found = stream(requests), stream([*nothing, *requests, *nothing])
    for answer in [next(found) for _ in nothing]:
        assert answer.masks.shape == (0, 3, 48, 80)
        assert answer.scores.shape == (0, 3)
        assert answer.image_embeddings.shape == (1, 16, 4, 4)
    for one in wanted:
        assert torch.allclose(next(found).scores, one.scores, atol=1e-5)
    assert [len(answer.masks) for answer in found] == [0, 0, 0]
    with pytest.raises(ValueError, match="found no prompt, wanted points, labels, boxes, or an empty list"):
        list(stream([*requests, (photo, {})]))


def test_pictures_are_taken_as_they_are_needed(stream, photo):
    taken = []

    def film():
        for number in range(100):
            taken.append(number)
            yield photo, {"points": [[24, 20]]}

    answers = stream(film())
    assert not taken
    next(answers)
    # Two batches computed or staged, one read ahead, and the one that is being handed over.
    assert len(taken) <= 2 * 3 + 1
    answers.close()


def test_what_is_wrong_comes_after_what_was_right(stream, photo, tmp_path):
    good, bad = (photo, {"points": [[24, 20]]}), (tmp_path / "none.png", {"points": [[24, 20]]})
    answers = stream([good, good, good, good, bad])
    for _ in range(4):
        assert next(answers).masks.shape == (1, 3, 48, 80)
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        list(answers)
    with pytest.raises(ValueError, match="unknown prompt 'point', wanted points"):
        list(stream([(photo, {"point": [[24, 20]]})]))
    for alone, found in (("photo.jpg", "str"), ((photo, {}, {}), "3 of them")):
        with pytest.raises(ValueError, match=f"wants pairs of a picture and its prompts, found {found}"):
            list(stream([alone]))
    with pytest.raises(ValueError, match="batch_size must be 1 or more, got 0"):
        SegmentationStream(stream.model, stream.processor, batch_size=0)
    with pytest.raises(ValueError, match=r"zoom wants 0 or a number from 1 on, got 0\.5"):
        SegmentationStream(stream.model, stream.processor, zoom=0.5)


def frames_of(photo: np.ndarray, kind: str, folder: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Frame n, darker than the one before, in the memory of the one before; so is its click."""
    buffer, click = photo.copy(), np.zeros((1, 2))
    frames = [photo // (2 * number + 1) for number in range(6)]
    if kind == "film":
        first, *others = map(Image.fromarray, frames)
        first.save(folder / "film.tiff", save_all=True, append_images=others)
    film = Image.open(folder / "film.tiff") if kind == "film" else Image.fromarray(photo)
    for number, frame in enumerate(frames):
        buffer[:], click[:] = frame, [10 * number, 5]
        if kind == "film":
            film.seek(number)
        elif kind == "PIL":
            film.paste(Image.fromarray(frame))
        picture = {"array": buffer, "tensor": torch.from_numpy(buffer)}.get(kind, film)
        yield picture, {"points": [click] if number % 2 else click}


@pytest.mark.parametrize("kind", ["array", "tensor", "PIL", "film"])
def test_frames_may_share_their_memory(stream, photo, tmp_path, monkeypatch, kind):
    read = prediction_stream.read_request
    monkeypatch.setattr(prediction_stream, "read_request", lambda request: (time.sleep(0.05), read(request))[1])
    found = list(stream(frames_of(photo, kind, tmp_path)))
    requests = [(photo // (2 * number + 1), {"points": [[10 * number, 5]]}) for number in range(6)]
    for answer, (picture, prompts) in zip(found, requests, strict=True):
        wanted = segment(stream.model, stream.processor, picture, **prompts)
        assert torch.allclose(answer.scores, wanted.scores, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 4, 16])
@pytest.mark.parametrize("fault", ["source", "picture", "prompt"])
def test_all_answers_before_an_error_are_given(stream, photo, tmp_path, batch_size, fault):
    def requests():
        for _ in range(9):
            yield photo, {"points": [[24, 20]]}
        if fault == "source":
            raise FileNotFoundError("none.png: the film ends here")
        yield (
            (tmp_path / "none.png" if fault == "picture" else photo),
            {"point" if fault == "prompt" else "points": []},
        )
        yield photo, {"points": [[24, 20]]}

    answers = SegmentationStream(stream.model, stream.processor, batch_size=batch_size)(requests())
    assert len([next(answers) for _ in range(9)]) == 9
    with pytest.raises((FileNotFoundError, ValueError), match=r"none\.png|unknown prompt"):
        next(answers)


def test_labels_of_one_picture_do_not_change_another(photo):
    model = make_model(tiny_config(negative_points=True))
    stream = SegmentationStream(model, EfficientSamProcessor.from_model_config(model.config), batch_size=2)
    requests = [
        (photo, {"points": [[24, 20], [60, 35]], "labels": [1, 0]}),
        (photo, {"points": [[24, 20], [60, 35]]}),
    ]
    for (picture, prompts), answer in zip(requests, stream(requests), strict=True):
        alone = segment(model, stream.processor, picture, **prompts)
        assert torch.allclose(answer.scores, alone.scores, atol=1e-5)


def test_a_grey_picture_can_be_copied_through_pinned_memory(monkeypatch):
    # Pinning, which wants a GPU, copies into memory of the same strides; three views of one channel cannot be written.
    monkeypatch.setattr(
        torch.Tensor, "pin_memory", lambda grey: torch.empty_strided(grey.shape, grey.stride()).copy_(grey)
    )
    grey = torch.rand(1, 4, 5).expand(3, -1, -1)
    with pytest.raises(RuntimeError, match="more than one element"):
        grey.pin_memory()
    assert torch.equal(pinned(grey), grey)


def test_files_that_are_closed_or_asked_twice_are_read_before(model, photo, tmp_path):
    processor = EfficientSamProcessor.from_model_config(model.config)
    stream = SegmentationStream(model, processor, batch_size=2)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    wanted = segment(model, processor, photo, points=[30, 20]).masks

    def requests():
        for _ in range(4):
            with Image.open(tmp_path / "photo.png") as picture:
                yield picture, {"points": [30, 20]}

    twice = [(picture, {"points": [30, 20]}) for picture in [Image.open(tmp_path / "photo.png")] * 2]
    answers = [*stream(requests()), *stream(twice)]
    assert len(answers) == 6
    assert all(torch.equal(answer.masks, wanted) for answer in answers)
