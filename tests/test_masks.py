"""Masks, boxes and crops against slow obvious versions, and run lengths against pycocotools."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from pycocotools import mask as coco

from efficientsam_hf import masks_efficientsam
from efficientsam_hf.masks_efficientsam import (
    box_area,
    box_iou,
    boxes_at_size,
    corners_of,
    cut_off_by_crop,
    decode_rle,
    encode_rle,
    layered_crops,
    mask_iou,
    masks_to_boxes,
    nms,
    point_grid,
    resize_masks,
    rle_area,
    stability_score,
)

some_masks = arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=12))
coordinates = st.integers(0, 12)
some_boxes = st.lists(
    st.tuples(coordinates, coordinates, coordinates, coordinates).map(
        lambda c: [min(c[0], c[2]), min(c[1], c[3]), max(c[0], c[2]), max(c[1], c[3])]
    ),
    max_size=8,
).map(lambda boxes: torch.tensor(boxes, dtype=torch.float32).view(-1, 4))

SPECIAL_MASKS = {
    "empty": np.zeros((5, 7), bool),
    "full": np.ones((5, 7), bool),
    "starts on the object": np.eye(6, dtype=bool),
    "one row": np.array([[0, 1, 1, 0, 1]], bool),
    "one column": np.array([[1], [0], [0], [1]], bool),
    "one pixel": np.ones((1, 1), bool),
    "long runs": np.kron(np.eye(3, dtype=bool), np.ones((90, 110), bool)),
    "no pixels": np.zeros((0, 5), bool),
}


def coco_encode(mask):
    return coco.encode(np.asfortranarray(mask.astype(np.uint8)))


def slow_box(mask):
    inside = [(x, y) for y, row in enumerate(mask) for x, pixel in enumerate(row) if pixel]
    if not inside:
        return [0, 0, 0, 0]
    xs, ys = zip(*inside, strict=True)
    return [min(xs), min(ys), max(xs) + 1, max(ys) + 1]


def painted(box, side=12):
    canvas = np.zeros((side, side), bool)
    x0, y0, x1, y1 = (int(value) for value in box)
    canvas[y0:y1, x0:x1] = True
    return canvas


def slow_iou(mask, other):
    union = (mask | other).sum()
    return (mask & other).sum() / union if union else 0.0


def slow_nms(boxes, scores, threshold):
    waiting = sorted(range(len(boxes)), key=lambda index: -float(scores[index]))
    kept = []
    while waiting:
        best = waiting.pop(0)
        kept.append(best)
        waiting = [i for i in waiting if slow_iou(painted(boxes[best]), painted(boxes[i])) <= threshold]
    return kept


# --------------------------------------------------------------------------------------------------------------------
# Run lengths


@pytest.mark.parametrize("mask", SPECIAL_MASKS.values(), ids=SPECIAL_MASKS)
def test_special_masks_are_written_as_pycocotools_writes_them(mask):
    ours, theirs = encode_rle(mask), coco_encode(mask)
    assert ours["counts"].encode() == theirs["counts"]
    assert ours["size"] == list(theirs["size"])


@given(some_masks)
def test_run_lengths_are_pycocotools_own(mask):
    assert encode_rle(mask)["counts"].encode() == coco_encode(mask)["counts"]


@given(some_masks)
def test_run_lengths_come_back_as_the_mask(mask):
    for rle in (encode_rle(mask), encode_rle(torch.from_numpy(mask), compressed=False), coco_encode(mask)):
        decoded = decode_rle(rle)
        assert decoded.dtype == torch.bool
        np.testing.assert_array_equal(decoded.numpy(), mask)
        assert rle_area(rle) == mask.sum()


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=30))
def test_any_counts_survive_compression(counts):
    counts = np.array(counts)
    np.testing.assert_array_equal(masks_efficientsam.expand_counts(masks_efficientsam.compress_counts(counts)), counts)


@pytest.mark.parametrize("mask", SPECIAL_MASKS.values(), ids=SPECIAL_MASKS)
def test_special_masks_come_back(mask):
    np.testing.assert_array_equal(decode_rle(encode_rle(mask)).numpy(), mask)


def test_plain_counts_start_with_the_background():
    assert encode_rle(np.array([[1, 0], [1, 1]], bool), compressed=False) == {"size": [2, 2], "counts": [0, 2, 1, 1]}


def test_a_decoded_mask_can_be_written_to():
    mask = decode_rle({"size": [2, 3], "counts": [6]})
    mask[0, 0] = True
    assert mask.is_contiguous()
    assert mask.sum() == 1


GOOD = encode_rle(SPECIAL_MASKS["long runs"])


@pytest.mark.parametrize("read", [decode_rle, rle_area])
@pytest.mark.parametrize(
    ("rle", "message"),
    [
        ({**GOOD, "size": [270, 331]}, "add up to 89370"),
        ({"size": [2, 2], "counts": [1, 2]}, "add up to 4 .* found a sum of 3"),
        ({"size": [2, 2], "counts": [5, -1]}, "the least -1"),
        ({**GOOD, "counts": GOOD["counts"][:-1]}, "add up|cut short"),
        ({"size": [40, 40], "counts": "PPP"}, "cut short"),
        ({"size": [2, 2], "counts": ""}, "cut short"),
        ({"size": [2, 2], "counts": "4 "}, "characters from '0' to 'o'"),
        ({"size": [2, 2], "counts": "o" * 20 + "0"}, "at most 12 characters"),
    ],
)
def test_broken_run_lengths_are_refused(read, rle, message):
    with pytest.raises(ValueError, match=message):
        read(rle)


def test_logits_are_not_taken_for_a_mask():
    for function in (encode_rle, masks_to_boxes):
        with pytest.raises(ValueError, match=r"found a mask of torch\.float32, wanted booleans"):
            function(torch.zeros(4, 4))


def test_run_lengths_want_one_mask():
    with pytest.raises(ValueError, match=r"found a mask of shape \(1, 4, 4\)"):
        encode_rle(torch.zeros(1, 4, 4, dtype=torch.bool))


# --------------------------------------------------------------------------------------------------------------------
# Boxes and overlaps


@given(some_masks)
def test_boxes_close_around_their_masks(mask):
    assert masks_to_boxes(mask).tolist() == slow_box(mask)


def test_boxes_keep_the_leading_dimensions():
    masks = torch.rand(2, 3, 5, 6, generator=torch.Generator().manual_seed(0)) > 0.8
    boxes = masks_to_boxes(masks)
    assert boxes.shape == (2, 3, 4)
    assert boxes[1, 2].tolist() == slow_box(masks[1, 2].numpy())
    assert masks_to_boxes(masks[:0]).shape == (0, 3, 4)


@given(arrays(bool, (2, 4, 5)))
def test_mask_iou(masks):
    assert mask_iou(torch.from_numpy(masks[0]), torch.from_numpy(masks[1])) == pytest.approx(slow_iou(*masks))


def test_mask_iou_broadcasts():
    masks = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0)) > 0.5
    table = mask_iou(masks[:, None], masks[None])
    assert table.shape == (3, 3)
    assert table.diagonal().tolist() == [1, 1, 1]
    assert table[0, 2] == mask_iou(masks[0], masks[2])


@given(some_boxes, some_boxes)
def test_box_iou_is_the_iou_of_the_painted_boxes(boxes, others):
    wanted = [[slow_iou(painted(box), painted(other)) for other in others] for box in boxes]
    table = box_iou(boxes, others)
    assert table.shape == (len(boxes), len(others))
    np.testing.assert_allclose(table.numpy(), np.array(wanted).reshape(table.shape), rtol=1e-6)


@given(some_boxes)
def test_box_area_is_the_area_of_the_painted_box(boxes):
    assert box_area(boxes).tolist() == [painted(box).sum() for box in boxes]


@given(some_boxes, st.randoms(use_true_random=False), st.sampled_from([0.0, 0.3, 0.5, 0.7, 1.0]))
def test_nms_is_the_obvious_loop(boxes, random, threshold):
    scores = torch.tensor([random.choice([0.1, 0.4, 0.4, 0.9]) for _ in boxes])
    kept = nms(boxes, scores, threshold)
    assert kept.dtype == torch.int64
    assert kept.tolist() == slow_nms(boxes, scores, threshold)


def test_nms_keeps_an_overlap_of_exactly_the_threshold():
    boxes = torch.tensor([[0, 0, 2, 2], [0, 0, 2, 4]])
    assert nms(boxes, torch.tensor([1.0, 0.5]), 0.5).tolist() == [0, 1]
    assert nms(boxes, torch.tensor([0.5, 1.0]), 0.49).tolist() == [1]


def test_nms_of_nothing():
    assert nms(torch.zeros(0, 4), torch.zeros(0), 0.5).tolist() == []


def test_stability_counts_the_pixels_that_do_not_care():
    logits = torch.tensor([[[2.0, 1.5, 0.5, -0.5, -2.0]], [[-9.0] * 5], [[9.0] * 5]])
    assert stability_score(logits, 0.0, 1.0).tolist() == [0.5, 0.0, 1.0]
    assert stability_score(logits[:1], 0.0, 0.0).tolist() == [1.0]
    assert stability_score(logits[:1], 1.0, 1.0).tolist() == [0.0]
    assert stability_score(logits[:0]).shape == (0,)


def test_stability_is_exact_beyond_float32():
    logits = torch.full((24929, 673), 3.0)  # 2**24 + 1 pixels, the first number that float32 lacks
    logits[0, 0] = 1
    assert stability_score(logits, 0.0, 2.0).item() == 1 - 2**-24


# --------------------------------------------------------------------------------------------------------------------
# Sizes and crops


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_resizing_in_chunks_changes_nothing(mode, monkeypatch):
    logits = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = torch.nn.functional.interpolate(logits.flatten(0, 2)[:, None], (13, 21), mode=mode).view(2, 3, 4, 13, 21)
    monkeypatch.setattr(masks_efficientsam, "CHUNK_BYTES", 13 * 21 * 4 * 5)
    torch.testing.assert_close(resize_masks(logits, (13, 21), mode), whole)
    assert torch.equal(resize_masks(logits, (13, 21), mode, threshold=0.25), whole >= 0.25)
    assert resize_masks(logits[:, :0], (13, 21), mode).shape == (2, 0, 4, 13, 21)


def test_resizing_holds_one_chunk_at_a_time(monkeypatch):
    sizes = []
    interpolate = torch.nn.functional.interpolate
    monkeypatch.setattr(
        masks_efficientsam.F, "interpolate", lambda x, *a, **k: sizes.append(len(x)) or interpolate(x, *a, **k)
    )
    monkeypatch.setattr(masks_efficientsam, "CHUNK_BYTES", 10 * 10 * 4 * 3)
    resize_masks(torch.zeros(8, 1, 4, 4), (10, 10), threshold=0.0)
    assert sizes == [3, 3, 2]


def test_the_threshold_itself_belongs_to_the_mask():
    assert resize_masks(torch.zeros(1, 1, 4, 4), (4, 4), threshold=0.0).all()


def test_half_precision_masks_are_resized_in_float32():
    assert resize_masks(torch.zeros(1, 1, 4, 4, dtype=torch.bfloat16), (6, 6)).dtype == torch.float32


@pytest.mark.parametrize(("height", "width"), [(30, 30), (30, 40), (36, 64), (64, 36), (2, 3), (1, 50)])
@pytest.mark.parametrize("layers", [0, 1, 2])
def test_every_layer_of_crops_covers_the_picture(height, width, layers):
    crops = layered_crops(height, width, layers, 512 / 1500)
    assert crops[0] == (0, [0, 0, width, height])
    assert {layer for layer, _ in crops} == set(range(layers + 1))
    for wanted in range(layers + 1):
        seen = np.zeros((height, width), bool)
        for layer, (x0, y0, x1, y1) in crops:
            assert 0 <= x0 < x1 <= width
            assert 0 <= y0 < y1 <= height
            if layer == wanted:
                seen[y0:y1, x0:x1] = True
        assert seen.all()


def test_crops_overlap_as_asked():
    boxes = [box for layer, box in layered_crops(100, 200, 1, 0.3) if layer == 1]
    assert boxes == [[0, 0, 115, 65], [0, 35, 115, 100], [85, 0, 200, 65], [85, 35, 200, 100]]


def test_point_grid_lies_on_the_centres_of_cells():
    assert point_grid(2).tolist() == [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]
    assert point_grid(1).tolist() == [[0.5, 0.5]]


def test_only_an_edge_inside_the_picture_cuts_off():
    crop = [0, 100, 300, 400]
    boxes = torch.tensor(
        [
            [0, 200, 100, 300],  # touches the picture's left edge, which is the crop's too
            [100, 110, 150, 200],  # ends near the crop's top, which the picture goes on behind
            [100, 130, 150, 200],  # keeps its distance
            [100, 200, 280, 300],  # ends 20 pixels before the crop's right edge
            [100, 200, 279, 300],  # ends 21 pixels before it
        ]
    )
    assert cut_off_by_crop(boxes, crop, 1000, 1000).tolist() == [False, True, False, True, False]
    assert not cut_off_by_crop(boxes, [0, 0, 300, 400], 400, 300).any()


def test_cocos_boxes_as_corners():
    assert corners_of([[1, 2, 3, 4], [0, 0, 5, 6]]).tolist() == [[1, 2, 4, 6], [0, 0, 5, 6]]
    assert corners_of([]).shape == (0, 4)


@pytest.mark.parametrize("size", [(16, 16), (64, 48), (40, 100)])
def test_boxes_without_the_masks_are_the_masks_boxes_to_the_pixel(size):
    """Of smooth masks, brought to full size by the same interpolation that boxes assume."""
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    centres = [(8, 8, 5), (3, 12, 4), (0, 0, 6), (15, 7, 3.3), (7.4, 7.7, 30)]
    logits = torch.stack([radius - torch.hypot(x - cx, y - cy) for cx, cy, radius in centres])
    wanted = masks_to_boxes(resize_masks(logits, size, "bilinear") >= 0).float()
    found = boxes_at_size(logits, *size)
    assert (found - wanted).abs().max() <= 1
    assert (found == wanted).float().mean() > 0.8


def test_an_empty_mask_has_an_empty_box():
    assert boxes_at_size(torch.full((1, 4, 4), -1.0), 20, 30).tolist() == [[0, 0, 0, 0]]
