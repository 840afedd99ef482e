"""Which of the masks that answer a prompt is the best one."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .configuration_efficientsam import EfficientSamConfig
from .masks_efficientsam import box_iou, masks_to_boxes, stability_score
from .prompts_efficientsam import BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, gather_slots

MASK_CELLS = 4  # of the masks' grid along a side of a patch


def rank_masks(logits: Tensor, scores: Tensor, config: EfficientSamConfig, prompts: Mapping[str, Any]) -> Tensor:
    """What the best of a prompt's masks has most of: predicted IoU; times what the config says.

    Args:
        logits: Answers, (B, Q, M, h, w).
        scores: Their predicted IoU, (B, Q, M).
        config: The model's (`rank_by_stability`, `rank_by_box`).
        prompts: What was asked, as the model takes it; box corners may be among the points, labelled 2 and 3.

    Returns:
        (B, Q, M), float32.
    """
    ranks = scores.float()
    if config.rank_by_stability:
        ranks = ranks * stability_score(logits)
    given = [prompts.get(f"input_{name}") for name in ("points", "labels", "boxes")]
    if config.rank_by_box and any(part is not None for part in given):
        points, labels = gather_slots(*given)
        cells = points.float() * MASK_CELLS / config.vision_config.patch_size
        ranks = ranks * box_agreement(logits >= 0, cells, labels)
    return ranks


def box_agreement(masks: Tensor, points: Tensor, labels: Tensor) -> Tensor:
    """The IoU of each mask's box and the box of its prompt, 1 for prompts without one.

    Booleans (B, Q, M, h, w), slots (B, Q, P, 2) in cells of the masks and (B, Q, P) -> (B, Q, M), float32.
    """
    corners = [(labels == corner)[..., None] for corner in (BOX_TOP_LEFT, BOX_BOTTOM_RIGHT)]
    boxes = torch.cat([(points * corner).sum(2) for corner in corners], dim=-1)
    found = box_iou(boxes[:, :, None], masks_to_boxes(masks).float())[:, :, 0]
    return torch.where(corners[0].any(2), found, 1.0)


__all__ = ["rank_masks"]
