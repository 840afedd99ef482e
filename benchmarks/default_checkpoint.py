"""Mean IoU of a checkpoint on pictures with masks in SA-1B's layout, beside the trivial answers to the same boxes.

    python benchmarks/default_checkpoint.py grabcut berkeley
    python benchmarks/default_checkpoint.py FOLDER --model MODEL

Box: the mask's true tight box. Click: one, at the object's point farthest from its edge. Of three masks the one with
the highest predicted IoU counts. Pixels of an annotation's `ignore` mask are left out. Means over masks.
"""

import argparse
from collections import defaultdict
from pathlib import Path

import cv2
import numpy as np
import torch

from efficientsam_hf import load_checkpoint, segment
from efficientsam_hf.data.sa1b import Pair, find_pairs
from efficientsam_hf.masks_efficientsam import decode_rle, masks_to_boxes


def iou(answer: np.ndarray, mask: np.ndarray, ignore: np.ndarray) -> float:
    answer, mask = answer & ~ignore, mask & ~ignore
    return (answer & mask).sum() / max((answer | mask).sum(), 1)


def filled_box(box: list[int], shape: tuple[int, int]) -> np.ndarray:
    answer = np.zeros(shape, dtype=bool)
    answer[box[1] : box[3], box[0] : box[2]] = True
    return answer


def ellipse_in_box(box: list[int], shape: tuple[int, int]) -> np.ndarray:
    y, x = np.mgrid[: shape[0], : shape[1]] + 0.5
    across = (2 * x - box[0] - box[2]) / (box[2] - box[0])
    down = (2 * y - box[1] - box[3]) / (box[3] - box[1])
    return across**2 + down**2 <= 1


def deepest_point(mask: np.ndarray) -> list[float]:
    distances = cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, 5)[1:-1, 1:-1]
    y, x = np.unravel_index(distances.argmax(), mask.shape)
    return [float(x), float(y)]


def evaluate(pairs: list[Pair], most: int | None, model, processor) -> dict[str, list[float]]:
    """The IoU of every mask (`most` a photo, spread over its list) by every way of answering."""
    scores = defaultdict(list)
    for pair in pairs:
        image, records = pair.read_image(), pair.read_annotations()
        records = records[:: -(-len(records) // most)] if most else records
        masks = [decode_rle(record["segmentation"]).numpy() for record in records]
        boxes = [masks_to_boxes(mask).tolist() for mask in masks]
        by_box = segment(model, processor, image, boxes=boxes)
        clicks = [[deepest_point(mask)] for mask in masks]
        by_click = segment(model, processor, image, points=clicks, image_embeddings=by_box.image_embeddings)
        for number, (record, mask, box) in enumerate(zip(records, masks, boxes, strict=True)):
            ignore = decode_rle(record["ignore"]).numpy() if "ignore" in record else np.zeros_like(mask)
            answers = {
                "box": by_box.masks[number, 0].cpu().numpy(),
                "one click": by_click.masks[number, 0].cpu().numpy(),
                "filled box": filled_box(box, mask.shape),
                "ellipse in the box": ellipse_in_box(box, mask.shape),
            }
            for name, answer in answers.items():
                scores[name].append(iou(answer, mask, ignore))
            best = max(iou(answer.cpu().numpy(), mask, ignore) for answer in by_box.masks[number])
            scores["box, best of three"].append(best)
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path, nargs="+", help="folders or tars of .jpg and .json pairs")
    parser.add_argument("--model", help="folder or Hub id; the bundled checkpoint if left out")
    parser.add_argument("--every", type=int, default=1, help="only every so many-th photo: those held out of training")
    parser.add_argument("--limit", type=int, help="most photos of each source")
    parser.add_argument("--masks", type=int, help="most masks of a photo")
    args = parser.parse_args()
    torch.set_num_threads(2)
    model, processor = load_checkpoint(args.model, device="cpu")
    columns = ["box", "box, best of three", "one click", "filled box", "ellipse in the box"]
    print(f"| set | photos | masks | {' | '.join(columns)} |\n|{'---|' * (3 + len(columns))}")
    for source in args.sources:
        pairs = find_pairs(source)[:: args.every][: args.limit]
        scores = evaluate(pairs, args.masks, model, processor)
        means = " | ".join(f"{np.mean(scores[name]):.3f}" for name in columns)
        print(f"| {source.name} | {len(pairs)} | {len(scores['box'])} | {means} |", flush=True)


if __name__ == "__main__":
    main()
