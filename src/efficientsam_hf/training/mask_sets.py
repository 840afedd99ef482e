"""Mask2Former on this package's encoder: its config, and a training step's inputs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..configuration_efficientsam import PYRAMID_STRIDES
from .classification import normalize_pixels
from .encoders import backbone_config, load_backbone


def build_mask2former(source: str, names: Sequence[str], encoder: dict[str, Any] | None = None, **fields: Any) -> Any:
    """A `Mask2FormerForUniversalSegmentation` over the pyramid of a checkpoint's encoder; all else starts anew.

    Args:
        source: Folder or Hub id of any checkpoint of this package.
        names: The classes by their numbers.
        encoder: Fields of the encoder's config in place of the checkpoint's.
        **fields: Of the `Mask2FormerConfig`.

    Raises:
        ValueError: if the checkpoint lacks the encoder.
        OSError: if there is no such folder or Hub id.
    """
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

    config = Mask2FormerConfig(
        backbone_config=backbone_config(source, **{"out_features": list(PYRAMID_STRIDES), **(encoder or {})}),
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
        **fields,
    )
    model = Mask2FormerForUniversalSegmentation(config)
    load_backbone(model, source)
    return model


def mask2former_inputs(batch: dict[str, Any], generator: torch.Generator | None = None) -> dict[str, Tensor | list]:
    """Samples of `data.instances` or `data.semantic` -> what Mask2Former takes; nothing is left to chance here."""
    pixels = normalize_pixels(batch["pixels"])
    return {
        "pixel_values": pixels,
        "mask_labels": [masks.to(pixels.device, torch.float32) for masks in batch["mask_labels"]],
        "class_labels": [labels.to(pixels.device) for labels in batch["class_labels"]],
    }
