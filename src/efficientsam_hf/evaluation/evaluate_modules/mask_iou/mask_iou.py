"""Mean intersection over union of masks, for `evaluate`."""

from typing import Any

import datasets
import evaluate
import numpy as np

from efficientsam_hf.evaluation.metrics import iou

DESCRIPTION = "Intersection over union of each mask with its reference; mean over masks."
INPUTS = """
predictions: masks (height, width), 1 on the object, 0 off it.
references: as predictions; -1 for pixels that count for nothing.
Gives mask_iou.
"""


class MaskIou(evaluate.Metric):
    """See `INPUTS`."""

    def _info(self) -> evaluate.MetricInfo:
        mask = datasets.Sequence(datasets.Sequence(datasets.Value("int8")))
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": mask, "references": mask}),
        )

    def _compute(self, predictions: Any, references: Any, **of_others: Any) -> dict[str, float]:
        # `evaluate.combine` hands every module the arguments of all: `of_others` are theirs.
        scores = [
            iou(np.asarray(answer) > 0, np.asarray(truth) > 0, np.asarray(truth) < 0)
            for answer, truth in zip(predictions, references, strict=True)
        ]
        return {"mask_iou": float(np.mean(scores))}
