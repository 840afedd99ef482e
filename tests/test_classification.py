"""Classes of whole pictures: what is pooled, which labels are taken, and the pipeline of transformers."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import detail_config, make_model, tiny_config
from PIL import Image
from test_sami_model import make_sami
from transformers import AutoConfig, AutoModelForImageClassification, BitImageProcessorPil, pipeline
from transformers.loss.loss_utils import ForSequenceClassificationLoss

from efficientsam_hf import (
    EfficientSamForImageClassification,
    EfficientSamImageProcessor,
    EfficientSamVisionConfig,
    EfficientSamVisionModel,
    save_for_hub,
)


def make_classifier(**fields) -> EfficientSamForImageClassification:
    torch.manual_seed(0)
    fields = {**tiny_config().vision_config.to_dict(), "num_labels": 3, **fields}
    return EfficientSamForImageClassification(EfficientSamVisionConfig(**fields)).eval()


@torch.no_grad()
def test_the_mean_of_the_vision_model_s_patches_is_pooled(tmp_path, pixels):
    make_model(tiny_config()).save_pretrained(tmp_path)
    vision = EfficientSamVisionModel.from_pretrained(tmp_path)(pixels, output_hidden_states=True)
    model, report = EfficientSamForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    wanted = vision.hidden_states[-1].mean((1, 2))
    torch.testing.assert_close(model.get_image_features(pixels), wanted)
    torch.testing.assert_close(model(pixels).logits, model.classifier(model.layer_norm(wanted)))
    new = {"layer_norm.weight", "layer_norm.bias", "classifier.weight", "classifier.bias"}
    assert set(report["missing_keys"]) == new
    assert not report["unexpected_keys"]


@torch.no_grad()
def test_a_class_token_sees_every_patch_and_is_what_counts(pixels):
    model = make_classifier(pooling="class_token")
    assert set(dict(model.named_parameters())) - set(dict(make_classifier().named_parameters())) == {"class_token"}
    features = model.get_image_features(pixels)
    for row, column in ((0, 0), (40, 63)):
        changed = pixels.clone()
        changed[0, :, row, column] += 5
        moved = (model.get_image_features(changed) - features).abs().amax(1)
        assert moved[0] > 1e-6
        assert moved[1] == 0
    model.class_token.zero_()
    model.vision_encoder.embeddings.position_embedding[:, 0] = 0
    assert not torch.allclose(model.get_image_features(pixels), features)
    hidden = model(pixels, output_hidden_states=True).hidden_states
    assert torch.equal(hidden[0][:, 0, 0], torch.zeros(2, 24))
    assert hidden[0].shape == (2, 1, 17, 24)


def test_shares_of_classes_are_what_numbers_mean(pixels):
    model = make_classifier()
    labels = torch.tensor([2, 0])
    shares = torch.nn.functional.one_hot(labels, 3).float()
    assert model(pixels, labels=labels).loss.item() == pytest.approx(model(pixels, labels=shares).loss.item())
    half = torch.full((2, 3), 1 / 3)
    wanted = -model(pixels).logits.log_softmax(-1).mean()
    assert model(pixels, labels=half).loss.item() == pytest.approx(wanted.item(), abs=1e-6)


@pytest.mark.parametrize("count", [3, 1])
@pytest.mark.parametrize("problem", [None, "multi_label_classification", "regression"])
def test_each_problem_has_the_loss_of_transformers(problem, count, pixels):
    model = make_classifier(problem_type=problem, num_labels=count)
    labels = torch.tensor([[1.0, 0, 1], [0, 1, 0]])[:, :count]
    labels = torch.tensor([2, 0]) if (problem, count) == (None, 3) else labels
    config = SimpleNamespace(problem_type=problem, num_labels=count)
    wanted = ForSequenceClassificationLoss(labels, model(pixels).logits, config)
    assert model(pixels, labels=labels).loss.item() == pytest.approx(wanted.item())


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_each_class_wants_its_label(problem, pixels):
    model = make_classifier(problem_type=problem)
    for labels in (torch.tensor([2, 0]), torch.ones(2, 1)):
        with pytest.raises(ValueError, match=rf"labels of {problem} must be \(B, 3\), got \(2"):
            model(pixels, labels=labels)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (torch.tensor([0, 3]), "numbers from 0 to 2, got from 0 to 3"),
        (torch.tensor([-1, 1]), "numbers from 0 to 2, got from -1 to 1"),
        (torch.tensor([[0], [1]]), r"got of shape \(2, 1\)"),
        (torch.rand(2, 4), r"shares must be \(B, 3\), got \(2, 4\)"),
    ],
)
def test_labels_out_of_range_are_named(labels, words, pixels):
    with pytest.raises(ValueError, match=words):
        make_classifier()(pixels, labels=labels)


def test_a_class_token_has_no_place_in_windows():
    with pytest.raises(ValueError, match="pooling='class_token' wants window_size 0, got 2"):
        make_classifier(pooling="class_token", window_size=2)


@torch.no_grad()
def test_it_starts_from_the_pretrained_student(tmp_path, pixels):
    sami = make_sami()
    sami.save_pretrained(tmp_path)
    side = sami.config.vision_config.pretrain_image_size
    loaded = EfficientSamForImageClassification.from_pretrained(tmp_path, num_labels=3)
    given = sami.to_efficientsam(EfficientSamForImageClassification(sami.config.vision_config)).eval()
    found = [model.get_image_features(pixels[..., :side, :side]) for model in (loaded, given)]
    assert torch.equal(*found)
    everything = torch.arange(sami.config.vision_config.position_grid_size**2).expand(len(pixels), -1)
    encoded = sami.eval().vision_encoder(pixels[..., :side, :side], everything).last_hidden_state
    torch.testing.assert_close(found[0], encoded.mean(1))


@pytest.mark.parametrize("pooling", ["mean", "class_token"])
def test_pipeline_and_auto_classes(pooling, tmp_path):
    names = {0: "cat", 1: "dog", 2: "cow"}
    model = make_classifier(pooling=pooling, id2label=names, label2id={name: number for number, name in names.items()})
    model.save_pretrained(tmp_path)
    sides = {"size": {"shortest_edge": 72}, "crop_size": {"height": 64, "width": 64}}
    BitImageProcessorPil(**sides).save_pretrained(tmp_path)
    assert type(AutoModelForImageClassification.from_pretrained(tmp_path)) is EfficientSamForImageClassification
    assert type(AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(tmp_path))) is type(model)
    picture = Image.fromarray(np.random.default_rng(0).integers(256, size=(80, 100, 3), dtype=np.uint8))
    found = pipeline("image-classification", model=str(tmp_path))([picture, picture], top_k=3)
    inputs = BitImageProcessorPil(**sides)(picture, return_tensors="pt")
    with torch.no_grad():
        shares = model(**inputs).logits.softmax(-1)[0]
    assert [{row["label"] for row in rows} for rows in found] == [{"cat", "dog", "cow"}] * 2
    assert {row["label"]: row["score"] for row in found[0]} == pytest.approx(
        {names[n]: share.item() for n, share in enumerate(shares)}, abs=1e-6
    )


@pytest.mark.parametrize("task", ["image-classification", "image-feature-extraction"])
@pytest.mark.parametrize("save", ["plain", "for the Hub"])
def test_pipelines_run_our_own_processor_without_a_question(save, task, tmp_path, monkeypatch):
    head = EfficientSamForImageClassification if task == "image-classification" else EfficientSamVisionModel
    model, processor = head(tiny_config().vision_config), EfficientSamImageProcessor(size=64)
    if save == "plain":
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
    else:
        save_for_hub(model, processor, tmp_path)
    monkeypatch.setattr("builtins.input", lambda question: pytest.fail(question))
    asked = pipeline(task, model=str(tmp_path))
    assert type(asked.model) is head
    assert type(asked.image_processor) is EfficientSamImageProcessor
    assert asked(Image.fromarray(np.zeros((48, 80, 3), np.uint8)))


def test_no_weight_of_a_stem_with_details_waits_for_a_gradient(tmp_path):
    """Several processes that train together would wait for it; and a whole model's details are not missed."""
    whole = make_model(detail_config())
    whole.save_pretrained(tmp_path)
    model, report = EfficientSamForImageClassification.from_pretrained(
        tmp_path, num_labels=3, output_loading_info=True
    )
    assert not report["unexpected_keys"]
    assert all(name.startswith(("layer_norm", "classifier", "head")) for name in report["missing_keys"]), report
    model(torch.randn(2, 3, 64, 64), labels=torch.tensor([0, 2])).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
