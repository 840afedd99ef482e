"""Mean boundary IoU of masks (Cheng et al., 2021), for `evaluate`."""

from typing import Any

import datasets
import evaluate
import numpy as np

from efficientsam_hf.evaluation.metrics import BOUNDARY_SHARE, boundary_iou

DESCRIPTION = "Intersection over union of what lies near each mask's and its reference's boundary; mean over masks."
INPUTS = """
predictions: masks (height, width), 1 on the object, 0 off it.
references: as predictions; -1 for pixels that count for nothing.
share: width of the boundary as a share of the picture's diagonal, 0.02 if left out.
Gives boundary_iou.
"""


class BoundaryIou(evaluate.Metric):
    """See `INPUTS`."""

    def _info(self) -> evaluate.MetricInfo:
        mask = datasets.Sequence(datasets.Sequence(datasets.Value("int8")))
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": mask, "references": mask}),
        )

    def _compute(
        self, predictions: Any, references: Any, share: float = BOUNDARY_SHARE, **of_others: Any
    ) -> dict[str, float]:
        # `evaluate.combine` hands every module the arguments of all: `of_others` are theirs.
        scores = [
            boundary_iou(np.asarray(answer) > 0, np.asarray(truth) > 0, np.asarray(truth) < 0, share)
            for answer, truth in zip(predictions, references, strict=True)
        ]
        return {"boundary_iou": float(np.mean(scores))}
