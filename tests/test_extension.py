"""New kinds of prompts for trained weights: the old ones are answered as before, the new ones can be learnt."""

import pytest
import torch
from conftest import make_model, tiny_config

from efficientsam_hf import EfficientSamModel, EfficientSamProcessor
from efficientsam_hf.training.extension import extend_prompts
from efficientsam_hf.training.finetuning import InteractiveSegmentation
from efficientsam_hf.training.recipes import PromptRecipe

EVERYTHING = {"negative_points": True, "mask_prompts": True, "max_prompt_points": 12}
NEW = {"prompt_encoder.background", "prompt_encoder.no_mask"} | {
    f"prompt_encoder.mask_embedding.{part}.{kind}"
    for part in ("conv1", "layer_norm1", "conv2", "layer_norm2", "conv3")
    for kind in ("weight", "bias")
}


def prompts(clicks: int, generator: torch.Generator, box: bool = False) -> dict[str, torch.Tensor]:
    asked = {"input_points": 64 * torch.rand(2, 3, clicks, 2, generator=generator)}
    asked["input_labels"] = torch.ones(2, 3, clicks, dtype=torch.long)
    if box:
        asked["input_boxes"] = torch.tensor([4.0, 8, 40, 50]).expand(2, 3, 4)
    return asked


@pytest.mark.parametrize(
    "added", [{"negative_points": True}, {"mask_prompts": True}, {"max_prompt_points": 9}, EVERYTHING]
)
def test_old_prompts_get_old_answers_bit_for_bit(added, model, pixels):
    generator = torch.Generator().manual_seed(0)
    asked = [prompts(clicks, generator, box) for clicks, box in ((1, False), (3, True), (4, True), (6, False))]
    # Padding inside the tensors, and a label 0, which adds nothing before it is trained.
    asked[1]["input_labels"][0, 1, 1:] = -1
    asked[3]["input_labels"][1, 0, 2] = 0
    before = [model(pixels, **prompt) for prompt in asked]
    extend_prompts(model, **added)
    for prompt, old in zip(asked, before, strict=True):
        new = model(pixels, **prompt)
        assert torch.equal(new.pred_masks, old.pred_masks)
        assert torch.equal(new.iou_scores, old.iou_scores)


def test_a_first_mask_prompt_changes_nothing_but_can_be_learnt(model, pixels):
    extend_prompts(model, mask_prompts=True)
    asked = prompts(1, torch.Generator().manual_seed(0))
    logits = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    alone, beside = model(pixels, **asked), model(pixels, **asked, input_masks=logits)
    # With a mask each prompt has an image of its own, whose sums are taken in another order.
    torch.testing.assert_close(beside.pred_masks, alone.pred_masks, rtol=0, atol=1e-5)
    beside.pred_masks.square().mean().backward()
    assert model.prompt_encoder.mask_embedding.conv3.weight.grad.any()


def test_only_parameters_are_added_and_a_saved_model_is_the_same(model, pixels, tmp_path):
    old = {name: value.clone() for name, value in model.state_dict().items()}
    model.prompt_encoder.foreground.requires_grad_(False)
    assert set(extend_prompts(model, **EVERYTHING)) == NEW
    assert set(model.state_dict()) == set(old) | NEW
    assert all(torch.equal(model.state_dict()[name], value) for name, value in old.items())
    assert not model.prompt_encoder.foreground.requires_grad
    assert model.prompt_encoder.background.requires_grad
    model.save_pretrained(tmp_path)
    loaded = EfficientSamModel.from_pretrained(tmp_path)
    asked = prompts(8, torch.Generator().manual_seed(0))
    assert torch.equal(loaded(pixels, **asked).pred_masks, model(pixels, **asked).pred_masks)


def test_what_a_model_has_it_keeps(pixels):
    model = make_model(tiny_config(**EVERYTHING))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert extend_prompts(model, **EVERYTHING) == []
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config.prompt_encoder_config.padded_prompt_points is None


def test_the_start_depends_on_the_seed_alone(model):
    weights = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(weights))
        other = make_model(tiny_config())
        extend_prompts(other, mask_prompts=True, seed=seed)
        weights.append(other.prompt_encoder.mask_embedding.conv1.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("short", [1, 5, 6, 7])
def test_a_short_prompt_beside_a_long_one_is_answered_as_alone(short, model, pixels):
    """Padding is only counted up to the slots that the weights were trained with."""
    extend_prompts(model, max_prompt_points=12)
    generator = torch.Generator().manual_seed(0)
    long, alone = prompts(10, generator), prompts(short, generator)
    both = {name: torch.cat([value, value], dim=1) for name, value in long.items()}
    both["input_points"][:, 3:, :short] = alone["input_points"]
    both["input_points"][:, 3:, short:] = -1
    both["input_labels"][:, 3:, short:] = -1
    together, one, other = (model(pixels, **asked).pred_masks for asked in (both, long, alone))
    torch.testing.assert_close(together[:, :3], one, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together[:, 3:], other, rtol=1e-4, atol=1e-5)


def test_more_slots_without_care_would_change_the_answers(model, pixels):
    """Why `padded_prompt_points` exists: the free slots are tokens that everything else attends to."""
    asked = prompts(1, torch.Generator().manual_seed(0))
    wider = make_model(tiny_config(max_prompt_points=12))
    wider.load_state_dict(model.state_dict())
    assert not torch.allclose(wider(pixels, **asked).pred_masks, model(pixels, **asked).pred_masks, atol=1e-3)


def test_fewer_slots_are_refused(model):
    with pytest.raises(ValueError, match="max_prompt_points must be 6 or more, got 5"):
        extend_prompts(model, max_prompt_points=5)
    with pytest.raises(ValueError, match="padded_prompt_points must be 1 to max_prompt_points = 6, got 7"):
        tiny_config(padded_prompt_points=7)


def test_a_processor_is_told(model, photo):
    processor = EfficientSamProcessor.from_model_config(model.config)
    processor.image_processor.antialias = True
    extend_prompts(model, **EVERYTHING)
    extended = processor.extended(model.config)
    assert extended.image_processor.antialias
    clicks = [[[[10, 10]] * 9]]
    inputs = extended(
        photo, input_points=clicks, input_labels=[[[1] * 8 + [0]]], input_masks=torch.zeros(1, 1, 16, 16)
    )
    del inputs["original_sizes"]
    assert model(**inputs).pred_masks.isfinite().all()


def test_what_was_added_is_trained(model, pixels):
    added = extend_prompts(model, **EVERYTHING)
    task = InteractiveSegmentation(model, PromptRecipe(rounds=8, box_chance=0.0)).train()
    labels = torch.zeros(2, 3, 16, 16)
    labels[:, :, 4:9, 3:12] = 1
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
    before = {name: value.clone() for name, value in model.named_parameters()}
    for step in range(2):
        task(pixels, labels, torch.Generator().manual_seed(step))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(dict(model.named_parameters())[name], before[name]) for name in added)
