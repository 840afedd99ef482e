"""How much a frozen encoder tells of classes: nearest neighbours, a linear probe, and plain accuracy.

N pictures, C channels of their features, K classes.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def top_accuracy(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Scores (N, K) of classes, labels (N,) -> `accuracy`, as the `evaluate` library calls it, and `top5_accuracy`."""
    hits = scores.topk(min(5, scores.shape[1]), dim=1).indices == labels[:, None]
    return {"accuracy": hits[:, 0].float().mean().item(), "top5_accuracy": hits.any(1).float().mean().item()}


@torch.no_grad()
def collect_features(
    model: Any, items: Sequence, prepare: Callable[[list], Any], batch_size: int = 32
) -> tuple[Tensor, Tensor]:
    """Features (N, C) float32 and labels (N,) of classified pictures.

    Args:
        model: Has `get_image_features`, as `EfficientSamForImageClassification` does, and is in evaluation mode.
        items: Of pictures and class numbers.
        prepare: Pictures -> something with `pixel_values`: an image processor.
        batch_size: Pictures at a time.

    Raises:
        ValueError: if there are no pictures.
    """
    if not len(items):
        raise ValueError("wanted pictures to collect features of, found none")
    features: list[Tensor] = []
    labels: list[int] = []
    for start in range(0, len(items), batch_size):
        images, numbers = zip(
            *(items[index] for index in range(start, min(start + batch_size, len(items)))), strict=True
        )
        pixels = prepare(list(images))["pixel_values"].to(model.device, model.dtype)
        features.append(model.get_image_features(pixels).float().cpu())
        labels += numbers
    return torch.cat(features), torch.tensor(labels)


def neighbour_scores(
    known: Tensor, known_labels: Tensor, asked: Tensor, classes: int, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """Votes of the k nearest known pictures by cosine, each weighted by exp(cosine / temperature).

    The protocol of Wu et al. (2018) that DINO made the usual one, with its values.

    Args:
        known: Features (M, C).
        known_labels: Their classes (M,).
        asked: Features (N, C).
        classes: How many there are, K.
        k: Neighbours that vote.
        temperature: Smaller lets the nearest decide alone.

    Returns:
        (N, K).

    Raises:
        ValueError: if k is more than the known pictures, or a label is out of range.
    """
    check_range(known_labels, classes)
    if not 1 <= k <= len(known):
        raise ValueError(f"k must be from 1 to {len(known)}, the number of known pictures, got {k}")
    cosines = F.normalize(asked, dim=1) @ F.normalize(known, dim=1).T
    nearest, places = cosines.topk(k, dim=1)
    votes = F.one_hot(known_labels[places], classes)
    return ((nearest / temperature).exp()[..., None] * votes).sum(1)


def probe_scores(
    known: Tensor, known_labels: Tensor, asked: Tensor, classes: int, penalty: float = 1e-2, steps: int = 200
) -> Tensor:
    """Scores of a linear classifier that was fitted to the known features, each brought to mean 0 and variance 1.

    Multinomial logistic regression by L-BFGS, which has one minimum and needs neither rate nor seed.

    Args:
        known: Features (M, C).
        known_labels: Their classes (M,).
        asked: Features (N, C).
        classes: How many there are, K.
        penalty: On the squares of the weights, beside the mean cross-entropy.
        steps: Of L-BFGS, at most.

    Returns:
        (N, K).

    Raises:
        ValueError: if a label is out of range.
    """
    check_range(known_labels, classes)
    mean, deviation = known.mean(0), known.std(0, correction=0).clamp(min=1e-6)
    known, asked = (known - mean) / deviation, (asked - mean) / deviation
    weight = torch.zeros(known.shape[1], classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(known @ weight + bias, known_labels) + penalty * weight.square().sum() / 2
        value.backward()
        return value

    optimizer.step(loss)
    return (asked @ weight + bias).detach()


def check_range(labels: Tensor, classes: int) -> None:
    """Raise ValueError if a class number is not from 0 to classes - 1."""
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(f"labels must be from 0 to {classes - 1}, got from {labels.min()} to {labels.max()}")


def fold_numbers(labels: Iterable[int], folds: int, seed: int = 0) -> Tensor:
    """For each picture the fold that it is asked in; every class is spread over the folds as evenly as it can be."""
    labels = torch.as_tensor(list(labels))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    numbers, count = torch.empty_like(labels), 0
    for label in labels.unique():
        places = order[labels[order] == label]
        numbers[places] = (torch.arange(len(places)) + count) % folds
        count += len(places)
    return numbers
