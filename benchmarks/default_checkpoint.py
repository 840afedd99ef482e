"""Mean IoU of a checkpoint on pictures with masks in SA-1B's layout, beside the trivial answers to the same boxes.

    python benchmarks/default_checkpoint.py grabcut berkeley
    python benchmarks/default_checkpoint.py FOLDER --model MODEL

Box: protocol "box", the mask's true tight box. Click: one, at the object's point farthest from its edge, by OpenCV's
quick distances, with which the tables of the model card were made; protocol "sam" has exact ones, and other figures.
After 1, 3 and 5 clicks: protocol "ritm". Of three masks the one with the highest predicted IoU counts, or, "best of
three", the one nearest to the truth. Pixels of an annotation's `ignore` mask are left out. Means over masks.

`--output scores.json` keeps the figures: benchmarks/checkpoint_card.py makes the model card of them.
"""

import argparse
import json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from statistics import fmean

import cv2
import numpy as np
import torch

from efficientsam_hf import default_checkpoint, load_checkpoint
from efficientsam_hf.data.sa1b import find_pairs
from efficientsam_hf.evaluation.ground_truth import TrueObject, true_objects
from efficientsam_hf.evaluation.interactive import Settings, evaluate_picture
from efficientsam_hf.evaluation.metrics import iou
from efficientsam_hf.evaluation.predictor import EfficientSamPredictor, ZoomingPredictor
from efficientsam_hf.evaluation.protocols import find_protocol
from efficientsam_hf.evaluation.skips import Skips
from efficientsam_hf.evaluation.summary import summarize


def quickly_deepest(mask: np.ndarray, generator: np.random.Generator) -> tuple[int, int]:
    distances = cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5)[1:-1, 1:-1]
    y, x = divmod(int(distances.argmax()), mask.shape[1])
    return x, y


PROTOCOLS = [
    find_protocol("box"),
    replace(find_protocol("sam", (1,)), name="one click", first=quickly_deepest),
    # To the fifth click, whatever IoU has been reached before.
    replace(find_protocol("ritm", (1, 3, 5)), wanted=(), most=5),
]
COLUMNS = {
    "box": "box",
    "best": "box, best of three",
    "click": "one click",
    "ritm_1": "ritm 1",
    "ritm_3": "ritm 3",
    "ritm_5": "ritm 5",
    "filled": "filled box",
    "ellipse": "ellipse in the box",
}


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


def score(predictor: EfficientSamPredictor, source: Path, args: argparse.Namespace) -> dict:
    """The figures of a set, by the names of COLUMNS."""
    pairs = find_pairs(source)[:: args.every][: args.limit]
    records, trivial = [], []
    for pair in pairs:
        settings = Settings(masks=args.masks, show_answer=args.show_answer)
        records.append(evaluate_picture(predictor, pair, PROTOCOLS, settings))
        asked = {row["id"] for row in records[-1]["masks"]}
        for target in true_objects(pair, tuple(records[-1]["size"]), Skips()):
            if target.id in asked:
                answers = (filled_box(target), ellipse_in_box(target))
                trivial.append([iou(answer, target.mask, target.ignore) for answer in answers])
    box, click, clicks = (summarize(records, protocol)["at"] for protocol in PROTOCOLS)
    means = [box["1"]["miou"], box["1"]["oracle_miou"], click["1"]["miou"], *(clicks[n]["miou"] for n in "135")]
    figures = dict(zip(COLUMNS, [*means, *map(fmean, zip(*trivial, strict=True))], strict=True))
    rounded = {name: round(figure, 4) for name, figure in figures.items()}
    return {"set": source.name, "photos": len(pairs), "masks": len(trivial), **rounded}


def checksum(folder: Path) -> str:
    """SHA-256 of a checkpoint's weights, so that figures are known to be theirs."""
    return sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def table(rows: list[dict]) -> str:
    head = f"| set | photos | masks | {' | '.join(COLUMNS.values())} |\n|{'---|' * (3 + len(COLUMNS))}"
    return "\n".join([head, *map(table_row, rows)])


def table_row(row: dict) -> str:
    figures = " | ".join(f"{row[name]:.3f}" for name in COLUMNS)
    return f"| {row['set']} | {row['photos']} | {row['masks']} | {figures} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path, nargs="+", help="folders or tars of .jpg and .json pairs")
    parser.add_argument("--model", help="folder of a checkpoint; the bundled one if left out")
    parser.add_argument("--every", type=int, default=1, help="only every so many-th photo: those held out of training")
    parser.add_argument("--limit", type=int, help="most photos of each source")
    parser.add_argument("--masks", type=int, help="most masks of a photo")
    parser.add_argument("--zoom", type=float, help="look closer, as `segment` does with this zoom")
    parser.add_argument("--edge_radius", type=int, help="in place of the processor's own; 0: edges follow no photo")
    parser.add_argument("--show_answer", action="store_true", help="show each answer with the next click")
    parser.add_argument("--threads", type=int, default=2, help="of the processor")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, processor = load_checkpoint(args.model, device="cpu")
    if args.edge_radius is not None:
        processor.image_processor.edge_radius = args.edge_radius
    predictor = EfficientSamPredictor(model, processor)
    if args.zoom:
        predictor = ZoomingPredictor(model, processor, "zooming", args.zoom)
    print(table([]))
    rows = []
    for source in args.sources:
        rows.append(score(predictor, source, args))
        print(table_row(rows[-1]), flush=True)
    if args.output:
        folder = Path(args.model) if args.model else default_checkpoint()
        args.output.write_text(json.dumps({"weights": checksum(folder), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
