"""Masks drawn in their boxes alone are those of the whole picture."""

import numpy as np
import pytest
import torch

from efficientsam_hf.mask_drawing import MaskPainter, annotate, decode_box, edges_of_columns, find_edges
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
