"""Which thresholds suit a checkpoint: what segment everything finds of the masks people drew, for a table of settings.

    python benchmarks/everything_thresholds.py FOLDER [FOLDER ...] --photos 10

Found: the share of drawn masks that some mask matches with an IoU of at least 0.5. Masks: how many a photo there are.
Chosen: of the settings with at most `--most` masks a photo, the one that finds most.
"""

import argparse
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from efficientsam_hf import load_checkpoint, segment_everything
from efficientsam_hf.data.sa1b import Pair, find_pairs
from efficientsam_hf.masks_efficientsam import decode_rle, mask_iou, masks_to_boxes, nms

SMALLEST, LARGEST = 0.005, 0.9  # of the picture, for the masks to be found
TABLE = list(product((0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.88), (0.0, 0.2, 0.4, 0.6, 0.8, 0.95)))


def spread_out(source: Path, photos: int, every: int) -> list[Pair]:
    """So many photos of a source, from its whole length, among every so many-th of it."""
    pairs = find_pairs(source)[::every]
    return pairs[:: max(1, len(pairs) // photos)][:photos]


def drawn_masks(pair: Pair) -> list[Tensor]:
    """What people drew, without the smallest and the largest."""
    masks = [decode_rle(record["segmentation"]) for record in pair.read_annotations()]
    return [mask for mask in masks if SMALLEST < mask.float().mean() < LARGEST]


def overlaps_of(records: list[dict], drawn: list[Tensor]) -> tuple[Tensor, Tensor]:
    """IoU of each mask found with each drawn one, (found, drawn), and the boxes (found, 4)."""
    if not records:
        return torch.zeros(0, len(drawn)), torch.zeros(0, 4)
    masks = torch.stack([decode_rle(record["segmentation"]) for record in records])
    return torch.stack([mask_iou(masks, mask[None]) for mask in drawn], dim=1), masks_to_boxes(masks)


def options(parser: argparse.ArgumentParser) -> None:
    """What this script and `everything_strategies.py` take alike."""
    parser.add_argument("sources", type=Path, nargs="+", help="folders or tars of .jpg and .json pairs")
    parser.add_argument("--model", help="folder or Hub id; the bundled checkpoint if left out")
    parser.add_argument("--photos", type=int, default=10, help="of each source")
    parser.add_argument("--every", type=int, default=1, help="only every so many-th photo: those held out of training")
    parser.add_argument("--points_per_side", type=int, default=16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options(parser)
    parser.add_argument("--most", type=float, default=25, help="masks a photo that a person may have to look through")
    args = parser.parse_args()
    torch.set_num_threads(2)
    model, processor = load_checkpoint(args.model, device="cpu")
    loosest = {"pred_iou_thresh": TABLE[0][0], "stability_score_thresh": TABLE[0][1], "box_nms_thresh": 0.95}
    found: dict[tuple, list[float]] = {row: [] for row in TABLE}
    counts: dict[tuple, list[int]] = {row: [] for row in TABLE}
    for pair in (pair for source in args.sources for pair in spread_out(source, args.photos, args.every)):
        if not (drawn := drawn_masks(pair)):
            continue
        photo = pair.read_image()
        records = segment_everything(model, processor, photo, points_per_side=args.points_per_side, **loosest)
        overlaps, boxes = overlaps_of(records, drawn)
        scores = torch.tensor([record["predicted_iou"] for record in records])
        stability = torch.tensor([record["stability_score"] for record in records])
        for row in TABLE:
            passing = torch.where((scores > row[0]) & (stability > row[1]))[0]
            kept = passing[nms(boxes[passing], scores[passing], 0.7)]
            found[row] += (overlaps[kept] >= 0.5).any(0).float().tolist()
            counts[row].append(len(kept))
    print(f"{len(counts[TABLE[0]])} photos, {len(found[TABLE[0]])} drawn masks")
    print("| predicted IoU | stability | found | masks a photo |\n|---|---|---|---|")
    for row in TABLE:
        print(f"| {row[0]} | {row[1]} | {np.mean(found[row]):.3f} | {np.mean(counts[row]):.1f} |")
    fitting = [row for row in TABLE if np.mean(counts[row]) <= args.most]
    print(f"chosen: {max(fitting, key=lambda row: np.mean(found[row])) if fitting else 'none'}")


if __name__ == "__main__":
    main()
