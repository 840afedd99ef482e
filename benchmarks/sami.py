"""What the feature cache saves, and how fast the student's step is.

    python benchmarks/sami.py                        # CPU: cached against the online teacher, in turn in one run
    python benchmarks/sami.py --pictures 0 --student_batch 256 --student_rounds 50 --workers 12
        # a CUDA GPU: the student's pictures a second and model FLOP utilisation, beside those that loading gives

The teacher is SAM's ViT-B encoder at 1024 pixels with random weights: time does not depend on their values. Both sides
take the whole way from pictures on disk to the moved weights, with EfficientSAM-Ti as the student.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import SamVisionConfig, SamVisionModel

from efficientsam_hf import EfficientSamForPreTraining, EfficientSamSamiConfig
from efficientsam_hf.data.crops import SampleMaker
from efficientsam_hf.data.images import UnlabelledImages, find_pictures
from efficientsam_hf.training.feature_cache import CacheSettings, FeatureCache, write_cache
from efficientsam_hf.training.sami import model_inputs, training_flops
from efficientsam_hf.training.teachers import SamTeacher

# Dense bfloat16 FLOP/s of a GPU, by a part of its name.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}


def make_pictures(folder: Path, count: int, size: tuple[int, int]) -> None:
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 255, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(folder / f"{number}.jpg")


class Step:
    """One weight update of a new student."""

    def __init__(self, device: torch.device):
        torch.manual_seed(0)
        self.config = EfficientSamSamiConfig()
        self.model = EfficientSamForPreTraining(self.config).to(device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.device = device

    def __call__(self, inputs: dict) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = self.model(**inputs).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def compare(args: argparse.Namespace, room: Path) -> None:
    make_pictures(room, args.pictures, (640, 480))
    pictures, count = find_pictures([room]), args.pictures
    torch.manual_seed(0)
    # The default of 1e-10 would give features that float16 cannot hold.
    teacher = SamTeacher(SamVisionModel(SamVisionConfig(initializer_range=0.02)), image_size=1024)
    maker = SampleMaker(teacher_size=1024, crops=1)
    start = time.perf_counter()
    list(write_cache(room / "cache", pictures, teacher, maker, CacheSettings(grid=14, crops=1), batch_size=1))
    print(f"writing the cache: {(time.perf_counter() - start) / count:.2f} s a picture")
    cache = FeatureCache(room / "cache", pictures, 14, SampleMaker(crops=1))
    step, length = Step(torch.device("cpu")), count * args.rounds
    ways = {
        "online": (UnlabelledImages(pictures, length, maker), teacher),
        "cached": (UnlabelledImages(pictures, length, SampleMaker(crops=1), features=cache), None),
    }
    loaders = {name: iter(DataLoader(samples, batch_size=count)) for name, (samples, _) in ways.items()}
    rows: dict[str, list[float]] = {name: [] for name in ways}
    targets = {}
    for _ in range(args.rounds):
        for name, (_, seen_by) in ways.items():
            start = time.perf_counter()
            inputs = model_inputs(next(loaders[name]), step.config, seen_by)
            step(inputs)
            rows[name].append(count / (time.perf_counter() - start))
            targets[name] = inputs["target_features"]
    print(
        f"\nEfficientSAM-Ti at 224, ViT-B at 1024, float32, {args.threads} thread(s), {args.rounds} rounds of {count}"
    )
    print("| features | images a second, median (range) |\n|---|---|")
    for name, rates in rows.items():
        print(f"| {name} | {statistics.median(rates):.2f} ({min(rates):.2f} to {max(rates):.2f}) |")
    ratios = [cached / online for online, cached in zip(rows["online"], rows["cached"], strict=True)]
    print(f"cached / online, pair by pair: {statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})")
    error = (targets["cached"] - targets["online"]).norm() / targets["online"].norm()
    size = sum(path.stat().st_size for path in (room / "cache").iterdir())
    print(f"relative error of the cached features: {error:.1e}; {size / count / 1e3:.0f} kB a crop on disk")


def measure_student(args: argparse.Namespace) -> float:
    """Pictures a second, the teacher's features given."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    step, batch = Step(device), args.student_batch
    if args.compile:
        step.model = torch.compile(step.model)
    inputs = {
        "pixel_values": torch.randn(batch, 3, 224, 224, device=device),
        "noise": torch.rand(batch, 196, device=device),
        "target_features": torch.randn(batch, 256, 14, 14, device=device),
    }
    times = []
    for _ in range(args.student_rounds + 2):
        start = time.perf_counter()
        step(inputs)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    rate, flops = batch / statistics.median(times[2:]), training_flops(step.config)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    peak = next((peak for part, peak in PEAKS.items() if part in name), None)
    share = f"{flops * rate / peak:.1%} of {peak / 1e12:.0f} TFLOP/s" if peak else "share of the peak unknown"
    kind = "bfloat16" if device.type == "cuda" else f"float32, {args.threads} thread(s)"
    print(f"student step, EfficientSAM-Ti at 224, batch {batch}, {name}, {kind}: {rate:.1f} pictures/s")
    print(f"{flops / 1e9:.2f} GFLOP a picture, {flops * rate / 1e12:.3f} TFLOP/s, {share}")
    return rate


def measure_loading(args: argparse.Namespace, room: Path, needed: float) -> None:
    """Pictures a second from JPEG and cache to batches, beside what the student takes."""
    make_pictures(room, 64, (500, 375))
    pictures = find_pictures([room])
    torch.manual_seed(0)
    tiny = SamVisionConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=1, initializer_range=0.02)
    teacher, maker = SamTeacher(SamVisionModel(tiny), image_size=224), SampleMaker(crops=1)
    list(write_cache(room / "cache", pictures, teacher, maker, CacheSettings(grid=14, crops=1), batch_size=64))
    cache = FeatureCache(room / "cache", pictures, 14, maker)
    samples = UnlabelledImages(pictures, 64 * (args.loading_rounds + 1), maker, features=cache)
    loader = iter(DataLoader(samples, batch_size=32, num_workers=args.workers))
    next(loader), next(loader)
    start, count = time.perf_counter(), sum(len(batch["pixels"]) for batch in loader)
    rate = count / (time.perf_counter() - start)
    one = rate / max(args.workers, 1)
    print(f"loading, 500 x 375 JPEG and 256 x 14 x 14 features: {rate:.0f} pictures/s, {one:.0f} a process that reads")
    print(f"loading / student: {rate / needed:.1f}; the student takes {needed / one:.1f} reading processes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=2, help="pictures of a batch of the comparison; 0: none")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--student_batch", type=int, default=8)
    parser.add_argument("--student_rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="the student by torch.compile")
    parser.add_argument("--workers", type=int, default=0, help="processes that read pictures")
    parser.add_argument("--loading_rounds", type=int, default=4, help="times that 64 pictures are read")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rate = measure_student(args)
    with tempfile.TemporaryDirectory() as room:
        measure_loading(args, Path(room), rate)
    if args.pictures:
        with tempfile.TemporaryDirectory() as room:
            compare(args, Path(room))


if __name__ == "__main__":
    main()
