"""What an object is asked, by the name of a recipe, and what the answers are blamed for."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from conftest import make_model, tiny_config
from test_finetuning import Listener, generator, labels  # noqa: F401 - a fixture

from efficientsam_hf.loss_efficientsam import segmentation_loss
from efficientsam_hf.modeling_efficientsam import EfficientSamModel, best_mask
from efficientsam_hf.training.finetuning import InteractiveSegmentation
from efficientsam_hf.training.recipes import RECIPES, PromptRecipe


def able_model(single_mask_token: bool = False, **prompts) -> EfficientSamModel:
    """A model with background clicks, mask prompts and slots for every recipe."""
    config = tiny_config(**{"negative_points": True, "mask_prompts": True, "max_prompt_points": 10, **prompts})
    config.mask_decoder_config.single_mask_token = single_mask_token
    return make_model(config)


def test_the_recipes_are_those_of_their_papers():
    paper, sam, sam2 = (RECIPES[name] for name in ("paper", "sam", "sam2"))
    assert len(paper.order()) == 5
    assert (len(sam.order(generator())), sum(sam.order(generator()))) == (11, 9)
    assert (len(sam2.order()), sum(sam2.order())) == (8, 8)
    assert {recipe.box_chance for recipe in RECIPES.values()} == {0.5}
    assert (sam.every_iou, sam2.every_iou, sam2.iou_error) == (False, True, "absolute")


def test_one_round_without_news_comes_last_and_one_anywhere():
    orders = {tuple(RECIPES["sam"].order(generator(seed))) for seed in range(60)}
    assert all(order[0] and not order[-1] for order in orders)
    assert {order.index(False) for order in orders} == set(range(1, 10))


def test_the_papers_recipe_fits_the_released_weights(model, pixels, labels):  # noqa: F811
    task = InteractiveSegmentation(model, RECIPES["paper"])
    heard = Listener(task)
    task(pixels, labels, generator())
    assert len(heard.asked) == 5
    assert not any("input_masks" in asked for asked in heard.asked)
    assert not (torch.cat([asked["input_labels"].flatten() for asked in heard.asked]) == 0).any()


@pytest.mark.parametrize("name", ["sam", "sam2"])
def test_a_recipe_that_the_weights_cannot_follow_is_refused(name, model):
    with pytest.raises(ValueError, match=r"a box takes two of 6 slots; got .*extend_prompts gives a model more"):
        InteractiveSegmentation(model, RECIPES[name])
    with pytest.raises(ValueError, match="2 rounds show the last mask alone: wanted a model with mask_prompts"):
        InteractiveSegmentation(able_model(mask_prompts=False), RECIPES["sam"])


def test_the_last_answer_is_shown_and_rounds_without_news_repeat_the_clicks(pixels, labels):  # noqa: F811
    task = InteractiveSegmentation(able_model(), RECIPES["sam"])
    heard = Listener(task)
    task(pixels, labels, generator(3))
    assert len(heard.asked) == 11
    assert "input_masks" not in heard.asked[0]
    clicks = [asked["input_points"].shape[2] for asked in heard.asked]
    assert [later - earlier for earlier, later in pairwise(clicks)].count(0) == 2
    assert clicks[-1] == clicks[-2]
    for before, asked in zip(heard.answered, heard.asked[1:], strict=False):
        wanted = best_mask(before.pred_masks, before.iou_scores)[0][:, :, 0]
        assert torch.equal(asked["input_masks"], wanted)
        assert not asked["input_masks"].requires_grad


def test_weights_of_mask_prompts_have_a_gradient_in_steps_without_them(pixels, labels):  # noqa: F811
    """Each process draws whether it shows answers, and FSDP wants gradients of the same weights from all."""
    task, norms = InteractiveSegmentation(able_model(), PromptRecipe(rounds=2, answer_chance=0.5)), []
    for seed in range(8):
        task.zero_grad()
        task(pixels, labels, generator(seed))["loss"].backward()
        gradients = [weight.grad for weight in task.model.prompt_encoder.mask_embedding.parameters()]
        assert all(gradient is not None for gradient in gradients)
        norms.append(sum(float(gradient.abs().sum()) for gradient in gradients))
    assert min(norms) == 0 < max(norms)


@pytest.mark.parametrize("mask_rounds", [0, 1])
def test_the_last_answer_is_shown_in_some_steps_and_where_nothing_else_is(mask_rounds, pixels, labels):  # noqa: F811
    recipe = PromptRecipe(rounds=2, mask_rounds=mask_rounds, answer_chance=0.5)
    task, with_answer = InteractiveSegmentation(able_model(), recipe), 0
    for seed in range(40):
        heard = Listener(task)
        task(pixels, labels, generator(seed))
        shown = ["input_masks" in asked for asked in heard.asked]
        assert not shown[0]
        assert all(shown[2:])
        with_answer += shown[1]
    assert 10 < with_answer < 30


def test_what_never_shows_an_answer_leaves_the_mask_prompts_alone(pixels, labels):  # noqa: F811
    task = InteractiveSegmentation(able_model(), PromptRecipe(rounds=2, answer_chance=0.0))
    task(pixels, labels, generator())["loss"].backward()
    frozen = [name for name, parameter in task.named_parameters() if not parameter.requires_grad]
    assert any("mask_embedding" in name for name in frozen)
    assert all(parameter.grad is not None for parameter in task.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("chance", [-0.1, 1.5])
@pytest.mark.parametrize("name", ["box_chance", "answer_chance", "answered_share"])
def test_a_chance_is_a_share(name, chance):
    with pytest.raises(ValueError, match=f"{name} must be 0 to 1, got {chance}"):
        InteractiveSegmentation(able_model(), PromptRecipe(**{name: chance}))


def test_the_mask_prompt_of_the_released_weights_is_none(pixels, labels):  # noqa: F811
    task = InteractiveSegmentation(able_model(mask_prompts=False), RECIPES["sam2"])
    heard = Listener(task)
    task(pixels, labels, generator())
    assert len(heard.asked) == 8
    assert not any("input_masks" in asked for asked in heard.asked)


@pytest.mark.parametrize(("alone", "masks"), [(True, [3, 1, 1]), (False, [4, 4, 4])])
def test_token_0_answers_alone_or_beside_the_three(alone, masks, pixels, labels):  # noqa: F811
    task = InteractiveSegmentation(able_model(single_mask_token=True), PromptRecipe(rounds=3, single_mask_alone=alone))
    heard = Listener(task)
    losses = task(pixels, labels, generator())
    assert [answer.pred_masks.shape[2] for answer in heard.answered] == masks
    losses["loss"].backward()
    # Its network, and its own output of the IoU head.
    assert task.model.mask_decoder.hypernetworks[0].layers[0].weight.grad.any()
    assert task.model.mask_decoder.iou_head.layers[-1].bias.grad[0] != 0
    if not alone:
        parts = [
            segmentation_loss(answer.pred_masks[:, :, part], answer.iou_scores[:, :, part], labels)["loss"]
            for answer in heard.answered
            for part in (slice(0, 1), slice(1, None))
        ]
        torch.testing.assert_close(losses["loss"], torch.stack(parts).mean())


def test_token_0_is_left_alone_unless_the_config_trains_it(pixels, labels):  # noqa: F811
    task = InteractiveSegmentation(able_model(), RECIPES["sam2"])
    task(pixels, labels, generator())["loss"].backward()
    assert task.model.mask_decoder.hypernetworks[0].layers[0].weight.grad is None


def test_all_predicted_ious_are_blamed_where_wanted(pixels, labels):  # noqa: F811
    bias = {}
    for every in (True, False):
        task = InteractiveSegmentation(make_model(tiny_config()), PromptRecipe(every_iou=every))
        task(pixels[:1], labels[:1, :1], generator())["iou"].backward()
        bias[every] = (task.model.mask_decoder.iou_head.layers[-1].bias.grad[1:] != 0).tolist()
    assert bias[True] == [True] * 3
    assert sum(bias[False]) == 1


def test_the_mask_that_a_user_is_given_is_blamed_where_wanted(pixels, labels):  # noqa: F811
    model, blamed = make_model(tiny_config()), []
    for rounds, share in ((1, 0.0), (1, 1.0), (2, 0.0), (2, 1.0)):
        task = InteractiveSegmentation(model, PromptRecipe(rounds, answered_share=share))
        model.zero_grad()
        task(pixels[:1], labels[:1, :1], generator())["dice"].backward()
        blamed.append(
            [network.layers[-1].bias.grad.abs().sum() > 0 for network in model.mask_decoder.hypernetworks[1:]]
        )
    assert blamed[0] == blamed[1], "a first prompt may mean several things"
    assert blamed[2] != blamed[3]


def test_the_error_of_the_iou_is_squared_or_not(pixels, labels):  # noqa: F811
    squared, absolute = (
        InteractiveSegmentation(make_model(tiny_config()), PromptRecipe(iou_error=error))(
            pixels[:1], labels[:1, :1], generator()
        )["iou"]
        for error in ("squared", "absolute")
    )
    torch.testing.assert_close(squared, absolute**2)
    with pytest.raises(ValueError, match="iou_error must be squared or absolute, got 'l1'"):
        InteractiveSegmentation(make_model(tiny_config()), replace(PromptRecipe(), iou_error="l1"))(pixels, labels)


@pytest.mark.parametrize("token_0", [False, True])
@pytest.mark.parametrize(
    "recipe", [*RECIPES.values(), PromptRecipe(), PromptRecipe(single_mask_alone=True)], ids=[*RECIPES, "one", "alone"]
)
def test_every_batch_reaches_what_is_trained(recipe, token_0, pixels, labels):  # noqa: F811
    """Otherwise an optimizer lacks states, which FSDP does not resume, and ranks wait for each other's gradients."""
    model = able_model(single_mask_token=token_0)
    task = InteractiveSegmentation(model, recipe).train()
    padding, empty = torch.full_like(labels, -1), torch.zeros_like(labels)
    for seed, masks in enumerate((labels, labels[:, :1], padding, empty)):
        task(pixels, masks, generator(seed))["loss"].backward()
        assert [name for name, part in model.named_parameters() if (part.grad is None) == part.requires_grad] == []
        model.zero_grad()
