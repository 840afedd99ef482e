"""Where a device's time goes: the model on random pixels, and segment everything on a photo; photos a second, memory.

    python benchmarks/profiles.py --device cuda --dtype bfloat16 --batches 1 32 --photos 1920x1080 4000x3000

Of the model of a variant's size with random weights, one box a picture; of everything with the bundled checkpoint.
Each table lists what the device did (torch.profiler), by kernel, and how often Python waited for it.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from operations import place
from PIL import Image
from torch.profiler import ProfilerActivity, profile

from efficientsam_hf import VARIANTS, EfficientSamConfig, EfficientSamModel, load_checkpoint, segment_everything

PHOTO = Path(__file__).parents[1] / "examples" / "images" / "coffee.jpg"
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
STARTS = ("cudaLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch", "cudaLaunchKernelExC")


def wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def median_seconds(run: Callable[[], object], device: str, rounds: int) -> float:
    """Of some rounds after a first one that is not counted."""
    times = []
    for _ in range(rounds + 1):
        wait(device)
        start = time.perf_counter()
        run()
        wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def print_profile(name: str, run: Callable[[], object], args: argparse.Namespace) -> None:
    """Seconds without the profiler, then what one more round is made of."""
    seconds = median_seconds(run, args.device, args.rounds)
    on_gpu = args.device != "cpu"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as profiler:
        run()
        wait(args.device)
    events = profiler.key_averages()
    kernels = [event for event in events if str(event.device_type).endswith("CUDA") == on_gpu]
    own = {event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total for event in kernels}
    waits, starts = (sum(event.count for event in events if event.key in names) for names in (WAITS, STARTS))
    print(f"\n{name}: {1000 * seconds:.2f} ms, {args.device} busy {sum(own.values()) / 1000:.2f} ms, ", end="")
    print(f"{starts} starts, {waits} waits\n| ms | calls | what |\n|---|---|---|")
    for event in sorted(kernels, key=lambda event: -own[event.key])[: args.rows]:
        print(f"| {own[event.key] / 1000:.3f} | {event.count} | {event.key[:100]} |", flush=True)


def profile_model(args: argparse.Namespace) -> None:
    model = EfficientSamModel(EfficientSamConfig(vision_config=VARIANTS[args.variant])).eval()
    model.to(args.device, getattr(torch, args.dtype))
    for count in args.batches:
        pixels = torch.randn(count, 3, 1024, 1024, device=model.device, dtype=model.dtype)
        boxes = torch.tensor([75.0, 15, 480, 385], device=model.device).expand(count, 1, -1)
        with torch.inference_mode():
            print_profile(
                f"{args.variant}, batch {count}",
                lambda pixels=pixels, boxes=boxes: model(pixel_values=pixels, input_boxes=boxes),
                args,
            )


def profile_everything(args: argparse.Namespace) -> None:
    model, processor = load_checkpoint(device=args.device, dtype=args.dtype)
    for size in args.photos:
        width, height = map(int, size.split("x"))
        photo = Image.open(PHOTO).convert("RGB").resize((width, height), Image.Resampling.BICUBIC)

        def run(photo=photo) -> list:
            return segment_everything(model, processor, photo)

        count, held = len(run()), 0
        if args.device != "cpu":
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        seconds = median_seconds(run, args.device, args.rounds)
        peak = f", {(torch.cuda.max_memory_allocated() - held) / 2**20:.0f} MiB" if args.device != "cpu" else ""
        print(f"\neverything, {size}, {count} masks: {1 / seconds:.2f} photos a second{peak}")
        print_profile(f"everything, {size}", run, args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=list(VARIANTS), default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batches", type=int, nargs="*", default=[1], help="of the model; none leaves it out")
    parser.add_argument("--photos", nargs="*", default=["640x480"], help="sizes for everything; none leaves it out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{place(args.device)}, {args.dtype}, torch {torch.__version__}")
    profile_everything(args)
    profile_model(args)


if __name__ == "__main__":
    main()
