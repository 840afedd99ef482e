"""The loss, against slow and obvious formulas, and the laws of who is blamed and what counts."""

import math

import pytest
import torch
from torch import Tensor

from efficientsam_hf.loss_efficientsam import dice_loss, focal_loss, resize_labels, segmentation_loss, true_iou


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def labels(generator: torch.Generator) -> Tensor:
    return (torch.rand(2, 3, 8, 8, generator=generator) < 0.4).float()


@pytest.fixture
def logits(generator: torch.Generator) -> Tensor:
    return 3 * torch.randn(2, 3, 4, 8, 8, generator=generator)


@pytest.fixture
def scores(generator: torch.Generator) -> Tensor:
    return torch.rand(2, 3, 4, generator=generator)


def perfect_logits(labels: Tensor, guesses: int = 4) -> Tensor:
    return (30 * (2 * labels - 1))[:, :, None].repeat(1, 1, guesses, 1, 1)


def slow_focal(logits: Tensor, targets: Tensor, known: Tensor) -> float:
    costs = []
    for logit, target, is_known in zip(logits.flatten(), targets.flatten(), known.flatten(), strict=True):
        chance = 1 / (1 + math.exp(-logit))
        right, weight = (chance, 0.25) if target else (1 - chance, 0.75)
        if is_known:
            costs.append(-weight * (1 - right) ** 2 * math.log(right))
    return sum(costs) / len(costs)


def slow_dice(logits: Tensor, targets: Tensor, known: Tensor) -> float:
    both = chances = truth = 0.0
    for logit, target, is_known in zip(logits.flatten(), targets.flatten(), known.flatten(), strict=True):
        if is_known:
            chance = 1 / (1 + math.exp(-logit))
            both, chances, truth = both + chance * target, chances + chance, truth + target
    return float(1 - (2 * both + 1) / (chances + truth + 1))


# --------------------------------------------------------------------------------------------------------------------
# The parts


@pytest.mark.parametrize(("fast", "slow"), [(focal_loss, slow_focal), (dice_loss, slow_dice)])
def test_part_equals_the_slow_formula(fast, slow, logits: Tensor, labels: Tensor, generator: torch.Generator):
    known = (torch.rand(labels.shape, generator=generator) < 0.7).float()
    found = fast(logits[:, :, 0], labels, known)
    assert found.shape == (2, 3)
    for index in [(0, 0), (1, 2)]:
        guess = logits[index][0]
        assert found[index].item() == pytest.approx(slow(guess, labels[index], known[index]), rel=1e-4)


def test_focal_loss_stays_finite_for_sure_and_wrong_answers():
    logits = torch.tensor([[[200.0, -200.0]]], requires_grad=True)
    loss = focal_loss(logits, torch.tensor([[[0.0, 1.0]]]), torch.ones(1, 1, 2)).sum()
    loss.backward()
    assert loss.item() == pytest.approx((0.75 + 0.25) * 200 / 2)
    assert logits.grad.isfinite().all()


def test_true_iou_counts_pixels():
    targets = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    known = torch.ones(1, 4)
    assert true_iou(torch.tensor([[5.0, -1.0, 0.0, -2.0]]), targets, known).item() == pytest.approx(1 / 3)
    assert true_iou(torch.tensor([[-5.0, -1.0, -2.0, -2.0]]), targets, known).item() == 0
    assert true_iou(torch.tensor([[-5.0, -1.0, -2.0, -2.0]]), 0 * targets, known).item() == 1
    # A falsely covered pixel and a missed one, both unknown, are no fault.
    assert true_iou(torch.tensor([[5.0, -1.0, 3.0, -2.0]]), targets, torch.tensor([[1.0, 0.0, 0.0, 1.0]])).item() == 1


def test_labels_shrink_by_majority_of_known_pixels():
    labels = torch.tensor([[1, 1, 1, 1, 1, 1, 1, -1, 1, -1], [1, 0, 0, 0, 0, -1, 0, 0, -1, 1]])[None, None]
    targets, known = resize_labels(labels, (1, 5))
    # Three of four; two of four; two of three known; one of three known; two known of four are too few.
    assert targets[0, 0, 0, :4].tolist() == [1, 0, 1, 0]
    assert known[0, 0, 0].tolist() == [1, 1, 1, 1, 0]


def test_an_object_that_fills_half_of_no_cell_is_not_learnt_to_be_nothing(logits, scores):
    labels = torch.zeros(2, 3, 64, 64)
    labels[0, 0, 8:40, 16:48] = labels[1, 1, 0:30, 0:30] = 1
    labels[0, 1, 21] = 1  # a wire
    _, known = resize_labels(labels, (8, 8))
    assert not known[0, 1].any()
    assert known.flatten(2).all(2).sum() == 5, "and what is empty means what it says"
    blank = labels.clone()
    blank[0, 1] = -1
    assert segmentation_loss(logits, scores, labels) == segmentation_loss(logits, scores, blank)
    logits.requires_grad_()
    segmentation_loss(logits, scores, labels)["loss"].backward()
    assert not logits.grad[0, 1].any()
    assert logits.grad[0, 0].any()


def test_labels_of_the_masks_size_stay_as_they_are(labels: Tensor):
    labels[0, 0, :4] = -1
    targets, known = resize_labels(labels, (8, 8))
    assert torch.equal(targets, (labels == 1).float())
    assert torch.equal(known, (labels >= 0).float())


# --------------------------------------------------------------------------------------------------------------------
# The whole


def test_a_perfect_mask_costs_nothing(labels: Tensor):
    losses = segmentation_loss(perfect_logits(labels), torch.ones(2, 3, 4), labels)
    assert all(value.item() < 1e-6 for value in losses.values())


def test_a_wrong_mask_costs(labels: Tensor):
    losses = segmentation_loss(-perfect_logits(labels), torch.ones(2, 3, 4), labels)
    assert losses["focal"] > 1
    assert losses["dice"] > 0.9
    assert losses["iou"] == 1


def test_the_whole_equals_the_slow_formula(logits: Tensor, scores: Tensor, labels: Tensor):
    labels[0, 1, :, :3] = -1
    found, wanted = segmentation_loss(logits, scores, labels), []
    for b in range(2):
        for q in range(3):
            known, costs = labels[b, q] >= 0, []
            for m in range(4):
                focal, dice = (part(logits[b, q, m], labels[b, q], known) for part in (slow_focal, slow_dice))
                covered, truth = (logits[b, q, m] >= 0) & known, (labels[b, q] > 0) & known
                iou = (covered & truth).sum() / (covered | truth).sum()
                costs.append((20 * focal + dice, focal, dice, (scores[b, q, m] - iou).item() ** 2))
            wanted.append(min(costs)[1:])
    focal, dice, iou = torch.tensor(wanted).mean(0).tolist()
    assert found["focal"].item() == pytest.approx(focal, rel=1e-4)
    assert found["dice"].item() == pytest.approx(dice, rel=1e-4)
    assert found["iou"].item() == pytest.approx(iou, rel=1e-4)
    assert found["loss"].item() == pytest.approx(20 * focal + dice + iou, rel=1e-4)


def test_weights_are_those_given(logits: Tensor, scores: Tensor, labels: Tensor):
    losses = segmentation_loss(logits[:, :, :1], scores[:, :, :1], labels, focal_weight=2, dice_weight=3, iou_weight=5)
    assert losses["loss"].item() == pytest.approx(2 * losses["focal"] + 3 * losses["dice"] + 5 * losses["iou"])


def test_only_the_nearest_guess_is_blamed(logits: Tensor, scores: Tensor, labels: Tensor):
    logits[:, :, 2] = 0.1 * perfect_logits(labels)[:, :, 0]
    # The best predicted IoU must not matter: guess 1 boasts.
    scores[:, :, 1] = 2.0
    logits, scores = logits.requires_grad_(), scores.requires_grad_()
    segmentation_loss(logits, scores, labels)["loss"].backward()
    assert (logits.grad[:, :, 2] != 0).any((-2, -1)).all()
    assert (scores.grad[:, :, 2] != 0).all()
    others = [0, 1, 3]
    assert not logits.grad[:, :, others].any()
    assert not scores.grad[:, :, others].any()


def test_every_guess_may_learn_how_good_it_is(logits: Tensor, scores: Tensor, labels: Tensor):
    plain = segmentation_loss(logits, scores, labels)
    every = segmentation_loss(logits, scores.requires_grad_(), labels, every_iou=True)
    single = [
        segmentation_loss(logits[:, :, m : m + 1], scores[:, :, m : m + 1], labels)["iou"]
        for m in range(scores.shape[2])
    ]
    assert every["iou"].item() == pytest.approx(torch.stack(single).mean().item(), rel=1e-5)
    assert every["focal"] == plain["focal"]
    assert every["dice"] == plain["dice"]
    every["loss"].backward()
    assert (scores.grad != 0).all()


def test_the_answered_guess_takes_its_share_of_the_blame(logits: Tensor, scores: Tensor, labels: Tensor):
    scores[:, :, 1] = 2.0
    answered = segmentation_loss(logits[:, :, 1:2], scores[:, :, 1:2], labels)
    nearest, half, whole = (segmentation_loss(logits, scores, labels, answered_share=share) for share in (0, 0.5, 1))
    for name, value in half.items():
        torch.testing.assert_close(whole[name], answered[name])
        torch.testing.assert_close(value, (nearest[name] + answered[name]) / 2)
    assert not torch.equal(nearest["dice"], answered["dice"])


def test_the_iou_prediction_does_not_pull_at_the_mask(logits: Tensor, scores: Tensor, labels: Tensor):
    logits = logits.requires_grad_()
    loss = segmentation_loss(logits, scores.requires_grad_(), labels, focal_weight=0, dice_weight=0)["loss"]
    loss.backward()
    assert not logits.grad.any()
    assert scores.grad.any()


def test_unknown_pixels_change_nothing(logits: Tensor, scores: Tensor, labels: Tensor):
    labels[:, :, 2:5, 1:6] = -1
    changed = torch.where((labels < 0)[:, :, None], 7 - 2 * logits, logits)
    assert not torch.equal(changed, logits)
    before, after = (segmentation_loss(masks, scores, labels) for masks in (logits, changed))
    assert {name: value.item() for name, value in before.items()} == {k: v.item() for k, v in after.items()}


def test_unknown_pixels_get_no_gradient(logits: Tensor, scores: Tensor, labels: Tensor):
    labels[:, :, 2:5, 1:6] = -1
    logits = logits.requires_grad_()
    segmentation_loss(logits, scores, labels)["loss"].backward()
    assert not logits.grad[:, :, :, 2:5, 1:6].any()


def test_padded_prompts_change_nothing(logits: Tensor, scores: Tensor, labels: Tensor):
    alone = segmentation_loss(logits, scores, labels)
    padding = torch.full((2, 2, 8, 8), -1.0)
    padded = segmentation_loss(
        torch.cat([logits, logits[:, :2] + 5], dim=1),
        torch.cat([scores, scores[:, :2] - 3], dim=1),
        torch.cat([labels, padding], dim=1),
    )
    for name, value in alone.items():
        torch.testing.assert_close(padded[name], value, rtol=1e-6, atol=0)


def test_the_mean_runs_over_real_prompts_not_over_pictures(logits: Tensor, scores: Tensor, labels: Tensor):
    labels[1, 1:] = -1
    real = [(0, 0), (0, 1), (0, 2), (1, 0)]
    wanted = [segmentation_loss(*(t[b : b + 1, q : q + 1] for t in (logits, scores, labels)))["loss"] for b, q in real]
    found = segmentation_loss(logits, scores, labels)["loss"]
    torch.testing.assert_close(found, torch.stack(wanted).mean())


def test_without_a_real_prompt_the_loss_is_zero(logits: Tensor, scores: Tensor, labels: Tensor):
    logits, scores = logits.requires_grad_(), scores.requires_grad_()
    losses = segmentation_loss(logits, scores, torch.full_like(labels, -1))
    losses["loss"].backward()
    assert all(value.item() == 0 for value in losses.values())
    assert not logits.grad.any()
    assert not scores.grad.any()


@pytest.mark.parametrize("factor", [2, 4])
def test_labels_may_have_another_resolution(factor: int, logits: Tensor, scores: Tensor, labels: Tensor):
    labels[0, 2, 3:] = -1
    wanted = segmentation_loss(logits, scores, labels)
    large = labels.repeat_interleave(factor, -2).repeat_interleave(factor, -1)
    found = segmentation_loss(logits, scores, large)
    assert {name: value.item() for name, value in found.items()} == {k: v.item() for k, v in wanted.items()}


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.float16])
def test_labels_may_have_another_type(dtype: torch.dtype, logits: Tensor, scores: Tensor, labels: Tensor):
    labels[0, 2, 3:] = -1
    wanted = segmentation_loss(logits, scores, labels)["loss"]
    assert segmentation_loss(logits, scores, labels.to(dtype))["loss"] == wanted


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_single(dtype: torch.dtype, logits: Tensor, scores: Tensor, labels: Tensor):
    logits, scores = logits.to(dtype), scores.to(dtype)
    found = segmentation_loss(logits, scores, labels)
    assert all(value.dtype == torch.float32 for value in found.values())
    assert found["loss"] == segmentation_loss(logits.float(), scores.float(), labels)["loss"]


def test_large_masks_do_not_overflow_half_precision():
    labels = torch.zeros(1, 1, 512, 512)
    labels[..., :400] = 1
    losses = segmentation_loss((20 * (2 * labels - 1))[:, :, None].half(), torch.ones(1, 1, 1).half(), labels)
    assert losses["loss"].item() < 1e-4
