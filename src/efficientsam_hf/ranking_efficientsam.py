"""Which of the masks that answer a prompt is the best one."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .configuration_efficientsam import EfficientSamConfig
from .masks_efficientsam import box_iou, masks_to_boxes, stability_score
from .prompts_efficientsam import BACKGROUND, BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, OBJECT, gather_slots

MASK_CELLS = 4  # of the masks' grid along a side of a patch


def rank_masks(logits: Tensor, scores: Tensor, config: EfficientSamConfig, prompts: Mapping[str, Any]) -> Tensor:
    """What the best of a prompt's masks has most of: predicted IoU; times what the config says.

    Args:
        logits: Answers, (B, Q, M, h, w).
        scores: Their predicted IoU, (B, Q, M).
        config: The model's (`rank_by_stability`, `rank_by_prompt`).
        prompts: What was asked, as the model takes it; box corners may be among the points, labelled 2 and 3.

    Returns:
        (B, Q, M), float32.
    """
    ranks = scores.float()
    if config.rank_by_stability:
        ranks = ranks * stability_score(logits)
    given = [prompts.get(f"input_{name}") for name in ("points", "labels", "boxes")]
    if config.rank_by_prompt and any(part is not None for part in given):
        points, labels = gather_slots(*given)
        cells = points.float() * MASK_CELLS / config.vision_config.patch_size
        ranks = ranks * prompt_agreement(logits >= 0, cells, labels)
    return ranks


def prompt_agreement(masks: Tensor, points: Tensor, labels: Tensor) -> Tensor:
    """How well masks keep to their prompts: to the edges of a box, times half of one and of the share of clicks.

    A mask that leaves half of its box empty is hardly meant; one that misses a click of several may be.

    Booleans (B, Q, M, h, w), slots (B, Q, P, 2) in cells of the masks and (B, Q, P) -> (B, Q, M), float32.
    """
    return agreement_with_boxes(masks, points, labels) * (1 + agreement_with_clicks(masks, points, labels)) / 2


def agreement_with_boxes(masks: Tensor, points: Tensor, labels: Tensor) -> Tensor:
    """The IoU of a mask's box and the prompt's, 1 for prompts without: shapes as `prompt_agreement`'s."""
    corners = [(labels == corner)[..., None] for corner in (BOX_TOP_LEFT, BOX_BOTTOM_RIGHT)]
    boxes = torch.cat([(points * corner).sum(2) for corner in corners], dim=-1)
    found = box_iou(boxes[:, :, None], masks_to_boxes(masks).float())[:, :, 0]
    return torch.where(corners[0].any(2), found, 1.0)


def agreement_with_clicks(masks: Tensor, points: Tensor, labels: Tensor) -> Tensor:
    """The share of a prompt's clicks that a mask answers, 1 for prompts without: shapes as `prompt_agreement`'s."""
    height, width = masks.shape[-2:]
    x, y = points[..., 0].long().clamp(0, width - 1), points[..., 1].long().clamp(0, height - 1)
    places = (y * width + x)[:, :, None].expand(-1, -1, masks.shape[2], -1)
    covered = masks.flatten(-2).gather(-1, places)
    is_click = ((labels == OBJECT) | (labels == BACKGROUND))[:, :, None]
    answered = (covered == (labels == OBJECT)[:, :, None]) & is_click
    clicks = is_click.sum(-1)
    return torch.where(clicks > 0, answered.sum(-1) / clicks.clamp(min=1), 1.0)


__all__ = ["rank_masks"]
