"""Clicks and boxes drawn from masks: where they fall, how evenly, and with which label."""

import pytest
import torch
from torch import Tensor

from efficientsam_hf.training.prompts import click_inside, click_on_error, draw_cells, noisy_boxes

SCALE = 4.0


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blobs(count: int = 200, height: int = 12, width: int = 16) -> Tensor:
    """Random masks, some of a single cell, none empty."""
    chances = torch.rand(count, 1, 1, generator=generator(5)) ** 3
    masks = torch.rand(count, height, width, generator=generator(6)) < chances
    masks[torch.arange(count), torch.arange(count) % height, torch.arange(count) % width] = True
    return masks


def cells_under(points: Tensor) -> Tensor:
    """Grid cells (N, 2) as x, y of points: a pixel's centre lies half a pixel behind its number, as in the model."""
    return ((points + 0.5) / SCALE).floor().long()


def values_under(masks: Tensor, points: Tensor) -> Tensor:
    x, y = cells_under(points).unbind(1)
    return masks[torch.arange(len(masks)), y, x]


# --------------------------------------------------------------------------------------------------------------------
# Clicks


def test_clicks_fall_inside_their_masks():
    masks = blobs()
    points, labels = click_inside(masks, SCALE, generator())
    assert points.shape == (200, 2)
    assert labels.tolist() == [1] * 200
    assert values_under(masks, points).all()


def test_the_nearest_whole_pixel_lies_in_the_mask_at_full_size():
    """A user's click is a whole pixel, so a drawn one, rounded, must hit the enlarged mask."""
    masks = blobs()
    points, _ = click_inside(masks, SCALE, generator())
    large = masks.repeat_interleave(4, 1).repeat_interleave(4, 2)
    x, y = points.round().long().unbind(1)
    assert large[torch.arange(len(masks)), y, x].all()


def test_clicks_in_a_cell_average_to_its_centre():
    masks = torch.zeros(4000, 12, 16, dtype=torch.bool)
    masks[:, 7, 3] = True
    points, _ = click_inside(masks, SCALE, generator())
    # Pixels 12 to 15 and 28 to 31, whose middles are 13.5 and 29.5.
    torch.testing.assert_close(points.mean(0), torch.tensor([13.5, 29.5]), atol=0.1, rtol=0)
    assert points[:, 0].min() >= 11.5
    assert points[:, 0].max() <= 15.5
    assert points.std(0).sub(4 / 12**0.5).abs().max() < 0.05


def test_every_cell_of_a_mask_is_equally_likely():
    mask = torch.zeros(12, 16, dtype=torch.bool)
    mask[0, :5] = mask[11, 11:] = mask[3:6, 4:7] = True
    draws = 40 * int(mask.sum()) * 10
    cells = draw_cells(mask.expand(draws, 12, 16), generator())
    counts = cells.bincount(minlength=12 * 16)
    assert counts[~mask.flatten()].sum() == 0
    expected = draws / mask.sum()
    chi_square = ((counts[mask.flatten()] - expected) ** 2 / expected).sum()
    # 19 cells, 18 degrees of freedom: 42.3 is passed once in a thousand times.
    assert chi_square < 42.3


def test_cells_are_drawn_by_weight():
    weights = torch.tensor([[0.0, 1.0, 3.0, 0.0]]).expand(8000, 4)[:, None]
    counts = draw_cells(weights, generator()).bincount(minlength=4)
    assert counts[0] == counts[3] == 0
    assert counts[2] / counts[1] == pytest.approx(3, abs=0.25)


@pytest.mark.parametrize(("chance", "cell"), [(0.0, 2), (0.5, 4), (1 - 2**-53, 4)])
def test_the_edges_of_chance_stay_in_the_mask(chance: float, cell: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, **kwargs: torch.full(shape, chance, dtype=torch.float64))
    assert draw_cells(torch.tensor([[[0, 0, 1, 0, 1, 0]]])).item() == cell


def test_an_empty_mask_is_clicked_anywhere():
    points, labels = click_inside(torch.zeros(500, 12, 16, dtype=torch.bool), SCALE, generator())
    cells = cells_under(points)
    assert cells.min() == 0
    assert cells.amax(0).tolist() == [15, 11]
    assert labels.eq(1).all()


# --------------------------------------------------------------------------------------------------------------------
# Clicks on errors


def test_clicks_fall_on_errors_with_the_right_label():
    masks, answers = blobs(), blobs().flip(0)
    answers[::2] = masks[::2] & answers[::2]
    wrong = (masks ^ answers).flatten(1).any(1)
    points, labels = click_on_error(answers, masks, SCALE, True, generator())
    assert wrong.sum() > 150
    assert values_under(masks ^ answers, points)[wrong].all()
    assert torch.equal(labels, values_under(masks, points).long())
    assert {0, 1} == set(labels.tolist())


def test_missed_and_falsely_covered_cells_are_equally_likely():
    mask, answer = torch.zeros(2, 12, 16, dtype=torch.bool)
    mask[:4], answer[2:8] = True, True
    labels = click_on_error(answer.expand(6000, 12, 16), mask.expand(6000, 12, 16), SCALE, True, generator())[1]
    assert labels.float().mean().item() == pytest.approx(2 / (2 + 4), abs=0.025)


def test_without_background_only_missed_cells_are_clicked():
    masks, answers = blobs(), blobs().flip(0)
    points, labels = click_on_error(answers, masks, SCALE, False, generator())
    missed = (masks & ~answers).flatten(1).any(1)
    assert 50 < missed.sum() < 200
    assert values_under(masks & ~answers, points)[missed].all()
    assert values_under(masks, points).all()
    assert labels.eq(1).all()


@pytest.mark.parametrize("background", [True, False])
def test_faultless_answers_are_clicked_on_the_object(background: bool):
    masks = blobs()
    points, labels = click_on_error(masks, masks, SCALE, background, generator())
    assert values_under(masks, points).all()
    assert labels.eq(1).all()


@pytest.mark.parametrize("background", [True, False])
def test_padding_gets_no_background_click(background: bool):
    nothing = torch.zeros(50, 12, 16, dtype=torch.bool)
    assert click_on_error(nothing, nothing, SCALE, background, generator())[1].eq(1).all()


# --------------------------------------------------------------------------------------------------------------------
# Boxes


def test_boxes_without_noise_are_tight():
    masks = blobs()
    boxes = noisy_boxes(masks, SCALE, noise=0.0, generator=generator())
    for mask, box in zip(masks, boxes, strict=True):
        y, x = mask.nonzero().unbind(1)
        assert box.tolist() == [4 * x.min(), 4 * y.min(), 4 * (x.max() + 1), 4 * (y.max() + 1)]


TIGHT = torch.tensor([160, 120, 320, 200])


def box_mask(count: int) -> Tensor:
    """A box of 40 x 20 cells, far from the edges: 160 x 80 pixels."""
    mask = torch.zeros(100, 120, dtype=torch.bool)
    mask[30:50, 40:80] = True
    return mask.expand(count, 100, 120)


def test_boxes_move_by_a_share_of_their_sides():
    moves = noisy_boxes(box_mask(4000), SCALE, 0.1, most=1e9, generator=generator()) - TIGHT
    torch.testing.assert_close(moves.std(0), torch.tensor([16.0, 8.0, 16.0, 8.0]), rtol=0.05, atol=0)
    assert moves.mean(0).abs().max() < 1
    # Each coordinate goes its own way.
    assert (torch.corrcoef(moves.T) - torch.eye(4)).abs().max() < 0.06


def test_boxes_move_no_further_than_the_cap():
    moves = noisy_boxes(box_mask(1000), SCALE, 0.1, most=5.0, generator=generator()) - TIGHT
    assert moves.abs().max() == 5
    assert (moves.abs() < 5).any()


def test_boxes_stay_proper_and_inside_the_square():
    masks = torch.cat([blobs(), torch.ones(100, 12, 16, dtype=torch.bool), torch.zeros(10, 12, 16, dtype=torch.bool)])
    boxes = noisy_boxes(masks, SCALE, noise=3.0, most=1e9, generator=generator())
    assert boxes.min() >= 0
    assert boxes[:, 0::2].max() <= 64
    assert boxes[:, 1::2].max() <= 48
    assert (boxes[:, 2:] - boxes[:, :2]).min() >= 1


# --------------------------------------------------------------------------------------------------------------------
# Randomness is an argument

DRAWS = [
    lambda source: click_inside(blobs(), SCALE, source)[0],
    lambda source: click_on_error(blobs().flip(0), blobs(), SCALE, True, source)[0],
    lambda source: noisy_boxes(blobs(), SCALE, generator=source),
]


@pytest.mark.parametrize("draw", DRAWS, ids=["click_inside", "click_on_error", "noisy_boxes"])
def test_the_same_generator_draws_the_same(draw):
    torch.manual_seed(1)
    first = draw(generator(3))
    torch.manual_seed(2)
    assert torch.equal(draw(generator(3)), first)
    assert not torch.equal(draw(generator(4)), first)
