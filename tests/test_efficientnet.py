"""The stem against EfficientNet-Lite written out with its batch norms, on random weights in the ports' layout."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import REPOSITORY, make_model, tiny_config
from torch.testing import assert_close

from efficientsam_hf.efficientnet import BATCH_NORM_EPS, EFFICIENTNET_LITE0, rescale_input, start_from_efficientnet
from efficientsam_hf.modeling_efficientsam import EfficientSamSameConv2d

# (stride of the first block, blocks, channels, expansion, kernel): three stages of a small EfficientNet-Lite.
STAGES = [(1, 1, 4, 1, 3), (2, 2, 6, 2, 5), (2, 1, 8, 2, 3)]
ROWS = [[3, 1, 1, 4, 1, 1], [5, 2, 2, 6, 2, 1], [3, 2, 2, 8, 1, 1]]


def add_layer(weights: dict, convolution: str, norm: str, *shape: int) -> None:
    weights[f"{convolution}.weight"] = 0.3 * torch.randn(shape)
    for name, value in (("weight", torch.rand), ("bias", torch.randn), ("running_mean", torch.randn)):
        weights[f"{norm}.{name}"] = value(shape[0])
    weights[f"{norm}.running_var"] = 0.5 + torch.rand(shape[0])


def random_weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    weights: dict[str, torch.Tensor] = {}
    add_layer(weights, "_conv_stem", "_bn0", 5, 3, 3, 3)
    channels, number = 5, 0
    for _, repeats, output, expansion, kernel in STAGES:
        for _ in range(repeats):
            block, inner = f"_blocks.{number}.", channels * expansion
            if expansion > 1:
                add_layer(weights, block + "_expand_conv", block + "_bn0", inner, channels, 1, 1)
            add_layer(weights, block + "_depthwise_conv", block + "_bn1", inner, 1, kernel, kernel)
            add_layer(weights, block + "_project_conv", block + "_bn2", output, inner, 1, 1)
            channels, number = output, number + 1
    return weights


def layer(weights: dict, image: torch.Tensor, convolution: str, norm: str, stride: int = 1) -> torch.Tensor:
    """Convolution with TensorFlow's "same" padding, then batch norm."""
    kernel = weights[f"{convolution}.weight"]
    total = max(kernel.shape[-1] - stride, 0)
    padded = F.pad(image, (total // 2, total - total // 2) * 2)
    image = F.conv2d(padded, kernel, stride=stride, groups=image.shape[1] // kernel.shape[1])
    values = (weights[f"{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(image, *values, eps=BATCH_NORM_EPS)


def written_out(weights: dict, pixels: torch.Tensor) -> torch.Tensor:
    image, number = layer(weights, pixels, "_conv_stem", "_bn0", 2).clamp(0, 6), 0
    for stride, repeats, _, expansion, _ in STAGES:
        for repeat in range(repeats):
            block, start = f"_blocks.{number}.", image
            if expansion > 1:
                image = layer(weights, image, block + "_expand_conv", block + "_bn0").clamp(0, 6)
            image = layer(weights, image, block + "_depthwise_conv", block + "_bn1", stride if repeat == 0 else 1)
            image = layer(weights, image.clamp(0, 6), block + "_project_conv", block + "_bn2")
            image, number = (start + image if repeat else image), number + 1
    return image


@pytest.fixture
def stem():
    config = tiny_config()
    config.vision_config.stem_stages, config.vision_config.stem_channels = ROWS, 5
    config.vision_config.patch_size = 8
    return make_model(config).vision_encoder.embeddings.patch_embedding


def test_stem_is_efficientnet_with_its_norms_folded_in(tmp_path, stem, monkeypatch):
    weights = random_weights()
    torch.save(weights, tmp_path / "lite.pth")
    # Pictures as EfficientNet takes them, so that the padding is the same, too.
    monkeypatch.setattr("efficientsam_hf.efficientnet.IMAGENET_DEFAULT_MEAN", [127 / 255] * 3)
    monkeypatch.setattr("efficientsam_hf.efficientnet.IMAGENET_DEFAULT_STD", [128 / 255] * 3)
    start_from_efficientnet(stem, tmp_path / "lite.pth")
    pixels = torch.randn(2, 3, 48, 64)
    stem.projection = torch.nn.Identity()
    assert_close(stem(pixels)[0], written_out(weights, pixels), rtol=1e-4, atol=1e-4)


SIZES = [(3, 1, 1), (5, 1, 2), (3, 2, 1), (5, 2, 1), (2, 2, 1)]


@pytest.mark.parametrize(("kernel", "stride", "dilation"), SIZES)
@pytest.mark.parametrize("exporting", [False, True])
def test_an_odd_padding_is_longer_below_and_right(kernel, stride, dilation, exporting, monkeypatch):
    monkeypatch.setattr("torch.compiler.is_exporting", lambda: exporting)
    convolution = EfficientSamSameConv2d(4, 4, kernel, stride, dilation=dilation, groups=2)
    pixels = torch.randn(2, 4, 12, 20)
    total = dilation * (kernel - 1) + 1 - stride
    padded = F.pad(pixels, (total // 2, total - total // 2) * 2)
    wanted = F.conv2d(padded, convolution.weight, convolution.bias, stride, dilation=dilation, groups=2)
    assert wanted.shape[2:] == (12 // stride, 20 // stride)
    assert_close(convolution(pixels), wanted)


@pytest.mark.parametrize("act", ["relu6", "relu"])
def test_working_in_place_changes_neither_answers_nor_gradients(act):
    """Block outputs, which are residuals and details, are read after the next block has worked."""
    config = tiny_config()
    config.vision_config.stem_stages, config.vision_config.stem_channels = ROWS, 4
    config.vision_config.patch_size, config.vision_config.stem_act = 8, act
    stem = make_model(config).vision_encoder.embeddings.patch_embedding
    pixels, results = torch.randn(2, 3, 48, 64, requires_grad=True), []
    activations = [module.activation for module in stem.modules() if hasattr(module, "activation")]
    assert len(activations) == 1 + len(stem.blocks)
    assert all(activation.inplace for activation in activations)
    for in_place in (True, False):
        for activation in activations:
            activation.inplace = in_place
        stem.zero_grad()
        answer = stem(pixels)[0]
        answer.square().sum().backward()
        results.append([answer, *(parameter.grad.clone() for parameter in stem.parameters())])
    assert_close(*results)


def test_first_convolution_takes_our_normalisation():
    weight, bias, mean, std = torch.randn(4, 3, 3, 3), torch.randn(4), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    photo = torch.rand(1, 3, 9, 9)
    ours = (photo - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert_close(
        F.conv2d(ours, *rescale_input(weight, bias, mean, std)),
        F.conv2d((255 * photo - 127) / 128, weight, bias),
        rtol=1e-4,
        atol=1e-4,
    )


def test_lite0_ends_at_stride_16_with_all_its_blocks():
    config = tiny_config()
    config.vision_config.stem_stages = [list(row) for row in EFFICIENTNET_LITE0]
    stem = make_model(config).vision_encoder.embeddings.patch_embedding
    assert len(stem.blocks) == 16
    assert stem(torch.randn(1, 3, 64, 96))[0].shape == (1, 24, 4, 6)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"_conv_stem.weight": torch.zeros(5, 3, 3, 3)}, "does not hold an EfficientNet-Lite"),
        ([1, 2], "does not hold an EfficientNet-Lite"),
    ],
    ids=["incomplete", "a list"],
)
def test_other_files_are_refused(tmp_path, stem, content, words):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=words):
        start_from_efficientnet(stem, tmp_path / "other.pth")


def test_missing_block_is_refused(tmp_path, stem):
    weights = {name: value for name, value in random_weights().items() if not name.startswith("_blocks.3._proj")}
    torch.save(weights, tmp_path / "short.pth")
    with pytest.raises(ValueError, match="2 tensors missing"):
        start_from_efficientnet(stem, tmp_path / "short.pth")


def test_missing_file_is_named(stem):
    with pytest.raises(FileNotFoundError, match=r"no weights at gone\.pth"):
        start_from_efficientnet(stem, "gone.pth")


def test_nano_has_lite0_for_its_stem():
    config = json.loads((REPOSITORY / "examples" / "configs" / "nano.json").read_text())
    assert [tuple(row) for row in config["vision_config"]["stem_stages"]] == list(EFFICIENTNET_LITE0)
