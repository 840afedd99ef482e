"""What an encoder knows of classes that nobody taught it: k-NN and a linear probe on groups of ImageNet's classes.

    python benchmarks/frozen_features.py PICTURES --wordnet data.noun --models mae=RUN0,RUN1,RUN2 sami=RUN0,RUN1,RUN2

PICTURES is a folder of pictures whose names begin with a WordNet id (n02085620_Chihuahua.jpg), one or more a class.
`data.noun` is WordNet 3.0's file (Debian: package wordnet-base). A picture belongs to the first group below that is
above its class in WordNet; the rest are left out. Every picture is asked once, with four fifths of the others known
(five folds); the range is over the seeds that deal the folds, each of which has the next of a name's checkpoints.
`random` stands before the first model of a size: the same config with fresh weights, drawn anew for each seed.
`colours` are the picture's mean colour and deviation alone. Last comes how far each model is ahead of the one named
before it, seed by seed.
"""

import argparse
import copy
import re
import statistics
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from efficientsam_hf import EfficientSamForImageClassification, EfficientSamVisionConfig
from efficientsam_hf.data.classified_images import centre_crop_processor
from efficientsam_hf.data.images import Picture, find_pictures
from efficientsam_hf.evaluation.classification import (
    collect_features,
    fold_numbers,
    neighbour_scores,
    probe_scores,
    top_accuracy,
)
from efficientsam_hf.training.encoders import load_encoder_model

GROUPS = {
    "dog": "02084071",
    "bird": "01503061",
    "reptile": "01661091",
    "insect": "02159955",
    "ungulate": "02370806",
    "primate": "02469914",
    "musical instrument": "03800933",
    "vehicle": "04524313",
    "clothing": "03051540",
    "structure": "04341686",
    "container": "03094503",
    "furniture": "03405725",
    "food": "07555863",
    "fruit": "13134947",
}


def read_parents(path: Path) -> dict[str, list[str]]:
    """WordNet's `data.noun`: by the number of each synset those right above it."""
    parents = {}
    for line in path.read_text(encoding="latin-1").splitlines():
        if re.match(r"\d{8} ", line):
            parents[line[:8]] = re.findall(r"@ (\d{8}) n", line)
    return parents


def group_of(synset: str, parents: dict[str, list[str]]) -> str | None:
    """The first group that is above a synset, or is it."""
    above, waiting = set(), [synset]
    while waiting:
        above.add(waiting[-1])
        waiting += [parent for parent in parents[waiting.pop()] if parent not in above]
    return next((name for name, number in GROUPS.items() if number in above), None)


class Grouped:
    """Pictures and the numbers of their groups, as `collect_features` wants them."""

    def __init__(self, pictures: list[Picture], parents: dict[str, list[str]]):
        found = [(picture, group_of(Path(picture.name).name[1:9], parents)) for picture in pictures]
        self.names = [name for name in GROUPS if any(group == name for _, group in found)]
        self.items = [(picture, self.names.index(group)) for picture, group in found if group]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int):
        picture, label = self.items[index]
        return picture.read(), label


class Colours(torch.nn.Module):
    """Six numbers of a picture: what no encoder is needed for."""

    device, dtype = torch.device("cpu"), torch.float32

    def get_image_features(self, pixels: Tensor) -> Tensor:
        return torch.cat([pixels.mean((2, 3)), pixels.std((2, 3))], dim=1)


def folded_accuracy(features: Tensor, labels: Tensor, classes: int, seed: int, k: int) -> tuple[float, float]:
    """Of nearest neighbours and of a probe, every picture asked once."""
    folds, votes = fold_numbers(labels.tolist(), 5, seed), torch.zeros(2, len(labels), classes)
    for fold in range(5):
        known, asked = folds != fold, folds == fold
        given = (features[known], labels[known], features[asked], classes)
        votes[0, asked], votes[1, asked] = neighbour_scores(*given, k), probe_scores(*given, penalty=0.1)
    return tuple(top_accuracy(scores, labels)["accuracy"] for scores in votes)


def told(values: list[float], sign: str = "") -> str:
    return f"{statistics.fmean(values):{sign}.3f} ({min(values):{sign}.3f} to {max(values):{sign}.3f})"


def encoders(args: argparse.Namespace):
    """Name, side of the pictures, and one model a seed, or one for all of them."""
    yield "colours", 224, [Colours()]
    seen = []
    for given in args.models:
        name, sources = given.split("=", 1)
        loaded = [load_encoder_model(EfficientSamForImageClassification, one).eval() for one in sources.split(",")]
        config = loaded[0].config
        side, shape = min(config.pretrain_image_size, args.largest_side), config.to_diff_dict()
        if shape not in seen:
            seen.append(shape)
            yield f"random, as {name}", side, [fresh(config, seed) for seed in range(args.seeds)]
        yield name, side, loaded


def fresh(config: EfficientSamVisionConfig, seed: int) -> EfficientSamForImageClassification:
    torch.manual_seed(seed)
    return EfficientSamForImageClassification(copy.deepcopy(config)).eval()


def main(args: argparse.Namespace) -> None:
    items = Grouped(find_pictures([args.pictures]), read_parents(args.wordnet))
    counts = torch.bincount(torch.tensor([label for _, label in items.items]))
    groups = (f"{n} {name}" for name, n in zip(items.names, counts.tolist(), strict=True))
    print(f"{len(items)} pictures: {', '.join(groups)}")
    print(f"the largest group alone: {(counts.max() / len(items)).item():.3f}\n")
    print(f"| encoder | side | k-NN (k = {args.k}) | linear probe |\n|---|---|---|---|")
    columns: dict[str, tuple] = {}
    for name, side, models in encoders(args):
        prepare = partial(centre_crop_processor(side), return_tensors="pt")
        taken = [collect_features(model, items, prepare) for model in models]
        found = []
        for seed in range(args.seeds):
            features, labels = taken[seed % len(taken)]
            found.append(folded_accuracy(features, labels, len(items.names), seed, args.k))
        columns[name] = tuple(zip(*found, strict=True))
        print(f"| {name} | {side} | {' | '.join(told(column) for column in columns[name])} |", flush=True)
    print()
    for before, after in pairwise(columns):
        ahead = (
            told([b - a for a, b in zip(*both, strict=True)], "+")
            for both in zip(columns[before], columns[after], strict=True)
        )
        print(f"{after} over {before}: k-NN {next(ahead)}, linear probe {next(ahead)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--wordnet", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=[], help="NAME=FOLDER or Hub id, or several of them and commas")
    parser.add_argument("--largest_side", type=int, default=256)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    main(parser.parse_args())
