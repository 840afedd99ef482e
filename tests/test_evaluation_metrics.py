import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from efficientsam_hf.evaluation.clicks import anywhere, centroid, deepest
from efficientsam_hf.evaluation.ground_truth import TrueObject
from efficientsam_hf.evaluation.interactive import Walk
from efficientsam_hf.evaluation.metrics import (
    boundary,
    boundary_iou,
    boundary_width,
    iou,
    number_of_clicks,
    size_class,
)
from efficientsam_hf.evaluation.protocols import deepest_error, deepest_of_larger, find_protocol, random_error

MASKS = arrays(bool, (9, 12))
GENERATOR = np.random.default_rng(0)


def block(top, left, height, width, size=(60, 80)):
    mask = np.zeros(size, dtype=bool)
    mask[top : top + height, left : left + width] = True
    return mask


@given(MASKS, MASKS, MASKS)
def test_iou_is_that_of_the_sets_of_pixels(answer, truth, ignore):
    sets = [{tuple(place) for place in np.argwhere(mask & ~ignore)} for mask in (answer, truth)]
    both, either = sets[0] & sets[1], sets[0] | sets[1]
    assert iou(answer, truth, ignore) == (len(both) / len(either) if either else 0)


def test_a_moved_mask_scores_what_is_reckoned_by_hand():
    truth, moved = block(10, 10, 20, 30), block(10, 16, 20, 30)
    assert iou(moved, truth) == 24 / 36
    # The columns that only one of them has do not count.
    assert iou(moved, truth, ignore=block(0, 10, 60, 6) | block(0, 40, 60, 6)) == 1


def test_boundary_iou_by_hand():
    """Of a 20 x 30 block moved by 6 pixels, a frame of 2 pixels each: 184 pixels, of which 104 are in both."""
    truth, moved = block(10, 10, 20, 30), block(10, 16, 20, 30)
    assert boundary_width((60, 80)) == 2
    assert np.count_nonzero(boundary(truth, 2)) == 20 * 30 - 16 * 26
    both = 2 * 2 * 24 - 0  # above and below, where the blocks overlap; the upright sides meet nothing but these
    upright = np.count_nonzero(boundary(truth, 2) & boundary(moved, 2)) - both
    assert upright == 0
    assert boundary_iou(moved, truth) == both / (2 * 184 - both)


@given(MASKS, st.integers(1, 3))
def test_boundary_is_what_is_near_the_outside(mask, width):
    padded = np.pad(mask, width)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * width + 1, 2 * width + 1))
    assert (boundary(mask, width) == (mask & ~windows.all((-2, -1)))).all()


def test_masks_of_two_sizes_are_refused():
    with pytest.raises(ValueError, match=r"bool \(4, 4\) beside \(4, 5\)"):
        iou(np.zeros((4, 4), bool), np.zeros((4, 5), bool))
    with pytest.raises(ValueError, match="uint8"):
        iou(np.zeros((4, 4), np.uint8), np.zeros((4, 4), bool))


def test_clicks_are_counted_to_the_first_that_suffices():
    assert number_of_clicks([0.2, 0.85, 0.7, 0.9], 0.85) == 2
    assert number_of_clicks([0.2, 0.85, 0.7, 0.9], 0.9) == 4
    assert number_of_clicks([0.2, 0.3], 0.9) == 20
    assert number_of_clicks([0.0] * 20 + [1.0], 0.9) == 20


def test_sizes_are_cocos():
    assert [size_class(area) for area in (1, 1023, 1024, 9215, 9216)] == [
        "small",
        "small",
        "medium",
        "medium",
        "large",
    ]


@given(MASKS.filter(np.any))
def test_the_deepest_pixel_has_the_most_room(region):
    (x, y), depth = deepest(region)
    outside = np.argwhere(~np.pad(region, 1)) - 1
    distances = [min(math.dist(place, other) for other in outside) for place in np.argwhere(region)]
    assert region[y, x]
    assert depth == pytest.approx(max(distances), abs=1e-5)
    assert min(math.dist((y, x), other) for other in outside) == pytest.approx(depth, abs=1e-5)


@given(MASKS.filter(np.any))
def test_the_centroid_is_on_the_object(region):
    x, y = centroid(region)
    middle = np.round(np.argwhere(region).mean(0)).astype(int)
    assert region[y, x]
    if region[tuple(middle)]:
        assert (y, x) == tuple(middle)
        return

    def room(place):
        steps = []
        for move in ((-1, 0), (1, 0), (0, -1), (0, 1)):
            way, here = 0, np.add(place, move)
            while (here >= 0).all() and (here < region.shape).all() and region[tuple(here)]:
                way, here = way + 1, here + move
            steps.append(way)
        return min(steps)

    assert room((y, x)) == max(room(place) for place in np.argwhere(region))


def test_anywhere_is_everywhere_alike():
    region = block(2, 3, 2, 2, (6, 8))
    clicks = [anywhere(region, GENERATOR) for _ in range(2000)]
    counts = [clicks.count(click) for click in ((3, 2), (4, 2), (3, 3), (4, 3))]
    assert sum(counts) == 2000
    assert min(counts) > 400


def test_next_clicks_differ_by_protocol():
    missed, false = block(5, 5, 10, 10), block(30, 30, 20, 20)
    assert deepest_of_larger(missed, false, True, [], GENERATOR)[1] == 0
    assert deepest_of_larger(false, missed, True, [], GENERATOR)[1] == 1
    # Side by side they are one error, and its middle lies deeper than either's own.
    left, right = block(10, 10, 20, 10), block(10, 20, 20, 12)
    (x, _), label = deepest_error(left, right, True, [], GENERATOR)
    assert 19 <= x <= 22
    assert label == (x < 20)
    (x, _), _ = deepest_of_larger(left, right, True, [], GENERATOR)
    assert x in (25, 26)


def ritm_click(truth, ignore, answer, clicked):
    """RITM's `Clicker._get_next_click`, step by step."""
    import cv2

    depths = []
    for region in (truth & ~answer & ~ignore, ~truth & answer & ~ignore):
        depth = cv2.distanceTransform(np.pad(region, 1).astype(np.uint8), cv2.DIST_L2, 0)[1:-1, 1:-1]
        for x, y in clicked:
            depth[y, x] = 0
        depths.append(depth)
    label = int(depths[0].max() > depths[1].max())
    y, x = np.unravel_index(depths[1 - label].argmax(), depths[0].shape)
    return (int(x), int(y)), label


def test_ritm_clicks_where_its_authors_do():
    """The answers are nothing, so that what was clicked stays an error, and then too much."""
    truth, ignore = block(10, 10, 20, 24), block(16, 16, 10, 10)
    walk = Walk(TrueObject(0, truth, (10, 10, 34, 30), 480, ignore=ignore), GENERATOR)
    for number in range(12):
        if number:
            walk.answer = block(0, 0, 0, 0) if number < 6 else block(5, 5, 40, 40)
        answer = block(0, 0, 0, 0) if walk.answer is None else walk.answer
        wanted = ritm_click(truth, ignore, answer, walk.points)
        assert walk.click(find_protocol("ritm"), background=True)
        assert (walk.points[-1], walk.labels[-1]) == wanted
    assert len(set(walk.points)) == 12
    assert set(walk.labels) == {0, 1}


def test_first_clicks_leave_out_what_is_ignored_where_the_authors_do():
    truth, middle = block(10, 10, 20, 20), block(15, 15, 10, 10)
    for name, ignore, on_ignored in (("ritm", middle, False), ("sam", middle, True), ("ritm", truth, True)):
        walk = Walk(TrueObject(0, truth, (10, 10, 30, 30), 400, ignore=ignore), GENERATOR)
        walk.click(find_protocol(name), background=True)
        ((x, y),) = walk.points
        assert truth[y, x]
        assert ignore[y, x] == on_ignored


def test_where_all_was_clicked_there_is_no_click():
    pixel, nothing = block(5, 5, 1, 1), block(0, 0, 0, 0)
    assert deepest_of_larger(pixel, nothing, True, [(5, 5)], GENERATOR) is None
    assert deepest_of_larger(pixel, nothing, True, [(6, 5), (0, 0)], GENERATOR) == ((5, 5), 1)


@pytest.mark.parametrize("choose", [deepest_error, deepest_of_larger, random_error])
def test_a_model_without_background_clicks_gets_none(choose):
    missed, false, nothing = block(5, 5, 10, 10), block(30, 30, 20, 20), block(0, 0, 0, 0)
    (x, y), label = choose(missed, false, False, [], GENERATOR)
    assert missed[y, x]
    assert label == 1
    assert choose(nothing, false, False, [], GENERATOR) is None
    assert choose(nothing, nothing, True, [], GENERATOR) is None


def test_protocols_say_what_they_are_not():
    with pytest.raises(ValueError, match=r"unknown protocol 'bocs', wanted one of box, paper, sam, ritm, centroid"):
        find_protocol("bocs")
    with pytest.raises(ValueError, match=r"'sam': prompts must be numbers of clicks from 1 on, got \(0,\)"):
        find_protocol("sam", (0,))
    with pytest.raises(ValueError, match=r"'box': prompts must be the box alone, \(1,\), got \(1, 2\)"):
        find_protocol("box", (1, 2))
