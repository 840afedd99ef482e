"""What one person does with one photo: clicks, boxes, undo, masks to choose from. Any page or window may show it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from .mask_drawing import decode_box
from .mask_generation import coco_dataset, segment_everything
from .masks_efficientsam import decode_rle, encode_rle
from .modeling_efficientsam import EfficientSamModel
from .pictures_efficientsam import read_photo
from .prediction import Segmentation, segment
from .processing_efficientsam import EfficientSamProcessor
from .visualization import cut_out, draw_everything, draw_segmentation, label_map

SHOWN_SIDE = 800  # pixels of the longer side of what is drawn, at every click
FARTHEST = 2  # sides that a place may lie from the photo's middle; what is farther must be in pixels
KINDS = ("mask", "coco", "cutout")


@dataclass(frozen=True)
class Prompt:
    """What was pointed at so far: clicks x, y with labels 1 (object) or 0 (background), and at most one box.

    With its last click goes the mask that it corrects, as run lengths, so that it is asked for the same again; once
    something else is pointed at, it keeps which of its answer's masks was chosen.
    """

    points: tuple[tuple[float, float], ...] = ()
    labels: tuple[int, ...] = ()
    box: tuple[float, float, float, float] | None = None
    mask: dict[str, Any] | None = None
    choice: int = 0

    def with_click(self, x: float, y: float, label: int, mask: dict[str, Any] | None = None) -> "Prompt":
        """One click more, on a mask that was found before."""
        return replace(self, points=(*self.points, (x, y)), labels=(*self.labels, label), mask=mask, choice=0)

    def with_box(self, x0: float, y0: float, x1: float, y1: float) -> "Prompt":
        """Another box in place of the one before, however its corners were drawn."""
        return replace(self, box=(min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)), mask=None, choice=0)

    def arguments(self) -> dict[str, Any]:
        """As `segment` takes them; nothing of nothing."""
        clicks = {"points": [[*self.points]], "labels": [[*self.labels]]} if self.points else {}
        boxes = {"boxes": [[*self.box]]} if self.box else {}
        return {**clicks, **boxes, **({"masks": decode_rle(self.mask)} if self.mask else {})}


def open_photo(path: str | Path, most_pixels: int) -> PIL.Image.Image:
    """A photo that somebody sent, looked at before it is decoded.

    Of `most_pixels` and Pillow's own limit, `PIL.Image.MAX_IMAGE_PIXELS`, the lower one counts.

    Raises:
        ValueError: in words for that person, without a path of this machine, if it is none or too large.
    """
    path = Path(path)
    try:
        with PIL.Image.open(path) as header:
            width, height = header.size
    except PIL.Image.DecompressionBombError as error:
        raise ValueError(f"{path.name} is far too large a picture") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path.name} is no picture that can be read") from error
    most_pixels = min(most_pixels, PIL.Image.MAX_IMAGE_PIXELS or most_pixels)
    if width * height > most_pixels:
        wanted = f"{most_pixels / 1e6:.0f} megapixels"
        raise ValueError(f"{path.name} has {width} x {height} pixels, wanted at most {wanted}")
    try:
        return read_photo(path)
    except (OSError, ValueError) as error:
        if isinstance(error.__cause__ or error, OSError | SyntaxError):
            raise ValueError(f"{path.name} is damaged, or its upload was cut short") from error
        reason = str(error).removeprefix("the picture: ").replace(str(path), path.name)
        raise ValueError(reason if reason.startswith(path.name) else f"{path.name}: {reason}") from error


@dataclass(frozen=True)
class Found:
    """What was pointed at, and what came of it: exchanged as a whole, so that whoever draws meets parts that fit.

    Args:
        history: What was pointed at, click by click; the last is what is pointed at now.
        answer: To that; None if nothing was asked, or everything.
        records: All objects, if everything was asked.
        choice: Which of the answer's masks.
    """

    history: tuple[Prompt, ...] = (Prompt(),)
    answer: Segmentation | None = None
    records: tuple[dict[str, Any], ...] = ()
    choice: int = 0

    @property
    def prompt(self) -> Prompt:
        """What is pointed at now."""
        return self.history[-1]

    @property
    def scores(self) -> list[float]:
        """Predicted IoU of the masks to choose from, the best first."""
        return [] if self.answer is None else self.answer.scores[0].tolist()

    def mask(self, size: tuple[int, int]) -> np.ndarray | None:
        """The chosen mask (H, W), or all objects' of a photo of `size` (W, H) together; None if nothing was asked."""
        if self.records:
            return np.asarray(label_map(self.records, size)) > 0
        return None if self.answer is None else self.answer.masks[0, self.choice].cpu().numpy()

    def chosen_records(self) -> list[dict[str, Any]]:
        """All objects, or the chosen mask as a record."""
        if self.answer is None:
            return [*self.records]
        masks, scores = self.answer.masks[:, self.choice :], self.answer.scores[:, self.choice :]
        return Segmentation(masks, scores, self.answer.image_embeddings).records()


class PhotoSession:
    """A photo, what was pointed at, and the answer. What fails leaves everything as it was.

    Args:
        photo: Of any colour mode, turned any way.
        name: Of its file, which COCO's JSON gives; downloads are called after it.
    """

    def __init__(self, photo: PIL.Image.Image, name: str = "photo.jpg"):
        self.photo = photo = read_photo(photo)  # upright, as it is segmented
        self.name = Path(name).name
        self.scale = SHOWN_SIDE / max(photo.size)
        width, height = (max(1, round(side * self.scale)) for side in photo.size)
        self.shown = photo.resize((width, height), PIL.Image.Resampling.BICUBIC)
        self.embeddings: Tensor | None = None
        self.found = Found()

    def look(self, model: EfficientSamModel, processor: EfficientSamProcessor) -> None:
        """Encode the photo, so that the first click is as quick as the others."""
        if self.embeddings is None:
            inputs = processor.image_processor(self.photo, return_tensors="pt", device=model.device)
            with torch.inference_mode():
                self.embeddings = model.get_image_embeddings(inputs["pixel_values"])

    # ----------------------------------------------------------------------------------------------------------------
    # Pointing

    def click(
        self, model: EfficientSamModel, processor: EfficientSamProcessor, x: float, y: float, label: int
    ) -> None:
        """Point at x, y, which lie in 0 to 1 of the photo's sides; label 1 is the object, 0 the background.

        A model that has learnt mask prompts is shown the chosen mask with it.

        Raises:
            ValueError: if the model cannot be asked this, such as for one click too many.
        """
        found = self.found
        mask = found.mask(self.photo.size) if processor.mask_prompts and found.answer else None
        shown = encode_rle(mask) if mask is not None and mask.any() else None
        self.ask(model, processor, (*self.remembered(), found.prompt.with_click(*self.in_pixels(x, y), label, shown)))

    def drag(
        self, model: EfficientSamModel, processor: EfficientSamProcessor, corners: tuple[float, float, float, float]
    ) -> None:
        """Draw a box from one corner to the other, x0, y0, x1, y1 in 0 to 1 of the photo's sides.

        Raises:
            ValueError: as in `click`, and for a box without any area.
        """
        x0, y0, x1, y1 = corners
        box = (*self.in_pixels(x0, y0, last=0), *self.in_pixels(x1, y1, last=0))
        self.ask(model, processor, (*self.remembered(), self.found.prompt.with_box(*box)))

    def undo(self, model: EfficientSamModel, processor: EfficientSamProcessor) -> None:
        """Take back the last click or box; of all objects, show none."""
        history = self.found.history
        self.ask(model, processor, history if self.found.records else history[:-1] or (Prompt(),))

    def clear(self) -> None:
        """Point at nothing; the photo's embedding stays."""
        self.found = Found()

    def choose(self, choice: int) -> None:
        """Another of the answer's masks."""
        self.found = replace(self.found, choice=choice)

    def remembered(self) -> tuple[Prompt, ...]:
        """What was pointed at, with the choice that was made of the last answer."""
        found = self.found
        return (*found.history[:-1], replace(found.prompt, choice=found.choice if found.answer else 0))

    def in_pixels(self, x: float, y: float, last: int = 1) -> tuple[float, float]:
        """A place in 0 to 1 of the sides -> pixels of the photo, for a place beside it the nearest.

        The farthest are those `last` short of the sides: a click is on a pixel, while a box ends behind its last one.
        """
        if max(abs(x - 0.5), abs(y - 0.5)) > FARTHEST:
            raise ValueError(f"a place wants 0 to 1 of the photo's sides, found {x:g}, {y:g}")
        width, height = self.photo.size
        return min(max(x, 0) * width, width - last), min(max(y, 0) * height, height - last)

    def ask(self, model: EfficientSamModel, processor: EfficientSamProcessor, history: tuple[Prompt, ...]) -> None:
        """Segment what the last prompt points at; the photo is encoded once in its life."""
        answer = None
        if arguments := history[-1].arguments():
            answer = segment(model, processor, self.photo, **arguments, image_embeddings=self.embeddings)
            self.embeddings = answer.image_embeddings
        self.found = Found(history, answer, choice=history[-1].choice)

    def find_everything(
        self, model: EfficientSamModel, processor: EfficientSamProcessor, **options: Any
    ) -> list[dict[str, Any]]:
        """Find all objects, in place of what was pointed at.

        Raises:
            ValueError: for an option as in `segment_everything`.
        """
        known: dict[str, Any] = {"image_embeddings": self.embeddings, "return_embeddings": True}
        records, embeddings = segment_everything(model, processor, self.photo, **known, **options)
        # The first crop is the whole photo, which clicks are asked on; without the others' memory.
        self.found, self.embeddings = Found(records=tuple(records)), embeddings[:1].clone()
        return records

    # ----------------------------------------------------------------------------------------------------------------
    # Looking

    def draw(self, opacity: float = 0.45) -> PIL.Image.Image:
        """The photo with masks and prompts, its longer side `SHOWN_SIDE`."""
        found = self.found
        if found.records:
            return self.draw_records(found.records, opacity)
        mask = found.mask(self.photo.size)
        if mask is None:
            return self.shown
        points = [(x * self.scale, y * self.scale) for x, y in found.prompt.points]
        boxes = [side * self.scale for side in found.prompt.box or ()]
        shown = resized(mask, self.shown.size)[None]
        return draw_segmentation(self.shown, shown, points, found.prompt.labels, boxes, opacity)

    def draw_records(self, records: Sequence[dict[str, Any]], opacity: float) -> PIL.Image.Image:
        """All objects on the photo as it is shown; of each only its box is looked at, for there may be hundreds."""
        largest_first = sorted(records, key=lambda record: -record["area"])
        sides = [[round(side * self.scale) for side in record["bbox"]] for record in largest_first]
        masks = (
            resized(decode_box(record["segmentation"], record["bbox"]), (max(width, 1), max(height, 1)))
            for record, (_, _, width, height) in zip(largest_first, sides, strict=True)
        )
        return draw_everything(self.shown, masks, opacity, ((x, y) for x, y, _, _ in sides))

    # ----------------------------------------------------------------------------------------------------------------
    # Taking away

    def save(self, kind: str, folder: str | Path) -> Path:
        """Write what was found, at the photo's own size.

        Args:
            kind: "mask" (a PNG, white on black; of all objects a label map of 16 bits), "coco" (a JSON with run
                lengths) or "cutout" (the photo as a PNG, transparent around the object).
            folder: Where to; it must be there.

        Raises:
            ValueError: if nothing was found yet, and for another kind.
        """
        if kind not in KINDS:
            raise ValueError(f"there is no kind {kind!r}, wanted {', '.join(KINDS)}")
        found = self.found
        if found.answer is None and not found.records:
            raise ValueError("there is no mask yet: click on something first")
        path = Path(folder) / f"{Path(self.name).stem}_{kind}.{'json' if kind == 'coco' else 'png'}"
        if kind == "coco":
            path.write_text(json.dumps(coco_dataset([(self.name, *self.photo.size, found.chosen_records())])))
        elif kind == "mask" and found.records:
            label_map(found.records, self.photo.size).save(path)
        elif (mask := found.mask(self.photo.size)) is not None:
            (cut_out(self.photo, mask) if kind == "cutout" else PIL.Image.fromarray(mask)).save(path)
        return path


def resized(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask at another size (width, height)."""
    grey = PIL.Image.fromarray(mask.astype(np.uint8) * 255)
    return np.asarray(grey.resize(size, PIL.Image.Resampling.BILINEAR)) > 127
