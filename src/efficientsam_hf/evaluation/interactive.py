"""Interactive segmentation scored: every object of a picture is asked for by a protocol, all of them in one call.

Q objects of one H x W picture. A record of a picture is plain JSON, so that it can be written as soon as it is there.
"""

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.sa1b import LabelledPicture
from ..masks_efficientsam import encode_rle
from ..modeling_efficientsam import EfficientSamModel
from ..processing_efficientsam import EfficientSamProcessor
from .clicks import errors
from .ground_truth import TrueObject, picture_hash, read_or_note, true_objects
from .metrics import boundary_iou, iou
from .predictor import Answer, EfficientSamPredictor, Predictor, Prompts, ask, check_mask_prompts
from .protocols import Protocol, find_protocol
from .skips import Skips
from .stopwatch import Stopwatch
from .summary import summarize

FULL_SIZE_BYTES = 2**28  # masks of full size that exist at one time


@dataclass(frozen=True)
class Settings:
    """What is asked and counted, beside the protocol.

    Args:
        seed: Of all random clicks; a picture's do not depend on the others.
        crowds: Whether groups that are annotated as one are objects, too.
        boundary: Score boundaries, too.
        oracle: Score the mask nearest to the truth, too, for which all masks are brought to full size.
        refine: Show each answer's best mask to the model once more, with the same prompt.
        show_answer: Show it to the model with the next click, as the authors of SAM and RITM do in interactive use.
        masks: Most masks of a picture, spread over its list; None for all.
        keep: Put the last answers into the records, as run lengths, with the score the model gave them.
    """

    seed: int = 0
    crowds: bool = False
    boundary: bool = False
    oracle: bool = True
    refine: bool = False
    show_answer: bool = False
    masks: int | None = None
    keep: bool = False

    def __post_init__(self) -> None:
        if self.masks is not None and self.masks < 1:
            raise ValueError(f"masks must be 1 or more of a picture, got {self.masks}")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}")


@dataclass
class Walk:
    """One object on its way through a protocol.

    Args:
        target: The object.
        generator: Of its random clicks.
        scores: After each prompt: `iou`, `oracle`, and `boundary` if wanted.
        points: The clicks so far.
        labels: And what they are on.
        answer: The last mask (H, W).
        logits: It as the model gave it, (h, w), where it is to be shown with the next click.
        trust: The predicted IoU of it.
    """

    target: TrueObject
    generator: np.random.Generator
    scores: dict[str, list[float]] = field(default_factory=dict)
    points: list[tuple[int, int]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    answer: np.ndarray | None = None
    logits: Tensor | None = None
    trust: float = 0.0

    def click(self, protocol: Protocol, background: bool) -> bool:
        """Add the protocol's next click; False if there is none to give."""
        if protocol.first is None:
            return True
        if protocol.next is None or self.answer is None:
            click, label = protocol.first(self.clickable(protocol), self.generator), 1
        else:
            missed, false = errors(self.answer, self.target.mask, self.target.ignore)
            found = protocol.next(missed, false, background, self.points, self.generator)
            if found is None:
                return False
            click, label = found
        self.points.append(click)
        self.labels.append(label)
        return True

    def clickable(self, protocol: Protocol) -> np.ndarray:
        """Where the protocol's first click may be, (H, W)."""
        mask, ignore = self.target.mask, self.target.ignore
        counted = mask & ~ignore if protocol.ignoring and ignore is not None else mask
        return counted if counted.any() else mask

    def record(self, keep: bool) -> dict[str, Any]:
        """The way so far as JSON."""
        kept: dict[str, Any] = {}
        if keep and self.answer is not None:
            kept = {"answer": encode_rle(self.answer), "trust": round(self.trust, 6)}
        return {"points": self.points, "labels": self.labels, **self.scores, **kept}

    def is_done(self, protocol: Protocol) -> bool:
        """Whether no further click changes a figure."""
        scores = self.scores.get("iou", [])
        if len(scores) < max(protocol.prompts):
            return False
        return not protocol.wanted or max(scores) >= max(protocol.wanted)


def evaluate_interactive(
    model: EfficientSamModel,
    processor: EfficientSamProcessor,
    pictures: Sequence[LabelledPicture],
    protocol: str = "sam",
    prompts: tuple[int, ...] | None = None,
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Score a model on pictures with masks, as during training on a handful that were held out.

    Args:
        model: On any device; in evaluation mode while this runs.
        processor: The model's.
        pictures: As `find_labelled_pictures` or `find_true_pictures` give them.
        protocol: "box", "paper", "sam", "ritm" or "centroid", see `protocols`.
        prompts: Numbers of clicks after which the IoU is told; the protocol's own if left out.
        seed: Of random clicks.
        **options: Further fields of `Settings`.

    Returns:
        As `summarize` says: `result["at"]["1"]["miou"]` is the mean IoU over masks after one click.

    Raises:
        ValueError: for an unknown protocol.
    """
    asked, settings = find_protocol(protocol, prompts), Settings(seed=seed, **options)
    training = model.training
    model.eval()
    try:
        predictor = EfficientSamPredictor(model, processor)
        records = [evaluate_picture(predictor, picture, [asked], settings) for picture in pictures]
    finally:
        model.train(training)
    return summarize(records, asked, predictor.most_clicks)


def evaluate_picture(
    predictor: Predictor,
    picture: LabelledPicture,
    protocols: Iterable[Protocol],
    settings: Settings,
    skips: Skips | None = None,
    watch: Stopwatch | None = None,
) -> dict[str, Any]:
    """One picture by several protocols, encoded once.

    Returns:
        `picture` (its name), `sha256` (of its bytes), `size` (H, W, or None if it cannot be read), `skipped`,
        `seconds` by kind of work, and `masks`: for each its `id`, `area`, `category`, and under each protocol's name
        `points`, `labels`, and the lists `iou`, `oracle`, `boundary`, an entry a prompt; with `settings.keep` also
        `answer` and `trust`.

    Raises:
        ValueError: in strict mode, for a picture or a mask that cannot be read; and for settings that show masks to a
            model that takes none.
    """
    skips, watch = skips or Skips(), watch or Stopwatch()
    check_mask_prompts(predictor, settings.refine, settings.show_answer)  # before the first click is paid for
    with watch("read"):
        photo = read_or_note(picture, skips)
        objects = true_objects(picture, (photo.height, photo.width), skips, settings.crowds) if photo else []
        if settings.masks:
            objects = objects[:: -(-len(objects) // settings.masks) or 1]
        digest = picture_hash(picture)
    rows: list[dict[str, Any]] = [{"id": item.id, "area": item.area, "category": item.category} for item in objects]
    if photo and objects:
        with watch("encode"):
            embedded = predictor.embed(photo)
        for protocol in protocols:
            walks = walk(predictor, embedded, picture.name, objects, protocol, settings, watch)
            for row, walked in zip(rows, walks, strict=True):
                row[protocol.name] = walked.record(settings.keep)
    return {
        "picture": picture.name,
        "sha256": digest,
        "size": photo and [photo.height, photo.width],
        "skipped": skips.record(),
        "seconds": dict(watch.seconds),
        "masks": rows,
    }


def walk(
    predictor: Predictor,
    embedded: Any,
    name: str,
    objects: Sequence[TrueObject],
    protocol: Protocol,
    settings: Settings,
    watch: Stopwatch,
) -> list[Walk]:
    """All objects of an embedded picture by a protocol, in rounds: those that still want an answer get it together."""
    # Of the picture's name, so that neither other pictures nor the number of processes change a click.
    key = zlib.crc32(name.encode())
    walks = [Walk(item, np.random.default_rng((settings.seed, key, number))) for number, item in enumerate(objects)]
    going = walks
    for number in range(1, protocol.rounds + 1):
        if predictor.most_clicks is not None and number > predictor.most_clicks:
            break
        with watch("clicks"):
            going = [
                one for one in going if not one.is_done(protocol) and one.click(protocol, predictor.background_clicks)
            ]
        if not going:
            break
        with watch("decode"):
            prompts = prompts_of(going, protocol)
            answer = ask(predictor, embedded, prompts, settings.refine)
        score(predictor, embedded, answer, going, settings, watch)
    return walks


def prompts_of(walks: Sequence[Walk], protocol: Protocol) -> Prompts:
    """What these objects are asked by; all of them have had as many answers."""
    if protocol.first is None:
        return Prompts(boxes=np.array([one.target.box for one in walks], dtype=np.float32))
    points = np.array([one.points for one in walks], dtype=np.float32)
    logits = [one.logits for one in walks if one.logits is not None]
    masks = torch.stack(logits) if logits else None
    return Prompts(points=points, labels=np.array([one.labels for one in walks], dtype=np.int64), masks=masks)


def score(
    predictor: Predictor, embedded: Any, answer: Answer, walks: Sequence[Walk], settings: Settings, watch: Stopwatch
) -> None:
    """Note for each object the IoU of the mask that the model trusts most, and of the one nearest to the truth."""
    logits = answer.logits if settings.oracle else answer.best_logits()[:, None]
    best, count = answer.best().tolist() if settings.oracle else [0] * len(walks), logits.shape[1]
    trusted = answer.scores.take_along_dim(answer.best()[:, None], dim=1)[:, 0].tolist()
    step = max(1, FULL_SIZE_BYTES // (count * walks[0].target.mask.size))
    for start in range(0, len(walks), step):
        with watch("decode"):
            masks = predictor.at_size(embedded, logits[start : start + step].flatten(0, 1))
        with watch("metrics"):
            for place, one in enumerate(walks[start : start + step]):
                note(one, masks[place * count : (place + 1) * count], best[start + place], settings)
                one.trust = trusted[start + place]
    if settings.show_answer:
        for one, own in zip(walks, answer.best_logits(), strict=True):
            one.logits = own


def note(one: Walk, masks: np.ndarray, best: int, settings: Settings) -> None:
    """Keep the best (by the model) of an object's masks (M, H, W), and what it is worth."""
    truth, ignore = one.target.mask, one.target.ignore
    scores = [iou(mask, truth, ignore) for mask in masks]
    one.answer = masks[best].copy()
    found = {"iou": scores[best]}
    if settings.oracle:
        found["oracle"] = max(scores)
    if settings.boundary:
        found["boundary"] = boundary_iou(one.answer, truth, ignore)
    for kind, value in found.items():
        one.scores.setdefault(kind, []).append(round(float(value), 6))


__all__ = ["Settings", "evaluate_interactive", "evaluate_picture"]
