"""Pure functions of masks, boxes and crops: overlaps, stability, non-maximum suppression, COCO's run lengths.

N masks or boxes, H x W pixels. Boxes are x0, y0, x1, y1 in pixels; x1 and y1 lie just behind the last pixel.
"""

import math
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = 2**26  # float32 masks at full size that exist at one time
SURE = 3.0  # logit of a mask that is shown as a prompt: about as sure as models are inside an object
CROP_EDGE = 20  # pixels from its crop's edge within which a mask counts as cut off

# A run length of COCO travels in groups of five bits, least significant first; the sixth says that more follow, and
# every group is shifted into printable characters.
GROUP_BITS, MORE, FIRST_CHARACTER = 5, 0x20, 48
LONGEST_RUN_GROUPS = 12


def as_booleans(masks: Tensor | np.ndarray) -> Tensor:
    """The same masks as a boolean tensor.

    Raises:
        ValueError: for floats, which are more likely logits that nobody has compared with a threshold yet.
    """
    # Torch reads no array that runs backwards, such as a flipped one.
    masks = torch.as_tensor(np.ascontiguousarray(masks) if isinstance(masks, np.ndarray) else masks)
    if masks.is_floating_point():
        raise ValueError(f"found a mask of {masks.dtype}, wanted booleans: compare logits with a threshold first")
    return masks.bool()


def masks_to_boxes(masks: Tensor | np.ndarray) -> Tensor:
    """Boolean masks (..., H, W) -> int64 boxes (..., 4) around their pixels; four zeros for a mask without any."""
    masks = as_booleans(masks)
    columns, rows = masks.any(-2), masks.any(-1)
    first = [side.byte().argmax(-1) for side in (columns, rows)]
    behind = [side.shape[-1] - side.byte().flip(-1).argmax(-1) for side in (columns, rows)]
    return torch.stack([*first, *behind], dim=-1) * rows.any(-1, keepdim=True)


def boxes_at_size(logits: Tensor, height: int, width: int) -> Tensor:
    """Boxes that masks will have at full size, without making them: (N, h, w) -> (N, 4), as `masks_to_boxes` says.

    An edge lies where the largest logit of a row or column crosses 0 between two cells' centres: to the pixel or
    nearly so, where the grid's own boxes would be off by up to a cell.
    """
    x0, x1 = crossings(logits.amax(1), width)
    y0, y1 = crossings(logits.amax(2), height)
    return torch.stack([x0, y0, x1, y1], dim=1)


def crossings(profile: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """First pixel and the one after the last, of `length`, where a profile of logits (N, cells) is 0 or more."""
    cells = profile.shape[1]
    ends = []
    for side in (profile, profile.flip(1)):
        first = (side >= 0).int().argmax(1, keepdim=True)
        here, before = side.gather(1, first), side.gather(1, (first - 1).clamp(min=0))
        share = (here / (here - before)).where(first > 0, 0.5)
        ends.append(((first + 0.5 - share)[:, 0] * length / cells - 0.5).ceil())
    found = (profile >= 0).any(1)
    return (ends[0] * found).clamp(min=0), ((length - ends[1]) * found).clamp(max=length)


def corners_of(boxes: list[list[float]]) -> Tensor:
    """COCO's boxes (x, y, width, height) -> (N, 4) x0, y0, x1, y1; without boxes (0, 4)."""
    x, y, width, height = torch.tensor(boxes).view(-1, 4).unbind(1)
    return torch.stack([x, y, x + width, y + height], dim=1)


def mask_iou(masks: Tensor, others: Tensor) -> Tensor:
    """Boolean masks (..., H, W), one against one and broadcasting -> IoU (...), float32; 0 for two empty masks."""
    masks, others = as_booleans(masks), as_booleans(others)
    # Not in float64, which Apple's GPUs lack.
    intersection, union = (found.sum((-2, -1)).float() for found in (masks & others, masks | others))
    return intersection / union.clamp(min=1)


def box_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Every box (N, 4) against every other (M, 4) -> IoU (N, M); 0 where both have no area."""
    top_left = torch.maximum(boxes[:, None, :2], others[None, :, :2])
    bottom_right = torch.minimum(boxes[:, None, 2:], others[None, :, 2:])
    intersection = (bottom_right - top_left).clamp(min=0).prod(-1)
    union = box_area(boxes)[:, None] + box_area(others)[None] - intersection
    return torch.where(union > 0, intersection / union, 0.0)


def box_area(boxes: Tensor) -> Tensor:
    """Boxes (N, 4) -> their areas (N,)."""
    return (boxes[:, 2:] - boxes[:, :2]).prod(-1)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Greedy non-maximum suppression: the best box stays, and what overlaps it by more than the threshold goes.

    Args:
        boxes: (N, 4).
        scores: (N,); among equals the earlier box goes first.
        iou_threshold: An overlap of exactly this much is still kept.

    Returns:
        Indices of the kept boxes, best first, int64 on the device of `boxes`.
    """
    # The loop asks a question a step, which costs an accelerator more than a copy does.
    candidates, order = boxes.float().cpu(), scores.float().cpu().argsort(descending=True, stable=True)
    kept = []
    while len(order):
        best, order = order[0], order[1:]
        kept.append(int(best))
        order = order[box_iou(candidates[best][None], candidates[order])[0] <= iou_threshold]
    return torch.tensor(kept, dtype=torch.int64, device=boxes.device)


def stability_score(logits: Tensor, threshold: float = 0.0, offset: float = 1.0) -> Tensor:
    """How little a mask depends on its threshold (Kirillov et al., 2023, section 5).

    The IoU of the masks above `threshold + offset` and above `threshold - offset`; the first lies within the second,
    so that two counts of pixels are enough. Logits (..., H, W) -> (...), float32; 0 where no pixel reaches either.
    """
    levels = (threshold + offset, threshold - offset)
    inner, outer = ((logits > level).sum((-2, -1), dtype=torch.int32) for level in levels)
    # What differs is few pixels, which float32 counts beyond 2^24, too; Apple's GPUs have no float64.
    lost = (outer - inner).float() / outer.clamp(min=1).float()
    return torch.where(outer > 0, 1 - lost, 0.0)


def mask_prompts(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Booleans (..., H, W) -> logits (..., h, w) as models are shown them, by how much of each cell is covered."""
    # One by one, so that only one is there in float32 at its own size.
    shares = [F.interpolate(mask.float()[None, None], size, mode="area") for mask in masks.flatten(0, -3)]
    return ((2 * torch.cat(shares) - 1) * SURE).view(*masks.shape[:-2], *size)


def rank_masks(logits: Tensor, scores: Tensor, by_stability: bool) -> Tensor:
    """What the best of a prompt's masks has most of: predicted IoU, or that times stability.

    Logits (..., M, h, w), predicted IoU (..., M) -> (..., M), float32.
    """
    return scores.float() * stability_score(logits) if by_stability else scores.float()


def resizing_matrix(cells: int, length: int, mode: str, device: torch.device) -> Tensor:
    """What interpolation from `cells` to `length` does along one axis, (length, cells)."""
    alone = torch.eye(cells, device=device)[None, None]
    return F.interpolate(alone, (length, cells), mode=mode, align_corners=False)[0, 0]


def resize_masks(
    logits: Tensor, size: tuple[int, int], mode: str = "bicubic", threshold: float | None = None
) -> Tensor:
    """Logits (..., h, w) -> (..., H, W), float32; booleans at or above the threshold if there is one.

    Beside the result only `CHUNK_BYTES` of masks exist at one time, however many prompts there are.
    """
    flat = logits.reshape(-1, 1, *logits.shape[-2:])
    resized = logits.new_empty((len(flat), 1, *size), dtype=torch.float32 if threshold is None else torch.bool)
    step = max(1, CHUNK_BYTES // (4 * size[0] * size[1]))
    for start in range(0, len(flat), step):
        chunk = F.interpolate(flat[start : start + step].float(), size, mode=mode, align_corners=False)
        resized[start : start + step] = chunk if threshold is None else chunk >= threshold
    return resized.reshape(*logits.shape[:-2], *size)


def layered_crops(height: int, width: int, layers: int, overlap_ratio: float) -> list[tuple[int, list[int]]]:
    """The whole picture as layer 0, then 2**i x 2**i overlapping boxes as layer i (Kirillov et al., 2023, app. B).

    Args:
        height: Of the picture.
        width: Of the picture.
        layers: Layers behind the first.
        overlap_ratio: Overlap in layer 1 as a part of the short side; halved from layer to layer.

    Returns:
        (layer, [x0, y0, x1, y1]) for each crop; the crops of a layer cover the picture.
    """
    crops = [(0, [0, 0, width, height])]
    for layer in range(1, layers + 1):
        count = 2**layer
        overlap = int(overlap_ratio * min(height, width) * 2 / count)
        crop_width, crop_height = (math.ceil((overlap * (count - 1) + side) / count) for side in (width, height))
        for column, row in product(range(count), repeat=2):
            x, y = column * (crop_width - overlap), row * (crop_height - overlap)
            if x < width and y < height:
                crops.append((layer, [x, y, min(x + crop_width, width), min(y + crop_height, height)]))
    return crops


def point_grid(side: int) -> Tensor:
    """Centres of side x side equal cells of the unit square, row after row: (side * side, 2) as x, y."""
    centres = (torch.arange(side) + 0.5) / side
    return torch.cartesian_prod(centres, centres).flip(-1)


def cut_off_by_crop(boxes: Tensor, crop_box: list[int], height: int, width: int) -> Tensor:
    """Which boxes (N, 4) of a picture end at an edge of their crop that is no edge of the picture: (N,), booleans."""
    crop = torch.tensor(crop_box, device=boxes.device)
    picture = torch.tensor([0, 0, width, height], device=boxes.device)
    return (((boxes - crop).abs() <= CROP_EDGE) & ((boxes - picture).abs() > CROP_EDGE)).any(-1)


def encode_rle(mask: Tensor | np.ndarray, compressed: bool = True) -> dict:
    """A boolean mask (H, W) as COCO's run lengths, column after column, background first.

    Returns:
        `{"size": [H, W], "counts": ...}`, the counts as pycocotools' string, or as plain integers if not `compressed`.
    """
    mask = as_booleans(mask)
    if mask.ndim != 2:
        raise ValueError(f"found a mask of shape {tuple(mask.shape)}, wanted (height, width)")
    pixels = mask.cpu().numpy().ravel(order="F")
    edges = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    counts = np.diff(edges, prepend=0, append=pixels.size)
    if pixels.size and pixels[0]:
        counts = np.concatenate([[0], counts])
    return {"size": list(mask.shape), "counts": compress_counts(counts) if compressed else counts.tolist()}


def decode_rle(rle: dict) -> Tensor:
    """COCO's run lengths, compressed or not -> the boolean mask (H, W).

    Raises:
        ValueError: if the counts are cut short, or do not add up to the size.
    """
    height, width = rle["size"]
    counts = read_counts(rle)
    pixels = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return torch.from_numpy(np.ascontiguousarray(pixels.reshape(width, height).T))


def rle_area(rle: dict) -> int:
    """Pixels of the mask that the run lengths stand for, without painting it; raises as `decode_rle` does."""
    return int(read_counts(rle)[1::2].sum())


def read_counts(rle: dict) -> np.ndarray:
    """The run lengths as int64, checked against the size they came with."""
    counts, (height, width) = rle["counts"], rle["size"]
    if isinstance(counts, (str, bytes)):
        counts = expand_counts(counts)
    counts = np.asarray(counts, dtype=np.int64)
    if (counts < 0).any() or counts.sum() != height * width:
        raise ValueError(
            f"run lengths of a {height} x {width} mask want to add up to {height * width} and none below 0: "
            f"found a sum of {counts.sum()}, the least {counts.min(initial=0)}"
        )
    return counts


def compress_counts(counts: np.ndarray) -> str:
    """Run lengths as COCO's string: from the fourth on, each is written as the difference to the last but one."""
    # Half the bytes are twice the speed, and hold the runs of any picture below a gigapixel.
    rest: np.ndarray = counts.astype(np.int32 if counts.max(initial=0) < 2**30 else np.int64)
    rest[3:] -= rest[1:-2].copy()
    numbers, places, characters = np.arange(len(rest)), [], []
    while len(rest):
        group, rest = rest & (MORE - 1), rest >> GROUP_BITS
        # The last group's highest bit is the sign, so a number ends once the rest repeats that bit for ever.
        unfinished = rest != -(group >> (GROUP_BITS - 1))
        characters.append((group + MORE * unfinished + FIRST_CHARACTER).astype(np.uint8))
        places.append(numbers)
        # In a mask of many runs most are short: few numbers have another group.
        numbers, rest = numbers[unfinished], rest[unfinished]
    first, *others = characters or [np.empty(0, dtype=np.uint8)]
    if others:
        # By number, and of one number in the order of its groups.
        behind = np.concatenate(places[1:])
        order = behind.argsort(kind="stable")
        first = np.insert(first, behind[order] + 1, np.concatenate(others)[order])
    return first.tobytes().decode("ascii")


def expand_counts(text: str | bytes) -> np.ndarray:
    """COCO's string -> run lengths, int64; the reverse of `compress_counts`.

    Raises:
        ValueError: for a character that COCO never writes, or a string whose last number has no end.
    """
    raw = text.encode() if isinstance(text, str) else text
    groups = np.frombuffer(raw, dtype=np.uint8).astype(np.int64) - FIRST_CHARACTER
    if ((groups < 0) | (groups >= 2 * MORE)).any():
        raise ValueError(f"run lengths want characters from '0' to 'o': found {text[:40]!r}")
    ends = np.flatnonzero((groups & MORE) == 0)
    if not len(ends) or ends[-1] != len(groups) - 1:
        raise ValueError(f"a string of run lengths was cut short: found {text[-40:]!r} at its end")
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > LONGEST_RUN_GROUPS:
        raise ValueError(f"a run length wants at most {LONGEST_RUN_GROUPS} characters: found {lengths.max()}")
    places = GROUP_BITS * (np.arange(len(groups)) - np.repeat(starts, lengths))
    counts = np.add.reduceat((groups & (MORE - 1)) << places, starts)
    counts -= np.where(groups[ends] & (MORE >> 1), 1 << (GROUP_BITS * lengths), 0)
    counts[1::2], counts[2::2] = counts[1::2].cumsum(), counts[2::2].cumsum()
    return counts


__all__ = [
    "box_area",
    "box_iou",
    "boxes_at_size",
    "corners_of",
    "cut_off_by_crop",
    "decode_rle",
    "encode_rle",
    "layered_crops",
    "mask_iou",
    "mask_prompts",
    "masks_to_boxes",
    "nms",
    "point_grid",
    "resize_masks",
    "rle_area",
    "stability_score",
]
