"""What the adaptive strategy of segment everything loses and gains against the grid.

    python benchmarks/everything_strategies.py FOLDER [FOLDER ...] --photos 10 --points_per_side 32

Both ways look at the same photos, one after the other. Clicks: how many the decoder was asked a photo, once
more for each mask that is drawn at the end. Found: the share
of drawn masks that some mask matches with an IoU of at least 0.5. Agreed: of the grid's masks, those that the adaptive
way has too, with an IoU of at least 0.8. Seconds do not count the encoder, whose embeddings are shared.
"""

import argparse
import time

import numpy as np
import torch
from everything_thresholds import drawn_masks, options, overlaps_of, spread_out

from efficientsam_hf import load_checkpoint, segment_everything
from efficientsam_hf.masks_efficientsam import decode_rle


class CountedClicks:
    """Counts the prompts that a mask decoder looks at."""

    def __init__(self, decoder):
        self.look, self.clicks = decoder.look, 0
        decoder.look = self

    def __call__(self, prepared, **prompts):
        self.clicks += prompts["prompts"].shape[1]
        return self.look(prepared, **prompts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options(parser)
    parser.add_argument("--pred_iou_thresh", type=float, default=0.88)
    parser.add_argument("--stability_score_thresh", type=float, default=0.95)
    args = parser.parse_args()
    torch.set_num_threads(2)
    model, processor = load_checkpoint(args.model, device="cpu")
    counted = CountedClicks(model.mask_decoder)
    limits = {name: getattr(args, name) for name in ("points_per_side", "pred_iou_thresh", "stability_score_thresh")}
    columns = ("clicks", "seconds", "masks", "found")
    rows = {strategy: {column: [] for column in columns} for strategy in ("grid", "adaptive")}
    agreed: list[float] = []
    for pair in (pair for source in args.sources for pair in spread_out(source, args.photos, args.every)):
        if not (drawn := drawn_masks(pair)):
            continue
        photo, results = pair.read_image(), {}
        _, embeddings = segment_everything(model, processor, photo, return_embeddings=True, points_per_side=1)
        for strategy, row in rows.items():
            start, counted.clicks = time.perf_counter(), 0
            results[strategy] = segment_everything(
                model, processor, photo, image_embeddings=embeddings, strategy=strategy, **limits
            )
            row["seconds"].append(time.perf_counter() - start)
            row["clicks"].append(counted.clicks)
            row["masks"].append(len(results[strategy]))
            row["found"] += (overlaps_of(results[strategy], drawn)[0] >= 0.5).any(0).float().tolist()
        if results["grid"]:
            of_grid = [decode_rle(record["segmentation"]) for record in results["grid"]]
            agreed += (overlaps_of(results["adaptive"], of_grid)[0] >= 0.8).any(0).float().tolist()
    print(f"{len(rows['grid']['masks'])} photos, {len(rows['grid']['found'])} drawn masks")
    print(f"| strategy | {' | '.join(columns)} |\n|{'---|' * (1 + len(columns))}")
    for strategy, row in rows.items():
        print(f"| {strategy} | {' | '.join(f'{np.mean(row[column]):.3f}' for column in columns)} |")
    if agreed:
        print(f"agreed: {np.mean(agreed):.3f} of the grid's {len(agreed)} masks")


if __name__ == "__main__":
    main()
