"""Results as the objects of other libraries."""

from collections.abc import Sequence
from typing import Any

import torch

from .masks_efficientsam import decode_rle, masks_to_boxes


def to_supervision(records: Sequence[dict[str, Any]]) -> Any:
    """Records as `supervision.Detections`, for its annotators, trackers, filters and file formats.

    Masks, boxes around them, `predicted_iou` as confidence, `category_id` (0 if there is none) as class; whatever else
    all records have stands in `data`. Needs the extra [supervision].

    Args:
        records: From `segment_everything`, `Segmentation.records`, or COCO's JSON of labels.

    Raises:
        ImportError: without supervision.
    """
    try:
        import supervision
    except ImportError as error:
        raise ImportError("wanted supervision: pip install 'efficientsam-hf[supervision]'") from error
    import numpy as np

    if not records:
        return supervision.Detections.empty()
    masks = torch.stack([decode_rle(record["segmentation"]) for record in records])
    shared = set.intersection(*(set(record) for record in records))
    others = sorted(shared - {"segmentation", "bbox", "predicted_iou", "category_id"})
    scores = [record.get("predicted_iou", 1.0) for record in records]
    return supervision.Detections(
        xyxy=masks_to_boxes(masks).numpy().astype(np.float32),
        mask=masks.numpy(),
        confidence=np.array(scores, dtype=np.float32),
        class_id=np.array([record.get("category_id", 0) for record in records]),
        data={name: [record[name] for record in records] for name in others},
    )


__all__ = ["to_supervision"]
