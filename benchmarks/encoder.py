"""The default attention against the eager one: time, peak memory, difference. EfficientSAM-Ti at 1024 pixels, float32.

    python benchmarks/encoder.py

Random weights: neither time nor memory depends on their values. Each row's memory is measured in a process of its own.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from efficientsam_hf import VARIANTS, EfficientSamConfig, EfficientSamVisionModel

CLOCK = time.perf_counter


def build(variant: str) -> EfficientSamVisionModel:
    torch.manual_seed(0)
    return EfficientSamVisionModel(EfficientSamConfig(vision_config=VARIANTS[variant]).vision_config).eval()


def picture() -> torch.Tensor:
    return torch.randn(1, 3, 1024, 1024, generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def encode(model: EfficientSamVisionModel, pixels: torch.Tensor, implementation: str) -> tuple[torch.Tensor, float]:
    model.set_attn_implementation(implementation)
    start = CLOCK()
    embeddings = model(pixels).last_hidden_state
    return embeddings, CLOCK() - start


def peak_memory(variant: str, implementation: str) -> float:
    """MiB that encoding one picture adds to a process that holds the model and the picture."""
    command = [sys.executable, __file__, "--variant", variant, "--memory_of", implementation]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def status_mebibytes(name: str) -> float:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="tiny", choices=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--processor_time", action="store_true", help="the processor's time, for busy machines; with --threads 1"
    )
    parser.add_argument("--memory_of", choices=["eager", "sdpa"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.processor_time:
        global CLOCK
        CLOCK = time.process_time
    model, pixels = build(args.variant), picture()
    if args.memory_of:
        Path("/proc/self/clear_refs").write_text("5")  # starts the peak anew (Linux)
        before = status_mebibytes("VmHWM")
        encode(model, pixels, args.memory_of)
        print(status_mebibytes("VmHWM") - before)
        return
    times: dict[str, list[float]] = {"eager": [], "sdpa": []}
    results = {name: encode(model, pixels, name)[0] for name in times}  # the first round warms up
    for _ in range(args.rounds):
        for name, row in times.items():
            row.append(encode(model, pixels, name)[1])
    ratios = [eager / sdpa for eager, sdpa in zip(times["eager"], times["sdpa"], strict=True)]
    print(f"EfficientSAM {args.variant}, 1024 x 1024, float32, {args.threads} threads, torch {torch.__version__}")
    print("| attention | median s | fastest s | peak memory MiB |\n|---|---|---|---|")
    for name, row in times.items():
        print(f"| {name} | {statistics.median(row):.2f} | {min(row):.2f} | {peak_memory(args.variant, name):.0f} |")
    difference = (results["eager"] - results["sdpa"]).abs().max()
    print(
        f"eager / sdpa, pair by pair: median {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    )
    print(f"largest difference of the embeddings: {difference:.1e}")


if __name__ == "__main__":
    main()
