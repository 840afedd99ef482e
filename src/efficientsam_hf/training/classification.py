"""The classification step's inputs: normalised pictures, mixed in pairs, and the share of each class in them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


def normalize_pixels(pixels: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 -> float32 with ImageNet's mean and deviation."""
    mean, std = (
        torch.tensor(values, device=pixels.device).view(3, 1, 1)
        for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    )
    return (pixels.float() / 255 - mean) / std


def smooth_labels(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """Class numbers (B,) -> shares (B, classes) that sum to 1; `smoothing` is spread evenly over all classes."""
    return F.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes


def mix_pairs(pixels: Tensor, shares: Tensor, alpha: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mixup (Zhang et al., 2018): each picture with the one as far from the batch's other end, in one ratio.

    Args:
        pixels: (B, 3, H, W).
        shares: Of the classes, (B, classes).
        alpha: The ratio is drawn from Beta(alpha, alpha); 0 mixes nothing.
        generator: Source of the ratio.
    """
    if not alpha:
        return pixels, shares
    # torch's own Beta takes no generator; the ratio of two Gamma variables is one.
    gammas = torch._standard_gamma(torch.full((2,), float(alpha)), generator=generator)
    ratio = (gammas[0] / gammas.sum()).item()
    return pixels.lerp(pixels.flip(0), 1 - ratio), shares.lerp(shares.flip(0), 1 - ratio)


def classification_inputs(
    batch: dict[str, Any], generator: torch.Generator, classes: int, smoothing: float, mixup: float
) -> dict[str, Tensor]:
    """Samples of `data.classified_images` -> what `EfficientSamForImageClassification` takes."""
    shares = smooth_labels(batch["labels"], classes, smoothing)
    pixels, shares = mix_pairs(normalize_pixels(batch["pixels"]), shares, mixup, generator)
    return {"pixel_values": pixels, "labels": shares}
