"""What transformers' Auto classes find once the package is imported, and the front door itself."""

import importlib
import importlib.metadata

import numpy as np
import pytest
import torch
from conftest import make_model, tiny_config
from packaging.version import Version
from transformers import AutoConfig, AutoModel, AutoModelForMaskGeneration, AutoProcessor
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING, AutoImageProcessor

import efficientsam_hf
from efficientsam_hf import (
    VARIANTS,
    EfficientSamConfig,
    EfficientSamImageProcessor,
    EfficientSamMaskDecoderConfig,
    EfficientSamModel,
    EfficientSamProcessor,
    EfficientSamPromptEncoderConfig,
    EfficientSamSamiConfig,
    EfficientSamSamiDecoderConfig,
    EfficientSamVisionConfig,
    EfficientSamVisionModel,
)

CONFIGS = [
    EfficientSamConfig,
    EfficientSamVisionConfig,
    EfficientSamPromptEncoderConfig,
    EfficientSamMaskDecoderConfig,
    EfficientSamSamiConfig,
    EfficientSamSamiDecoderConfig,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model and its processor as users save them, with settings that are nobody's defaults."""
    path = tmp_path_factory.mktemp("tiny")
    model = make_model(tiny_config(max_prompt_points=4, negative_points=True))
    processor = EfficientSamProcessor.from_model_config(model.config)
    processor.image_processor.antialias = True
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def same_weights(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForMaskGeneration])
def test_auto_models_load_the_whole(auto, folder):
    model = auto.from_pretrained(folder)
    assert type(model) is EfficientSamModel
    assert same_weights(model, make_model(tiny_config(max_prompt_points=4, negative_points=True)))


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForMaskGeneration])
def test_auto_models_start_from_a_config(auto, folder):
    model = auto.from_config(AutoConfig.from_pretrained(folder))
    assert type(model) is EfficientSamModel
    assert model.config.vision_config.hidden_size == 24


def test_auto_config_reads_the_whole(folder):
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is EfficientSamConfig
    assert type(config.vision_config) is EfficientSamVisionConfig
    assert config.prompt_encoder_config.max_prompt_points == 4
    assert config.mask_decoder_config.upscaling_channels == [8, 4]


@pytest.mark.parametrize("config_class", CONFIGS, ids=lambda config_class: config_class.model_type)
def test_auto_config_knows_each_part(config_class, tmp_path):
    config = AutoConfig.for_model(config_class.model_type)
    assert type(config) is config_class
    config.initializer_range = 0.5
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is config_class
    assert again.initializer_range == 0.5


@pytest.mark.parametrize("variant", VARIANTS)
def test_auto_model_builds_the_variants(variant):
    config = AutoConfig.for_model("efficientsam_vision_model", num_hidden_layers=1, **VARIANTS[variant])
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    assert type(model) is EfficientSamVisionModel
    assert model.get_input_embeddings().weight.shape == (VARIANTS[variant]["hidden_size"], 3, 16, 16)


def load_vision_directly(folder):
    return EfficientSamVisionModel.from_pretrained(folder, output_loading_info=True)


def load_vision_by_auto_class(folder):
    config = AutoConfig.from_pretrained(folder).vision_config
    return AutoModel.from_pretrained(folder, config=config, output_loading_info=True)


@pytest.mark.parametrize("load", [load_vision_directly, load_vision_by_auto_class])
def test_vision_model_comes_out_of_the_whole_checkpoint(load, folder, pixels):
    vision, report = load(folder)
    whole = EfficientSamModel.from_pretrained(folder)
    assert type(vision) is EfficientSamVisionModel
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert same_weights(vision.vision_encoder, whole.vision_encoder)
    with torch.no_grad():
        embeddings = whole.get_image_embeddings(pixels)
        torch.testing.assert_close(vision(pixels).last_hidden_state, embeddings, rtol=0, atol=0)


def test_vision_model_saved_alone(folder, tmp_path):
    vision = EfficientSamVisionModel.from_pretrained(folder)
    vision.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert type(again) is EfficientSamVisionModel
    assert same_weights(again, vision)


@pytest.mark.parametrize("backend", [None, "pil", "torchvision"])
def test_one_image_processor_for_every_backend(backend, folder, photo):
    asked = {} if backend is None else {"backend": backend}
    processor = AutoImageProcessor.from_pretrained(folder, **asked)
    assert type(processor) is EfficientSamImageProcessor
    assert dict(processor.size) == {"height": 64, "width": 64}
    assert processor.antialias is True
    assert processor(photo, return_tensors="pt")["pixel_values"].shape == (1, 3, 64, 64)
    # Without an entry of its own a backend falls back to another's class, with a warning.
    assert backend is None or IMAGE_PROCESSOR_MAPPING[EfficientSamConfig][backend] is EfficientSamImageProcessor


def test_image_processor_saved_alone(tmp_path):
    EfficientSamImageProcessor(size=32, do_normalize=False).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    assert type(processor) is EfficientSamImageProcessor
    assert (processor.size["height"], processor.do_normalize) == (32, False)


def test_auto_processor(folder, photo):
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor) is EfficientSamProcessor
    assert type(processor.image_processor) is EfficientSamImageProcessor
    assert (processor.max_prompt_points, processor.negative_points) == (4, True)
    saved = EfficientSamProcessor.from_pretrained(folder)
    prompts = {"input_points": [[[[3, 4], [60, 40]]]], "input_labels": [[[1, 0]]]}
    first, second = (one(photo, **prompts) for one in (processor, saved))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_everything_together(folder, photo):
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForMaskGeneration.from_pretrained(folder)
    inputs = processor(photo, input_points=[[[[24, 20]]]])
    with torch.no_grad():
        outputs = model(**{key: value for key, value in inputs.items() if key != "original_sizes"})
    masks = processor.post_process_masks(outputs.pred_masks, inputs["original_sizes"])
    assert masks[0].shape == (1, 3, *np.asarray(photo).shape[:2])


# --------------------------------------------------------------------------------------------------------------------
# The front door


def test_import_may_be_repeated(folder):
    importlib.reload(efficientsam_hf)
    assert type(AutoModelForMaskGeneration.from_pretrained(folder)) is EfficientSamModel
    assert type(AutoProcessor.from_pretrained(folder)) is EfficientSamProcessor


def test_all_names_are_there():
    assert [name for name in efficientsam_hf.__all__ if not hasattr(efficientsam_hf, name)] == []
    assert {"EfficientSamModel", "EfficientSamProcessor", "VARIANTS"} <= set(efficientsam_hf.__all__)


def test_version(monkeypatch):
    def not_installed(name):
        raise importlib.metadata.PackageNotFoundError(name)

    try:
        monkeypatch.setattr(importlib.metadata, "version", {"efficientsam-hf": "3.4.5"}.__getitem__)
        assert importlib.reload(efficientsam_hf).__version__ == "3.4.5"
        monkeypatch.setattr(importlib.metadata, "version", not_installed)
        assert Version(importlib.reload(efficientsam_hf).__version__) < Version("0.1")
    finally:
        monkeypatch.undo()
        importlib.reload(efficientsam_hf)
