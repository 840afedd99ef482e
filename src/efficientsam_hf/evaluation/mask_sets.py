"""What Mask2Former's queries say of a picture at its own size: instances with scores, or a class for each pixel.

Q queries, K classes, h x w their masks' grid. transformers' own post-processing goes through 384 x 384 pixels,
whatever the picture's size, which the published figures do not.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..masks_efficientsam import encode_rle


def masks_at_full_size(
    logits: Tensor, frame: tuple[int, int], placed: tuple[int, int], original: tuple[int, int]
) -> Tensor:
    """Mask logits (Q, h, w) of a frame -> the picture's part of it at its own size (Q, H, W).

    Args:
        logits: Over the frame.
        frame: Its height and width in pixels.
        placed: Height and width of the picture in its upper left corner.
        original: Height and width of the picture.
    """
    whole = F.interpolate(logits[None].float(), frame, mode="bilinear", align_corners=False)
    part = whole[..., : placed[0], : placed[1]]
    return F.interpolate(part, original, mode="bilinear", align_corners=False)[0]


def boxes_at_full_size(boxes: Tensor, placed: tuple[int, int], original: tuple[int, int]) -> list[list[float]]:
    """Boxes (N, 4) x0, y0, x1, y1 in a frame's pixels -> COCO's x, y, width, height in the picture's.

    `placed` and `original` as in `masks_at_full_size`.
    """
    sides = torch.tensor([*original[::-1], *original[::-1]], device=boxes.device)
    scale = sides / torch.tensor([*placed[::-1], *placed[::-1]], device=boxes.device)
    x0, y0, x1, y1 = (boxes.float() * scale).clamp(min=0).minimum(sides).unbind(1)
    return torch.stack([x0, y0, x1 - x0, y1 - y0], dim=1).tolist()


def best_instances(class_logits: Tensor, masks: Tensor, limit: int = 100) -> tuple[Tensor, Tensor, Tensor]:
    """The instances that Mask2Former is most sure of: pairs of a query and a class (Cheng et al., 2022).

    Args:
        class_logits: (Q, K + 1), the last class being none.
        masks: Logits at the picture's size (Q, H, W).
        limit: Pairs that are kept.

    Returns:
        Masks (N, H, W) bool, scores (N,) falling, labels (N,). The score is the class's share times the mean share of
        the mask's pixels. Empty masks are left out.
    """
    shares = class_logits.float().softmax(-1)[:, :-1]
    found, places = shares.flatten().topk(min(limit, shares.numel()))
    queries, labels = places // shares.shape[1], places % shares.shape[1]
    binary = masks > 0
    area = binary.sum((1, 2))
    sure = (masks.sigmoid() * binary).sum((1, 2)) / area.clamp(min=1)
    scores = found * sure[queries]
    order = scores.argsort(descending=True, stable=True)
    order = order[area[queries[order]] > 0]
    return binary[queries[order]], scores[order], labels[order]


def instance_rows(
    class_logits: Tensor, masks: Tensor, picture: int, category_ids: list[int], limit: int = 100
) -> list[dict[str, Any]]:
    """`best_instances` as rows of COCO's result format, `category_ids` being the classes' ids there."""
    found, scores, labels = best_instances(class_logits, masks, limit)
    return result_rows(found, scores, labels, picture, category_ids)


def result_rows(
    masks: Tensor, scores: Tensor, labels: Tensor, picture: int, category_ids: list[int]
) -> list[dict[str, Any]]:
    """Masks (N, H, W) bool, scores (N,), labels (N,) -> rows of COCO's result format."""
    return [
        {"image_id": picture, "category_id": category_ids[label], "segmentation": encode_rle(mask), "score": score}
        for mask, score, label in zip(masks, scores.tolist(), labels.tolist(), strict=True)
    ]


@torch.no_grad()
def predict_instances(
    model: Any,
    pixel_values: Tensor,
    picture: int,
    category_ids: list[int],
    frame: tuple[int, int],
    placed: tuple[int, int],
    original: tuple[int, int],
) -> list[dict[str, Any]]:
    """What a Mask2Former, or a `MaskRcnn`, finds in one picture -> rows of COCO's result format.

    A `MaskRcnn`'s have its boxes as well, which need not be those of its masks.

    Args:
        model: In evaluation mode.
        pixel_values: (1, 3, h, w), normalised.
        picture: Its id.
        category_ids: The classes' ids by their numbers.
        frame: See `masks_at_full_size`; so are `placed` and `original`.
        placed: As above.
        original: As above.
    """
    outputs = model(pixel_values=pixel_values)
    if "masks_queries_logits" in outputs:
        masks = masks_at_full_size(outputs.masks_queries_logits[0], frame, placed, original)
        return instance_rows(outputs.class_queries_logits[0], masks, picture, category_ids)
    found = outputs.detections[0]
    if not len(found["scores"]):
        return []
    masks = masks_at_full_size(found["masks"][:, 0], frame, placed, original) > 0.5
    rows = result_rows(masks, found["scores"], found["labels"] - 1, picture, category_ids)
    boxes = boxes_at_full_size(found["boxes"], placed, original)
    return [{**row, "bbox": box} for row, box in zip(rows, boxes, strict=True)]


def pixel_classes(class_logits: Tensor, masks: Tensor) -> Tensor:
    """The class that most of a pixel's queries speak for, each weighted by its mask: -> (H, W)."""
    shares = class_logits.float().softmax(-1)[:, :-1]
    return torch.einsum("qk,qhw->khw", shares, masks.sigmoid()).argmax(0)
