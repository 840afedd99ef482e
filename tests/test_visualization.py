import numpy as np
import pytest
from PIL import Image

from efficientsam_hf import draw_everything, draw_segmentation
from efficientsam_hf.visualization import BACKGROUND, COLORS, FOREGROUND


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
