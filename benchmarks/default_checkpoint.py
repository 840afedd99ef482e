"""Mean IoU of a checkpoint on pictures with masks in SA-1B's layout, beside the trivial answers to the same boxes.

    python benchmarks/default_checkpoint.py grabcut berkeley
    python benchmarks/default_checkpoint.py FOLDER --model MODEL

Box: protocol "box", the mask's true tight box. Click: one, at the object's point farthest from its edge, by OpenCV's
quick distances, with which the tables of the model card were made; protocol "sam" has exact ones, and other figures.
Of three masks the one with the highest predicted IoU counts, or, "best of three", the one nearest to the truth. Pixels
of an annotation's `ignore` mask are left out. Means over masks.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import cv2
import numpy as np
import torch

from efficientsam_hf import load_checkpoint
from efficientsam_hf.data.sa1b import find_pairs
from efficientsam_hf.evaluation.ground_truth import TrueObject, true_objects
from efficientsam_hf.evaluation.interactive import Settings, evaluate_picture
from efficientsam_hf.evaluation.metrics import iou
from efficientsam_hf.evaluation.predictor import EfficientSamPredictor
from efficientsam_hf.evaluation.protocols import find_protocol
from efficientsam_hf.evaluation.skips import Skips
from efficientsam_hf.evaluation.summary import summarize


def quickly_deepest(mask: np.ndarray, generator: np.random.Generator) -> tuple[int, int]:
    distances = cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5)[1:-1, 1:-1]
    y, x = divmod(int(distances.argmax()), mask.shape[1])
    return x, y


PROTOCOLS = [find_protocol("box"), replace(find_protocol("sam", (1,)), name="one click", first=quickly_deepest)]


def filled_box(target: TrueObject) -> np.ndarray:
    answer, (left, top, right, bottom) = np.zeros_like(target.mask), target.box
    answer[top:bottom, left:right] = True
    return answer


def ellipse_in_box(target: TrueObject) -> np.ndarray:
    (height, width), (left, top, right, bottom) = target.mask.shape, target.box
    y, x = np.mgrid[:height, :width] + 0.5
    across = (2 * x - left - right) / (right - left)
    down = (2 * y - top - bottom) / (bottom - top)
    return across**2 + down**2 <= 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path, nargs="+", help="folders or tars of .jpg and .json pairs")
    parser.add_argument("--model", help="folder or Hub id; the bundled checkpoint if left out")
    parser.add_argument("--every", type=int, default=1, help="only every so many-th photo: those held out of training")
    parser.add_argument("--limit", type=int, help="most photos of each source")
    parser.add_argument("--masks", type=int, help="most masks of a photo")
    args = parser.parse_args()
    torch.set_num_threads(2)
    predictor = EfficientSamPredictor(*load_checkpoint(args.model, device="cpu"))
    columns = ["box", "box, best of three", "one click", "filled box", "ellipse in the box"]
    print(f"| set | photos | masks | {' | '.join(columns)} |\n|{'---|' * (3 + len(columns))}")
    for source in args.sources:
        pairs = find_pairs(source)[:: args.every][: args.limit]
        records, trivial = [], []
        for pair in pairs:
            records.append(evaluate_picture(predictor, pair, PROTOCOLS, Settings(masks=args.masks)))
            asked = {row["id"] for row in records[-1]["masks"]}
            for target in true_objects(pair, tuple(records[-1]["size"]), Skips()):
                if target.id in asked:
                    answers = (filled_box(target), ellipse_in_box(target))
                    trivial.append([iou(answer, target.mask, target.ignore) for answer in answers])
        box, click = (summarize(records, protocol)["at"]["1"] for protocol in PROTOCOLS)
        means = [box["miou"], box["oracle_miou"], click["miou"], *map(fmean, zip(*trivial, strict=True))]
        row = " | ".join(f"{mean:.3f}" for mean in means)
        print(f"| {source.name} | {len(pairs)} | {len(trivial)} | {row} |", flush=True)


if __name__ == "__main__":
    main()
