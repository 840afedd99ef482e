"""Which thresholds suit a checkpoint: what segment everything finds of the masks people drew, for a table of settings.

    python benchmarks/everything_thresholds.py FOLDER [FOLDER ...] --photos 10

Found: the share of drawn masks that some mask matches with an IoU of at least 0.5. Masks: how many a photo there are.
Score: found, less a hundredth for every ten masks a photo, since a person has to look through them.
"""

import argparse
from itertools import product
from pathlib import Path

import numpy as np
import torch

from efficientsam_hf import load_checkpoint, segment_everything
from efficientsam_hf.data.sa1b import find_pairs
from efficientsam_hf.masks_efficientsam import decode_rle, mask_iou, masks_to_boxes, nms

SMALLEST, LARGEST = 0.005, 0.9  # of the picture, for the masks to be found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path, nargs="+", help="folders or tars of .jpg and .json pairs")
    parser.add_argument("--model", help="folder or Hub id; the bundled checkpoint if left out")
    parser.add_argument("--photos", type=int, default=10, help="of each source")
    parser.add_argument("--points_per_side", type=int, default=16)
    args = parser.parse_args()
    torch.set_num_threads(2)
    model, processor = load_checkpoint(args.model, device="cpu")
    table = list(product((0.5, 0.6, 0.7, 0.8, 0.88), (0.6, 0.7, 0.8, 0.9, 0.95)))
    found: dict[tuple, list[float]] = {row: [] for row in table}
    counts: dict[tuple, list[int]] = {row: [] for row in table}
    for source in args.sources:
        pairs = find_pairs(source)
        for pair in pairs[:: max(1, len(pairs) // args.photos)][: args.photos]:
            records = segment_everything(
                model,
                processor,
                pair.read_image(),
                points_per_side=args.points_per_side,
                pred_iou_thresh=table[0][0],
                stability_score_thresh=table[0][1],
                box_nms_thresh=0.95,
            )
            drawn = [decode_rle(record["segmentation"]) for record in pair.read_annotations()]
            drawn = [mask for mask in drawn if SMALLEST < mask.float().mean() < LARGEST]
            if not drawn:
                continue
            masks = torch.stack([decode_rle(r["segmentation"]) for r in records]) if records else None
            overlaps = (
                torch.stack([mask_iou(masks, mask[None]) for mask in drawn], dim=1)
                if records
                else torch.zeros(0, len(drawn))
            )
            boxes = masks_to_boxes(masks) if records else torch.zeros(0, 4)
            scores = torch.tensor([r["predicted_iou"] for r in records])
            stability = torch.tensor([r["stability_score"] for r in records])
            for row in table:
                passing = (
                    torch.where((scores > row[0]) & (stability > row[1]))[0] if records else torch.zeros(0).long()
                )
                kept = passing[nms(boxes[passing], scores[passing], 0.7)]
                found[row] += (overlaps[kept] >= 0.5).any(0).float().tolist()
                counts[row].append(len(kept))
    print("| predicted IoU | stability | found | masks a photo | score |\n|---|---|---|---|---|")
    for row in table:
        share, count = np.mean(found[row]), np.mean(counts[row])
        print(f"| {row[0]} | {row[1]} | {share:.3f} | {count:.1f} | {share - count / 1000:.3f} |")


if __name__ == "__main__":
    main()
