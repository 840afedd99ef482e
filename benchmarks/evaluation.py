"""What an evaluation costs: all objects of a picture in one call, against one by one; and what the metrics take of it.

    python benchmarks/evaluation.py IMAGES INSTANCES.json --pictures 12 --rounds 3

Protocol box, the bundled checkpoint, on the CPU; the three ways in turn on each picture. "One by one" gives each
object's box to the whole model, as the authors' code does; "on kept embeddings" encodes the picture once.
"""

import argparse
import statistics
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

from efficientsam_hf import load_checkpoint
from efficientsam_hf.evaluation.ground_truth import find_true_pictures
from efficientsam_hf.evaluation.interactive import Settings, evaluate_picture
from efficientsam_hf.evaluation.predictor import Answer, EfficientSamPredictor, Embedded, Prompts
from efficientsam_hf.evaluation.protocols import find_protocol
from efficientsam_hf.evaluation.stopwatch import Stopwatch


class OneByOne(EfficientSamPredictor):
    """Every object in a call of its own, on kept embeddings or from the picture on."""

    keeps = True

    def embed(self, picture) -> Embedded:
        self.picture = picture
        return super().embed(picture)

    def decode(self, embedded: Embedded, prompts: Prompts) -> Answer:
        parts = []
        for at in range(len(prompts)):
            # The first object's encoding has just been paid for.
            known = embedded if self.keeps or at == 0 else super().embed(self.picture)
            parts.append(super().decode(known, prompts[at : at + 1]))
        return Answer.join(parts)


class FromThePicture(OneByOne):
    keeps = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("annotations", type=Path)
    parser.add_argument("--pictures", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    loaded = load_checkpoint(device="cpu")
    ways = {
        "all in one call": EfficientSamPredictor(*loaded),
        "one by one, on kept embeddings": OneByOne(*loaded),
        "one by one": FromThePicture(*loaded),
    }
    pictures = find_true_pictures(args.images, args.annotations)
    pictures = pictures[:: max(1, len(pictures) // args.pictures)][: args.pictures]
    settings, protocols = replace(Settings(), oracle=False), [find_protocol("box")]
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    spent, masks = Counter[str](), 0
    for _ in range(args.rounds):
        for picture in pictures:
            for name, predictor in ways.items():
                watch, start = Stopwatch(), time.perf_counter()
                record = evaluate_picture(predictor, picture, protocols, settings, watch=watch)
                seconds[name].append(time.perf_counter() - start)
                if name == "all in one call":
                    spent.update(watch.seconds)
                    masks += len(record["masks"])
    print(f"{len(pictures)} pictures, {masks // args.rounds} masks, {args.rounds} rounds, {args.threads} threads")
    print("| way | seconds a picture | times the first | range |\n|---|---|---|---|")
    first = seconds["all in one call"]
    for name, found in seconds.items():
        by_round = [
            sum(found[at : at + len(pictures)]) / sum(first[at : at + len(pictures)])
            for at in range(0, len(found), len(pictures))
        ]
        ratio = f"{sum(found) / sum(first):.2f} | {min(by_round):.2f} to {max(by_round):.2f}"
        print(f"| {name} | {statistics.mean(found):.3f} | {ratio} |", flush=True)
    total = sum(spent.values())
    shares = ", ".join(f"{kind} {part / total:.1%}" for kind, part in spent.most_common())
    print(f"all in one call, by kind of work: {shares}")


if __name__ == "__main__":
    main()
