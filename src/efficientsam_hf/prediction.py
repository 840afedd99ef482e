"""One photo and its prompts -> masks with scores, best first."""

import html
import math
from dataclasses import dataclass
from itertools import zip_longest
from numbers import Real
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .interchange import to_supervision
from .masks_efficientsam import as_booleans, encode_rle, masks_to_boxes, rank_masks
from .modeling_efficientsam import EfficientSamModel
from .pictures_efficientsam import read_picture
from .processing_efficientsam import EfficientSamProcessor, read_layers
from .prompts_efficientsam import NO_BOX, one_image
from .visualization import draw_segmentation
from .zooming import Pointed, look_closer

NOBODY = {"points": [[[-1, -1]]], "labels": [[-1]]}  # what a picture without objects is asked: a click that is none


@dataclass(frozen=True, repr=False, eq=False)
class Segmentation:
    """What `segment` answers for Q objects of one H x W photo, M masks each, the best first.

    Its tensors are made without gradients; they may be written into, and others trained on them.

    Args:
        masks: (Q, M, H, W), booleans.
        scores: Predicted IoU, (Q, M); what is best may depend on stability as well (config, `rank_by_stability`).
        image_embeddings: (1, C, h, w), to be given to `segment` again for the next click on the same photo.
    """

    masks: Tensor
    scores: Tensor
    image_embeddings: Tensor

    def __repr__(self) -> str:
        objects, count, height, width = self.masks.shape
        scores = ", ".join(f"{score:.2f}" for score in self.scores[:8, 0].tolist()) + ", ..." * (objects > 8)
        place = f" on {self.masks.device}" if self.masks.device.type != "cpu" else ""
        return f"Segmentation({objects} objects, {count} masks each, {height} x {width}{place}, best scores: {scores})"

    def _repr_html_(self) -> str:
        """What a notebook shows: a row an object."""
        rows = "".join(
            f"<tr><td>{record['id']}</td><td>{record['predicted_iou']:.3f}</td><td>{record['area']:,}</td>"
            f"<td>{', '.join(map(str, record['bbox']))}</td></tr>"
            for record in self.records()
        )
        head = "<tr><th>object</th><th>predicted IoU</th><th>pixels</th><th>x, y, width, height</th></tr>"
        return f"<p>{html.escape(repr(self))}</p><table><thead>{head}</thead><tbody>{rows}</tbody></table>"

    def show(
        self, photo: Any, points: Any = None, labels: Any = None, boxes: Any = None, opacity: float = 0.45
    ) -> Image.Image:
        """The best mask of each object drawn on its photo, as a PIL picture, which a notebook shows by itself.

        Args:
            photo: What was segmented: PIL picture, array, tensor, path or URL.
            points: Clicks to draw on top, as `segment` takes them.
            labels: Of the clicks.
            boxes: To draw on top, as `segment` takes them.
            opacity: Of the colours, 0 to 1.

        Raises:
            ValueError: for a photo of another size.
        """
        return draw_segmentation(photo, self.masks[:, 0], points, labels, boxes, opacity)

    def to_supervision(self) -> Any:
        """The best mask of each object as `supervision.Detections`, see `to_supervision`."""
        return to_supervision(self.records())

    def records(self) -> list[dict[str, Any]]:
        """The best mask of each object as SA-1B and COCO store it.

        Each has `id`, `segmentation` (COCO run lengths), `bbox` (x, y, width, height), `area` in pixels, and
        `predicted_iou`.
        """
        records = []
        for index, (mask, score) in enumerate(zip(self.masks[:, 0], self.scores[:, 0], strict=True)):
            x0, y0, x1, y1 = masks_to_boxes(mask).tolist()
            records.append(
                {
                    "id": index,
                    "segmentation": encode_rle(mask),
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": int(mask.sum()),
                    "predicted_iou": round(float(score), 4),
                }
            )
        return records


@torch.no_grad()
def segment(
    model: EfficientSamModel,
    processor: EfficientSamProcessor,
    image: Any,
    points: Any = None,
    labels: Any = None,
    boxes: Any = None,
    image_embeddings: Tensor | None = None,
    zoom: float | None = None,
    masks: Any = None,
) -> Segmentation:
    """Segment the objects that clicks and boxes point at.

    Args:
        model: On any device; its answer stays there. Anything that offers what `SegmentationNetwork` lists will do.
        processor: The model's.
        image: PIL picture, array, tensor, path or URL.
        points: One object's clicks, [[x, y], ...] in pixels of the photo, or one click alone; or a list of the first,
            one entry an object.
        labels: 1 on the object, 0 on the background, nested like `points` without the last level; all 1 if left out.
        boxes: One box [x0, y0, x1, y1], or a list of them, one an object; an empty list is answered with no objects.
            With `points`, box and clicks of the same place in the lists describe the same object; None stands for what
            an object does not have.
        image_embeddings: Of an earlier answer on the same photo, from any device and of any precision; saves the
            encoder's work.
        zoom: Look closer: ask once more on a crop around each object, so many times as wide and high as its box or
            first mask, wherever that shows it larger. Costs the encoder's work once an object. 0: do not; None: as
            the model's config says in `zoom`.
        masks: What was found before, as booleans of the photo's size, (H, W) or (Q, H, W), one an object, such as
            `answer.masks[:, 0]`: the closer look is around it and shows it with the next clicks, and what is too large
            for one is asked without it; with `zoom` 0 the whole picture is asked with it. For weights that learnt mask
            prompts. They know what masks without clicks and boxes mean only if they have seen such, which the bundled
            checkpoint has not.

    Raises:
        ValueError: for a prompt that cannot be meant, such as background clicks alone, or that the weights never
            learnt (see `EfficientSamProcessor`), and for a `zoom` other than 0 that is below 1.
        FileNotFoundError: if there is no such file.
    """
    picture, zoom = read_picture(image), find_zoom(model, zoom)
    height, width = picture.shape[-2:]
    points, labels = one_image(points, "input_points"), one_image(labels, "input_labels")
    boxes = one_image(boxes, "input_boxes")
    shown = None if masks is None else earlier_masks(masks, (height, width))
    prompts: dict[str, Any] = {"input_points": points, "input_labels": labels, "input_boxes": boxes}
    prompts["input_masks"] = None if shown is None else shown[None]
    given = [prompt[0] for prompt in prompts.values() if prompt is not None]
    if nobody := bool(given) and not any(map(len, given)):
        prompts = {f"input_{name}": [prompt] for name, prompt in NOBODY.items()}
    # A picture is stretched where the model is.
    pictures: dict[str, Any] = {"images": [picture], "device": model.device}
    if image_embeddings is not None:
        pictures = {"original_sizes": [[height, width]]}
        image_embeddings = read_embeddings(model, processor, image_embeddings)
        if len(image_embeddings) != 1:
            raise ValueError(f"wanted the embeddings of one picture, found those of {len(image_embeddings)}")
    inputs = processor(**pictures, **prompts, return_tensors="pt").to(model.device)
    del inputs["original_sizes"]
    objects = pointed_at(points, labels, boxes, shown)
    if zoom and all(pointed.on_object() or pointed.box for pointed in objects):
        # What a closer look shows no larger is found as well without the mask (docs/benchmarks.md).
        inputs.pop("input_masks", None)
    with torch.inference_mode():
        outputs = model(**inputs, image_embeddings=image_embeddings)
    low_resolution, scores = best_first(outputs.pred_masks, outputs.iou_scores, model.config.rank_by_stability)
    if nobody:
        low_resolution, scores = low_resolution[:, :0], scores[:, :0]
    found, scores = answer_at_size(model, processor, picture, low_resolution[0], scores[0], objects, zoom)
    embeddings = outputs.image_embeddings
    return Segmentation(found, scores, embeddings.clone() if embeddings.is_inference() else embeddings)


def answer_at_size(
    model: EfficientSamModel,
    processor: EfficientSamProcessor,
    picture: Tensor,
    logits: Tensor,
    scores: Tensor,
    objects: list[Pointed],
    zoom: float,
) -> tuple[Tensor, Tensor]:
    """Logits (Q, M, h, w), the best first -> masks (Q, M, H, W) of a picture (3, H, W) and scores (Q, M).

    With a `zoom` they are asked for once more, as `look_closer` says.
    """

    def draw(logits: Tensor) -> Tensor:
        return processor.post_process_masks(logits[None], [picture.shape[-2:]], images=[picture])[0]

    def ask(part: Tensor, pointed: Pointed) -> tuple[Tensor, Tensor]:
        points, labels = ([given] if given else None for given in (pointed.points, pointed.labels))
        closer = segment(model, processor, part, points, labels, pointed.box, zoom=0, masks=pointed.mask)
        return closer.masks[0], closer.scores[0]

    return look_closer(picture, logits, scores, objects, zoom, draw, ask) if zoom else (draw(logits), scores)


def pointed_at(
    points: list | None, labels: list | None, boxes: list | None, masks: Tensor | None = None
) -> list[Pointed]:
    """The prompts of one image, as the processor takes them, and masks (Q, H, W), object by object.

    Raises:
        ValueError: for background clicks alone, or padding alone, whose answer would be noise.
    """
    rows: list[Any] = [(part or [[]])[0] for part in (points, labels, boxes)]
    objects = [
        Pointed(clicks or [], marks or [1] * len(clicks or []), box if box and box != NO_BOX else None, mask)
        for clicks, marks, box, mask in zip_longest(*rows, () if masks is None else masks)
    ]
    for number, pointed in enumerate(objects):
        if not (pointed.on_object() or pointed.box or pointed.mask is not None):
            found = "clicks on the background alone" if 0 in pointed.labels else "neither"
            raise ValueError(f"object {number}: wanted a click on it or a box, found {found}")
    return objects


def earlier_masks(masks: Any, size: tuple[int, int]) -> Tensor:
    """Masks (H, W) or (Q, H, W) of a photo of this size as booleans (Q, H, W).

    Raises:
        ValueError: for logits, and for another size.
    """
    given = as_booleans(read_layers(masks, "masks"))
    given = given[None] if given.ndim == 2 else given
    if given.ndim != 3 or tuple(given.shape[1:]) != size:
        raise ValueError(f"masks wants booleans of the photo's size {size}, one an object, found {tuple(given.shape)}")
    return given


def read_embeddings(model: EfficientSamModel, processor: EfficientSamProcessor, given: Any) -> Tensor:
    """Embeddings (N, C, h, w) of earlier answers, where the model is and in its precision.

    Raises:
        ValueError: for another shape, such as the grid of pictures of another size, where clicks would be misplaced.
    """
    embeddings, vision = torch.as_tensor(given), model.config.vision_config
    grid = [side // vision.patch_size for side in processor.model_size({})]
    wanted = (vision.embedding_channels, *grid)
    if embeddings.ndim != 4 or embeddings.shape[1:] != wanted:
        raise ValueError(f"image_embeddings wants (1, {', '.join(map(str, wanted))}), found {tuple(embeddings.shape)}")
    return embeddings.to(model.device, model.dtype)


def find_zoom(model: EfficientSamModel, zoom: float | None) -> float:
    """The zoom that is asked for, or else the one of the model's config; 0 is none."""
    zoom = model.config.zoom if zoom is None else zoom
    if zoom and not (isinstance(zoom, Real) and 1 <= zoom < math.inf):
        raise ValueError(f"zoom wants 0 or a number from 1 on, got {zoom!r}")
    return zoom or 0


def best_first(masks: Tensor, scores: Tensor, by_stability: bool = False) -> tuple[Tensor, Tensor]:
    """Masks (B, Q, M, h, w) and their predicted IoU (B, Q, M), float32, the best first; see `rank_masks`."""
    order = rank_masks(masks, scores, by_stability).argsort(dim=-1, descending=True, stable=True)
    return masks.take_along_dim(order[..., None, None], dim=2), scores.float().take_along_dim(order, dim=2)
