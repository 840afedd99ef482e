"""How close to look: mean IoU by true boxes, by how much of the photo an object covers, at several zooms.

    python benchmarks/closer_look.py FOLDER ... --every 10 --limit 20 --masks 6

`segment(..., zoom=2)` asks once more on a crop around each object, with sides twice its own; zoom 0 is the model's own
answer. Beside them the ellipse in the box, which needs no model. Sets in SA-1B's layout; means over masks.
"""

import argparse
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import torch
from default_checkpoint import ellipse_in_box

from efficientsam_hf import load_checkpoint
from efficientsam_hf.data.sa1b import find_pairs
from efficientsam_hf.evaluation.ground_truth import true_objects
from efficientsam_hf.evaluation.interactive import Settings, evaluate_picture
from efficientsam_hf.evaluation.metrics import iou
from efficientsam_hf.evaluation.predictor import EfficientSamPredictor, ZoomingPredictor
from efficientsam_hf.evaluation.protocols import find_protocol
from efficientsam_hf.evaluation.skips import Skips

EDGES = [0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0]  # shares of the photo


def measure(predictors: list, source: Path, args: argparse.Namespace) -> list[tuple[float, list[float]]]:
    """Of each mask its share of the photo, and the IoU of the ellipse and of each predictor's answer."""
    rows = []
    for pair in find_pairs(source)[:: args.every][: args.limit]:
        answers, records = {}, []
        for predictor in predictors:
            records.append(evaluate_picture(predictor, pair, [find_protocol("box")], Settings(masks=args.masks)))
            for row in records[-1]["masks"]:
                answers.setdefault(row["id"], []).append(row["box"]["iou"][0])
        for target in true_objects(pair, tuple(records[0]["size"]), Skips()):
            if target.id in answers:
                ellipse = iou(ellipse_in_box(target), target.mask, target.ignore)
                rows.append((float(target.mask.mean()), [ellipse, *answers[target.id]]))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path, nargs="+", help="folders or tars of .jpg and .json pairs")
    parser.add_argument("--model", help="folder of a checkpoint; the bundled one if left out")
    parser.add_argument("--zooms", type=float, nargs="+", default=[1.5, 2.0, 2.5])
    parser.add_argument("--every", type=int, default=1, help="only every so many-th photo: those held out of training")
    parser.add_argument("--limit", type=int, help="most photos of each source")
    parser.add_argument("--masks", type=int, help="most masks of a photo")
    parser.add_argument("--threads", type=int, default=2, help="of the processor")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, processor = load_checkpoint(args.model, device="cpu")
    predictors = [EfficientSamPredictor(model, processor)]
    predictors += [ZoomingPredictor(model, processor, f"zoom {zoom:g}", zoom) for zoom in args.zooms]
    rows = [row for source in args.sources for row in measure(predictors, source, args)]
    columns = ["ellipse in the box", "no zoom", *(f"zoom {zoom:g}" for zoom in args.zooms)]
    print(f"| share of the photo | masks | {' | '.join(columns)} |\n|{'---|' * (2 + len(columns))}")
    for low, high in [*pairwise(EDGES), (0, 1)]:
        chosen = [figures for share, figures in rows if low < share <= high]
        if chosen:
            means = " | ".join(f"{fmean(column):.3f}" for column in zip(*chosen, strict=True))
            print(f"| {low:g} to {high:g} | {len(chosen)} | {means} |")


if __name__ == "__main__":
    main()
