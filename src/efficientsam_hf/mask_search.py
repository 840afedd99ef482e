"""The search for objects in one crop of a picture: clicks, filters, and the masks that stay, drawn at full size.

H x W the crop, Q clicks, M masks a click, N masks found so far, h x w the embedding grid of the model.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from .cpu_threads import map_on_threads
from .mask_drawing import MaskPainter, annotate, find_edges, without_small_regions
from .mask_settings import MaskGenerationSettings
from .masks_efficientsam import (
    boxes_at_size,
    corners_of,
    cut_off_by_crop,
    masks_to_boxes,
    nms,
    point_grid,
    resize_masks,
    stability_score,
)
from .modeling_efficientsam import EfficientSamModel, EfficientSamPromptedImage
from .processing_efficientsam import EfficientSamProcessor

FULL_SIZE_BYTES = 2**27  # masks of full size that exist at one time
KEPT_BYTES = 2**28  # logits of candidates that wait for their suppression; what is beyond is drawn once more
DRAWN_CLICKS = 4  # whose masks a CPU draws at one time
DECODER_BYTES = 2**30  # what the decoder may take of an accelerator at one time
CPU_DECODER_BYTES = 3 * 2**26  # what each thread's may take of the main memory; larger batches leave the cache
MOST_THREADS = 4  # that decode at one time, which bounds what they take together


@dataclass
class Candidates:
    """Masks that passed the filters: where to find their pixels, and how good they are."""

    points: Tensor = field(default_factory=lambda: torch.empty(0, 2))  # (N, 2) the clicks, in the model's pixels
    tokens: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))  # (N,) which of a click's masks
    scores: Tensor = field(default_factory=lambda: torch.empty(0))  # (N,) predicted IoU
    stability: Tensor = field(default_factory=lambda: torch.empty(0))  # (N,)
    boxes: Tensor = field(default_factory=lambda: torch.empty(0, 4))  # (N, 4) in the crop's pixels
    kept: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))  # (N,) place of the logits, or -1

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, rows: Tensor) -> "Candidates":
        return Candidates(*(getattr(self, item.name)[rows] for item in fields(self)))

    @classmethod
    def join(cls, parts: list["Candidates"]) -> "Candidates":
        """All of them, in order."""
        return cls(*(torch.cat([getattr(part, item.name) for part in [cls(), *parts]]) for item in fields(cls)))


@dataclass
class Crop:
    """One crop of a picture, embedded: clicks go in, records come out.

    Args:
        model: Any device.
        processor: The model's.
        embeddings: (1, channels, h, w).
        pixels: (3, H, W), as `read_picture` gives them.
        box: x0, y0, x1, y1 of the crop in the picture.
        picture_size: Height and width of the picture.
        settings: What to keep.
    """

    model: EfficientSamModel
    processor: EfficientSamProcessor
    embeddings: Tensor
    pixels: Tensor
    box: tuple[int, int, int, int]
    picture_size: tuple[int, int]
    settings: MaskGenerationSettings

    def __post_init__(self) -> None:
        left, top, right, bottom = self.box
        self.size = (bottom - top, right - left)
        self.grid = (self.embeddings.shape[-2], self.embeddings.shape[-1])
        patch = self.model.config.vision_config.patch_size
        self.frame = torch.tensor([patch * side for side in reversed(self.grid)])
        image_processor, device = self.processor.image_processor, self.embeddings.device
        masks_grid = (4 * self.grid[0], 4 * self.grid[1])
        self.guide = image_processor.find_guide(self.pixels, masks_grid, device)
        drawn_grid = self.guide.finer_grid if self.guide else masks_grid
        self.painter = MaskPainter(drawn_grid, self.size, image_processor.mask_interpolation, device)
        one = self.model.mask_decoder.bytes_per_prompt(self.grid[0] * self.grid[1])
        on_cpu, asked = self.embeddings.device.type == "cpu", self.settings.points_per_batch
        # The runtime of an exported model has threads of its own.
        own = min(MOST_THREADS, torch.get_num_threads(), asked or MOST_THREADS)
        self.threads = own if on_cpu and isinstance(self.model, nn.Module) else 1
        self.prepared = self.model.mask_decoder.prepare(**self.model.get_image_inputs(self.embeddings))
        by_memory = (CPU_DECODER_BYTES if on_cpu else DECODER_BYTES) // one
        self.points_per_batch = asked // self.threads if asked else max(1, by_memory)
        self.kept: list[Tensor] = []

    def search(self, side: int) -> Candidates:
        """The masks that side x side clicks give, after all filters and non-maximum suppression."""
        points = point_grid(side) * self.frame
        if self.settings.strategy == "grid":
            found = self.ask(points)
        else:
            found = self.ask_where_nothing_is(points, side)
        return found[nms(found.boxes, found.scores, self.settings.box_nms_thresh)]

    def ask(self, points: Tensor, covered: Tensor | None = None) -> Candidates:
        """What is left of the masks of these clicks (Q, 2); their pixels are noted in `covered` (4h, 4w), if given."""
        parts = []
        with map_on_threads(self.threads) as mapped:
            size = min(self.points_per_batch, -(-len(points) // self.threads)) or 1
            several = self.threads > 1
            results = mapped(self.find, points.split(size)) if several else self.in_batches(self.find, points)
            for found, masks in results:
                parts.append(replace(found, kept=self.keep(masks)))
                if covered is not None:
                    covered |= smallest_of_each_click(masks >= 0, found.points).any(0).cpu()
        return Candidates.join(parts)

    def find(self, points: Tensor) -> tuple[Candidates, Tensor]:
        """Clicks (Q, 2) -> what is left of their masks, and its logits (N, 4h, 4w)."""
        clicks, tokens, scores, masks = self.draw_trusted(points)
        stability, boxes = self.judge(masks)
        left, top, right, bottom = self.box
        placed = boxes + torch.tensor([left, top, left, top])
        keep = boxes[:, 2] > boxes[:, 0]
        keep &= ~cut_off_by_crop(placed, [left, top, right, bottom], *self.picture_size)
        if self.settings.stability_score_thresh > 0:
            keep &= stability > self.settings.stability_score_thresh
        found = Candidates(clicks[keep], tokens[keep], scores[keep], stability[keep], boxes[keep])
        return found, masks[keep.to(masks.device)]

    def keep(self, masks: Tensor) -> Tensor:
        """Places (N,) in `kept` of logits (N, 4h, 4w), as far as there is room; -1 of the others."""
        room = max(0, KEPT_BYTES // (16 * self.grid[0] * self.grid[1] * masks.element_size()) - len(self.kept))
        places = torch.arange(len(self.kept), len(self.kept) + len(masks))
        places[room:] = -1
        self.kept += masks[:room]
        return places

    def ask_where_nothing_is(self, points: Tensor, side: int) -> Candidates:
        """As `ask`, from coarse to fine, without clicks (side * side, 2) that lie on what was found before."""
        height, width = (4 * cells for cells in self.grid)
        covered = torch.zeros(height, width, dtype=torch.bool)
        rows, columns = torch.arange(side * side) // side, torch.arange(side * side) % side
        cells = (points / self.frame * torch.tensor([width, height])).long()
        asked = torch.zeros(side * side, dtype=torch.bool)
        found, step = [], 2 ** max(0, side.bit_length() - 2)
        while step:
            due = (rows % step == step // 2) & (columns % step == step // 2) & ~asked
            due &= ~covered[cells[:, 1], cells[:, 0]]
            asked |= due
            found.append(self.ask(points[due], covered))
            step //= 2
        return Candidates.join(found)

    def judge(self, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N, 4h, 4w) -> stability (N,) and boxes (N, 4) in the crop's pixels, on the CPU."""
        offset = self.settings.stability_score_offset
        if not self.settings.exact:
            return stability_score(masks, 0.0, offset).cpu(), boxes_at_size(masks, *self.size).cpu()
        stability, boxes = [torch.empty(0)], [torch.empty(0, 4)]
        for chunk in masks.split(self.full_size_chunk):
            resized = resize_masks(chunk, self.size, self.processor.image_processor.mask_interpolation)
            stability.append(stability_score(resized, 0.0, offset).cpu())
            boxes.append(masks_to_boxes(resized >= 0).cpu().float())
        return torch.cat(stability), torch.cat(boxes)

    @property
    def full_size_chunk(self) -> int:
        """How many masks may exist at full size at one time."""
        return max(1, FULL_SIZE_BYTES // (4 * self.size[0] * self.size[1]))

    def records(self, found: Candidates) -> list[dict[str, Any]]:
        """Draw the candidates at full size."""
        left, top, right, bottom = self.box
        share = torch.tensor([right - left, bottom - top]) / self.frame
        clicks = found.points * share + torch.tensor([left, top])
        records, unchanged = [], []
        for row, annotation, same in self.annotations(found):
            unchanged.append(same)
            records.append(
                {
                    **annotation,
                    "predicted_iou": float(found.scores[row]),
                    "stability_score": float(found.stability[row]),
                    "point_coords": [clicks[row].tolist()],
                    "crop_box": [left, top, right - left, bottom - top],
                }
            )
        if all(unchanged):
            return records
        # Without their islands masks may have become alike; those that were so from the start go first.
        boxes = corners_of([record["bbox"] for record in records])
        kept = nms(boxes, torch.tensor(unchanged).float(), self.settings.box_nms_thresh)
        return [records[index] for index in kept.tolist()]

    def annotations(self, found: Candidates) -> Iterator[tuple[int, dict[str, Any], bool]]:
        """Of candidates with any pixels the row, what COCO notes of them, and whether no small region was changed."""
        left, top, *_ = self.box
        for rows, logits in self.logits(found):
            logits = self.guide.refine(logits) if self.guide else logits
            if self.settings.min_mask_region_area:
                noted = self.annotate_regions(logits)
            else:
                noted = ((own, True) for own in self.painter.annotate(logits, top, left, self.picture_size))
            for row, (annotation, same) in zip(rows, noted, strict=True):
                if annotation["area"]:
                    yield row, annotation, same

    def annotate_regions(self, logits: Tensor) -> Iterator[tuple[dict[str, Any], bool]]:
        """What COCO notes of masks on the painter's grid without their small regions, and whether there were none."""
        left, top, *_ = self.box
        for own, box in zip(logits, self.painter.boxes(logits), strict=True):
            mask, y, x = self.painter.paint(own, box)
            drawn = torch.zeros(self.size, dtype=torch.bool)
            drawn[y : y + mask.shape[0], x : x + mask.shape[1]] = mask.cpu()
            whole = without_small_regions(drawn, self.settings.min_mask_region_area) if drawn.any() else drawn
            yield annotate(find_edges(whole), self.size[0], top, left, self.picture_size), torch.equal(whole, drawn)

    def logits(self, found: Candidates) -> Iterator[tuple[list[int], Tensor]]:
        """Rows of the candidates with their logits (N, 4h, 4w), kept or drawn once more."""

        def fetch(rows: Tensor) -> tuple[list[int], Tensor]:
            places, lost = found.kept[rows].tolist(), rows[found.kept[rows] < 0]
            drawn: Iterator[Tensor] = iter(())
            if len(lost):
                clicks = torch.arange(len(lost), device=self.embeddings.device)
                masks = self.draw(*self.look(found.points[lost]), clicks)
                drawn = iter(masks[clicks, found.tokens[lost].to(clicks.device)])
            return rows.tolist(), torch.stack([next(drawn) if place < 0 else self.kept[place] for place in places])

        yield from self.in_batches(fetch, torch.arange(len(found)))

    def draw_trusted(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Decode clicks (Q, 2), and draw what the model trusts.

        Returns:
            Of N masks: clicks (N, 2), which of the click's masks (N,), predicted IoU (N,), all three on the CPU, and
            logits (N, 4h, 4w).
        """
        tokens, image = self.look(points)
        decoder, chosen = self.model.mask_decoder, slice(1, None)
        scores = decoder.predict_iou(decoder.last_look(tokens, image, self.prepared, [0]), chosen)[0].float()
        threshold = self.settings.pred_iou_thresh
        trusted = scores > threshold if threshold > 0 else torch.ones_like(scores, dtype=torch.bool)
        if not self.settings.multimask:
            trusted &= torch.arange(scores.shape[1], device=scores.device) == scores.argmax(1, keepdim=True)
        clicks = trusted.any(1).nonzero()[:, 0]
        if not len(clicks):
            height, width = self.grid
            return torch.empty(0, 2), torch.empty(0).long(), torch.empty(0), scores.new_empty(0, 4 * height, 4 * width)
        masks = self.draw(tokens, image, clicks)[trusted[clicks]]
        which = trusted.nonzero().cpu()
        return points[which[:, 0]], which[:, 1], scores[trusted].cpu(), masks

    def look(self, points: Tensor) -> tuple[Tensor, EfficientSamPromptedImage]:
        """Clicks (Q, 2) -> the decoder's tokens and images, before any mask is drawn."""
        points = points[None, :, None].to(self.embeddings.device)
        prompts = self.model.get_prompt_inputs(self.embeddings, points)
        return self.model.mask_decoder.look(self.prepared, **prompts)

    def draw(self, tokens: Tensor, image: EfficientSamPromptedImage, clicks: Tensor) -> Tensor:
        """What `look` gave -> logits (Q, M, 4h, 4w), float32, of Q of its clicks, by their numbers (Q,)."""
        decoder, chosen, masks = self.model.mask_decoder, slice(1, None), []
        # On a CPU few clicks, so that what is made on the way stays in the cache and in memory that is used again.
        parts = -(-len(clicks) // DRAWN_CLICKS) if clicks.device.type == "cpu" else 1
        for some in clicks.tensor_split(parts):
            own = image[some]
            answers = decoder.last_look(tokens[:, some], own, self.prepared, decoder.numbers(chosen))
            masks.append(decoder.draw_masks(answers, own, self.prepared, chosen)[0].float())
        return torch.cat(masks)

    def in_batches(self, work: Callable[[Tensor], Any], rows: Tensor) -> Iterator[Any]:
        """Do `work` on as many rows at one time as memory allows; gives each batch's result."""
        start = 0
        while start < len(rows):
            batch = rows[start : start + self.points_per_batch]
            try:
                result = work(batch)
            except torch.OutOfMemoryError:
                if self.points_per_batch == 1:
                    raise
                self.points_per_batch //= 2
                warnings.warn(f"out of memory: trying {self.points_per_batch} clicks at a time", stacklevel=2)
                continue
            yield result
            start += len(batch)


def smallest_of_each_click(masks: Tensor, points: Tensor) -> Tensor:
    """Of masks (N, h, w) with the clicks (N, 2) that gave them, the smallest of each click."""
    if not len(masks):
        return masks
    clicks = points.unique(dim=0, return_inverse=True)[1]
    areas = masks.sum((1, 2)).cpu()
    smallest = [int(rows[areas[rows].argmin()]) for rows in (torch.where(clicks == c)[0] for c in clicks.unique())]
    return masks[smallest]
