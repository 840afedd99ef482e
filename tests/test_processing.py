"""Prompts on their way into the model: the same pixel after the round trip, exact padding, and every refusal."""

import json

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import tiny_config
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoProcessor

from efficientsam_hf import EfficientSamConfig, EfficientSamImageProcessor, EfficientSamProcessor

SIDE = 64
ASPECTS = [(1, 1), (4, 3), (3, 4), (16, 9), (9, 16), (21, 9), (2, 1), (1, 3), (5, 1), (1, 10)]


def make_processor(**settings) -> EfficientSamProcessor:
    return EfficientSamProcessor(EfficientSamImageProcessor(size={"height": SIDE, "width": SIDE}), **settings)


@pytest.fixture
def processor() -> EfficientSamProcessor:
    return make_processor()


@pytest.fixture
def image() -> np.ndarray:
    """Height 48, width 80."""
    return np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8)


SIZES = [(48, 80)]

# --------------------------------------------------------------------------------------------------------------------
# Where a click lands


@pytest.mark.parametrize("aspect", ASPECTS, ids=lambda aspect: "{}:{}".format(*aspect))
def test_a_click_lands_on_the_same_pixel_after_the_round_trip(processor, aspect):
    width, height = aspect[0] * SIDE // 2, aspect[1] * SIDE // 2
    for x, y in [(0.3, 0.6), (0.9, 0.1), (0.05, 0.95)]:
        column, row = int(x * width), int(y * height)
        point = processor(original_sizes=[(height, width)], input_points=[[[[column + 0.5, row + 0.5]]]]).input_points
        u, v = (float(value) for value in point[0, 0, 0])
        # A mask that is highest where the model sees the click must come back highest on the clicked pixel.
        ys, xs = torch.meshgrid(torch.arange(SIDE) + 0.5, torch.arange(SIDE) + 0.5, indexing="ij")
        seen = -((xs - u) ** 2) * (width / SIDE) ** 2 - (ys - v) ** 2 * (height / SIDE) ** 2
        (mask,) = processor.post_process_masks(seen[None, None, None], [(height, width)], binarize=False)
        found = np.unravel_index(int(mask.argmax()), (height, width))
        assert abs(found[0] - row) <= max(1, height / SIDE)
        assert abs(found[1] - column) <= max(1, width / SIDE)


@pytest.mark.parametrize("aspect", ASPECTS, ids=lambda aspect: "{}:{}".format(*aspect))
def test_the_model_sees_the_clicked_pixel_under_the_click(processor, aspect):
    width, height = aspect[0] * SIDE, aspect[1] * SIDE
    column, row = int(0.7 * width), int(0.2 * height)
    image = np.zeros((height, width, 3), np.uint8)
    reach_x, reach_y = aspect[0], aspect[1]  # one pixel of the model's to each side
    image[max(0, row - reach_y) : row + reach_y + 1, max(0, column - reach_x) : column + reach_x + 1] = 255
    batch = processor(image, input_points=[[[[column + 0.5, row + 0.5]]]])
    u, v = (int(value) for value in batch.input_points[0, 0, 0])
    red = batch.pixel_values[0, 0]
    assert red[v, u] > red.max() - 1e-4
    assert (red > red.max() - 1e-4).sum() < 16


@given(
    st.integers(1, 5000),
    st.integers(1, 5000),
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=6),
)
def test_coordinates_are_the_official_arithmetic(height, width, parts):
    processor = make_processor()
    points = torch.tensor([[x * width, y * height] for x, y in parts], dtype=torch.float32)
    points = points.clamp(max=torch.tensor([width, height]))
    found = processor(original_sizes=[[height, width]], input_points=[[points]]).input_points[0, 0]
    assert torch.equal(found[:, 0], points[:, 0] * SIDE / width)
    assert torch.equal(found[:, 1], points[:, 1] * SIDE / height)


def test_corners_of_the_picture_are_corners_of_the_square(processor):
    batch = processor(original_sizes=SIZES, input_points=[[[[0, 0], [80, 48]]]], input_boxes=[[[0, 0, 80, 48]]])
    assert batch.input_points.tolist() == [[[[0, 0], [SIDE, SIDE]]]]
    assert batch.input_boxes.tolist() == [[[0, 0, SIDE, SIDE]]]


def test_a_rectangular_model_picture_scales_each_axis_by_its_own():
    processor = EfficientSamProcessor(EfficientSamImageProcessor(size={"height": 32, "width": 64}))
    assert processor(original_sizes=[(64, 64)], input_points=[[[[16, 16]]]]).input_points.tolist() == [[[[16, 8]]]]


def test_prompts_follow_the_size_that_this_call_gives_the_picture(processor, image):
    batch = processor(image, input_points=[[[[40, 24]]]], size={"height": 32, "width": 32})
    assert batch.pixel_values.shape[-2:] == (32, 32)
    assert batch.input_points.tolist() == [[[[16, 16]]]]
    batch = processor(image, input_points=[[[[40, 24]]]], do_resize=False)
    assert batch.input_points.tolist() == [[[[40, 24]]]]


# --------------------------------------------------------------------------------------------------------------------
# Shapes, padding, forms of input


def test_what_comes_out(processor, image):
    batch = processor(
        images=[image, image[:20]],
        input_points=[[[[1, 2], [3, 4]]], [[[5, 6], [7, 8]]]],
        input_labels=[[[1, 1]], [[1, -1]]],
        input_boxes=[[[0, 0, 9, 9]], [[1, 1, 8, 8]]],
        return_tensors="pt",
    )
    shapes = {name: tuple(value.shape) for name, value in batch.items()}
    assert shapes == {
        "pixel_values": (2, 3, SIDE, SIDE),
        "original_sizes": (2, 2),
        "input_points": (2, 1, 2, 2),
        "input_labels": (2, 1, 2),
        "input_boxes": (2, 1, 4),
    }
    types = {name: value.dtype for name, value in batch.items()}
    assert types["input_points"] == types["input_boxes"] == types["pixel_values"] == torch.float32
    assert types["input_labels"] == types["original_sizes"] == torch.int64
    assert batch.original_sizes.tolist() == [[48, 80], [20, 80]]


def test_images_alone(processor, image):
    assert set(processor(image)) == {"pixel_values", "original_sizes"}
    assert torch.equal(processor(image).pixel_values, processor.image_processor(image).pixel_values)


def test_only_what_was_given_comes_out(processor):
    points = processor(original_sizes=SIZES, input_points=[[[[1, 2]]]])
    boxes = processor(original_sizes=SIZES, input_boxes=[[[1, 2, 3, 4]]])
    assert set(points) == {"original_sizes", "input_points", "input_labels"}
    assert set(boxes) == {"original_sizes", "input_boxes"}


def test_a_second_click_on_a_stored_embedding(processor, image):
    first = processor(image, input_points=[[[[10, 20]]]])
    second = processor(original_sizes=first["original_sizes"], input_points=[[[[10, 20]]]])
    assert "pixel_values" not in second
    assert torch.equal(first.input_points, second.input_points)


def test_labels_default_to_the_object(processor):
    batch = processor(original_sizes=SIZES, input_points=[[[[1, 2], [3, 4]], [[5, 6]]]])
    assert batch.input_labels.tolist() == [[[1, 1], [1, -1]]]


def test_ragged_points_are_padded_with_minus_one_at_every_level(processor):
    points = [[[[8, 6]], [[16, 12], [24, 18], [32, 24]]], [], [None, [[40, 30], [48, 36]], [[56, 42]]], None]
    boxes = [None, [[1, 1, 2, 2]], [[1, 1, 2, 2]], []]
    batch = processor(original_sizes=[(SIDE, SIDE)] * 4, input_points=points, input_boxes=boxes)
    none, no = [-1, -1], [-1, -1, -1, -1]
    assert batch.input_points.tolist() == [
        [[[8, 6], none, none], [[16, 12], [24, 18], [32, 24]], [none] * 3],
        [[none] * 3] * 3,
        [[none] * 3, [[40, 30], [48, 36], none], [[56, 42], none, none]],
        [[none] * 3] * 3,
    ]
    assert batch.input_labels.tolist() == [
        [[1, -1, -1], [1, 1, 1], [-1] * 3],
        [[-1] * 3] * 3,
        [[-1] * 3, [1, 1, -1], [1, -1, -1]],
        [[-1] * 3] * 3,
    ]
    assert batch.input_boxes.tolist() == [[no] * 3, [[1, 1, 2, 2], no, no], [[1, 1, 2, 2], no, no], [no] * 3]


@pytest.mark.parametrize("lacking", [None, []])
def test_an_object_may_lack_points_or_a_box(processor, lacking):
    batch = processor(
        original_sizes=[(SIDE, SIDE)],
        input_points=[[[[1, 2]], lacking, [[3, 4]]]],
        input_labels=[[[1], lacking, [1]]],
        input_boxes=[[lacking, [1, 2, 3, 4], [5, 6, 7, 8]]],
    )
    assert batch.input_labels.tolist() == [[[1], [-1], [1]]]
    assert batch.input_boxes.tolist() == [[[-1] * 4, [1, 2, 3, 4], [5, 6, 7, 8]]]


def test_more_boxes_than_points_are_objects_of_their_own(processor):
    batch = processor(
        original_sizes=[(SIDE, SIDE)], input_points=[[[[1, 2]]]], input_boxes=[[None, [1, 2, 3, 4], [5, 6, 7, 8]]]
    )
    assert batch.input_points.tolist() == [[[[1, 2]], [[-1, -1]], [[-1, -1]]]]
    assert batch.input_boxes.shape == (1, 3, 4)


def test_what_comes_out_can_go_in_again(processor):
    ragged = {"input_points": [[[[1, 2]], [[3, 4], [5, 6]], None]], "input_boxes": [[None, None, [1, 2, 3, 4]]]}
    once = processor(original_sizes=[(SIDE, SIDE)], **ragged)
    twice = processor(**once)
    assert set(once) == set(twice)
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_an_object_that_is_all_padding_stays_padding(processor):
    batch = processor(original_sizes=SIZES, input_points=[[[[-1, -1]]]], input_labels=[[[-1]]])
    assert batch.input_points.tolist() == [[[[-1, -1]]]]
    assert batch.input_labels.tolist() == [[[-1]]]


def test_a_point_that_is_no_point_may_lie_anywhere(processor):
    batch = processor(original_sizes=SIZES, input_points=[[[[5, 6], [float("nan"), 999]]]], input_labels=[[[1, -1]]])
    assert batch.input_labels.tolist() == [[[1]]]


@pytest.mark.parametrize("make", [torch.tensor, np.array, lambda data: data, lambda data: [np.array(data[0])]])
def test_lists_arrays_and_tensors_say_the_same(processor, make):
    points, labels, boxes = [[[[1, 2], [3, 4]]]], [[[1, 1]]], [[[1, 2, 3, 4]]]
    wanted = processor(original_sizes=SIZES, input_points=points, input_labels=labels, input_boxes=boxes)
    found = processor(
        original_sizes=make(SIZES), input_points=make(points), input_labels=make(labels), input_boxes=make(boxes)
    )
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_numpy_on_request(processor, image):
    batch = processor(image, input_points=[[[[1, 2]]]], return_tensors="np")
    assert {type(value) for value in batch.values()} == {np.ndarray}


@pytest.mark.parametrize("options", [(torch.bfloat16,), ("cpu", torch.bfloat16), ("meta",)], ids=str)
def test_cast_to_another_type_a_click_stays_on_its_pixel(options, image):
    prompts = {"input_points": [[[[77.3, 41.7]]]], "input_boxes": [[[3.3, 4.7, 70.1, 40.9]]]}
    batch, kept = (make_processor()(image, **prompts) for _ in range(2))
    assert batch.to(*options) is batch
    device = torch.device("meta" if options == ("meta",) else "cpu")
    assert {value.device for value in batch.values()} == {device}
    assert batch.pixel_values.dtype == (torch.float32 if device.type == "meta" else torch.bfloat16)
    for name in prompts:
        assert batch[name].dtype == torch.float32
        assert device.type == "meta" or torch.equal(batch[name], kept[name])
    as_arrays = make_processor()(image, **prompts, return_tensors="np").to(torch.bfloat16)
    np.testing.assert_array_equal(as_arrays.input_points, kept.input_points.numpy())


def test_the_users_lists_are_left_alone(processor):
    points, labels, boxes = [[[[1, 2], [3, 4]]]], [[[1, -1]]], [[[-9, 2, 3, 4]]]
    before = json.dumps([points, labels, boxes])
    processor(original_sizes=SIZES, input_points=points, input_labels=labels, input_boxes=boxes)
    assert json.dumps([points, labels, boxes]) == before


def test_a_box_over_the_edge_is_clipped(processor):
    batch = processor(original_sizes=[(SIDE, SIDE)], input_boxes=[[[-10, 5, 30, 99]]])
    assert batch.input_boxes.tolist() == [[[0, 5, 30, SIDE]]]


def test_trained_abilities_are_let_through():
    processor = make_processor(max_prompt_points=8, negative_points=True, mask_prompts=True)
    masks = np.random.default_rng(0).normal(size=(1, 2, 16, 16))
    batch = processor(
        original_sizes=SIZES,
        input_points=[[[[1, 2]] * 8, [[3, 4]]]],
        input_labels=[[[1, 0] * 4, [0]]],
        input_masks=masks,
    )
    assert batch.input_labels[0, 0].tolist() == [1, 0] * 4
    assert batch.input_masks.dtype == torch.float32
    np.testing.assert_allclose(batch.input_masks.numpy(), masks, rtol=1e-6)


def test_a_mask_alone_is_a_prompt_where_it_was_trained():
    processor = make_processor(mask_prompts=True)
    masks = torch.zeros(1, 2, 16, 16)
    assert set(processor(original_sizes=SIZES, input_masks=masks)) == {"original_sizes", "input_masks"}
    batch = processor(original_sizes=SIZES, input_masks=list(masks), input_points=[[[[1, 2]], None]])
    assert batch.input_labels.tolist() == [[[1], [-1]]]


@pytest.mark.parametrize("size", [(48, 80), (32, 32), (10, 6)])
def test_masks_of_any_size_become_logits_by_the_share_of_a_cell(size):
    """The left half, all of the picture, and nothing; where an edge goes through a cell, something between."""
    masks = torch.zeros(1, 3, *size, dtype=torch.bool)
    masks[0, 0, :, : size[1] // 2], masks[0, 1] = True, True
    processor = make_processor(mask_prompts=True)
    found = processor(original_sizes=SIZES, input_masks=masks).input_masks
    assert found.shape == (1, 3, SIDE // 4, SIDE // 4)
    assert found.dtype == torch.float32
    assert (found[0, 0, :, : SIDE // 8 - 1] == 3).all()
    assert (found[0, 0, :, SIDE // 8 + 1 :] == -3).all()
    assert (found[0, 0].diff(dim=1) <= 0).all()
    assert (found[0, 1] == 3).all()
    assert (found[0, 2] == -3).all()


@pytest.mark.parametrize("size", [(48, 80), (16, 16)])
def test_masks_of_every_kind_are_the_same_prompt_and_the_same_label(size):
    left = np.zeros((2, *size), bool)
    left[0, :, : size[1] // 2], left[1, : size[0] // 2] = True, True
    kinds = {
        "0 and 255": left.astype(np.uint8) * 255,
        "0 and 1": left.astype(np.uint8),
        "unsigned": left.astype(np.uint16),
        "flipped": left[:, ::-1].copy()[:, ::-1],
        "lists": left.tolist(),
        "tensors": list(torch.from_numpy(left)),
        "unsigned tensor": torch.from_numpy(left.astype(np.uint32)),
        "pictures": [PIL.Image.fromarray(mask) for mask in left],
        "grey pictures": [PIL.Image.fromarray(mask.astype(np.uint8) * 255) for mask in left],
    }
    processor = make_processor(mask_prompts=True)
    wanted = processor(original_sizes=[size], input_masks=left[None], segmentation_maps=left[None])
    assert set(wanted.input_masks.unique().tolist()) == {-3, 3}
    assert set(wanted.labels.unique().tolist()) == {0, 1}
    for kind, masks in kinds.items():
        found = processor(original_sizes=[size], input_masks=[masks], segmentation_maps=[masks])
        assert torch.equal(found.input_masks, wanted.input_masks), kind
        assert torch.equal(found.labels, wanted.labels), kind
    one = PIL.Image.fromarray(left[0])
    found = processor(original_sizes=[size], input_masks=[one], segmentation_maps=[one])
    assert torch.equal(found.input_masks, wanted.input_masks[:, :1])
    assert torch.equal(found.labels, wanted.labels[:, :1])


@pytest.mark.parametrize("name", ["input_masks", "segmentation_maps"])
@pytest.mark.parametrize(
    "masks", ["words", None, [torch.zeros(48, 80), torch.zeros(80, 48)], [np.zeros((48, 80)), np.zeros((80, 48))]]
)
def test_what_is_no_mask_is_refused_by_its_image(name, masks):
    given = {name: [torch.zeros(2, 48, 80), masks]}
    with pytest.raises(ValueError, match=f"image 1: {name} wants arrays, tensors or pictures of one size"):
        make_processor(mask_prompts=True)(original_sizes=[(48, 80)] * 2, **given)


def test_six_slots_are_the_limit_and_padding_takes_none(processor):
    box, six = [1, 1, 9, 9], [[1, 2]] * 6
    assert processor(original_sizes=SIZES, input_points=[[six]]).input_labels.sum() == 6
    assert processor(original_sizes=SIZES, input_points=[[six[:4]]], input_boxes=[[box]]).input_labels.sum() == 4
    labels = [[[1] * 4 + [-1] * 2]]
    assert processor(original_sizes=SIZES, input_points=[[six]], input_labels=labels, input_boxes=[[box]])


# --------------------------------------------------------------------------------------------------------------------
# True masks for training


def test_maps_become_labels_at_a_quarter_of_the_square(processor, image):
    maps = np.zeros((2, 48, 80), np.uint8)
    maps[0, :24] = 1
    maps[1, :, 40:] = 1
    labels = processor(image, segmentation_maps=[maps]).labels
    assert labels.dtype == torch.int64
    assert labels.shape == (1, 2, SIDE // 4, SIDE // 4)
    assert torch.equal(labels[0, 0], (torch.arange(16) < 8).long()[:, None].expand(16, 16))
    assert torch.equal(labels[0, 1], (torch.arange(16) >= 8).long()[None].expand(16, 16))


def test_ragged_maps_are_padded_as_unknown(processor):
    maps = [torch.ones(2, 16, 16, dtype=torch.bool), torch.ones(16, 16), torch.full((1, 16, 16), -1)]
    labels = processor(original_sizes=[(16, 16)] * 3, segmentation_maps=maps).labels
    assert labels.flatten(2).amin(-1).tolist() == labels.flatten(2).amax(-1).tolist() == [[1, 1], [1, -1], [-1, -1]]


def test_objects_that_fill_half_of_no_cell_are_unknown(processor):
    """Were they 0 everywhere, the model would learn that a wire is nothing; a map that is empty means what it says."""
    maps = np.zeros((3, 160, 160), bool)
    maps[0, 40:120, 30:90] = True
    maps[1, 80, :] = True
    labels = processor(original_sizes=[(160, 160)], segmentation_maps=[maps]).labels[0]
    assert labels[0].unique().tolist() == [0, 1]
    assert labels[1].unique().tolist() == [-1]
    assert labels[2].unique().tolist() == [0]


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (np.zeros((2, 1, 48, 80)), "maps for each of 1 images, found 2"),
        (np.zeros((1, 1, 80, 48)), r"image 0: segmentation_maps wants \(objects, \*\[48, 80\]\), found \(1, 80, 48\)"),
        (np.zeros((1, 2, 48, 80)), "image 0: found 2 segmentation_maps for 1 objects"),
    ],
)
def test_maps_that_do_not_fit(processor, maps, message):
    with pytest.raises(ValueError, match=message):
        processor(original_sizes=SIZES, input_points=[[[[1, 2]]]], segmentation_maps=maps)


# --------------------------------------------------------------------------------------------------------------------
# Every refusal

NAN, INF = float("nan"), float("inf")
ONE_POINT, ONE_BOX = [[[[1, 2]]]], [[[1, 2, 3, 4]]]

REFUSALS = {
    "nothing to see": ({"original_sizes": None}, "wanted images or original_sizes, found neither"),
    "sizes of one level": ({"original_sizes": [48, 80]}, "original_sizes wants a height and a width"),
    "sizes with channels": ({"original_sizes": [(3, 48, 80)]}, "original_sizes wants a height and a width"),
    "a size of nothing": ({"original_sizes": [(0, 80)]}, r"above 0 for each image, found \[\[0, 80\]\]"),
    "nan": ({"input_points": [[[[NAN, 2]]]]}, r"image 0, object 0: a point wants finite numbers, found \[nan, 2\]"),
    "inf": ({"input_points": [[[[1, INF]]]]}, "a point wants finite numbers"),
    "nan in a box": ({"input_boxes": [[[1, NAN, 3, 4]]]}, "a box wants finite numbers"),
    "beside the picture": (
        {"input_points": [[[[1, 2]], [[80.5, 20]]]]},
        r"image 0, object 1: wanted 0 <= x <= 80 and 0 <= y <= 48, found the point \[80.5, 20\]",
    ),
    "below the picture": ({"input_points": [[[[20, 49]]]]}, r"found the point \[20, 49\]"),
    "before the picture": ({"input_points": [[[[-1, 20]]]]}, r"found the point \[-1, 20\]"),
    "a raw minus one": ({"input_points": [[[[-1, -1]]]]}, r"found the point \[-1, -1\]"),
    "swapped corners": ({"input_boxes": [[[30, 2, 10, 40]]]}, r"wants x0 < x1 and y0 < y1, found \[30, 2, 10, 40\]"),
    "swapped heights": ({"input_boxes": [[[10, 40, 30, 2]]]}, "wants x0 < x1 and y0 < y1"),
    "no area": ({"input_boxes": [[[10, 2, 10, 40]]]}, "wants x0 < x1 and y0 < y1"),
    "a box elsewhere": ({"input_boxes": [[[80, 2, 90, 40]]]}, "wanted a box on the picture of width 80 and height 48"),
    "a box before": ({"input_boxes": [[[-9, 2, 0, 40]]]}, "wanted a box on the picture"),
    "a box of three": ({"input_boxes": [[[1, 2, 3]]]}, r"image 0, object 0: a box wants 4 numbers, found \[1, 2, 3\]"),
    "a point of three": ({"input_points": [[[[1, 2, 3]]]]}, r"a point wants 2 numbers, found \[1, 2, 3\]"),
    "a missing point": ({"input_points": [[[None, [1, 2]]]]}, "a point wants 2 numbers, found None"),
    "fewer labels": (
        {"input_points": [[[[1, 2], [3, 4]]]], "input_labels": [[[1]]]},
        "image 0, object 0: every point wants a label, found 2 points, 1 labels",
    ),
    "labels of fewer objects": (
        {"input_points": [[[[1, 2]], [[3, 4]]]], "input_labels": [[[1]]]},
        "image 0, object 1: every point wants a label, found 1 points, 0 labels",
    ),
    "labels alone": ({"input_labels": [[[1]]]}, "found 0 points, 1 labels"),
    "label 2": ({"input_points": ONE_POINT, "input_labels": [[[2]]]}, r"wanted labels 1 .* found 2"),
    "half a label": ({"input_points": ONE_POINT, "input_labels": [[[0.5]]]}, "found 0.5"),
    "a background click": (
        {"input_points": ONE_POINT, "input_labels": [[[0]]]},
        "never learnt background clicks; wanted a checkpoint trained with negative_points=True",
    ),
    "seven points": (
        {"input_points": [[[[1, 2]] * 7]]},
        r"image 0, object 0: wanted at most 6 slots, found 7 \(a box fills two\)",
    ),
    "five points and a box": ({"input_points": [[[[1, 2]] * 5]], "input_boxes": ONE_BOX}, "found 7"),
    "masks never learnt": ({"input_masks": torch.zeros(1, 1, 16, 16)}, "trained with mask_prompts=True"),
    "no objects": ({"input_points": [[]]}, "found no prompt for any image"),
    "no boxes": ({"input_boxes": [None]}, "found no prompt for any image"),
    "an object with nothing": ({"input_points": [[[[1, 2]], []]]}, "image 0, object 1: wanted points or a box"),
    "too shallow": ({"input_points": [[[1, 2]]]}, r"input_points wants 4 levels \(image > .*\), found 3"),
    "a bare click": ({"input_points": [1, 2]}, "input_points wants 4 levels .* found 1"),
    "too deep": ({"input_points": [ONE_POINT]}, "input_points wants 4 levels .* found 5"),
    "shallow labels": ({"input_points": ONE_POINT, "input_labels": [[1]]}, "input_labels wants 3 levels .* found 2"),
    "a bare box": ({"input_boxes": [1, 2, 3, 4]}, "input_boxes wants 3 levels .* found 1"),
    "a deep box": ({"input_boxes": [ONE_BOX]}, "input_boxes wants 3 levels .* found 4"),
    "a number": ({"input_points": 7}, "input_points wants 4 levels .* found 0"),
    "words": ({"input_points": [[[["a", "b"]]]]}, "input_points wants numbers in lists, .* found 'a'"),
    "prompts for two": ({"input_points": ONE_POINT * 2}, "found 2 lists for 1 images"),
    "boxes for two": ({"input_boxes": ONE_BOX * 2}, "found 2 lists for 1 images"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_meant_is_refused(processor, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        processor(**{"original_sizes": SIZES, **arguments})
    assert "\n" not in str(error.value)


def test_the_second_image_is_checked_against_its_own_size(processor):
    with pytest.raises(ValueError, match="image 1, object 0: wanted 0 <= x <= 20 and 0 <= y <= 30"):
        processor(original_sizes=[(48, 80), (30, 20)], input_points=[[[[40, 40]]], [[[40, 20]]]])


def test_sizes_beside_images_must_be_the_images(processor, image):
    assert processor(image, original_sizes=[(48, 80)]).original_sizes.tolist() == [[48, 80]]
    with pytest.raises(ValueError, match=r"found original_sizes \[\[80, 48\]\] beside images of \[\[48, 80\]\]"):
        processor(image, original_sizes=[(80, 48)])


@pytest.mark.parametrize("masks", [torch.zeros(2, 1, 16, 16), torch.zeros(1, 3, 16, 16), torch.zeros(1, 16, 16)])
def test_masks_that_do_not_fit(masks):
    with pytest.raises(ValueError, match=r"input_masks wants \(images, objects, h, w\) = \(1, \d+\)"):
        make_processor(mask_prompts=True)(original_sizes=SIZES, input_points=ONE_POINT, input_masks=masks)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ([], r"\(images, objects, h, w\) = \(2, 0\), found \[\]"),
        ([torch.zeros(()), torch.zeros(1, 16, 16)], r"= \(2, 1\), found \[\(\), \(1, 16, 16\)\]"),
        ([torch.zeros(1, 16, 16), torch.zeros(1, 8, 8)], r"logits of one size, found \[\(1, 16, 16\), \(1, 8, 8\)\]"),
    ],
)
def test_masks_that_do_not_fit_each_other(masks, message):
    with pytest.raises(ValueError, match=message):
        make_processor(mask_prompts=True)(original_sizes=[(48, 80)] * 2, input_masks=masks)


def test_an_unknown_argument_is_refused(processor, image):
    with pytest.raises(TypeError, match="input_dots"):
        processor(image, input_dots=[[[[1, 2]]]])


# --------------------------------------------------------------------------------------------------------------------
# Making, saving, loading


def test_from_a_models_config():
    config = tiny_config(max_prompt_points=8, negative_points=True, mask_prompts=True)
    processor = EfficientSamProcessor.from_model_config(config)
    assert dict(processor.image_processor.size) == {"height": 64, "width": 64}
    assert (processor.max_prompt_points, processor.negative_points, processor.mask_prompts) == (8, True, True)
    released = EfficientSamProcessor.from_model_config(EfficientSamConfig())
    assert released.to_dict() == EfficientSamProcessor(EfficientSamImageProcessor()).to_dict()


@pytest.mark.parametrize("auto", [False, True])
def test_saved_and_loaded_it_is_the_same(auto, tmp_path, image):
    saved = make_processor(max_prompt_points=8, negative_points=True)
    saved.save_pretrained(tmp_path)
    EfficientSamConfig().save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.json")} == {"processor_config.json", "config.json"}
    loaded = (AutoProcessor if auto else EfficientSamProcessor).from_pretrained(tmp_path)
    assert type(loaded) is EfficientSamProcessor
    ours, theirs = saved.to_dict(), loaded.to_dict()
    ours.pop("auto_map", None)  # of the processor itself; transformers writes it at saving and forgets it at loading
    assert theirs == ours
    prompts = {"input_points": [[[[1, 2], [3, 4]]]], "input_labels": [[[1, 0]]]}
    before, after = saved(image, **prompts), loaded(image, **prompts)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_file_says_what_the_weights_learnt(tmp_path):
    make_processor().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    saved.pop("auto_map", None)
    assert saved.pop("image_processor")["size"] == {"height": SIDE, "width": SIDE}
    assert saved == {
        "max_prompt_points": 6,
        "negative_points": False,
        "mask_prompts": False,
        "processor_class": "EfficientSamProcessor",
    }


def test_masks_go_out_through_the_image_processor(processor):
    logits = torch.randn(1, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    wanted = processor.image_processor.post_process_masks(logits, SIZES, mask_threshold=0.2)
    assert torch.equal(processor.post_process_masks(logits, SIZES, mask_threshold=0.2)[0], wanted[0])


def test_pillow_pictures_pass_through(processor, image):
    assert torch.equal(processor(PIL.Image.fromarray(image)).pixel_values, processor(image).pixel_values)


def test_without_images_their_options_are_refused(processor):
    """A misspelt prompt among them, which would be left out of the answer."""
    for name, value in (("input_box", [[[1, 1, 9, 9]]]), ("do_resize", False)):
        with pytest.raises(TypeError, match=f"wanted no {name} without images"):
            processor(original_sizes=[[40, 60]], input_points=[[[[30, 20]]]], **{name: value})


def test_a_second_click_is_at_the_size_of_the_first(processor, photo):
    clicks = {"input_points": [[[[30, 20]]]], "size": {"height": 32, "width": 32}}
    first = processor(photo, **clicks)
    second = processor(original_sizes=first["original_sizes"], **clicks)
    assert torch.equal(second["input_points"], first["input_points"])
    assert not torch.equal(second["input_points"], processor(photo, input_points=[[[[30, 20]]]])["input_points"])
    with pytest.raises(TypeError, match="wanted no do_normalize without images"):
        processor(original_sizes=[[48, 80]], do_normalize=False, **clicks)


def test_transformers_own_name_for_the_image_processor_s_options(processor, photo):
    found = processor(photo, images_kwargs={"size": {"height": 32, "width": 32}})
    assert found["pixel_values"].shape[-2:] == (32, 32)
