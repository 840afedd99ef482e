"""The encoder as a backbone: its maps are the vision model's own, at any size, inside the heads of transformers."""

import pytest
import torch
from conftest import make_model, stem_config, tiny_config
from test_sami_model import make_sami
from transformers import (
    AutoBackbone,
    DetrConfig,
    DetrForObjectDetection,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    MaskFormerConfig,
    MaskFormerForInstanceSegmentation,
    RTDetrConfig,
    RTDetrForObjectDetection,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from efficientsam_hf import EfficientSamBackbone, EfficientSamVisionConfig, EfficientSamVisionModel

PYRAMID = ["stride4", "stride8", "stride16", "stride32"]


def vision_config(**fields) -> EfficientSamVisionConfig:
    return EfficientSamVisionConfig(**{**tiny_config().vision_config.to_dict(), "pyramid_channels": 16, **fields})


def make_backbone(**fields) -> EfficientSamBackbone:
    torch.manual_seed(0)
    return EfficientSamBackbone(vision_config(**fields)).eval()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A whole model's checkpoint, convolutions and windows included."""
    folder, config = tmp_path_factory.mktemp("whole"), stem_config()
    config.vision_config.window_size = 3
    make_model(config).save_pretrained(folder)
    return folder


# --------------------------------------------------------------------------------------------------------------------
# The maps


@torch.no_grad()
def test_maps_are_the_vision_model_s_own(checkpoint, pixels):
    names = ["stem", "stage1", "stage2", "neck"]
    backbone, report = EfficientSamBackbone.from_pretrained(checkpoint, out_features=names, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    vision = EfficientSamVisionModel.from_pretrained(checkpoint)(pixels, output_hidden_states=True)
    maps = backbone(pixels).feature_maps
    wanted = [*(state.permute(0, 3, 1, 2) for state in vision.hidden_states), vision.last_hidden_state]
    assert len(maps) == len(wanted) == 4
    assert all(torch.equal(found, want) for found, want in zip(maps, wanted, strict=True))
    assert backbone.channels == [found.shape[1] for found in maps]


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (32, 96), (50, 70), (1, 33), (16, 48)])
def test_maps_at_any_size_are_those_of_the_padded_picture(size):
    backbone = make_backbone(out_features=["stage1", *PYRAMID])
    height, width = size
    pixels = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    rows, columns = -(-height // 32) * 32, -(-width // 32) * 32
    padded = torch.zeros(1, 3, rows, columns)
    padded[..., :height, :width] = pixels
    maps, wanted = backbone(pixels).feature_maps, backbone(padded).feature_maps
    assert all(torch.equal(found, want) for found, want in zip(maps, wanted, strict=True))
    assert [found.shape[2:] for found in maps] == [(rows // side, columns // side) for side in (16, 4, 8, 16, 32)]


@torch.no_grad()
def test_without_stride_32_a_patch_is_all_that_is_filled_up():
    maps = make_backbone(out_features=["stride4", "stride8"])(torch.randn(1, 3, 50, 33)).feature_maps
    assert [tuple(found.shape) for found in maps] == [(1, 16, 16, 12), (1, 16, 8, 6)]


@torch.no_grad()
def test_a_cell_of_the_map_is_a_square_of_the_picture():
    """With windows of one patch and a pyramid of 1 x 1 convolutions, a pixel reaches the cell above it alone."""
    names = ["stem", *PYRAMID]
    backbone = make_backbone(out_features=names, window_size=1)
    for level in backbone.pyramid.values():
        level.conv2.weight[...] = level.conv2.weight * torch.tensor([0, 1.0, 0]).outer(torch.tensor([0, 1.0, 0]))
    first = torch.randn(1, 3, 64, 96)
    second = first.clone()
    second[..., 37, 58] += 3
    for stride, before, after in zip(
        [16, 4, 8, 16, 32], *(backbone(p).feature_maps for p in (first, second)), strict=True
    ):
        changed = (before != after).any(1)[0].nonzero().tolist()
        # Inside a patch all cells may change, for a patch is one vector.
        side = max(stride, 16)
        assert [37 // stride, 58 // stride] in changed
        assert {(row * stride // side, column * stride // side) for row, column in changed} == {
            (37 // side, 58 // side)
        }


def test_the_last_layer_is_given_if_nothing_is_asked_for():
    backbone = make_backbone()
    assert backbone.out_features == ["stage2"]
    assert backbone.channels == [24]
    assert backbone.out_indices == [2]


def test_negative_numbers_count_from_the_last_layer(tmp_path):
    """And not from the pyramid, whose levels are named after the layers."""
    assert make_backbone(out_indices=[-2, -1]).out_features == ["stage1", "stage2"]
    with pytest.raises(ValueError, match="out_indices wants -3 or more, found -4"):
        make_backbone(out_indices=[-4])
    make_backbone().save_pretrained(tmp_path)
    assert EfficientSamBackbone.from_pretrained(tmp_path, out_indices=[-1]).out_features == ["stage2"]


@torch.no_grad()
def test_hidden_states_and_attentions_if_asked_for(pixels):
    backbone = make_backbone(attn_implementation="eager")
    plain, full = backbone(pixels), backbone(pixels, output_hidden_states=True, output_attentions=True)
    assert plain.hidden_states is None
    assert [tuple(state.shape) for state in full.hidden_states] == [(2, 4, 4, 24)] * 3
    assert [tuple(weights.shape) for weights in full.attentions] == [(2, 2, 16, 16)] * 2
    as_tuple = backbone(pixels, return_dict=False)
    assert torch.equal(as_tuple[0][0], plain.feature_maps[0])


def test_gradient_checkpointing_gives_the_same_gradients(pixels):
    backbone = make_backbone(out_features=PYRAMID).train()
    gradients = []
    for _ in range(2):
        backbone.zero_grad()
        sum(found.square().mean() for found in backbone(pixels).feature_maps).backward()
        gradients.append([parameter.grad.clone() for parameter in backbone.parameters()])
        backbone.gradient_checkpointing_enable()
    assert all(torch.allclose(first, second, atol=1e-6) for first, second in zip(*gradients, strict=True))


def test_skipped_layers_keep_the_expectation():
    from efficientsam_hf.modeling_efficientsam import drop_path

    torch.manual_seed(0)
    branch = torch.ones(20_000, 2, 3)
    dropped = drop_path(branch, 0.3)
    assert set(dropped.unique().tolist()) == {0.0, torch.tensor(1 / 0.7).item()}
    assert (dropped == dropped[:, :1, :1]).all()
    assert dropped.mean().item() == pytest.approx(1, abs=0.02)
    rates = [
        layer.drop_path_rate for layer in make_backbone(drop_path_rate=0.2, num_hidden_layers=3).vision_encoder.layers
    ]
    assert rates == pytest.approx([0, 0.1, 0.2])


def test_skipping_is_for_training_alone(pixels):
    backbone = make_backbone(drop_path_rate=0.9)
    assert torch.equal(backbone(pixels).feature_maps[0], make_backbone()(pixels).feature_maps[0])
    backbone.train()
    torch.manual_seed(0)
    assert not torch.equal(backbone(pixels).feature_maps[0], make_backbone()(pixels).feature_maps[0])


# --------------------------------------------------------------------------------------------------------------------
# Where it comes from, and where it goes


@pytest.mark.parametrize("asked", [{"out_indices": [1, 2]}, {"out_features": ["stage1", "stride8"]}, {}])
def test_auto_backbone_builds_it_and_the_config_survives(asked, tmp_path):
    backbone = AutoBackbone.from_config(vision_config(**asked))
    assert type(backbone) is EfficientSamBackbone
    backbone.save_pretrained(tmp_path)
    again = EfficientSamBackbone.from_pretrained(tmp_path)
    assert again.out_features == backbone.out_features
    assert again.out_indices == backbone.out_indices
    own, other = backbone.state_dict(), again.state_dict()
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in own)


def test_layers_may_be_taken_off_while_loading(tmp_path):
    make_backbone().save_pretrained(tmp_path)
    assert EfficientSamBackbone.from_pretrained(tmp_path, num_hidden_layers=1, out_features=["stage1"]).channels == [
        24
    ]


@torch.no_grad()
def test_it_starts_from_the_pretrained_student(tmp_path, pixels):
    sami = make_sami()
    sami.save_pretrained(tmp_path)
    side = sami.config.vision_config.pretrain_image_size
    pixels = pixels[..., :side, :side]
    loaded = EfficientSamBackbone.from_pretrained(tmp_path)
    given = sami.to_efficientsam(EfficientSamBackbone(sami.config.vision_config))
    everything = torch.arange(sami.config.vision_config.position_grid_size**2).expand(len(pixels), -1)
    wanted = sami.eval().vision_encoder(pixels, everything).last_hidden_state
    for backbone in (loaded, given.eval()):
        found = backbone(pixels).feature_maps[0].flatten(2).transpose(1, 2)
        torch.testing.assert_close(found, wanted)


def test_unknown_feature_is_named():
    with pytest.raises(ValueError, match=r"stage_names.*stride32.*stage3"):
        vision_config(out_features=["stage3"])
    backbone = make_backbone(out_features=["stage1"])
    backbone.out_features = ["stage1", "stride8"]
    with pytest.raises(ValueError, match="built without 'stride8': name it in out_features when it is made"):
        backbone(torch.zeros(1, 3, 32, 32))
    backbone.out_features = ["neck"]
    with pytest.raises(ValueError, match="built without 'neck'"):
        backbone(torch.zeros(1, 3, 32, 32))


def test_a_pyramid_wants_a_patch_it_can_halve():
    with pytest.raises(ValueError, match="patch_size 4 times or divided by a power of 2, got 14"):
        make_backbone(patch_size=14, pretrain_image_size=56, out_features=["stride4"])


def test_drop_path_out_of_range_is_named():
    with pytest.raises(ValueError, match="drop_path_rate must be at least 0 and below 1, got 1"):
        vision_config(drop_path_rate=1)


@pytest.mark.parametrize(
    ("fields", "found"), [({"window_size": -1}, "-1 and 16"), ({"pyramid_channels": 0}, "0 and 0")]
)
def test_windows_and_widths_out_of_range_are_named(fields, found):
    with pytest.raises(ValueError, match=f"window_size must be at least 0 .* at least 1, got {found}"):
        vision_config(**fields)


# --------------------------------------------------------------------------------------------------------------------
# Inside the heads of transformers

MASKS = {
    "mask_labels": [torch.rand(2, 64, 80) > 0.5] * 2,
    "class_labels": [torch.tensor([0, 2])] * 2,
}
BOXES = {"labels": [{"class_labels": torch.tensor([0, 2]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.3]] * 2)}] * 2}
SMALL = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
DETR = {**SMALL, "d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_queries": 5}
HEADS = {
    "mask2former": (
        Mask2FormerForUniversalSegmentation,
        lambda backbone: Mask2FormerConfig(
            backbone_config=backbone, num_labels=3, feature_size=32, mask_feature_size=32, hidden_dim=32,
            num_attention_heads=2, encoder_feedforward_dim=16, dim_feedforward=16, encoder_layers=1, decoder_layers=2,
            num_queries=5, train_num_points=64,
        ),
        PYRAMID,
        {key: [value.float() if key == "mask_labels" else value for value in values] for key, values in MASKS.items()},
    ),
    "maskformer": (
        MaskFormerForInstanceSegmentation,
        lambda backbone: MaskFormerConfig(
            backbone_config=backbone, num_labels=3, fpn_feature_size=32, mask_feature_size=16,
            decoder_config=DetrConfig(backbone_config=backbone, **DETR),
        ),
        PYRAMID,
        {key: [value.float() if key == "mask_labels" else value for value in values] for key, values in MASKS.items()},
    ),
    "upernet": (
        UperNetForSemanticSegmentation,
        lambda backbone: UperNetConfig(
            backbone_config=backbone, num_labels=3, hidden_size=16, auxiliary_in_channels=16, auxiliary_channels=8
        ),
        PYRAMID,
        {"labels": torch.randint(3, (2, 64, 80))},
    ),
    "detr": (
        DetrForObjectDetection,
        lambda backbone: DetrConfig(backbone_config=backbone, use_timm_backbone=False, num_labels=3, **DETR),
        ["stage2"],
        BOXES,
    ),
    "rt_detr": (
        RTDetrForObjectDetection,
        lambda backbone: RTDetrConfig(
            backbone_config=backbone, num_labels=3, d_model=16, encoder_hidden_dim=16, encoder_ffn_dim=16,
            decoder_ffn_dim=16, encoder_in_channels=[16] * 3, decoder_in_channels=[16] * 3, encoder_attention_heads=2,
            decoder_attention_heads=2, decoder_layers=1, num_queries=5, num_denoising=2,
            freeze_backbone_batch_norms=False,
        ),
        PYRAMID[1:],
        BOXES,
    ),
}  # fmt: skip


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.filterwarnings("ignore")
def test_head_trains_and_survives_saving(head, tmp_path):
    model_class, config, names, labels = HEADS[head]
    torch.manual_seed(0)
    model = model_class(config(vision_config(out_features=names)))
    backbones = [module for module in model.modules() if isinstance(module, EfficientSamBackbone)]
    assert len(backbones) == 1
    pixels = torch.randn(2, 3, 64, 80, generator=torch.Generator().manual_seed(0))
    loss = model.train()(pixel_values=pixels, **labels).loss
    loss.backward()
    assert loss.isfinite()
    gradients = {name: parameter.grad for name, parameter in backbones[0].named_parameters()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    assert gradients["vision_encoder.embeddings.patch_embedding.weight"].abs().sum() > 0

    model.eval().save_pretrained(tmp_path)
    again = model_class.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        first, second = model(pixel_values=pixels), again(pixel_values=pixels)
    key = "masks_queries_logits" if "masks_queries_logits" in first else "logits"
    torch.testing.assert_close(first[key], second[key], rtol=1e-3, atol=1e-6)


def test_a_config_stays_as_it_was_given():
    config = tiny_config().vision_config
    before = config.to_dict()
    EfficientSamBackbone(config)
    assert config.to_dict() == before
