"""Mixing, smoothing, the loop, and models that start from an encoder."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from conftest import make_model, tiny_config
from test_sami_model import make_sami
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from efficientsam_hf import EfficientSamBackbone, EfficientSamForImageClassification
from efficientsam_hf.training.classification import classification_inputs, mix_pairs, normalize_pixels, smooth_labels
from efficientsam_hf.training.encoders import (
    backbone_config,
    load_backbone,
    load_encoder_model,
    trunk_shares,
    windowed,
)
from efficientsam_hf.training.mask_sets import build_mask2former, mask2former_inputs
from efficientsam_hf.training.optimization import decay_polynomial, parameter_groups
from efficientsam_hf.training.runs import TaskOptions, start_run
from efficientsam_hf.training.updates import weight_updates


def test_shares_of_weights_are_refused_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda self: DistributedType.FSDP))
    with pytest.raises(ValueError, match="detection trains the whole model in each process, found FSDP"):
        start_run(TaskOptions(output_dir=str(tmp_path)), "detection")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole")
    make_model(tiny_config()).save_pretrained(path)
    return path


# --------------------------------------------------------------------------------------------------------------------
# Inputs


def test_smoothed_labels_sum_to_one_and_keep_their_class():
    shares = smooth_labels(torch.tensor([2, 0]), 4, 0.1)
    torch.testing.assert_close(shares, torch.tensor([[0.025, 0.025, 0.925, 0.025], [0.925, 0.025, 0.025, 0.025]]))


def test_mixup_mixes_labels_as_it_mixes_pictures():
    """With pictures that are their own labels, what comes out is still its own label."""
    labels = torch.tensor([0, 1, 2, 3])
    shares = torch.eye(4)
    pixels = shares[:, :, None, None].expand(-1, -1, 2, 2)
    ratios = []
    for seed in range(200):
        mixed, mixed_shares = mix_pairs(pixels, shares, 0.8, seeded(seed))
        assert torch.equal(mixed[:, :, 0, 0], mixed_shares)
        assert torch.equal(mixed_shares[labels, labels], mixed_shares[0, 0].expand(4))
        ratios.append(mixed_shares[0, 0].item())
    # Beta(0.8, 0.8): mean 1/2, variance 1 / (4 * 2.6).
    values = torch.tensor(ratios)
    assert values.mean().item() == pytest.approx(0.5, abs=0.07)
    assert values.var().item() == pytest.approx(1 / 10.4, abs=0.03)
    assert mix_pairs(pixels, shares, 0.0, seeded())[0] is pixels


def test_inputs_are_drawn_from_their_generator_alone():
    batch = {"pixels": torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8), "labels": torch.arange(4)}
    first, again, other = (
        classification_inputs(batch, seeded(seed), classes=5, smoothing=0.1, mixup=0.8) for seed in (1, 1, 2)
    )
    assert torch.equal(first["pixel_values"], again["pixel_values"])
    assert not torch.equal(first["pixel_values"], other["pixel_values"])
    grey = torch.tensor([124, 116, 104], dtype=torch.uint8).view(1, 3, 1, 1)
    assert normalize_pixels(grey).abs().max() < 0.01


# --------------------------------------------------------------------------------------------------------------------
# The loop


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return {"loss": (self.weight - x.mean()) ** 2, "answer": self.weight * x}


def run_line(first: int = 0, last: int = 3, accumulate: int = 2, **more):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model, optimizer = accelerator.prepare(model, optimizer)
    drawn = []

    def inputs(batch, generator):
        drawn.append(torch.rand(1, generator=generator).item())
        return {"x": batch}

    batches = (torch.tensor([float(number)]) for number in range(100))
    told = weight_updates(
        accelerator, model, optimizer, batches, inputs=inputs, rate=lambda step: 0.5 / (step + 1),
        first=first, last=last, seed=3, **more,
    )  # fmt: skip
    return list(told), accelerator.unwrap_model(model).weight.item(), drawn


def test_updates_are_those_of_an_obvious_loop():
    told, weight, _ = run_line()
    wanted, losses, batch = 0.0, [], 0
    for step in range(3):
        pair = [float(batch), float(batch + 1)]
        batch += 2
        losses.append(sum((wanted - x) ** 2 for x in pair) / 2)
        wanted -= 0.5 / (step + 1) * sum(2 * (wanted - x) for x in pair) / 2
    assert [update.step for update in told] == [1, 2, 3]
    assert [update.losses["loss"].item() for update in told] == pytest.approx(losses)
    assert weight == pytest.approx(wanted)


def test_a_resumed_loop_draws_what_it_would_have_drawn():
    whole, parts = run_line()[2], run_line(first=1)[2]
    assert parts == whole[2:]
    assert len(set(whole)) == len(whole)
    assert run_line(first=3)[0] == []


def test_gradients_are_cut():
    assert run_line(last=1, max_grad_norm=1e-3)[1] == pytest.approx(0.5e-3, rel=1e-3)


def test_polynomial_decay():
    assert decay_polynomial(0, peak=2.0, total=10) == 2.0
    assert decay_polynomial(10, peak=2.0, total=10) == decay_polynomial(11, peak=2.0, total=10) == 0.0
    assert decay_polynomial(5, peak=2.0, total=10) == pytest.approx(2 * 0.5**0.9)


# --------------------------------------------------------------------------------------------------------------------
# From an encoder


def test_windows_leave_the_last_of_each_quarter_to_see_everything():
    assert windowed(12) == {"window_size": 14, "global_attention_layers": [2, 5, 8, 11]}
    assert windowed(6)["global_attention_layers"] == [1, 2, 4, 5]
    assert windowed(2)["global_attention_layers"] == [0, 1]
    assert windowed(12, 0) == {"window_size": 0, "global_attention_layers": []}


def test_a_checkpoint_without_the_part_is_named(folder, tmp_path):
    make_sami().save_pretrained(tmp_path / "sami")
    with pytest.raises(ValueError, match="lacks the neck that EfficientSamBackbone needs: 6 weights"):
        load_encoder_model(EfficientSamBackbone, tmp_path / "sami", out_features=["neck"])
    with pytest.raises(ValueError, match="lacks the classifier that EfficientSamForImageClassification needs"):
        load_encoder_model(EfficientSamForImageClassification, folder, whole=True)
    with pytest.raises(ValueError, match=r"lacks the vision_encoder .* missing or of another shape"):
        load_encoder_model(EfficientSamForImageClassification, folder, hidden_size=48)
    other = ResNetForImageClassification(ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1]))
    other.save_pretrained(tmp_path / "resnet")
    with pytest.raises(ValueError, match="holds a model of type 'resnet': wanted one with an encoder"):
        load_encoder_model(EfficientSamBackbone, tmp_path / "resnet")
    with pytest.raises(OSError, match="nowhere"):
        load_encoder_model(EfficientSamBackbone, tmp_path / "nowhere")


def test_half_precision_checkpoints_train_in_full(tmp_path):
    make_model(tiny_config()).half().save_pretrained(tmp_path)
    assert load_encoder_model(EfficientSamForImageClassification, tmp_path).dtype == torch.float32
    assert backbone_config(tmp_path).dtype is None


SMALL = {
    "feature_size": 32,
    "mask_feature_size": 32,
    "hidden_dim": 32,
    "num_attention_heads": 2,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "num_queries": 3,
}


def test_mask2former_has_the_checkpoint_s_encoder(folder):
    model = build_mask2former(folder, ["a", "b"], {"window_size": 2}, **SMALL)
    backbone = next(module for module in model.modules() if isinstance(module, EfficientSamBackbone))
    own = make_model(tiny_config()).vision_encoder.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in backbone.vision_encoder.state_dict().items())
    assert (model.config.id2label, backbone.config.window_size) == ({0: "a", 1: "b"}, 2)
    shares = trunk_shares(model, 0.1)
    groups = parameter_groups(model, 0.05, shares)
    slow = sum(len(group["params"]) for group in groups if group["rate_share"] == 0.1)
    assert slow == len(list(backbone.vision_encoder.parameters()))


def test_another_encoder_is_not_taken(folder):
    model = build_mask2former(folder, ["a"], **SMALL)
    model.model.pixel_level_module.encoder = EfficientSamBackbone(backbone_config(folder, hidden_size=48))
    with pytest.raises(ValueError, match="has another encoder: wanted embeddings"):
        load_backbone(model, folder)
    with pytest.raises(ValueError, match="found none in Line"):
        load_backbone(Line(), folder)


def test_a_picture_without_instances_trains(folder):
    model = build_mask2former(folder, ["a", "b"], **SMALL).train()
    batch = {
        "pixels": torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8),
        "mask_labels": [torch.zeros(0, 64, 64, dtype=torch.bool), torch.ones(1, 64, 64, dtype=torch.bool)],
        "class_labels": [torch.zeros(0, dtype=torch.int64), torch.tensor([1])],
    }
    loss = model(**mask2former_inputs(batch)).loss
    loss.backward()
    assert loss.isfinite()
