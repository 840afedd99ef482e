"""The loss of promptable segmentation: focal, dice and predicted IoU, on the mask that comes nearest, or is given.

B images, Q prompts an image, M masks a prompt. A label pixel is 1 on the object, 0 off it, below 0 where nobody knows:
such pixels cost nothing, and a prompt without a known pixel (padding) drops out of the mean.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_labels(labels: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Bring labels to the masks' resolution by area.

    All of an object is unknown that fills half of no cell: to learn that it is nowhere would be wrong.

    Args:
        labels: (B, Q, H, W), values 1, 0, or below 0 for unknown.
        size: (h, w) of the predicted masks.

    Returns:
        Targets (B, Q, h, w) of 0 and 1, and which pixels are known (B, Q, h, w), both float32.
    """
    known = (labels >= 0).float()
    positive = (labels > 0).float()
    if labels.shape[-2:] != size:
        known = F.adaptive_avg_pool2d(known, size)
        positive = F.adaptive_avg_pool2d(positive, size)
    targets = (positive > 0.5 * known).float()
    vanished = (labels > 0).flatten(2).any(2) & ~targets.bool().flatten(2).any(2)
    return targets, (known > 0.5).float() * ~vanished[..., None, None]


def mean_over_known(values: Tensor, known: Tensor) -> Tensor:
    """Mean of `values` (..., h, w) over the pixels where `known` (..., h, w) is 1; 0 where none is."""
    return (values * known).sum((-2, -1)) / known.sum((-2, -1)).clamp(min=1)


def focal_loss(logits: Tensor, targets: Tensor, known: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Focal loss (Lin et al., 2017) averaged over known pixels: (..., h, w) each -> (...)."""
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    missed = (logits.sigmoid() - targets).abs()
    balance = (1 - alpha) + (2 * alpha - 1) * targets
    return mean_over_known(balance * missed**gamma * cross_entropy, known)


def dice_loss(logits: Tensor, targets: Tensor, known: Tensor) -> Tensor:
    """One minus the soft Dice coefficient over known pixels, smoothed by one pixel: (..., h, w) each -> (...)."""
    chances, targets = logits.sigmoid() * known, targets * known
    overlap = 2 * (chances * targets).sum((-2, -1))
    return 1 - (overlap + 1) / (chances.sum((-2, -1)) + targets.sum((-2, -1)) + 1)


def true_iou(logits: Tensor, targets: Tensor, known: Tensor) -> Tensor:
    """IoU of the masks that logits stand for, over known pixels: (..., h, w) each -> (...); 1 for two empty ones."""
    predicted, wanted = (logits >= 0) & (known > 0), (targets > 0) & (known > 0)
    intersection = (predicted & wanted).sum((-2, -1))
    union = (predicted | wanted).sum((-2, -1))
    return torch.where(union > 0, intersection / union.clamp(min=1), 1.0)


def segmentation_loss(
    pred_masks: Tensor,
    iou_scores: Tensor,
    labels: Tensor,
    focal_weight: float = 20.0,
    dice_weight: float = 1.0,
    iou_weight: float = 1.0,
    every_iou: bool = False,
    iou_error: str = "squared",
    answered_share: float = 0.0,
) -> dict[str, Tensor]:
    """Blame the mask nearest to the label alone (Kirillov et al., 2023, appendix A; weights 20 : 1 : 1).

    Every prompt of the batch weighs the same, so that a picture with more objects weighs more than its neighbours.

    Args:
        pred_masks: Logits (B, Q, M, h, w).
        iou_scores: Predicted IoU (B, Q, M).
        labels: (B, Q, H, W), values 1, 0, or below 0 for unknown; any size, brought to (h, w).
        focal_weight: Weight of the focal loss.
        dice_weight: Weight of the dice loss.
        iou_weight: Weight of the error of the predicted IoU.
        every_iou: Train the predicted IoU of all masks, as SAM 2 does, so that the best one is known by it; otherwise
            only that of the nearest.
        iou_error: "squared" (SAM) or "absolute" (SAM 2).
        answered_share: Of the blame, 0 to 1, so much goes to the mask with the highest predicted IoU, which is what
            a user is given, and the rest to the nearest.

    Returns:
        `loss`, the one to differentiate, and its unweighted parts `focal`, `dice`, `iou`, each a mean over the prompts
        that have a known pixel.

    Raises:
        ValueError: if there is no such error, or the labels are not those of the prompts.
    """
    if iou_error not in ("squared", "absolute"):
        raise ValueError(f"iou_error must be squared or absolute, got {iou_error!r}")
    batch, count = pred_masks.shape[:2]
    if labels.ndim != 4 or labels.shape[:2] != (batch, count):
        raise ValueError(f"labels must be ({batch}, {count}, h, w), got {tuple(labels.shape)}")
    targets, known = resize_labels(labels, (pred_masks.shape[-2], pred_masks.shape[-1]))
    targets, known = targets[:, :, None].expand_as(pred_masks), known[:, :, None].expand_as(pred_masks)
    logits = pred_masks.float()
    focal, dice = focal_loss(logits, targets, known), dice_loss(logits, targets, known)
    with torch.no_grad():
        nearest = (focal_weight * focal + dice_weight * dice).argmin(-1, keepdim=True)
        wanted_iou = true_iou(logits, targets, known)
    error = iou_scores.float() - wanted_iou
    parts = {"focal": focal, "dice": dice, "iou": error**2 if iou_error == "squared" else error.abs()}
    counted = known[:, :, 0].amax((-2, -1))
    answered = iou_scores.detach().argmax(-1, keepdim=True)
    of_each = {
        name: part.gather(-1, nearest).lerp(part.gather(-1, answered), answered_share)[..., 0]
        for name, part in parts.items()
    }
    if every_iou:
        of_each["iou"] = parts["iou"].mean(-1)
    parts = {name: (part * counted).sum() / counted.sum().clamp(min=1) for name, part in of_each.items()}
    loss = focal_weight * parts["focal"] + dice_weight * parts["dice"] + iou_weight * parts["iou"]
    return {"loss": loss, **parts}


__all__ = ["dice_loss", "focal_loss", "mean_over_known", "resize_labels", "segmentation_loss", "true_iou"]
