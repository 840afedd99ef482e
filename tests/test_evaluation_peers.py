"""The field's other models in the same harness, small and with random weights; that they run alike, not how well."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from oracles import write_coco
from PIL import Image
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, SamConfig
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.edgetam.configuration_edgetam import EdgeTamConfig
from transformers.models.edgetam.modeling_edgetam import EdgeTamModel
from transformers.models.sam.modeling_sam import SamModel
from transformers.models.sam2.configuration_sam2 import Sam2Config
from transformers.models.sam2.modeling_sam2 import Sam2Model
from transformers.models.sam2_video.configuration_sam2_video import Sam2VideoConfig
from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoModel
from transformers.models.sam_hq.configuration_sam_hq import SamHQConfig
from transformers.models.sam_hq.modeling_sam_hq import SamHQModel
from typer.testing import CliRunner

from efficientsam_cli import app
from efficientsam_cli.predictors import load_predictor
from efficientsam_hf.evaluation.ground_truth import find_true_pictures
from efficientsam_hf.evaluation.interactive import Settings, evaluate_picture
from efficientsam_hf.evaluation.onnx_pair import OnnxPairPredictor
from efficientsam_hf.evaluation.predictor import Prompts
from efficientsam_hf.evaluation.protocols import find_protocol

VISION = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "output_channels": 16, "image_size": 64,
    "patch_size": 16, "mlp_dim": 32, "window_size": 2, "global_attn_indexes": [1], "num_pos_feats": 8,
}  # fmt: skip
PROMPT = {"hidden_size": 16, "image_size": 64, "patch_size": 16, "mask_input_channels": 4}
DECODER = {"hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16}
HIERA = {
    "model_type": "sam2_hiera_det_model", "hidden_size": 8, "num_attention_heads": 1, "image_size": [64, 64],
    "blocks_per_stage": [1, 1, 2, 1], "embed_dim_per_stage": [8, 16, 32, 64], "global_attention_blocks": [3],
    "num_attention_heads_per_stage": [1, 1, 2, 4], "window_size_per_stage": [4, 2, 2, 2],
    "window_positional_embedding_background_size": [4, 4],
}  # fmt: skip
PYRAMID = {
    "backbone_config": HIERA, "backbone_channel_list": [64, 32, 16, 8], "fpn_hidden_size": 16,
    "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]], "fpn_top_down_levels": [2, 3], "num_feature_levels": 3,
}  # fmt: skip
# EdgeTAM's encoder is timm's RepViT; timm needs torchvision.
REPVIT = {
    "model_type": "timm_wrapper", "architecture": "repvit_m0_9", "num_classes": 2,
    "model_args": {"in_chans": 3, "features_only": True, "out_indices": [0, 1, 2, 3]},
}  # fmt: skip


class StripesConfig(PreTrainedConfig):
    model_type = "stripes"


class Stripes(PreTrainedModel):
    """In the place of EdgeTAM's encoder, maps of its four scales: what the rest of EdgeTAM works on."""

    config_class = StripesConfig
    base_model_prefix = "stripes"

    def __init__(self, config):
        super().__init__(config)
        sizes = [(8, 4), (16, 8), (32, 16), (64, 32)]
        self.scales = torch.nn.ModuleList(torch.nn.Conv2d(3, width, step, step) for width, step in sizes)
        self.post_init()

    def forward(self, pixel_values, **kwargs):
        return BaseModelOutput(last_hidden_state=[scale(pixel_values) for scale in self.scales])


AutoConfig.register("stripes", StripesConfig)
AutoModel.register(StripesConfig, Stripes)


def small(kind):
    torch.manual_seed(0)
    parts = {"vision_config": VISION, "prompt_encoder_config": PROMPT, "mask_decoder_config": DECODER}
    if kind == "sam":
        return SamModel(SamConfig(**parts))
    if kind == "sam_hq":
        return SamHQModel(SamHQConfig(**{**parts, "mask_decoder_config": {**DECODER, "vit_dim": 32}}))
    if kind == "edgetam":
        return EdgeTamModel(
            EdgeTamConfig(**{**parts, "vision_config": {**PYRAMID, "backbone_config": StripesConfig()}})
        )
    if kind == "edgetam_repvit":
        pytest.importorskip("timm", reason="EdgeTAM's own encoder needs timm, and that a torchvision")
        vision = {**PYRAMID, "backbone_config": REPVIT, "backbone_channel_list": [384, 192, 96, 48]}
        return EdgeTamModel(EdgeTamConfig(**{**parts, "vision_config": vision}))
    return Sam2Model(Sam2Config(**{**parts, "vision_config": PYRAMID}))


@pytest.fixture(params=["sam", "sam_hq", "sam2", "edgetam", "edgetam_repvit"])
def peer(request, tmp_path):
    small(request.param).save_pretrained(tmp_path / request.param)
    return load_predictor(str(tmp_path / request.param), "cpu")


def test_a_peer_goes_through_every_protocol(peer, tmp_path):
    path, _ = write_coco(tmp_path / "coco", 1)
    (picture,) = find_true_pictures(path.parent / "images", path)
    protocols = [find_protocol(name) for name in ("box", "sam", "ritm", "centroid")]
    record = evaluate_picture(peer, picture, protocols, Settings())
    assert len(record["masks"]) == 3
    for row in record["masks"]:
        for protocol in protocols:
            assert len(row[protocol.name]["iou"]) >= 1
            assert all(0 <= value <= 1 for value in row[protocol.name]["iou"])
    assert peer.parameters > 10_000
    assert len(peer.weights_hash()) == 64


def test_a_peers_objects_together_are_as_each_alone(peer):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 80, 3), dtype=np.uint8))
    embedded = peer.embed(photo)
    boxes = Prompts(boxes=np.array([[4, 5, 30, 33], [40, 2, 70, 40]], dtype=np.float32))
    points = Prompts(
        points=np.array([[[5, 5], [9, 9]], [[60, 30], [1, 2]]], dtype=np.float32), labels=np.array([[1, 0], [1, 1]])
    )
    for prompts in (boxes, points):
        together = peer.decode(embedded, prompts)
        alone = [peer.decode(embedded, prompts[at : at + 1]) for at in range(2)]
        assert torch.allclose(together.logits, torch.cat([one.logits for one in alone]), atol=1e-5)
        assert together.logits.shape[:2] == together.scores.shape == (2, 3)
        assert peer.at_size(embedded, together.best_logits()).shape == (2, 48, 80)
        shown = Prompts(prompts.points, prompts.labels, prompts.boxes, together.best_logits())
        assert peer.decode(embedded, shown).logits.shape == together.logits.shape


def test_the_picture_model_of_a_video_checkpoint(tmp_path):
    """SAM 2's weights lie on the Hub as those of the video model, which has the picture model's in it."""
    torch.manual_seed(0)
    memory = {f"memory_{name}": 16 for name in ("attention_hidden_size", "encoder_hidden_size")}
    memory |= {"memory_encoder_output_channels": 16, "memory_attention_num_layers": 1}
    parts = {"vision_config": PYRAMID, "prompt_encoder_config": PROMPT, "mask_decoder_config": DECODER}
    whole = Sam2VideoModel(Sam2VideoConfig(**parts, image_size=64, **memory))
    whole.save_pretrained(tmp_path / "video")
    loaded = load_predictor(str(tmp_path / "video"), "cpu").model
    weights = dict(whole.named_parameters())
    for name, weight in loaded.named_parameters():
        assert torch.equal(weight, weights[name]), name


def test_sams_coordinates_are_those_of_its_own_processor(tmp_path):
    """The long side of 80 goes to 64: a click at 40, 24 of the picture is one at 32, 19 of 64 x 38."""
    small("sam").save_pretrained(tmp_path / "sam")
    predictor = load_predictor(str(tmp_path / "sam"), "cpu")
    pixels, factors = predictor.read(Image.new("RGB", (80, 48)))
    assert pixels.shape == (1, 3, 64, 64)
    assert factors.tolist() == [64 / 80, 38 / 48]
    # What is drawn in the padded square comes back where it belongs: the upper 38 rows are the picture.
    logits = torch.full((1, 16, 16), -1.0)
    logits[:, :, :8] = 1
    embedded = predictor.embed(Image.new("RGB", (80, 48)))
    (mask,) = predictor.at_size(embedded, logits)
    assert mask[:, :39].all()
    assert not mask[:, 41:].any()


def onnx_pair(folder, decoder_input="batched_point_coords"):
    """Files with the names and shapes of the authors' export; each mask is the first click's x, IoU is known."""
    images = helper.make_tensor_value_info("batched_images", TensorProto.FLOAT, [1, 3, "h", "w"])
    found = helper.make_tensor_value_info("image_embeddings", TensorProto.FLOAT, [1, 1, "h2", "w2"])
    mean = helper.make_node("ReduceMean", ["batched_images"], ["image_embeddings"], axes=[1], keepdims=1)
    graph = helper.make_graph([mean], "encoder", [images], [found])
    save(graph, folder / "encoder.onnx")
    inputs = [
        helper.make_tensor_value_info("image_embeddings", TensorProto.FLOAT, [1, 1, "h", "w"]),
        helper.make_tensor_value_info(decoder_input, TensorProto.FLOAT, [1, 1, "p", 2]),
        helper.make_tensor_value_info("batched_point_labels", TensorProto.FLOAT, [1, 1, "p"]),
        helper.make_tensor_value_info("orig_im_size", TensorProto.INT64, [2]),
    ]
    outputs = [
        helper.make_tensor_value_info("output_masks", TensorProto.FLOAT, [1, 1, 3, "hh", "ww"]),
        helper.make_tensor_value_info("iou_predictions", TensorProto.FLOAT, [1, 1, 3]),
    ]
    weights = [
        helper.make_tensor("lead", TensorProto.INT64, [3], [1, 1, 3]),
        helper.make_tensor("scores", TensorProto.FLOAT, [1, 1, 3], [0.2, 0.9, 0.1]),
        helper.make_tensor("shift", TensorProto.FLOAT, [1, 1, 3, 1, 1], [-1e6, 0.0, 0.0]),
        helper.make_tensor("shape", TensorProto.INT64, [5], [1, 1, 1, 1, 1]),
    ]
    nodes = [
        helper.make_node("Concat", ["lead", "orig_im_size"], ["size"], axis=0),
        helper.make_node("ReduceSum", ["batched_point_labels"], ["sum"], keepdims=0),
        helper.make_node("Reshape", ["sum", "shape"], ["value"]),
        helper.make_node("Add", ["value", "shift"], ["three"]),
        helper.make_node("Expand", ["three", "size"], ["output_masks"]),
        helper.make_node("Identity", ["scores"], ["iou_predictions"]),
    ]
    save(helper.make_graph(nodes, "decoder", inputs, outputs, weights), folder / "decoder.onnx")
    return folder / "encoder.onnx", folder / "decoder.onnx"


def save(graph, path):
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, str(path))


def test_an_onnx_pair_is_asked_one_by_one(tmp_path):
    predictor = OnnxPairPredictor(*onnx_pair(tmp_path))
    photo = Image.new("RGB", (80, 48))
    embedded = predictor.embed(photo)
    answer = predictor.decode(embedded, Prompts(boxes=np.array([[1, 2, 30, 40], [5, 5, 9, 9]], dtype=np.float32)))
    assert predictor.one_by_one
    assert answer.logits.shape == (2, 3, 48, 80)
    assert answer.best().tolist() == [1, 1]
    assert (answer.best_logits() == 5).all()  # the labels of a box's corners, 2 and 3
    clicks = Prompts(points=np.zeros((1, 2, 2), np.float32), labels=np.array([[1, 1]]))
    assert (predictor.decode(embedded, clicks).best_logits() == 2).all()
    assert predictor.parameters == 3 + 3 + 3 + 5
    assert not predictor.background_clicks


def test_an_onnx_pair_of_another_model_is_refused(tmp_path):
    files = onnx_pair(tmp_path, "point_coords")
    with pytest.raises(ValueError, match=r"decoder\.onnx has the inputs .*'point_coords'"):
        OnnxPairPredictor(*files)
    (tmp_path / "decoder.onnx").write_text("no graph")
    with pytest.raises(ValueError, match="no pair that onnxruntime can read"):
        OnnxPairPredictor(*files)


def test_one_command_compares_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_coco(tmp_path / "coco", 1)
    encoder, decoder = onnx_pair(tmp_path)
    models = [f"{encoder},{decoder}"]
    for kind in ("sam", "sam2", "edgetam"):
        small(kind).save_pretrained(tmp_path / kind)
        models.append(kind)
    given = [word for model in models for word in ("--model", model)]
    data = ["--images", "coco/images", "--annotations", "coco/instances.json", "--device", "cpu"]
    result = CliRunner().invoke(app, ["evaluate", "boxes", *data, *given])
    assert result.exit_code == 0, result.output
    rows = [line for line in result.output.splitlines() if line.startswith("| ")]
    assert rows[0].startswith("| model | parameters | protocol | prompts | masks | mIoU | of pictures |")
    assert rows[0].endswith("| encode ms | decode ms |")
    assert [row.split(" | ")[0] for row in rows[1:5]] == ["| encoder", "| sam", "| sam2", "| edgetam"]
