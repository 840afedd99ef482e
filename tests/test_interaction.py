"""Pointing at a photo: what is shown and taken away is what `segment` answers, and what fails changes nothing."""

import json
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_model, tiny_config
from PIL import Image

from efficientsam_hf import EfficientSamProcessor, Segmentation, segment, segment_everything
from efficientsam_hf.interaction import SHOWN_SIDE, Found, PhotoSession, Prompt, open_photo, resized
from efficientsam_hf.masks_efficientsam import decode_rle
from efficientsam_hf.visualization import draw_everything

LOOSE = {"points_per_side": 3, "pred_iou_thresh": 0, "stability_score_thresh": 0, "box_nms_thresh": 0.9}


@pytest.fixture(scope="module")
def parts():
    model = make_model(tiny_config(negative_points=True))
    return model, EfficientSamProcessor.from_model_config(model.config)


@pytest.fixture
def session(photo) -> PhotoSession:
    return PhotoSession(Image.fromarray(photo), "cup.jpeg")


def test_clicks_and_boxes_are_asked_together(session, parts, photo):
    session.click(*parts, 0.3, 0.5, 1)
    session.drag(*parts, (0.9, 0.75, 0.25, 0.25))
    session.click(*parts, 0.75, 0.25, 0)
    assert session.found.prompt == Prompt(((24.0, 24.0), (60.0, 12.0)), (1, 0), (20.0, 12.0, 72.0, 36.0))
    wanted = segment(*parts, photo, points=[[[24, 24], [60, 12]]], labels=[[1, 0]], boxes=[[20, 12, 72, 36]])
    assert torch.equal(session.found.answer.masks, wanted.masks)
    assert session.found.scores == wanted.scores[0].tolist()


@pytest.fixture(scope="module")
def taught():
    """A model that can be shown masks."""
    model = make_model(tiny_config(negative_points=True, mask_prompts=True))
    return model, EfficientSamProcessor.from_model_config(model.config)


def test_the_chosen_mask_is_shown_with_the_next_click(session, taught, photo):
    session.click(*taught, 0.3, 0.5, 1)
    session.choose(1)
    mask = session.found.answer.masks[0, 1]
    assert 0 < mask.float().mean() < 1
    session.click(*taught, 0.75, 0.25, 0)
    wanted = segment(*taught, photo, points=[[24, 24], [60, 12]], labels=[1, 0], masks=mask)
    assert torch.equal(session.found.answer.masks, wanted.masks)
    without = segment(*taught, photo, points=[[24, 24], [60, 12]], labels=[1, 0])
    assert not torch.equal(session.found.answer.scores, without.scores)


def test_undo_gives_back_what_was_answered_to_a_mask(session, taught):
    for place in (0.2, 0.5, 0.8):
        session.click(*taught, place, 0.5, 1)
        if place < 0.8:
            before = session.found.answer
    session.undo(*taught)
    assert torch.equal(session.found.answer.masks, before.masks)
    assert torch.equal(session.found.answer.scores, before.scores)


@pytest.mark.parametrize("point_at", ["a click", "a box"])
def test_undo_gives_back_the_choice(session, taught, point_at):
    session.click(*taught, 0.3, 0.5, 1)
    session.choose(1)
    before = session.found.mask(session.photo.size)
    if point_at == "a click":
        session.click(*taught, 0.75, 0.25, 1)
    else:
        session.drag(*taught, (0.1, 0.1, 0.6, 0.6))
    assert session.found.choice == 0
    session.undo(*taught)
    assert session.found.choice == 1
    assert np.array_equal(session.found.mask(session.photo.size), before)


def test_places_in_pixels_and_unknown_kinds_are_refused(session, parts, tmp_path):
    with pytest.raises(ValueError, match=r"a place wants 0 to 1 of the photo's sides, found 300, 0\.5"):
        session.click(*parts, 300, 0.5, 1)
    with pytest.raises(ValueError, match="a place wants 0 to 1"):
        session.drag(*parts, (0.1, 0.1, 0.5, 20))
    assert session.found.prompt == Prompt()
    session.click(*parts, 1.04, -0.02, 1)
    assert session.found.prompt.points == ((session.photo.width - 1, 0),)
    with pytest.raises(ValueError, match="there is no kind 'jpg', wanted mask, coco, cutout"):
        session.save("jpg", tmp_path)
    assert not list(tmp_path.iterdir())


def test_no_mask_is_shown_with_a_box_of_everything_or_where_there_is_none(session, taught, photo):
    session.click(*taught, 0.3, 0.5, 1)
    session.click(*taught, 0.4, 0.5, 1)
    assert session.found.prompt.mask is not None
    session.drag(*taught, (0.25, 0.25, 0.9, 0.75))
    assert session.found.prompt.mask is None
    session.find_everything(*taught, **LOOSE)
    session.click(*taught, 0.3, 0.5, 1)
    assert session.found.prompt.mask is None
    empty = replace(session.found.answer, masks=torch.zeros_like(session.found.answer.masks))
    session.found = replace(session.found, answer=empty)
    session.click(*taught, 0.4, 0.5, 1)
    assert session.found.prompt.mask is None


def test_a_photo_is_encoded_once(session, parts, monkeypatch):
    model, _ = parts
    encoded = []
    encode = model.get_image_embeddings
    monkeypatch.setattr(model, "get_image_embeddings", lambda *a, **k: encoded.append(1) or encode(*a, **k))
    monkeypatch.setattr(
        model.vision_encoder,
        "forward",
        lambda *a, f=model.vision_encoder.forward, **k: encoded.append(2) or f(*a, **k),
    )
    session.look(*parts)
    assert encoded == [1, 2]
    session.look(*parts)
    session.click(*parts, 0.5, 0.5, 1)
    session.drag(*parts, (0.1, 0.1, 0.9, 0.9))
    session.find_everything(*parts, **LOOSE)
    session.clear()
    session.click(*parts, 0.5, 0.5, 1)
    assert encoded == [1, 2]


def test_a_photo_that_lies_on_its_side_is_turned(parts, photo, tmp_path):
    """As `segment` turns it: clicks, pictures and downloads are of the upright one."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photo).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    turned = PhotoSession(Image.open(tmp_path / "turned.png"), "turned.png")
    turned.click(*parts, 0.3, 0.5, 1)
    assert turned.found.prompt.points == ((24.0, 24.0),)
    assert torch.equal(turned.found.answer.masks, segment(*parts, photo, points=[24, 24]).masks)
    assert Image.open(turned.save("cutout", tmp_path)).size == (80, 48)


def test_a_click_on_the_background_alone_is_refused(session, parts):
    with pytest.raises(ValueError, match="object 0: wanted a click on it or a box"):
        session.click(*parts, 0.3, 0.5, 0)
    assert session.found.answer is None


def test_undo_goes_back_step_by_step(session, parts):
    drawn = [session.draw()]
    for place in ((0.2, 0.2), (0.8, 0.7)):
        session.click(*parts, *place, 1)
        drawn.append(session.draw())
    session.drag(*parts, (0.1, 0.1, 0.6, 0.6))
    for picture in reversed(drawn):
        session.undo(*parts)
        assert session.draw() == picture
    session.undo(*parts)
    assert session.found.prompt == Prompt()


def test_everything_takes_the_place_of_prompts_and_goes_with_undo(session, parts, photo):
    session.click(*parts, 0.5, 0.5, 1)
    records = session.find_everything(*parts, **LOOSE)
    assert records == segment_everything(*parts, photo, **LOOSE)
    assert session.found.scores == []
    assert np.array_equal(
        session.found.mask(session.photo.size),
        np.any([decode_rle(r["segmentation"]).numpy() for r in records], axis=0),
    )
    session.undo(*parts)
    assert session.found.mask(session.photo.size) is None
    assert session.draw() == session.shown


def test_everything_in_crops_keeps_the_photos_own_embedding(session, parts):
    session.look(*parts)
    own = session.embeddings
    assert session.find_everything(*parts, **LOOSE, crop_n_layers=1)
    assert torch.equal(session.embeddings, own)
    session.click(*parts, 0.5, 0.5, 1)
    assert session.found.answer is not None


def test_what_fails_changes_nothing(session, parts):
    for place in range(6):
        session.click(*parts, place / 6, 0.5, 1)
    before, picture = session.found.prompt, session.draw()
    with pytest.raises(ValueError, match="at most 6 slots, found 7"):
        session.click(*parts, 0.5, 0.9, 1)
    with pytest.raises(ValueError, match="pred_iou_thresh must be 0 to 1"):
        session.find_everything(*parts, pred_iou_thresh=7)
    with pytest.raises(ValueError, match="box"):
        session.drag(*parts, (0.5, 0.5, 0.5, 0.5))
    assert session.found.prompt == before
    assert session.draw() == picture


def test_places_outside_are_brought_in(session, parts):
    session.click(*parts, 1.0, 2.0, 1)
    assert session.found.prompt.points == ((79.0, 47.0),)
    session.drag(*parts, (0.5, 1.0, 1.2, 0.0))
    assert session.found.prompt.box == (40.0, 0.0, 80.0, 48.0)


def test_a_box_can_be_drawn_on_a_photo_one_pixel_high(parts):
    session = PhotoSession(Image.new("RGB", (80, 1)))
    session.drag(*parts, (0.1, 0.0, 0.9, 1.0))
    assert session.found.answer.masks.shape[-2:] == (1, 80)


def test_everything_is_drawn_as_its_whole_masks_would_be(session, parts):
    session.find_everything(*parts, **LOOSE)
    drawn = np.asarray(session.draw(1.0)).astype(int)
    records = sorted(session.found.records, key=lambda record: -record["area"])
    whole = (resized(decode_rle(record["segmentation"]).numpy(), session.shown.size) for record in records)
    wanted = np.asarray(draw_everything(session.shown, whole, 1.0)).astype(int)
    assert (np.abs(drawn - wanted).max(-1) > 60).mean() < 0.02  # but for edges


def test_drawing_while_somebody_clicks_meets_what_fits(session, parts):
    """A drawing that is under way while clicks come and go has the clicks of one moment."""
    session.click(*parts, 0.3, 0.5, 1)
    before, seen = session.found, session.draw()
    found = type("Changing", (Found,), {"mask": lambda self, size: (session.clear(), Found.mask(self, size))[1]})
    session.found = found(before.history, before.answer)
    assert session.draw() == seen
    assert session.found == Found()


def test_the_embedding_kept_of_everything_holds_no_other_crops(session, parts):
    session.find_everything(*parts, **LOOSE, crop_n_layers=1)
    kept = session.embeddings
    assert kept.untyped_storage().nbytes() == kept.numel() * kept.element_size()


def test_downloads_are_the_chosen_mask(session, parts, photo, tmp_path):
    with pytest.raises(ValueError, match="there is no mask yet"):
        session.save("mask", tmp_path)
    session.drag(*parts, (0.1, 0.1, 0.6, 0.9))
    session.choose(1)
    mask = session.found.answer.masks[0, 1].numpy()
    assert 0 < mask.mean() < 1
    paths = [session.save(kind, tmp_path) for kind in ("mask", "coco", "cutout")]
    assert [path.name for path in paths] == ["cup_mask.png", "cup_coco.json", "cup_cutout.png"]
    assert np.array_equal(np.asarray(Image.open(paths[0])) > 0, mask)
    dataset = json.loads(paths[1].read_text())
    (image,), (record,) = dataset["images"], dataset["annotations"]
    assert (image["file_name"], image["width"], image["height"]) == ("cup.jpeg", 80, 48)
    assert np.array_equal(decode_rle(record["segmentation"]).numpy(), mask)
    assert record["predicted_iou"] == round(session.found.scores[1], 4)
    cutout = np.asarray(Image.open(paths[2]))
    assert np.array_equal(cutout[..., :3], photo)
    assert np.array_equal(cutout[..., 3], mask * 255)


def test_downloads_of_everything(session, parts, tmp_path):
    records = session.find_everything(*parts, **LOOSE)
    labels = np.asarray(Image.open(session.save("mask", tmp_path)))
    smallest = min(range(len(records)), key=lambda n: records[n]["area"])
    assert np.array_equal(labels > 0, session.found.mask(session.photo.size))
    assert np.array_equal(labels == smallest + 1, decode_rle(records[smallest]["segmentation"]).numpy())
    assert len(json.loads(session.save("coco", tmp_path).read_text())["annotations"]) == len(records)


def test_downloads_of_everything_take_the_memory_of_a_few_masks_however_many_there_are(tmp_path, monkeypatch):
    masks = np.zeros((40, 1000, 800), dtype=bool)
    for number, mask in enumerate(masks):
        mask[20 * number : 20 * number + 30, number:700] = True
    session = PhotoSession(Image.new("RGB", (800, 1000)))
    found = Segmentation(torch.from_numpy(masks)[:, None], torch.ones(40, 1), torch.zeros(1, 1, 1, 1))
    session.found = Found(records=tuple(found.records()))
    tracemalloc.start()
    for kind in ("mask", "coco", "cutout"):
        session.save(kind, tmp_path)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 10 * masks[0].nbytes
    assert np.array_equal(session.found.mask(session.photo.size), masks.any(0))
    monkeypatch.setattr(Found, "mask", lambda *_: pytest.fail("the masks are not needed"))
    session.save("coco", tmp_path)


@pytest.mark.parametrize("size", [(30, 20), (3000, 1500)])
def test_what_is_shown_has_one_size(size, parts):
    session = PhotoSession(Image.new("RGB", size, (200, 100, 50)))
    session.drag(*parts, (0.2, 0.2, 0.8, 0.8))
    assert max(session.draw().size) == SHOWN_SIDE
    assert session.found.answer.masks.shape[-2:] == (size[1], size[0])


def test_opacity(session, parts):
    session.drag(*parts, (0.1, 0.1, 0.6, 0.9))
    inside = resized(session.found.mask(session.photo.size), session.shown.size)
    drawn = {opacity: np.asarray(session.draw(opacity)).astype(int) for opacity in (0.0, 1.0)}
    shown = np.asarray(session.shown).astype(int)
    assert np.abs(drawn[1.0] - shown)[inside].mean() > np.abs(drawn[0.0] - shown)[inside].mean() + 10


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("text.jpg", "text.jpg is no picture that can be read"),
        ("cut.png", "cut.png is damaged, or its upload was cut short"),
        ("float.tiff", "float.tiff: floats want 0 to 1, found 0 to 200: give uint8, or divide by 255"),
        ("huge.png", "huge.png has 80 x 48 pixels, wanted at most 0 megapixels"),
        ("large.png", "large.png has 80 x 48 pixels, wanted at most 0 megapixels"),
        ("bomb.png", "bomb.png is far too large a picture"),
        ("missing.png", "missing.png is no picture that can be read"),
    ],
)
def test_bad_files_are_told_without_a_path(name, words, photo, tmp_path, monkeypatch):
    Image.fromarray(photo).save(tmp_path / "huge.png")
    for same in ("large.png", "bomb.png"):
        (tmp_path / same).write_bytes((tmp_path / "huge.png").read_bytes())
    (tmp_path / "cut.png").write_bytes((tmp_path / "huge.png").read_bytes()[:-500])
    (tmp_path / "text.jpg").write_text("no picture")
    Image.fromarray(np.float32([[0, 200]])).save(tmp_path / "float.tiff")
    # Pillow warns of pictures beyond its limit, and refuses those beyond twice the limit.
    if name in ("large.png", "bomb.png"):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000 if name == "large.png" else 1000)
    with pytest.raises(ValueError, match=name) as error:
        open_photo(tmp_path / name, 3000 if name == "huge.png" else 10**8)
    assert str(error.value) == words
