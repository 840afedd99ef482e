"""How often segment everything decides otherwise on the decoder's grid than at full size.

    python benchmarks/everything_decisions.py FOLDER

The same photos are segmented both ways with the same settings. A mask is the same if the same click gave it with the
same predicted IoU; those kept by one way alone are counted.
"""

import argparse
from pathlib import Path

import torch

from efficientsam_hf import load_checkpoint, segment_everything
from efficientsam_hf.data.sa1b import find_pairs


def names(records: list[dict]) -> set[tuple]:
    return {(*record["point_coords"][0], round(record["predicted_iou"], 5)) for record in records}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder or tar of .jpg and .json pairs")
    parser.add_argument("--model", help="folder or Hub id; the bundled checkpoint if left out")
    parser.add_argument("--photos", type=int, default=24)
    parser.add_argument("--points_per_side", type=int, default=16)
    args = parser.parse_args()
    torch.set_num_threads(2)
    model, processor = load_checkpoint(args.model, device="cpu")
    filtered, kept = [0, 0], [0, 0]
    pairs = find_pairs(args.source)
    for pair in pairs[:: max(1, len(pairs) // args.photos)][: args.photos]:
        # Without suppression first: a mask that changes sides there may also decide for a neighbour.
        for counts, threshold in ((filtered, 1.0), (kept, 0.7)):
            options = {"points_per_side": args.points_per_side, "box_nms_thresh": threshold}
            quick = names(segment_everything(model, processor, pair.read_image(), **options))
            exact = names(segment_everything(model, processor, pair.read_image(), exact=True, **options))
            counts[0] += len(quick ^ exact)
            counts[1] += len(quick | exact)
    for text, (other, total) in (("filters alone", filtered), ("with suppression", kept)):
        print(f"{text}: {other} of {total} masks decided otherwise ({100 * other / max(total, 1):.2f} %)")


if __name__ == "__main__":
    main()
