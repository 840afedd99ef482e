"""Teachers: both readings of the paper, other models, ONNX files; and the step that shows their features."""

import pytest
import torch
from test_sami_model import MAE, make_sami, sami_config
from torch import nn
from torch.testing import assert_close
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Sam2HieraDetConfig,
    Sam2VisionConfig,
    Sam2VisionModel,
    SamHQVisionConfig,
    SamHQVisionModel,
    SamVisionConfig,
    SamVisionModel,
)

from efficientsam_hf.training.sami import draw_reconstruction, model_inputs
from efficientsam_hf.training.teachers import OnnxTeacher, SamTeacher, Teacher, VisionTeacher, load_teacher, on_grid

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 8,
    "output_channels": 5,
    "mlp_dim": 16,
    "window_size": 3,
    "global_attn_indexes": [1],
}


def small_sam(kind: type = SamVisionModel, config: type = SamVisionConfig) -> SamVisionModel:
    """64 pixels in patches of 8, positions that matter."""
    torch.manual_seed(0)
    model = kind(config(**SMALL)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


@pytest.fixture
def pictures() -> torch.Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("kind", "config"), [(SamVisionModel, SamVisionConfig), (SamHQVisionModel, SamHQVisionConfig)], ids=["sam", "hq"]
)
def test_sam_at_its_own_size_is_sam(kind, config, pictures):
    model = small_sam(kind, config)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        outputs = model((pictures - mean) / std, output_hidden_states=True)
    assert_close(SamTeacher(small_sam(kind, config), 64)(pictures), outputs.last_hidden_state)
    before = SamTeacher(small_sam(kind, config), 64, after_neck=False)
    assert_close(before(pictures), outputs.hidden_states[-1].permute(0, 3, 1, 2))
    assert before.name == "sam before the neck"


def test_sam_at_another_size_has_interpolated_positions(pictures):
    small = SamTeacher(small_sam(), 32)
    assert small(pictures).shape == (2, 5, 4, 4)
    assert small.encoder.pos_embed.shape == (1, 4, 4, 16)
    wanted = nn.functional.interpolate(
        small_sam().vision_encoder.pos_embed.permute(0, 3, 1, 2), (4, 4), mode="bicubic"
    )
    assert_close(small.encoder.pos_embed.permute(0, 3, 1, 2), wanted)
    with pytest.raises(ValueError, match="must be a multiple of its patches' 8, got 36"):
        SamTeacher(small_sam(), 36)


def test_the_large_reading_is_pooled_to_the_students_grid(pictures):
    teacher = SamTeacher(small_sam(), 64)
    whole = teacher(pictures)
    assert whole.shape[-2:] == (8, 8)
    assert_close(teacher(pictures, 4), whole.unflatten(2, (4, 2)).unflatten(4, (4, 2)).mean((3, 5)))
    assert_close(teacher(pictures, 8), whole)


def test_pictures_of_another_size_are_resized(pictures):
    small = nn.functional.interpolate(pictures, (32, 32), mode="bicubic", antialias=True).clamp(0, 1)
    assert_close(SamTeacher(small_sam(), 32)(pictures), SamTeacher(small_sam(), 32)(small))


def test_sam2_before_and_after_the_neck(pictures):
    hiera = Sam2HieraDetConfig(
        hidden_size=8,
        num_attention_heads=1,
        image_size=[64, 64],
        blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=[8, 16, 32, 64],
        num_attention_heads_per_stage=[1, 2, 4, 8],
        window_size_per_stage=[8, 4, 4, 2],
        window_positional_embedding_background_size=[2, 2],
        global_attention_blocks=[3],
    )
    config = Sam2VisionConfig(
        backbone_config=hiera,
        backbone_channel_list=[64, 32, 16, 8],
        backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
        fpn_hidden_size=12,
    )
    model = Sam2VisionModel(config).eval()
    after, before = SamTeacher(model, 64)(pictures), SamTeacher(model, 64, after_neck=False)(pictures)
    assert after.shape == (2, 12, 4, 4)
    assert before.shape == (2, 64, 2, 2)
    assert SamTeacher(model, 128)(pictures).shape == (2, 12, 8, 8)


@pytest.mark.parametrize("image_size", [32, 64])
@pytest.mark.parametrize("family", ["dinov2", "clip"])
def test_other_vision_models_leave_out_what_is_no_patch(family, image_size, pictures):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    if family == "dinov2":
        model = Dinov2Model(Dinov2Config(**sizes)).eval()
    else:
        model = CLIPVisionModel(CLIPVisionConfig(**sizes, intermediate_size=16)).eval()
    teacher = VisionTeacher(model, image_size, mean=[0.0] * 3, std=[1.0] * 3)
    features = teacher(pictures)
    side = image_size // 8
    assert features.shape == (2, 16, side, side)
    if image_size == 32:
        small = nn.functional.interpolate(pictures, (32, 32), mode="bicubic", antialias=True).clamp(0, 1)
        tokens = model(small).last_hidden_state
        assert_close(features[1, :, 2, 3], tokens[1, 1 + 2 * side + 3])


def test_grids_that_are_too_coarse_are_interpolated():
    features = torch.arange(4.0).view(1, 1, 2, 2)
    assert_close(on_grid(features, 4)[0, 0, 0], torch.tensor([0.0, 0.25, 0.75, 1.0]))


def test_a_teacher_gives_no_gradient_and_never_trains(pictures):
    teacher = SamTeacher(small_sam(), 64).train()
    assert not teacher.encoder.training
    assert not teacher(pictures.requires_grad_()).requires_grad
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    with pytest.raises(NotImplementedError, match="Teacher gives no features"):
        Teacher("none", 64, [0.0] * 3, [1.0] * 3)(pictures)


def test_the_identity_tells_weights_sizes_and_layers_apart():
    one = SamTeacher(small_sam(), 64).identity()
    assert one == SamTeacher(small_sam(), 64).identity()
    changed = small_sam()
    with torch.no_grad():
        changed.vision_encoder.layers[0].mlp.lin1.bias[3] += 1e-3
    others = [SamTeacher(changed, 64), SamTeacher(small_sam(), 32), SamTeacher(small_sam(), 64, after_neck=False)]
    assert all(other.identity() != one for other in others)
    assert others[0].identity()["weights"] != one["weights"]


def test_loaded_by_name(tmp_path, pictures):
    small_sam().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}')
    teacher = load_teacher(str(tmp_path), 64)
    assert isinstance(teacher, SamTeacher)
    assert_close(teacher(pictures), SamTeacher(small_sam(), 64, mean=[0.5] * 3, std=[0.5] * 3)(pictures))
    assert teacher.name == f"{tmp_path} after the neck"
    Dinov2Model(Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(
        tmp_path / "d"
    )
    assert isinstance(load_teacher(str(tmp_path / "d"), 56), VisionTeacher)
    with pytest.raises(ValueError, match=r"a\.onnx: say which output holds the features"):
        load_teacher("a.onnx", 64)
    for source in (str(tmp_path / "d"), "a.onnx"):
        with pytest.raises(ValueError, match="only an encoder of SAM has features before its neck, found"):
            load_teacher(source, 56, after_neck=False)


# --------------------------------------------------------------------------------------------------------------------
# ONNX


@pytest.fixture
def onnx_file(tmp_path):
    """A file whose feature map is the picture, pooled by 16, and its double."""
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [
        helper.make_node("AveragePool", ["x"], ["pooled"], kernel_shape=[16, 16], strides=[16, 16]),
        helper.make_node("Add", ["pooled", "pooled"], ["double"]),
    ]
    inputs = [helper.make_tensor_value_info("x", kind, ["n", 3, "h", "w"])]
    outputs = [helper.make_tensor_value_info(name, kind, None) for name in ("pooled", "double")]
    model = helper.make_model(
        helper.make_graph(nodes, "pool", inputs, outputs), opset_imports=[helper.make_opsetid("", 13)]
    )
    model.ir_version = 8
    onnx.save(model, tmp_path / "pool.onnx")
    return str(tmp_path / "pool.onnx")


def test_onnx_files(onnx_file, pictures):
    teacher = load_teacher(onnx_file, 64, output="double", mean=[0.5] * 3, std=[0.25] * 3)
    wanted = 2 * nn.functional.avg_pool2d((pictures - 0.5) / 0.25, 16)
    assert_close(teacher(pictures), wanted)
    assert teacher.name == "pool.onnx double"
    other = OnnxTeacher(onnx_file, 64, "double", [0.5] * 3, [0.5] * 3)
    assert teacher.identity()["weights"] != other.identity()["weights"]
    with pytest.raises(ValueError, match="has no output 'feat16': found pooled, double"):
        OnnxTeacher(onnx_file, 64, "feat16")
    with pytest.raises(FileNotFoundError, match="no ONNX file at"):
        OnnxTeacher(onnx_file + "x", 64, "pooled")


# --------------------------------------------------------------------------------------------------------------------
# What the student gets, and what one looks at


@pytest.fixture
def batch(pictures) -> dict:
    return {"pixels": (pictures * 255).byte(), "noise": torch.rand(2, 16), "corrupt": ["", ""]}


def test_inputs_of_the_student(batch):
    teacher = SamTeacher(small_sam(), 64)
    inputs = model_inputs(batch, sami_config(), teacher)
    pixels = batch["pixels"].float() / 255
    assert_close(inputs["target_features"], teacher(pixels, 4))
    assert_close(inputs["pixel_values"][:, 1], (pixels[:, 1] - 0.456) / 0.224)
    large = {**batch, "teacher_pixels": torch.zeros(2, 3, 128, 128, dtype=torch.uint8)}
    assert_close(model_inputs(large, sami_config(), teacher)["target_features"], teacher(torch.zeros(2, 3, 64, 64), 4))
    cached = {**batch, "features": torch.ones(2, 5, 4, 4, dtype=torch.float16)}
    assert torch.equal(model_inputs(cached, sami_config(), None)["target_features"], torch.ones(2, 5, 4, 4))
    assert set(model_inputs(batch, sami_config(**MAE), None)) == {"pixel_values", "noise"}
    with pytest.raises(ValueError, match="give a teacher or a cache, got neither"):
        model_inputs(batch, sami_config(), None)


@pytest.mark.parametrize("fields", [{}, MAE], ids=["features", "pixels"])
def test_reconstructions_show_what_was_seen_and_what_is_right(fields, batch):
    config = sami_config(**fields)
    inputs = model_inputs(batch, config, None if fields else SamTeacher(small_sam(), 64))
    outputs = make_sami(**fields)(**inputs)
    truth = inputs["pixel_values"].unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 4, 5, 1).flatten(3)
    truth = (truth - truth.mean(-1, keepdim=True)) / truth.std(-1, correction=0, keepdim=True)
    guess = truth if fields else inputs["target_features"].permute(0, 2, 3, 1)
    drawn = torch.from_numpy(draw_reconstruction(inputs, guess, outputs.mask, config)).unflatten(0, (2, 64))
    drawn = drawn.unflatten(2, (4, 64)).permute(2, 0, 4, 1, 3).float()
    pixels = batch["pixels"].float()
    hidden = outputs.mask.repeat_interleave(16, 1).repeat_interleave(16, 2)
    assert (drawn[0] - pixels).abs().max() <= 1
    assert (drawn[1] - pixels).permute(0, 2, 3, 1)[~hidden].abs().max() <= 1
    assert (drawn[1].permute(0, 2, 3, 1)[hidden] == 128).all()
    assert (drawn[2] - drawn[3]).abs().max() <= 1
