"""Mean number of clicks until an IoU is reached (Sofiiuk et al., 2021), for `evaluate`."""

from typing import Any

import datasets
import evaluate
import numpy as np

from efficientsam_hf.evaluation.metrics import number_of_clicks

DESCRIPTION = "Clicks until the IoU of each object's mask is at least 0.85 and 0.90; mean over objects."
INPUTS = """
ious: for each object the IoU after its first click, its second, and so on.
most: clicks that count as never, 20 if left out.
Gives noc_85, noc_90, never_85 and never_90 (objects that did not get there).
"""
WANTED = {"85": 0.85, "90": 0.90}


class NumberOfClicks(evaluate.Metric):
    """See `INPUTS`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"ious": datasets.Sequence(datasets.Value("float64"))}),
        )

    def _compute(self, ious: Any, most: int = 20, **of_others: Any) -> dict[str, float]:
        # `evaluate.combine` hands every module the arguments of all: `of_others` are theirs.
        found: dict[str, float] = {}
        for name, wanted in WANTED.items():
            found[f"noc_{name}"] = float(np.mean([number_of_clicks(scores, wanted, most) for scores in ious]))
            found[f"never_{name}"] = sum(max(scores[:most]) < wanted for scores in ious)
        return found
