"""The encoder by attention, batch and compilation, beside transformers' SAM, SAM 2 and EdgeTAM, in turn in one run.

    python benchmarks/encoder.py
    python benchmarks/encoder.py --peers "SamModel ViT-B" "Sam2Model Hiera-T" --batches 1 4 --rounds 3
    python benchmarks/encoder.py --device cuda --dtype bfloat16 --batches 1 8 32 --other_batches 1 32 --compile \
        --peers "SamModel ViT-H" --rounds 20

1024 pixels, random weights: neither time nor memory depends on their values. A row's memory is what it adds to model
and pictures, on a CPU in a process of its own. MFU is the model's operations a second over a large matrix product's.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from operations import encoder_operations, matrix_rate, place
from peers import PEERS

from efficientsam_hf import VARIANTS, EfficientSamConfig, EfficientSamModel

SIDE = 1024
EAGER, DEFAULT, COMPILED = "eager", "sdpa", "sdpa, compiled"


def build(name: str, variant: str) -> Any:
    torch.manual_seed(0)
    if name in PEERS:
        return PEERS[name]().eval()
    return EfficientSamModel(EfficientSamConfig(vision_config=VARIANTS[variant])).eval()


def encoder(name: str, args: argparse.Namespace) -> Callable[[torch.Tensor], torch.Tensor]:
    """Pictures (B, 3, S, S) -> embeddings; of a peer's several maps the coarsest."""
    with torch.device(args.device):
        model = build(name, args.variant).to(getattr(torch, args.dtype))
    model.set_attn_implementation("eager" if name == EAGER else "sdpa")
    encode = (
        torch.compile(model.get_image_embeddings, dynamic=False) if name == COMPILED else model.get_image_embeddings
    )

    @torch.inference_mode()
    def run(pixels: torch.Tensor) -> torch.Tensor:
        embeddings = encode(pixels)
        embeddings = embeddings[-1] if isinstance(embeddings, list) else embeddings
        embeddings[0, 0, 0, 0].item()  # a GPU is done only then
        return embeddings

    return run


def pictures(batch: int, args: argparse.Namespace) -> torch.Tensor:
    pixels = torch.randn(batch, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    return pixels.to(args.device, getattr(torch, args.dtype))


def peak_memory(name: str, batch: int, run: Callable, args: argparse.Namespace) -> float:
    """MiB that encoding adds to what model and pictures take."""
    if args.device == "cpu":
        command = [sys.executable, __file__, "--variant", args.variant, "--dtype", args.dtype]
        command += ["--memory_of", name, "--batches", str(batch)]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    pixels = pictures(batch, args)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(pixels)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def own_memory(args: argparse.Namespace) -> float:
    """The same on a CPU, to be asked in a process of its own."""
    run, pixels = encoder(args.memory_of, args), pictures(args.batches[0], args)
    Path("/proc/self/clear_refs").write_text("5")  # starts the peak anew (Linux)
    before = status_mebibytes("VmHWM")
    run(pixels)
    return status_mebibytes("VmHWM") - before


def status_mebibytes(name: str) -> float:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) / 1024


def measure(
    rows: dict[tuple[str, int], Callable], pixels: dict[int, torch.Tensor], rounds: int
) -> dict[tuple[str, int], list[float]]:
    """Seconds of each row and round, the rows in turns; the first round warms up."""
    times: dict[tuple[str, int], list[float]] = {row: [] for row in rows}
    for number in range(rounds + 1):
        for (name, batch), run in rows.items():
            start = time.perf_counter()
            run(pixels[batch])
            if number:
                times[name, batch].append(time.perf_counter() - start)
    return times


def print_table(
    times: dict[tuple[str, int], list[float]], rows: dict[tuple[str, int], Callable], args: argparse.Namespace
) -> None:
    rate = matrix_rate(torch.device(args.device), getattr(torch, args.dtype))
    print(f"EfficientSAM {args.variant}, {SIDE} x {SIDE}, {place(args.device)}, {args.dtype}, {args.threads} threads, "
          f"torch {torch.__version__}, matrix rate {rate / 1e9:.0f} G/s")  # fmt: skip
    print("| encoder | batch | p50 s | p95 s | pictures a second | eager / this, a picture | MFU | peak memory MiB |")
    print("|---|---|---|---|---|---|---|---|")
    digits = 3 if args.device == "cpu" else 5
    for (name, batch), row in times.items():
        ratios = [
            first / args.other_batches[0] / (this / batch)
            for first, this in zip(times[EAGER, args.other_batches[0]], row, strict=True)
        ]
        with torch.device("meta"):
            work = batch * encoder_operations(build(name, args.variant), SIDE)
        median = statistics.median(row)
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        seconds = f"{median:.{digits}f} | {np.percentile(row, 95):.{digits}f}"
        memory = peak_memory(name, batch, rows[name, batch], args)
        print(f"| {name} | {batch} | {seconds} | {batch / median:.2f} | {spread} | "
              f"{work / median / rate:.2f} | {memory:.0f} |", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="tiny", choices=list(VARIANTS))
    parser.add_argument("--peers", nargs="*", default=[], choices=list(PEERS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1], help="of the default attention")
    parser.add_argument("--other_batches", type=int, nargs="+", default=[1], help="of all else")
    parser.add_argument("--compile", action="store_true", help="torch.compile, too")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(own_memory(args))
        return
    encoders = {name: encoder(name, args) for name in [EAGER, DEFAULT, *[COMPILED] * args.compile, *args.peers]}
    rows = {
        (name, batch): run
        for name, run in encoders.items()
        for batch in (args.batches if name == DEFAULT else args.other_batches)
    }
    pixels = {batch: pictures(batch, args) for batch in {1, *args.batches, *args.other_batches}}
    difference = (encoders[EAGER](pixels[1]) - encoders[DEFAULT](pixels[1])).abs().max()
    print_table(measure(rows, pixels, args.rounds), rows, args)
    print(f"largest difference of the embeddings, eager and sdpa: {difference:.1e}")


if __name__ == "__main__":
    main()
