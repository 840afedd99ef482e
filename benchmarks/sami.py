"""What the feature cache saves, and how fast the student's step is.

    python benchmarks/sami.py                        # CPU: cached against the online teacher, in turn in one run
    python benchmarks/sami.py --student_batch 256    # a CUDA GPU: images a second and model FLOP utilisation

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
from torch.utils.flop_counter import FlopCounterMode
from transformers import SamVisionConfig, SamVisionModel

from efficientsam_hf import EfficientSamForPreTraining, EfficientSamSamiConfig
from efficientsam_hf.data.crops import SampleMaker
from efficientsam_hf.data.images import UnlabelledImages, find_pictures
from efficientsam_hf.training.feature_cache import CacheSettings, FeatureCache, write_cache
from efficientsam_hf.training.sami import model_inputs
from efficientsam_hf.training.teachers import SamTeacher

# Dense bfloat16 FLOP/s of a GPU, by a part of its name.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}


def make_pictures(folder: Path, count: int) -> None:
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 255, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg")


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
    make_pictures(room, args.pictures)
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


def measure_student(batch: int, rounds: int) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    step = Step(device)
    inputs = {
        "pixel_values": torch.randn(batch, 3, 224, 224, device=device),
        "noise": torch.rand(batch, 196, device=device),
        "target_features": torch.randn(batch, 256, 14, 14, device=device),
    }
    with FlopCounterMode(display=False) as counter:
        step(inputs)
    times = []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        step(inputs)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    seconds, flops = statistics.median(times[2:]), counter.get_total_flops()
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    peak = next((peak for part, peak in PEAKS.items() if part in name), None)
    share = f"{flops / seconds / peak:.1%} of {peak / 1e12:.0f} TFLOP/s" if peak else "share of the peak unknown"
    print(f"student step, batch {batch}, {name}: {batch / seconds:.1f} images/s")
    print(f"{flops / batch / 1e9:.2f} GFLOP an image, {flops / seconds / 1e12:.3f} TFLOP/s, {share}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=2, help="pictures of a batch of the comparison; 0: none")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--student_batch", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    measure_student(args.student_batch, args.rounds)
    if args.pictures:
        with tempfile.TemporaryDirectory() as room:
            compare(args, Path(room))


if __name__ == "__main__":
    main()
