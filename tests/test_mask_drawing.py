"""Masks drawn in their boxes alone are those of the whole picture."""

import numpy as np
import pytest
import torch

from efficientsam_hf.edges_efficientsam import SMOOTHNESS, guided_masks
from efficientsam_hf.mask_drawing import (
    LEAST_LOGIT,
    GuidedPainter,
    MaskPainter,
    annotate,
    decode_box,
    edges_of_columns,
    find_edges,
)
from efficientsam_hf.masks_efficientsam import decode_rle, encode_rle, masks_to_boxes, resize_masks

SIZES = [(60, 90), (16, 16), (5, 7), (1, 1), (33, 8), (150, 200)]  # the last is made in several strips


def kinds_of_logits() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    cells = torch.arange(16.0)
    disc = 30 * (4 - ((cells[:, None] - 3) ** 2 + (cells - 11) ** 2).sqrt())
    kinds = {"disc": disc, "noise": 10 * torch.randn(16, 16, generator=generator), "nothing": -disc.abs() - 1}
    # Low cells around high ones: what bicubic interpolation lifts above zero where no cell is.
    kinds |= {"overshoot": torch.where(torch.rand(16, 16, generator=generator) > 0.5, -0.1, -10.0)}
    return kinds | {
        "everything": disc.abs() + 1,
        "corner": torch.full((16, 16), -5.0).index_put_((torch.tensor(15), torch.tensor(15)), torch.tensor(9.0)),
    }


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", kinds_of_logits())
def test_painted_in_its_box_is_resized_as_a_whole(kind, size, mode):
    logits = kinds_of_logits()[kind]
    painter = MaskPainter((16, 16), size, mode, logits.device)
    # Beside another mask, of which nothing must be seen.
    *_, place = painter.boxes(torch.stack([torch.ones_like(logits), logits]))
    box, top, left = painter.paint(logits, place)
    painted = torch.zeros(size, dtype=torch.bool)
    painted[top : top + box.shape[0], left : left + box.shape[1]] = box
    resized = resize_masks(logits, size, mode)
    assert torch.equal(painted | (resized.abs() < 1e-4), (resized >= 0) | (resized.abs() < 1e-4))


def test_a_small_mask_is_painted_in_a_small_box():
    painter, logits = MaskPainter((16, 16), (160, 160), "bicubic", torch.device("cpu")), kinds_of_logits()["corner"]
    box, *_ = painter.paint(logits, *painter.boxes(logits[None]))
    assert max(box.shape) <= 45


@pytest.mark.parametrize("place", [(0, 0), (3, 2), (7, 5)])
@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
def test_what_is_noted_of_a_placed_mask_is_that_of_the_whole(place, share):
    mask = torch.from_numpy(np.random.default_rng(1).random((6, 5)) < share)
    mask[0, 0] = True
    for height in (place[0] + 6, place[0] + 9):
        size = (height, place[1] + 5)
        whole = torch.zeros(size, dtype=torch.bool)
        whole[place[0] : place[0] + 6, place[1] : place[1] + 5] = mask
        x0, y0, x1, y1 = masks_to_boxes(whole).tolist()
        wanted = {"segmentation": encode_rle(whole), "bbox": [x0, y0, x1 - x0, y1 - y0], "area": int(whole.sum())}
        assert annotate(find_edges(mask), len(mask), *place, size) == wanted


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_gpu_finds_the_edges_that_a_cpu_finds(share):
    masks = torch.from_numpy(np.random.default_rng(2).random((4, 7, 5)) < share)
    masks[2] = False
    found = edges_of_columns(masks.transpose(1, 2))
    assert [edges.tolist() for edges in found] == [find_edges(mask).tolist() for mask in masks]


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_gpu_draws_the_masks_that_a_cpu_draws(size, mode):
    logits = torch.stack(list(kinds_of_logits().values()))
    painter, picture = MaskPainter((16, 16), size, mode, logits.device), (size[0] + 4, size[1] + 5)
    wanted = list(painter.annotate(logits, 3, 2, picture))
    found = [annotate(edges, size[0], 3, 2, picture) for edges in edges_of_columns(painter.paint_columns(logits))]
    for one, other in zip(found, wanted, strict=True):
        assert one["area"] == pytest.approx(other["area"], abs=2 + 0.001 * other["area"])
        assert (decode_rle(one["segmentation"]) != decode_rle(other["segmentation"])).sum() <= 2


def test_a_mask_without_pixels_has_no_area():
    wanted = {"segmentation": encode_rle(torch.zeros(7, 6, dtype=torch.bool)), "bbox": [0, 0, 0, 0], "area": 0}
    assert annotate(find_edges(torch.zeros(3, 2, dtype=torch.bool)), 3, 1, 4, (7, 6)) == wanted


def test_a_box_of_run_lengths_is_cut_from_the_whole():
    mask = np.random.default_rng(2).random((9, 11)) < 0.4
    for x, y, width, height in [(0, 0, 11, 9), (3, 2, 5, 4), (10, 8, 1, 1)]:
        np.testing.assert_array_equal(
            decode_box(encode_rle(mask), [x, y, width, height]), mask[y : y + height, x : x + width]
        )


# --------------------------------------------------------------------------------------------------------------------
# With the picture's edges


def guided(size: tuple[int, int], radius: int) -> tuple[GuidedPainter, torch.Tensor]:
    picture = torch.rand(3, *size, generator=torch.Generator().manual_seed(5))
    return GuidedPainter((16, 16), picture, radius), picture


@pytest.mark.parametrize("radius", [1, 2, 9])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", kinds_of_logits())
def test_guided_in_its_box_is_guided_as_a_whole(kind, size, radius):
    logits, (painter, picture) = kinds_of_logits()[kind], guided(size, radius)
    same_in_the_box(painter, logits, guided_masks(logits, picture, radius))


@pytest.mark.parametrize("radius", [1, 2, 4])
def test_pixels_far_from_the_mask_are_in_its_box(radius):
    """Single white pixels, on a ground that is as dark as makes slopes the steepest."""
    logits = torch.full((16, 16), -99.0)
    logits[11:, 11:] = 9
    picture = steep_picture(logits >= 0)
    wanted = guided_masks(logits, picture, radius)
    rows = (wanted >= 0).any(1).nonzero()[:, 0]
    assert rows.min() < 20 * (12 - 2 * radius), "squares that lie next to one another reach twice as far as one"
    same_in_the_box(GuidedPainter((16, 16), picture, radius), logits, wanted)


def same_in_the_box(painter: GuidedPainter, logits: torch.Tensor, wanted: torch.Tensor) -> None:
    *_, place = painter.boxes(torch.stack([torch.ones_like(logits), logits]))
    box, top, left = painter.paint(logits, place)
    painted = torch.zeros(wanted.shape, dtype=torch.bool)
    painted[top : top + box.shape[0], left : left + box.shape[1]] = box
    near = wanted.abs() < 1e-4
    assert torch.equal(painted | near, (wanted >= 0) | near)


def steep_picture(there: torch.Tensor) -> torch.Tensor:
    colours = torch.where(there, 2 * (SMOOTHNESS / 3) ** 0.5, 0.0)
    picture = colours.repeat_interleave(20, 0).repeat_interleave(20, 1).expand(3, -1, -1).clone()
    picture[:, 10::20, 10::20] = 1
    return picture


def test_a_small_guided_mask_is_painted_in_a_small_box():
    painter, _ = guided((160, 160), 1)
    logits = kinds_of_logits()["corner"]
    box, *_ = painter.paint(logits, *painter.boxes(logits[None]))
    assert max(box.shape) <= 65


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_gpu_guides_as_a_cpu_does(size):
    logits, (painter, _) = torch.stack(list(kinds_of_logits().values())), guided(size, 2)
    wanted = list(painter.annotate(logits, 3, 2, (size[0] + 4, size[1] + 5)))
    columns = edges_of_columns(painter.paint_columns(logits))
    found = [annotate(edges, size[0], 3, 2, (size[0] + 4, size[1] + 5)) for edges in columns]
    for one, other in zip(found, wanted, strict=True):
        assert (decode_rle(one["segmentation"]) != decode_rle(other["segmentation"])).sum() <= 2


@pytest.mark.parametrize("radius", [1, 2, 4])
def test_no_colours_lift_shares_to_a_half(radius):
    """The worst case: slopes as steep as they become, and single pixels far away from all colours of their cells."""
    there = torch.rand(16, 16, generator=torch.Generator().manual_seed(1)) > 0.5
    picture = steep_picture(there)
    assert guided_masks(torch.where(there, LEAST_LOGIT, -99.0), picture, radius).max() < 0
    assert guided_masks(torch.where(there, LEAST_LOGIT + 0.5, -99.0), picture, radius).max() > 0
