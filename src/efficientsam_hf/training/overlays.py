"""What one looks at while a model learns: true masks beside the answers to their boxes."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ..data.sa1b import LabelledPicture
from ..masks_efficientsam import decode_rle, masks_to_boxes
from ..modeling_efficientsam import EfficientSamModel
from ..prediction import segment
from ..processing_efficientsam import EfficientSamProcessor
from ..visualization import draw_segmentation

logger = logging.getLogger(__name__)

GAP = 4  # pixels of white between two pictures


@dataclass(frozen=True)
class Example:
    """A picture (H, W, 3) uint8 with some of its true masks (N, H, W), booleans."""

    pixels: np.ndarray
    masks: np.ndarray

    @property
    def boxes(self) -> list[list[int]]:
        """The masks' boxes."""
        return masks_to_boxes(self.masks).tolist()


def find_examples(pictures: Sequence[LabelledPicture], count: int = 4, objects: int = 4) -> list[Example]:
    """The first pictures that have masks, each with the largest ones that leave some of it over.

    What cannot be read, or has another size than its picture, is left out, as it is where it is measured.
    """
    examples: list[Example] = []
    for picture in pictures:
        if len(examples) == count:
            break
        try:
            pixels = np.asarray(picture.read_image())
            masks = list(sound_masks(picture.read_annotations(), pixels.shape[:2]))
        except ValueError as error:
            logger.warning("not drawn: %s", error)
            continue
        fitting = sorted((mask for mask in masks if mask.mean() <= 0.9), key=lambda mask: -int(mask.sum()))[:objects]
        if fitting:
            examples.append(Example(pixels, np.stack(fitting)))
    return examples


def sound_masks(records: Sequence[dict[str, Any]], size: tuple[int, ...]) -> Iterator[np.ndarray]:
    """The masks (H, W) of annotations that can be read, are not empty and have their picture's size."""
    for record in records:
        try:
            mask = decode_rle(record["segmentation"]).numpy()
        except (ValueError, KeyError, TypeError):
            continue
        if mask.shape == size and mask.any():
            yield mask


def answer_boxes(model: EfficientSamModel, processor: EfficientSamProcessor, example: Example) -> np.ndarray:
    """The model's best masks for the true masks' boxes, (N, H, W), booleans; the model is left in its mode."""
    training = model.training
    try:
        answer = segment(model.eval(), processor, example.pixels, boxes=example.boxes, zoom=0)
    finally:
        model.train(training)
    return answer.masks[:, 0].cpu().numpy()


def draw_answers(
    examples: Sequence[Example], answers: Sequence[Sequence[np.ndarray]], height: int = 240
) -> np.ndarray:
    """A row for each example: its true masks with their boxes, then each answer -> (h, w, 3), uint8; white of none.

    Args:
        examples: What was asked.
        answers: For each of them one or more answers (N, H, W), such as before and after training.
        height: Of a row in pixels.
    """
    rows = []
    for example, columns in zip(examples, answers, strict=True):
        size = (round(height * example.pixels.shape[1] / example.pixels.shape[0]), height)
        drawn = [draw_segmentation(example.pixels, example.masks, boxes=example.boxes)]
        drawn += [draw_segmentation(example.pixels, masks) for masks in columns]
        small = [np.asarray(picture.resize(size, Image.Resampling.LANCZOS)) for picture in drawn]
        rows.append(
            np.concatenate([np.pad(part, ((0, GAP), (0, GAP), (0, 0)), constant_values=255) for part in small], 1)
        )
    if not rows:
        return np.full((GAP, GAP, 3), 255, np.uint8)
    width = max(row.shape[1] for row in rows)
    return np.concatenate(
        [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    )
