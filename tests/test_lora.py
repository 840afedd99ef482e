"""Adapters in the encoder: nothing at first, alone trained there, and gone at the end."""

import pytest
import torch
from conftest import detail_config, make_model, stem_config, tiny_config
from peft import LoraConfig, get_peft_model

from efficientsam_hf import EfficientSamModel
from efficientsam_hf.training.finetuning import InteractiveSegmentation
from efficientsam_hf.training.lora import LAYERS, add_lora, merge_lora
from efficientsam_hf.training.optimization import encoder_shares, freeze, parameter_groups

POINTS = torch.tensor([[[[20.0, 30.0]]]])


def answer(model: EfficientSamModel, pixels: torch.Tensor) -> torch.Tensor:
    return model.eval()(pixels[:1], input_points=POINTS).pred_masks


def trained(model: EfficientSamModel) -> set[str]:
    return {name for name, part in model.named_parameters() if part.requires_grad}


def test_adapters_begin_as_nothing_and_leave_the_decoder_to_be_trained(model, pixels):
    freeze(model, ["mask_decoder.iou_token"])
    decoder, before = trained(model), answer(model, pixels)
    decoder = {name for name in decoder if not name.startswith("vision_encoder.")}
    add_lora(model, rank=2)
    assert torch.equal(answer(model, pixels), before)
    lora = trained(model) - decoder
    assert trained(model) >= decoder
    assert len(lora) == 2 * 2 * model.config.vision_config.num_hidden_layers
    assert all(".q_proj.lora_" in name or ".v_proj.lora_" in name for name in lora)


@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_that_may_be_adapted_is_heard_and_merged(layer, model, pixels, tmp_path):
    before = answer(model, pixels)
    add_lora(model, rank=2, layers=[layer])
    with torch.no_grad():
        for name, part in model.named_parameters():
            if "lora_" in name:
                part.normal_(std=0.3)
    adapted = answer(model, pixels)
    assert not torch.allclose(adapted, before, atol=1e-3)
    merged = merge_lora(model)
    torch.testing.assert_close(answer(merged, pixels), adapted, rtol=1e-3, atol=1e-3)
    assert set(merged.state_dict()) == set(make_model(tiny_config()).state_dict())
    # The model goes on with its adapters.
    assert torch.equal(answer(model, pixels), adapted)
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(answer(EfficientSamModel.from_pretrained(tmp_path), pixels), answer(merged, pixels))


def test_a_step_moves_adapters_and_decoder_and_nothing_else(model, pixels):
    add_lora(model, rank=2)
    task = InteractiveSegmentation(model).train()
    groups = parameter_groups(task, 0.1, encoder_shares(2, encoder=0.5))
    assert sum(len(group["params"]) for group in groups) == len(trained(model))
    before = {name: value.clone() for name, value in model.named_parameters()}
    labels = torch.zeros(2, 3, 16, 16)
    labels[:, :, 4:9, 3:12] = 1
    optimizer = torch.optim.SGD(groups, lr=0.1)
    task(pixels, labels, torch.Generator().manual_seed(0))["loss"].backward()
    optimizer.step()
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert moved <= trained(model)
    assert any("lora_B" in name for name in moved)
    assert any(name.startswith("mask_decoder") for name in moved)


@pytest.mark.parametrize("make_config", [tiny_config, stem_config, detail_config])
def test_adapters_of_peft_learn_the_same_under_gradient_checkpointing(make_config, pixels):
    steps = []
    for checkpointing in (False, True):
        model = make_model(make_config()).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(0)
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=r"vision_encoder.*\.[qv]_proj"))
        adapted(pixel_values=pixels[:1], input_points=POINTS, labels=torch.ones(1, 1, 16, 16)).loss.backward()
        steps.append({name: part.grad for name, part in adapted.named_parameters() if "lora_B" in name})
    assert all(gradient.abs().sum() > 0 for gradient in steps[0].values())
    torch.testing.assert_close(*steps)


def test_the_decoder_takes_no_adapters(model):
    with pytest.raises(
        ValueError, match="layers must be some of q_proj, k_proj, v_proj, out_proj, mlp, got k_projection"
    ):
        add_lora(model, layers=["k_projection"])
    with pytest.raises(ValueError, match="got none"):
        add_lora(model, layers=[])
