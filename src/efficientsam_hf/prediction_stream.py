"""Many pictures, or the frames of a film: read, copied and segmented at the same time.

B pictures a batch, Q objects a picture, M masks an object, H x W a picture.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from .cpu_threads import in_order
from .pictures_efficientsam import read_picture
from .prediction import NOBODY, Segmentation, answer_at_size, best_first, find_zoom, pointed_at
from .processing_efficientsam import EfficientSamProcessor
from .prompts_efficientsam import one_image
from .zooming import Pointed

PROMPTS = ("points", "labels", "boxes")  # arguments of `segment`; the processor's are called input_...


@dataclass(frozen=True)
class Staged:
    """A batch on the model's device, ready to be segmented."""

    pictures: list[Tensor]
    inputs: dict[str, Tensor]
    objects: list[list[Pointed]]
    ready: Any  # an event of the stream that copies, or None


class SegmentationStream:
    """Segments pictures as they come, in their order, each as `segment` does.

    While the device works on one batch, the next is copied to it and stretched there, and threads read and decode the
    pictures after that. On a GPU the copies go through page-locked memory on a stream of their own.

    Args:
        model: On any device; anything that offers what `SegmentationNetwork` lists.
        processor: The model's.
        batch_size: Pictures that the encoder sees at once.
        readers: Threads that read pictures.
        ahead: Batches that may be read before they are needed.
        zoom: As in `segment`; a closer look costs the encoder's work for each object by itself.

    Raises:
        ValueError: for a number below 1, and a `zoom` as in `segment`.
    """

    def __init__(
        self,
        model: Any,
        processor: EfficientSamProcessor,
        batch_size: int = 4,
        readers: int = 2,
        ahead: int = 2,
        zoom: float | None = None,
    ):
        for name, value in {"batch_size": batch_size, "readers": readers, "ahead": ahead}.items():
            if value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        self.model = model
        self.processor = processor
        self.batch_size, self.readers, self.ahead, self.zoom = batch_size, readers, ahead, find_zoom(model, zoom)
        self.device = torch.device(model.device)
        self.copying = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def __call__(self, requests: Iterable[tuple[Any, dict[str, Any]]]) -> Iterator[Segmentation]:
        """Answer requests one after the other; they are taken only as far ahead as they are read.

        Args:
            requests: Pictures of any kind, a file's name or a film's frame, each with its prompts: `points`, `labels`
                and `boxes` as `segment` takes them. One array may hold every frame.

        Yields:
            What `segment` answers to each.

        Raises:
            ValueError: for a picture or a prompt that cannot be read, once all answers before it are given, as for any
                error of the requests themselves; for a prompt that cannot be meant, once those before its batch are.
        """
        with ThreadPoolExecutor(self.readers) as pool:
            read = in_order(pool, read_request, map(as_it_is_now, requests), self.batch_size * self.ahead)
            waiting: tuple[Staged, Any] | None = None
            try:
                for batch in batches(read, self.batch_size):
                    staged = self.stage(batch)
                    # On a GPU this only starts the work, which then goes on while the answers before it are taken.
                    before, waiting = waiting, (staged, self.compute(staged))
                    if before:
                        yield from self.answers(*before)
            except Exception:
                if waiting:
                    yield from self.answers(*waiting)
                raise
            if waiting:
                yield from self.answers(*waiting)

    def stage(self, batch: list[tuple[Tensor, dict[str, Any]]]) -> Staged:
        """Copy pictures to the device and prepare them there, beside what it is doing."""
        pictures, prompts = [picture for picture, _ in batch], [asked for _, asked in batch]
        with torch.cuda.stream(self.copying) if self.copying else nullcontext():
            copies = pictures
            if self.copying:
                copies = [pinned(picture).to(self.device, non_blocking=True) for picture in pictures]
            prepared = self.processor.image_processor(copies, return_tensors="pt", device=self.device)
            asked = self.processor(original_sizes=prepared["original_sizes"], **gather(prompts))
            del asked["original_sizes"]
            inputs = {"pixel_values": prepared["pixel_values"], **asked.to(self.device)}
            ready = self.copying.record_event() if self.copying else None
        rows = ([[asked[name] or []] for name in PROMPTS] for asked in prompts)
        objects = [pointed_at(points, labels, boxes) for points, labels, boxes in rows]
        return Staged(pictures, inputs, objects, ready)

    @torch.inference_mode()
    def compute(self, staged: Staged) -> Any:
        """Start the model on a batch."""
        if staged.ready is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(staged.ready)
            for tensor in staged.inputs.values():
                tensor.record_stream(current)
        return self.model(**staged.inputs)

    @torch.no_grad()
    def answers(self, staged: Staged, outputs: Any) -> Iterator[Segmentation]:
        """Masks at the pictures' sizes, without those of the padding."""
        masks, scores = best_first(outputs.pred_masks, outputs.iou_scores, self.model.config.rank_by_stability)
        for row, objects in enumerate(staged.objects):
            found, own, picture = masks[row, : len(objects)], scores[row, : len(objects)], staged.pictures[row]
            drawn, own = answer_at_size(self.model, self.processor, picture, found, own, objects, self.zoom)
            # Copies, which are no inference tensors and do not hold those of the whole batch.
            yield Segmentation(drawn, own.clone(), outputs.image_embeddings[row : row + 1].clone())


def batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of so many items, the last perhaps of fewer; what comes before an error is given before it."""
    batch: list[Any] = []
    try:
        for item in items:
            batch.append(item)
            if len(batch) == size:
                yield batch
                batch = []
    except Exception:
        if batch:
            yield batch
        raise
    if batch:
        yield batch


def as_it_is_now(request: tuple[Any, dict[str, Any]]) -> tuple[Any, dict[str, Any]]:
    """A picture, and its prompts with a list for each object, whatever the caller writes over afterwards."""
    if not isinstance(request, tuple | list) or len(request) != 2:
        found = f"{len(request)} of them" if isinstance(request, tuple | list) else type(request).__name__
        raise ValueError(f"a stream wants pairs of a picture and its prompts, found {found}")
    picture, prompts = request
    unknown = sorted(set(prompts) - set(PROMPTS))
    if unknown:
        raise ValueError(f"unknown prompt {unknown[0]!r}, wanted {', '.join(PROMPTS)}")
    lists = {name: one_image(prompts.get(name), f"input_{name}") for name in PROMPTS}
    if all(value is None for value in lists.values()):
        raise ValueError(f"found no prompt, wanted {', '.join(PROMPTS)}, or an empty list for no object")
    return kept(picture), {name: value and value[0] for name, value in lists.items()}


def kept(picture: Any) -> Any:
    """A copy of what is in memory, or of Pillow's open file, which the caller may close; names are left to be read."""
    if isinstance(picture, Tensor):
        return picture.clone()
    return picture.copy() if isinstance(picture, np.ndarray | Image) else picture


def read_request(request: tuple[Any, dict[str, Any]]) -> tuple[Tensor, dict[str, Any]]:
    """A picture's pixels (3, H, W), and its prompts."""
    picture, prompts = request
    return read_picture(picture), prompts


def pinned(picture: Tensor) -> Tensor:
    """A picture (3, H, W) in page-locked memory; a grey one, of three views of one channel, is written out for it."""
    return (picture if all(picture.stride()) else picture.contiguous()).pin_memory()


def gather(prompts: list[dict[str, Any]]) -> dict[str, Any]:
    """The prompts of several pictures, as the processor takes them; labels that were left out are all 1."""
    prompts = [asked if any(asked.values()) else {**asked, **NOBODY} for asked in prompts]
    labels = [asked["labels"] or [[1] * len(clicks or []) for clicks in asked["points"] or []] for asked in prompts]
    return {
        "input_points": [asked["points"] for asked in prompts],
        "input_labels": labels,
        "input_boxes": [asked["boxes"] for asked in prompts],
    }
