"""From files to masks: pictures a second with one box each, by batch and runtime, beside transformers' SAM.

    python benchmarks/throughput.py --exported openvino-float32 onnx-float32
    python benchmarks/throughput.py --variant tiny --device cuda --dtype bfloat16 --batches 1 8 32 --compile --peers

Reading, resizing, encoder, decoder, masks at the photo's size. Every way does the same photos in turn in one run. The
model's share of the device's measured matrix rate (MFU) counts the encoder's and decoder's operations alone.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import SamConfig, SamModel

from efficientsam_hf import (
    VARIANTS,
    EfficientSamConfig,
    EfficientSamModel,
    EfficientSamProcessor,
    ExportedEfficientSam,
    SegmentationStream,
    compile_model,
    load_checkpoint,
    segment,
)

PHOTO = Path(__file__).parents[1] / "examples" / "images" / "coffee.jpg"
BOX = [75, 15, 480, 385]
# transformers' defaults are ViT-B's; these are what ViT-H changes.
PEERS = {
    "SamModel ViT-B": {},
    "SamModel ViT-H": {
        "hidden_size": 1280,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "global_attn_indexes": [7, 15, 23, 31],
        "mlp_dim": 5120,
    },
}


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product."""
    side = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        (left @ right).sum().item()
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds)


def operations(model: EfficientSamModel, processor: EfficientSamProcessor) -> float:
    """Of one picture and one box."""
    with FlopCounterMode(display=False) as counter:
        segment(model, processor, PHOTO, boxes=BOX)
    return float(counter.get_total_flops())


def in_stream(model: Any, processor: EfficientSamProcessor, batch_size: int, count: int) -> Callable[[], None]:
    stream = SegmentationStream(model, processor, batch_size=batch_size)

    def run() -> None:
        for answer in stream((PHOTO, {"boxes": BOX}) for _ in range(count)):
            answer.masks.cpu()

    return run


def sam(changes: dict[str, Any], device: torch.device, dtype: torch.dtype, count: int) -> Callable[[], None]:
    """A peer with random weights; resizing as SAM's processor does it, the longer side to 1024, padded."""
    config = SamConfig(vision_config=changes)
    model = SamModel(config).to(device, dtype).eval()

    @torch.inference_mode()
    def run() -> None:
        for _ in range(count):
            photo = Image.open(PHOTO).convert("RGB")
            scale = 1024 / max(photo.size)
            small = photo.resize([round(side * scale) for side in photo.size])
            pixels = np.zeros((1024, 1024, 3), dtype=np.float32)
            pixels[: small.height, : small.width] = np.float32(small) / 255 - 0.45
            inputs = torch.from_numpy(pixels).permute(2, 0, 1)[None].to(device, dtype)
            boxes = torch.tensor([[BOX]], device=device, dtype=dtype) * scale
            low = model(pixel_values=inputs, input_boxes=boxes).pred_masks[0].float()
            square = torch.nn.functional.interpolate(low, (1024, 1024), mode="bilinear")
            cut = square[..., : small.height, : small.width]
            (torch.nn.functional.interpolate(cut, (photo.height, photo.width), mode="bilinear") > 0).cpu()

    return run


def ways(args: argparse.Namespace, model: Any, processor: Any, dtype: torch.dtype) -> Iterator[tuple[str, Callable]]:
    count = args.pictures

    def one_by_one() -> None:
        for _ in range(count):
            segment(model, processor, PHOTO, boxes=BOX).masks.cpu()

    yield "`segment`, one by one", one_by_one
    for batch_size in args.batches:
        yield f"stream, batch {batch_size}", in_stream(model, processor, batch_size, count)
    for folder in args.exported:
        exported = ExportedEfficientSam(folder, threads=args.threads)
        yield f"stream, batch {args.batches[0]}, {folder.name}", in_stream(exported, processor, args.batches[0], count)
    for name, changes in PEERS.items() if args.peers else ():
        yield name, sam(changes, torch.device(args.device), dtype, count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=list(VARIANTS), help="random weights; the bundled checkpoint if left out")
    parser.add_argument("--exported", type=Path, nargs="*", default=[], help="folders of the same model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--pictures", type=int, default=8, help="a way and round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--peers", action="store_true", help="transformers' SamModel, too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    if args.variant:
        model = EfficientSamModel(EfficientSamConfig(vision_config=VARIANTS[args.variant])).eval()
        processor = EfficientSamProcessor.from_model_config(model.config)
    else:
        model, processor = load_checkpoint(device="cpu", dtype="float32")
    work = operations(model, processor)
    model = model.to(args.device, dtype)
    if args.compile:
        compile_model(model)
    rows = dict(ways(args, model, processor, dtype))
    times: dict[str, list[float]] = {name: [] for name in rows}
    for run in rows.values():
        run()
    for _ in range(args.rounds):
        for name, run in rows.items():
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) / args.pictures)
    rate = matrix_rate(torch.device(args.device), dtype)
    first = next(iter(rows))
    print(
        f"{args.variant or 'bundled checkpoint'}, {args.device}, {args.dtype}, {args.threads} threads, "
        f"torch {torch.__version__}, {work / 1e9:.1f} G operations a picture, matrix rate {rate / 1e9:.0f} G/s"
    )
    print("| way | pictures a second | p50 ms | p95 ms | first / this | MFU |\n|---|---|---|---|---|---|")
    for name, row in times.items():
        ratio = statistics.median(other / this for other, this in zip(times[first], row, strict=True))
        median = statistics.median(row)
        share = "" if name in PEERS else f"{work / median / rate:.2f}"
        print(f"| {name} | {1 / median:.2f} | {1000 * median:.0f} | {1000 * np.percentile(row, 95):.0f} | "
              f"{ratio:.2f} | {share} |", flush=True)  # fmt: skip
    if args.device == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
