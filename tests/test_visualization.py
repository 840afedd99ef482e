import io

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageChops, ImageFilter

from efficientsam_hf import draw_everything, draw_segmentation
from efficientsam_hf.masks_efficientsam import encode_rle
from efficientsam_hf.visualization import BACKGROUND, COLORS, FOREGROUND, WHITE, draw_records


@pytest.fixture
def masks(photo):
    masks = np.zeros((2, *photo.shape[:2]), dtype=bool)
    masks[0, 10:30, 10:30] = True
    masks[1, 28:44, 50:74] = True
    return masks


def test_colours_lie_on_their_masks_and_the_rest_is_dimmed(photo, masks):
    drawn = np.asarray(draw_segmentation(photo, masks)).astype(int)
    inside = (20, 20)
    for mask, spot, color in zip(masks, (inside, (36, 62)), COLORS, strict=False):
        assert mask[spot]
        blend = 0.55 * photo[spot] + 0.45 * np.array(color)
        assert np.abs(drawn[spot] - blend).max() <= 2
    assert np.abs(drawn[2, 40] - 0.62 * photo[2, 40]).max() <= 2


def draw_slowly(photo: Image.Image, masks: np.ndarray) -> Image.Image:
    """The masks of `draw_segmentation`, each with filters over the whole photo."""
    areas, unit = [Image.fromarray(mask.astype(np.uint8) * 255) for mask in masks], max(photo.size) / 640
    whole = Image.fromarray(masks.any(0).astype(np.uint8) * 255)
    picture = Image.composite(photo, photo.point(lambda value: int(value * 0.62)), whole)
    for area, color in zip(areas, COLORS, strict=False):
        picture.paste(color, mask=area.point(lambda value: int(value * 0.45)))
        for width, ink in ((4, WHITE), (2, color)):
            reach = max(1, round(width * unit / 2))
            edge = ImageChops.subtract(area.filter(ImageFilter.MaxFilter(2 * reach + 1)), area)
            picture.paste(ink, mask=edge.filter(ImageFilter.GaussianBlur(0.6 * unit)))
    return picture


@pytest.mark.parametrize("size", [(80, 48), (700, 40), (50, 1300), (2000, 60)])
def test_outlines_are_those_of_filters_over_the_whole_photo(size):
    generator = np.random.default_rng(0)
    width, height = size
    masks = np.zeros((6, height, width), dtype=bool)
    for mask, share in zip(masks, (0.02, 0.1, 0.4, 0.9), strict=False):
        x, y = generator.integers(width), generator.integers(height)
        part = mask[y : y + int(share * height) + 1, x : x + int(share * width) + 1]
        part[:] = generator.random(part.shape) < 0.3
    masks[4, 0, 0] = masks[4, -1, -1] = masks[5, height // 2, width // 2] = True
    photo = Image.fromarray(generator.integers(0, 255, (height, width, 3), dtype=np.uint8))
    for some in (masks, *masks[:, None]):
        assert draw_segmentation(photo, some) == draw_slowly(photo, some)


def test_filters_see_the_mask_alone_and_none_of_a_window(monkeypatch):
    photo, masks = Image.new("RGB", (2000, 1500)), np.zeros((1, 1500, 2000), dtype=bool)
    masks[0, 400:500, 600:800] = True
    seen, own = [], Image.Image.filter
    monkeypatch.setattr(Image.Image, "filter", lambda image, kind: seen.append((image.size, kind)) or own(image, kind))
    draw_segmentation(photo, masks)
    assert seen
    assert all(width < 240 and height < 140 for (width, height), _ in seen)
    # The time of a maximum over a window grows with the window; that of these does not.
    assert {type(kind) for _, kind in seen} == {ImageFilter.BoxBlur, ImageFilter.GaussianBlur}


def test_clicks_show_their_label(photo, masks):
    drawn = np.asarray(draw_segmentation(photo, masks, points=[[20, 20], [60, 8]], labels=[1, 0]))
    assert np.abs(drawn[20, 20].astype(int) - FOREGROUND).max() <= 3
    assert np.abs(drawn[8, 60].astype(int) - BACKGROUND).max() <= 3


@pytest.mark.parametrize("kind", [np.array, tuple])
def test_labels_of_any_kind(photo, masks, kind):
    for labels in ([1, 0], [0, 0]):
        points = [[20, 20], [60, 8]]
        wanted, found = (draw_segmentation(photo, masks, points, given) for given in (labels, kind(labels)))
        assert found == wanted


SAME_PROMPTS = {
    "a flat box": ({"boxes": [10, 8, 40, 30]}, {"boxes": [[10, 8, 40, 30]]}),
    "labels of None": ({"points": [[20, 20]], "labels": None}, {"points": [[20, 20]], "labels": [1]}),
    "several objects": (
        {"points": [[[20, 20]], [[60, 8], [62, 9]]], "labels": [[1], [0, 1]]},
        {"points": [[20, 20], [60, 8], [62, 9]], "labels": [1, 0, 1]},
    ),
    "arrays": ({"points": np.array([[20, 20]]), "boxes": np.ones((0, 4))}, {"points": [[20, 20]]}),
    "nothing": ({"points": [], "boxes": []}, {}),
    "padding": ({"points": [[20, 20], [-1, -1]], "labels": [1, -1], "boxes": [[-1] * 4]}, {"points": [[20, 20]]}),
}


@pytest.mark.parametrize(("prompts", "same"), SAME_PROMPTS.values(), ids=SAME_PROMPTS)
def test_prompts_are_taken_as_segment_takes_them(photo, masks, prompts, same):
    assert draw_segmentation(photo, masks, **prompts) == draw_segmentation(photo, masks, **same)


def test_a_box_has_its_objects_colour(photo, masks):
    drawn = draw_segmentation(photo, masks, points=[[[20, 20]], None], boxes=[[4, 4, 36, 36], [46, 5, 76, 22]])
    assert (drawn.getpixel((20, 36)), drawn.getpixel((60, 22))) == tuple(COLORS[:2])


def test_masks_of_a_device_are_brought_from_there(photo, masks):
    class Elsewhere:
        """Like a tensor of a GPU: NumPy cannot read it."""

        def cpu(self):
            return masks

        def __array__(self, *args, **kwargs):
            raise TypeError("not in this memory")

    assert draw_segmentation(photo, Elsewhere()) == draw_segmentation(photo, masks)


def test_the_photo_itself_is_left_alone(photo, masks):
    image = Image.fromarray(photo)
    draw_segmentation(image, masks, points=[[20, 20]], boxes=[[1, 1, 30, 30]])
    assert np.array_equal(np.asarray(image), photo)


def test_logits_are_refused(photo, masks):
    for draw in (draw_segmentation, draw_everything):
        with pytest.raises(ValueError, match="compare logits with a threshold first"):
            draw(photo, np.where(masks, 5.0, -5.0))
    drawn = draw_everything(photo, torch.from_numpy(np.asarray(masks)))
    np.testing.assert_array_equal(np.asarray(drawn), np.asarray(draw_everything(photo, masks)))


def test_no_mask_and_an_empty_mask(photo):
    for masks in (np.zeros((0, 48, 80), bool), np.zeros((1, 48, 80), bool)):
        assert draw_segmentation(photo, masks).size == (80, 48)


def test_sizes_must_fit(photo):
    with pytest.raises(ValueError, match=r"masks must be \(N, 48, 80\) like the photo, got \(1, 4, 4\)"):
        draw_segmentation(photo, np.zeros((1, 4, 4), bool))


def test_everything_is_drawn_the_last_mask_on_top(photo, masks):
    whole = np.ones(photo.shape[:2], dtype=bool)
    drawn = np.asarray(draw_everything(photo, iter([whole, *masks]))).astype(int)
    assert drawn.shape == photo.shape
    colors = [drawn[spot] - 0.5 * photo[spot] for spot in ((2, 40), (20, 20), (36, 62))]
    for one in range(3):
        for other in range(one):
            assert np.abs(colors[one] - colors[other]).max() > 30


def test_everything_without_masks_is_the_photo(photo):
    assert np.array_equal(np.asarray(draw_everything(photo, [])), photo)


def test_masks_of_parts_are_drawn_as_masks_of_the_whole(photo, masks):
    masks[1, 40:48, 70:80] = True  # up to the photo's corner
    parts, corners = [masks[0, 10:30, 10:30], masks[1, 28:48, 50:80]], [(10, 10), (50, 28)]
    drawn = draw_everything(photo, parts, corners=corners)
    assert np.array_equal(np.asarray(drawn), np.asarray(draw_everything(photo, masks)))


def turned(picture: Image.Image, orientation: int) -> Image.Image:
    """The picture as a camera stores it that was held so."""
    exif, file = Image.Exif(), io.BytesIO()
    exif[ExifTags.Base.Orientation] = orientation
    stored = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90}[orientation]
    picture.transpose(stored).save(file, "PNG", exif=exif)
    return Image.open(file)


def assert_same(found: Image.Image, wanted: Image.Image) -> None:
    assert np.array_equal(np.asarray(found), np.asarray(wanted))


@pytest.mark.parametrize("orientation", [3, 6])
def test_masks_lie_on_the_photo_as_it_was_segmented(photo, orientation):
    upright = Image.fromarray(photo)
    mask = np.zeros((48, 80), dtype=bool)
    mask[5:20, 10:50] = True
    record = {"segmentation": encode_rle(mask), "bbox": [10, 5, 40, 15], "area": 600}
    assert_same(draw_segmentation(turned(upright, orientation), mask[None]), draw_segmentation(upright, mask[None]))
    assert_same(draw_everything(turned(upright, orientation), [mask]), draw_everything(upright, [mask]))
    assert_same(draw_records(turned(upright, orientation), [record]), draw_records(upright, [record]))


def test_records_of_another_photo_are_refused(photo):
    record = {"segmentation": encode_rle(np.ones((20, 30), dtype=bool)), "bbox": [0, 0, 30, 20], "area": 600}
    with pytest.raises(ValueError, match=r"found a record of 30 x 20 pixels, wanted the photo's \(80, 48\)"):
        draw_records(photo, [record])


def test_photos_of_16_bits_are_drawn_in_their_shades(tmp_path):
    grey = np.linspace(0, 65535, 48 * 80).reshape(48, 80).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    drawn = np.asarray(draw_everything(tmp_path / "grey.png", []))
    assert np.abs(drawn[..., 0] - grey / 257).max() < 1
