"""What is evaluated, seen from the protocols: encode a picture once, then ask for the masks of all its objects.

Q objects of one H x W picture, P clicks an object, M masks an object of h x w logits.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..exported.model import ExportedEfficientSam
from ..masks_efficientsam import rank_masks
from ..modeling_efficientsam import EfficientSamModel
from ..prediction import segment
from ..processing_efficientsam import EfficientSamProcessor

DECODER_BYTES = {"cpu": 2**28}  # what the decoder may take at one time; on a CPU more only leaves the cache
ACCELERATOR_BYTES = 2**30


@dataclass(frozen=True)
class Prompts:
    """What is shown of Q objects, in pixels of the picture; every object has as many clicks as the others.

    Args:
        points: (Q, P, 2) x, y.
        labels: (Q, P), 1 on the object, 0 on the background.
        boxes: (Q, 4) x0, y0, x1, y1.
        masks: Logits of an earlier answer, (Q, h, w), of the predictor's own.
    """

    points: np.ndarray | None = None
    labels: np.ndarray | None = None
    boxes: np.ndarray | None = None
    masks: Tensor | None = None

    def __len__(self) -> int:
        return len(next(part for part in (self.points, self.boxes, self.masks) if part is not None))

    def __getitem__(self, rows: slice) -> "Prompts":
        parts: dict[str, Any] = vars(self)
        return Prompts(**{name: None if part is None else part[rows] for name, part in parts.items()})


@dataclass(frozen=True)
class Answer:
    """Masks of Q objects: logits (Q, M, h, w) of the predictor's own grid, predicted IoU (Q, M).

    The best has the highest of `ranks` (Q, M), or of the scores without.
    """

    logits: Tensor
    scores: Tensor
    ranks: Tensor | None = None

    def best(self) -> Tensor:
        """The place of the best mask, (Q,)."""
        return (self.scores if self.ranks is None else self.ranks).argmax(-1)

    @classmethod
    def join(cls, parts: Sequence["Answer"]) -> "Answer":
        """The answers for all objects of some of them, in order."""
        ranks = [part.scores if part.ranks is None else part.ranks for part in parts]
        return cls(torch.cat([p.logits for p in parts]), torch.cat([p.scores for p in parts]), torch.cat(ranks))

    def best_logits(self) -> Tensor:
        """(Q, h, w)."""
        return self.logits[torch.arange(len(self.logits), device=self.logits.device), self.best()]


class Predictor(Protocol):
    """Any model that answers prompts.

    Attributes:
        name: For tables.
        parameters: How many there are.
        background_clicks: Whether a click may have label 0.
        most_clicks: Clicks an object may have; None for any number.
        mask_prompts: Whether `Prompts.masks` may be given.
    """

    name: str
    parameters: int
    background_clicks: bool
    most_clicks: int | None
    mask_prompts: bool

    def embed(self, picture: Image.Image) -> Any:
        """The encoder's work, once a picture."""

    def decode(self, embedded: Any, prompts: Prompts) -> Answer:
        """The masks of all objects that `prompts` show."""

    def at_size(self, embedded: Any, logits: Tensor) -> np.ndarray:
        """Logits (N, h, w) of a picture -> its masks (N, H, W), booleans."""

    def weights_hash(self) -> str:
        """SHA-256 of the weights."""

    def settings(self) -> dict[str, Any]:
        """What the answers depend on beside the weights, as JSON."""


def check_mask_prompts(predictor: Predictor, refine: bool, show_answer: bool) -> None:
    """Refuse to show masks to a model that cannot be shown any.

    Raises:
        ValueError: names the model and the option.
    """
    if (refine or show_answer) and not predictor.mask_prompts:
        shown = "--refine" if refine else "--show-answer"
        raise ValueError(f"{predictor.name} takes no mask prompts, which {shown} gives it")


def ask(predictor: Predictor, embedded: Any, prompts: Prompts, refine: bool = False) -> Answer:
    """The answer to prompts; with `refine` to them and to the best masks of the first answer (Kirillov, 2023, D.4).

    Raises:
        ValueError: if the model cannot be shown masks.
    """
    check_mask_prompts(predictor, refine, prompts.masks is not None)
    answer = predictor.decode(embedded, prompts)
    return predictor.decode(embedded, replace(prompts, masks=answer.best_logits())) if refine else answer


@dataclass(frozen=True)
class Embedded:
    """A picture that the encoder has seen: `features` as the model has them, `size` (H, W)."""

    features: Any
    size: tuple[int, int]
    picture: Image.Image | None = None


class EfficientSamPredictor:
    """This package's models, of any variant, and their exported folders.

    Args:
        model: On any device.
        processor: The model's.
        name: For tables.
    """

    def __init__(
        self,
        model: EfficientSamModel | ExportedEfficientSam,
        processor: EfficientSamProcessor,
        name: str = "efficientsam",
    ):
        self.model: Any = model
        self.processor = processor
        self.name = name
        self.parameters = count_parameters(model)
        self.background_clicks = processor.negative_points
        self.most_clicks: int | None = processor.max_prompt_points
        self.mask_prompts = processor.mask_prompts

    @torch.inference_mode()
    def embed(self, picture: Image.Image) -> Embedded:
        """See `Predictor`; of the pixels as they are stored, whichever side EXIF data says is up."""
        picture = Image.fromarray(np.asarray(picture.convert("RGB")))
        inputs = self.processor(images=picture, return_tensors="pt")
        features = self.model.get_image_embeddings(inputs["pixel_values"].to(self.model.device, self.model.dtype))
        return Embedded(features, (picture.height, picture.width), picture)

    @torch.inference_mode()
    def decode(self, embedded: Embedded, prompts: Prompts) -> Answer:
        """See `Predictor`; so many objects at once as memory allows, without a difference in the answers."""
        device = embedded.features.device
        cells = embedded.features.shape[-2] * embedded.features.shape[-1]
        budget = DECODER_BYTES.get(device.type, ACCELERATOR_BYTES)
        step = max(1, budget // self.model.mask_decoder.bytes_per_prompt(cells))
        parts = [self.decode_some(embedded, prompts[at : at + step]) for at in range(0, len(prompts), step)]
        return Answer.join(parts)

    def decode_some(self, embedded: Embedded, prompts: Prompts) -> Answer:
        """The answer to so few prompts that memory is no question."""
        given: dict[str, Any] = {"input_points": prompts.points, "input_labels": prompts.labels}
        given |= {"input_boxes": prompts.boxes, "input_masks": prompts.masks}
        given = {name: value[None] for name, value in given.items() if value is not None}
        inputs = self.processor(original_sizes=[list(embedded.size)], **given, return_tensors="pt")
        del inputs["original_sizes"]
        outputs = self.model(**inputs.to(self.model.device), image_embeddings=embedded.features)
        logits, scores = outputs.pred_masks[0], outputs.iou_scores[0].float()
        return Answer(logits, scores, rank_masks(logits, scores, self.model.config.rank_by_stability))

    @torch.inference_mode()
    def at_size(self, embedded: Embedded, logits: Tensor) -> np.ndarray:
        """See `Predictor`."""
        sizes, pictures = [list(embedded.size)], [embedded.picture]
        masks = self.processor.post_process_masks(logits[None, None], sizes, images=pictures)[0][0]
        return masks.cpu().numpy()

    def weights_hash(self) -> str:
        """See `Predictor`; the same on every device and in every precision that keeps the values.

        Of an exported folder it is that of its files.
        """
        if isinstance(self.model, ExportedEfficientSam):
            return hashlib.sha256(json.dumps(self.model.manifest.files, sort_keys=True).encode()).hexdigest()
        return module_hash(self.model)

    def settings(self) -> dict[str, Any]:
        """See `Predictor`."""
        return {"config": self.model.config.to_dict(), "processor": self.processor.to_dict()}


class ZoomingPredictor(EfficientSamPredictor):
    """As `segment` answers with its `zoom`: each object is looked at once more, closely.

    What stands for logits is 1 on an object and -1 elsewhere, at the picture's size.
    """

    def __init__(self, model: EfficientSamModel, processor: EfficientSamProcessor, name: str, zoom: float):
        super().__init__(model, processor, name)
        self.zoom = zoom

    def decode_some(self, embedded: Embedded, prompts: Prompts) -> Answer:
        """See `Predictor`."""
        given: dict[str, Any] = {"points": prompts.points, "labels": prompts.labels, "boxes": prompts.boxes}
        given["masks"] = None if prompts.masks is None else prompts.masks > 0
        answer = segment(
            self.model,
            self.processor,
            embedded.picture,
            **given,
            image_embeddings=embedded.features,
            zoom=self.zoom,
        )
        places = torch.arange(answer.scores.shape[1], device=answer.scores.device)
        return Answer(answer.masks.to(torch.int8) * 2 - 1, answer.scores, (-places).expand_as(answer.scores))

    def at_size(self, embedded: Embedded, logits: Tensor) -> np.ndarray:
        """See `Predictor`."""
        return (logits > 0).cpu().numpy()

    def settings(self) -> dict[str, Any]:
        """See `Predictor`."""
        return {**super().settings(), "zoom": self.zoom}


def count_parameters(model: EfficientSamModel | ExportedEfficientSam) -> int:
    """Of the model, or of the one that was exported."""
    if isinstance(model, ExportedEfficientSam):
        with torch.device("meta"):
            model = EfficientSamModel(model.config)
    return sum(parameter.numel() for parameter in model.parameters())


def module_hash(module: nn.Module) -> str:
    """SHA-256 over names, shapes and float32 values of a module's state, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


__all__ = [
    "Answer",
    "EfficientSamPredictor",
    "Embedded",
    "Predictor",
    "Prompts",
    "ZoomingPredictor",
    "ask",
    "check_mask_prompts",
    "module_hash",
]
