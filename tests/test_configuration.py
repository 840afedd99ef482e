import json

import pytest
from conftest import tiny_config

from efficientsam_hf import VARIANTS, EfficientSamConfig, EfficientSamModel, EfficientSamVisionConfig
from efficientsam_hf.configuration_efficientsam_sami import EfficientSamSamiDecoderConfig


def test_round_trip(tmp_path, config):
    config.save_pretrained(tmp_path)
    assert EfficientSamConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_derived_values_never_reach_the_json_and_follow_their_source(tmp_path, config):
    config.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert not {"mlp_dim", "position_grid_size"} & fields["vision_config"].keys()
    assert "num_mask_tokens" not in fields["mask_decoder_config"]
    fields["vision_config"]["pretrain_image_size"] = 96
    assert EfficientSamConfig(**fields).vision_config.position_grid_size == 6


def test_parts_may_be_configs_dicts_or_left_out():
    whole = EfficientSamConfig(
        vision_config=EfficientSamVisionConfig(hidden_size=384), mask_decoder_config={"mlp_dim": 64}
    )
    assert whole.vision_config.hidden_size == 384
    assert whole.mask_decoder_config.mlp_dim == 64
    assert whole.prompt_encoder_config.max_prompt_points == 6


@pytest.mark.parametrize(
    ("variant", "parameters"), [("tiny", 10_223_204), ("small", 26_413_028)], ids=["tiny", "small"]
)
def test_variants_have_the_released_models_size(variant, parameters):
    model = EfficientSamModel(EfficientSamConfig(vision_config=VARIANTS[variant]))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_wrong_type_is_refused():
    with pytest.raises(Exception, match="hidden_size"):
        EfficientSamVisionConfig(hidden_size="wide")


def test_widths_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"must be equal, got \(256, 128, 256\)"):
        EfficientSamConfig(prompt_encoder_config={"hidden_size": 128})


@pytest.mark.parametrize("config", [EfficientSamVisionConfig, EfficientSamSamiDecoderConfig])
def test_heads_that_do_not_share_the_channels_are_refused(config):
    with pytest.raises(ValueError, match="num_attention_heads must divide hidden_size 24, got 10"):
        config(hidden_size=24, num_attention_heads=10)


def test_attention_implementation_reaches_every_part():
    config = tiny_config()
    config._attn_implementation = "eager"
    parts = (config.vision_config, config.prompt_encoder_config, config.mask_decoder_config)
    assert {part._attn_implementation for part in parts} == {"eager"}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([[3, 8, 1, 4, 1]], "kernel, stride, expansion, channels, repeats, dilation"),
        ([[3, 4, 1, 4, 1, 1]], "shrink the picture by patch_size 16, got 8"),
    ],
    ids=["short row", "stride"],
)
def test_stem_that_cannot_be_is_refused(rows, words):
    with pytest.raises(ValueError, match=words):
        EfficientSamVisionConfig(stem_stages=rows)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"mask_decoder_config": {"num_attention_heads": 7}},
            "num_attention_heads must divide hidden_size 256, got 7",
        ),
        (
            {"mask_decoder_config": {"num_attention_heads": 64, "attention_downsample_rate": 8}},
            "num_attention_heads must divide hidden_size 32, got 64",
        ),
        ({"mask_decoder_config": {"num_hidden_layers": 0}}, "num_hidden_layers must be at least 1, got 0"),
        ({"vision_config": {"image_size": 1000}}, "image_size must be a multiple of patch_size 16, got 1000"),
        ({"zoom": 0.5}, "zoom must be 0 or a number from 1 on, got 0.5"),
    ],
)
def test_what_no_model_can_be_made_of_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        EfficientSamConfig(**changes)
