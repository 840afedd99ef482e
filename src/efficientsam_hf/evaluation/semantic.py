"""Mean IoU over classes, from the pixels of all pictures together."""

import torch
from torch import Tensor


class ConfusionMatrix:
    """Counts of pixels by true and by guessed class.

    Args:
        classes: How many there are, K.
        ignored: True class that counts for nothing.
    """

    def __init__(self, classes: int, ignored: int = 255):
        self.ignored = ignored
        self.counts = torch.zeros(classes, classes, dtype=torch.int64)

    def add(self, guessed: Tensor, true: Tensor) -> None:
        """Classes of pixels, both of one shape.

        Raises:
            ValueError: if the shapes differ, or a class is out of range.
        """
        classes = len(self.counts)
        if guessed.shape != true.shape:
            raise ValueError(f"guessed and true classes must have one shape, got {guessed.shape} and {true.shape}")
        known = true != self.ignored
        pairs = torch.stack([true[known], guessed[known]]).cpu().long()
        if pairs.numel() and not 0 <= pairs.min() <= pairs.max() < classes:
            raise ValueError(f"classes must be from 0 to {classes - 1}, got from {pairs.min()} to {pairs.max()}")
        flat = pairs[0] * classes + pairs[1]
        self.counts += torch.bincount(flat, minlength=classes**2).view(classes, classes)

    def figures(self) -> dict[str, float]:
        """`mean_iou`, `mean_accuracy` and `overall_accuracy`, as the `evaluate` library's mean_iou metric has them.

        The means are over classes that occur; a class that neither truth nor guess has counts in none of them.
        """
        hits, true, guessed = self.counts.diagonal().double(), self.counts.sum(1), self.counts.sum(0)
        union = true + guessed - hits
        return {
            "mean_iou": (hits / union)[union > 0].mean().item(),
            "mean_accuracy": (hits / true)[true > 0].mean().item(),
            "overall_accuracy": (hits.sum() / true.sum()).item(),
        }
