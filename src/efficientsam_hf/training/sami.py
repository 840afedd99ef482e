"""The pretraining step's inputs, and what one looks at while it runs."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..configuration_efficientsam_sami import EfficientSamSamiConfig
from ..modeling_efficientsam_sami import EfficientSamForPreTraining, join_patches, patch_pixels
from .classification import normalize_pixels
from .teachers import Teacher


def model_inputs(batch: dict[str, Any], config: EfficientSamSamiConfig, teacher: Teacher | None) -> dict[str, Tensor]:
    """Samples of `data.images` -> what `EfficientSamForPreTraining` takes.

    Args:
        batch: `pixels` (B, 3, S, S) uint8, `noise` (B, T); `features` (B, C, h, w) from a cache, or `teacher_pixels`.
        config: The student's.
        teacher: Looked at where the batch has no features; None where the pixels are the target.

    Raises:
        ValueError: if the features are the target and nothing gives them.
    """
    pixels = batch["pixels"]
    inputs = {"pixel_values": normalize_pixels(pixels), "noise": batch["noise"]}
    if config.target == "pixels":
        return inputs
    if "features" in batch:
        return {**inputs, "target_features": batch["features"].float()}
    if teacher is None:
        raise ValueError("the config's target is a teacher's features: give a teacher or a cache, got neither")
    seen = batch.get("teacher_pixels", pixels).float() / 255
    grid = pixels.shape[-1] // config.vision_config.patch_size
    return {**inputs, "target_features": teacher(seen, grid)}


@torch.no_grad()
def draw_reconstruction(
    inputs: dict[str, Tensor], prediction: Tensor, mask: Tensor, config: EfficientSamSamiConfig, count: int = 4
) -> np.ndarray:
    """A row a picture: the picture, what was visible of it, the target, the guess -> (count * S, 4 * S, 3), uint8.

    Features are shown by the three directions in which the targets differ most, in the same colours on both sides.
    """
    pixels, patch = inputs["pixel_values"][:count].float(), config.vision_config.patch_size
    mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    pictures = pixels * std + mean
    hidden = enlarge(mask[:count, None].float(), patch)
    guess = prediction[:count].float()
    if config.target == "pixels":
        shown = [pictures, guessed_pictures(guess, pixels, config) * std + mean]
    else:
        targets = inputs["target_features"][:count].float().permute(0, 2, 3, 1)
        shown = [enlarge(colours, patch) for colours in principal_colours(targets, guess)]
    rows = torch.cat([pictures, pictures * (1 - hidden) + 0.5 * hidden, *shown], dim=3)
    rows = (rows.clamp(0, 1) * 255).round().byte()
    return rows.permute(0, 2, 3, 1).flatten(0, 1).cpu().numpy()


def enlarge(cells: Tensor, times: int) -> Tensor:
    """(B, C, h, w) -> (B, C, h * times, w * times)."""
    return cells.repeat_interleave(times, dim=2).repeat_interleave(times, dim=3)


def guessed_pictures(guess: Tensor, pixels: Tensor, config: EfficientSamSamiConfig) -> Tensor:
    """Guessed patches (B, h, w, channels) -> pictures (B, 3, S, S); the true mean and deviation undo the norm."""
    patch = config.vision_config.patch_size
    if config.normalize_targets:
        true = patch_pixels(pixels, patch)
        deviation = true.var(-1, correction=0, keepdim=True).add(1e-6).sqrt()
        guess = guess * deviation + true.mean(-1, keepdim=True)
    return join_patches(guess, patch)


def principal_colours(targets: Tensor, guess: Tensor) -> tuple[Tensor, Tensor]:
    """Features (B, h, w, C) twice -> colours in [0, 1], (B, 3, h, w) twice, by the targets' principal directions."""
    centre = targets.flatten(0, 2).mean(0)
    directions = torch.linalg.svd((targets - centre).flatten(0, 2), full_matrices=False).Vh[:3]
    shown = [(features - centre) @ directions.T for features in (targets, guess)]
    low, high = shown[0].flatten(0, 2).quantile(torch.tensor([0.02, 0.98], device=centre.device), dim=0)
    first, second = (((colours - low) / (high - low + 1e-6)).clamp(0, 1).permute(0, 3, 1, 2) for colours in shown)
    return first, second


def training_flops(config: EfficientSamSamiConfig) -> int:
    """Floating-point operations of a training step without its teacher, a picture, for model FLOP utilisation.

    Three times the matrix products and convolutions of the forward pass, as is usual: going back takes twice as many.
    What is done again to save memory does not count.
    """
    side, cells = config.vision_config.pretrain_image_size, config.vision_config.position_grid_size
    with torch.device("meta"):
        model = EfficientSamForPreTraining(config)
        # As plain products: PyTorch's counter knows attention on a CPU in no other form.
        model.set_attn_implementation("eager")
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, side, side), noise=torch.empty(1, cells**2))
    return 3 * counter.get_total_flops()
