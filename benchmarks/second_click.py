"""What a second click on a stored embedding costs, against the first: the default checkpoint and EfficientSAM-Ti.

    python benchmarks/second_click.py

The whole way from the photo to its masks at the photo's size, on the CPU; the two in turn.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from efficientsam_hf import (
    VARIANTS,
    EfficientSamConfig,
    EfficientSamModel,
    EfficientSamProcessor,
    load_checkpoint,
    read_photo,
    segment,
)

PHOTO = Path(__file__).parents[1] / "examples" / "images" / "coffee.jpg"


def seconds(call: Callable) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(name: str, model: EfficientSamModel, processor: EfficientSamProcessor, rounds: int) -> str:
    photo = read_photo(PHOTO)
    embeddings = segment(model, processor, photo, points=[[240, 160]]).image_embeddings
    first, second = [], []
    for _ in range(rounds):
        first.append(seconds(lambda: segment(model, processor, photo, points=[[240, 160]])))
        second.append(
            seconds(lambda: segment(model, processor, photo, points=[[300, 240]], image_embeddings=embeddings))
        )
    share = statistics.median(later / earlier for earlier, later in zip(first, second, strict=True))
    return f"| {name} | {statistics.median(first):.3f} | {statistics.median(second):.3f} | {share:.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tiny = EfficientSamModel(EfficientSamConfig(vision_config=VARIANTS["tiny"])).eval()
    print(f"{args.threads} threads, torch {torch.__version__}, photo 600 x 400, medians of {args.rounds}")
    print("| model | first click s | second click s | second / first |\n|---|---|---|---|")
    print(measure("default checkpoint", *load_checkpoint(device="cpu"), args.rounds))
    processor = EfficientSamProcessor.from_model_config(tiny.config)
    print(measure("EfficientSAM-Ti (random weights)", tiny, processor, args.rounds))


if __name__ == "__main__":
    main()
