"""What all tests share: a model small enough to be instant, a synthetic photo, and where the large data is."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision_operators  # noqa: F401  # before transformers

from efficientsam_hf import EfficientSamConfig, EfficientSamModel

# Several workers with several threads each would only wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# Files whose tests start commands, servers or compilers, or train: `-m "not slow"` is to answer within a minute.
SLOW_FILES = {
    "test_auto_classes",
    "test_checkpoints",
    "test_compilation",
    "test_default_checkpoint",
    "test_demo",
    "test_docs",
    "test_evaluation_cli",
    "test_evaluation_peers",
    "test_examples",
    "test_export",
    "test_export_formats",
    "test_feature_cache",
    "test_finetuning",
    "test_frozen_features",
    "test_hub",
    "test_labelling",
    "test_mask_rcnn",
    "test_pipeline",
    "test_pretraining",
    "test_publishing",
    "test_recipes",
    "test_recipes_published",
    "test_streaming",
    "test_task_training",
    "test_torchvision",
}

REPOSITORY = Path(__file__).parents[1]
# Photos with masks and the official code's answers, too large for the repository; what needs them skips without.
SHARED = Path(os.environ.get("EFFICIENTSAM_SHARED", REPOSITORY.parent / "shared"))


def tiny_config(**prompt_encoder) -> EfficientSamConfig:
    """64 pixels, 2 layers, 16 channels in the decoder."""
    return EfficientSamConfig(
        vision_config={
            "image_size": 64,
            "pretrain_image_size": 64,
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "output_channels": 16,
        },
        prompt_encoder_config={"hidden_size": 16, **prompt_encoder},
        mask_decoder_config={
            "hidden_size": 16,
            "num_attention_heads": 2,
            "mlp_dim": 32,
            "upscaling_channels": [8, 4],
            "iou_head_hidden_dim": 16,
        },
    )


def stem_config(**prompt_encoder) -> EfficientSamConfig:
    """As `tiny_config`, with convolutions in place of the patch embedding."""
    fields = tiny_config(**prompt_encoder).to_dict()
    rows = [[3, 2, 1, 4, 1, 1], [5, 2, 2, 6, 2, 1], [3, 2, 2, 8, 1, 1], [3, 1, 2, 8, 1, 2]]
    fields["vision_config"].update(stem_stages=rows, stem_channels=5)
    return EfficientSamConfig(**fields)


def detail_config(**prompt_encoder) -> EfficientSamConfig:
    """As `stem_config`, with the stem's details handed to the decoder."""
    fields = stem_config(**prompt_encoder).to_dict()
    fields["vision_config"]["detail_channels"] = [8, 4]
    return EfficientSamConfig(**fields)


def make_model(config: EfficientSamConfig, seed: int = 0) -> EfficientSamModel:
    """A model with weights large enough that every part shows in the output."""
    torch.manual_seed(seed)
    model = EfficientSamModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model.eval()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem in SLOW_FILES:
            item.add_marker("slow")


@pytest.fixture
def config() -> EfficientSamConfig:
    return tiny_config()


@pytest.fixture
def model(config: EfficientSamConfig) -> EfficientSamModel:
    return make_model(config)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's number of threads, which is afterwards what it was."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def photo() -> np.ndarray:
    """48 x 80: a red disc and a green box on noise."""
    generator = np.random.default_rng(0)
    image = generator.integers(90, 130, (48, 80, 3), dtype=np.uint8)
    y, x = np.mgrid[:48, :80]
    image[(y - 20) ** 2 + (x - 24) ** 2 < 144] = (220, 40, 30)
    image[28:44, 50:74] = (30, 200, 60)
    return image


@pytest.fixture
def shared() -> Path:
    """The folder of photos and golden answers; tests that ask for it skip where it is missing."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the photos and golden answers in {SHARED} (or EFFICIENTSAM_SHARED)")
    return SHARED
