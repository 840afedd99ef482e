"""From files to masks: pictures a second with one box each, by batch and runtime, beside transformers' models.

    python benchmarks/throughput.py --exported openvino-float32 onnx-float32
    python benchmarks/throughput.py --variant tiny --pictures 2 --rounds 3 --peers "SamModel ViT-B" "Sam2Model Hiera-T"
    python benchmarks/throughput.py --variant tiny --device cuda --dtype bfloat16 --batches 1 8 32 --compile \
        --peers "SamModel ViT-H"

Reading, resizing, encoder, decoder, masks at the photo's size. Every way does the same photos in turn in one run. The
model's share of the device's measured matrix rate (MFU) counts the encoder's operations alone.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from operations import encoder_operations, matrix_rate
from peers import PEERS
from PIL import Image
from transformers import SamModel

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
from efficientsam_hf.evaluation.peers import Sam2Predictor, SamPredictor
from efficientsam_hf.evaluation.predictor import Prompts

PHOTO = Path(__file__).parents[1] / "examples" / "images" / "coffee.jpg"
BOX = [75, 15, 480, 385]


def in_stream(model: Any, processor: EfficientSamProcessor, batch_size: int, count: int) -> Callable[[], None]:
    stream = SegmentationStream(model, processor, batch_size=batch_size)

    def run() -> None:
        for answer in stream((PHOTO, {"boxes": BOX}) for _ in range(count)):
            answer.masks.cpu()

    return run


def peer(name: str, device: torch.device, dtype: torch.dtype, count: int) -> Callable[[], None]:
    """A peer with random weights, pictures read as its processor reads them."""
    model = PEERS[name]().to(device, dtype).eval()
    predictor = SamPredictor(model, name) if isinstance(model, SamModel) else Sam2Predictor(model, name)
    prompts = Prompts(boxes=np.array([BOX], dtype=np.float64))

    def run() -> None:
        for _ in range(count):
            embedded = predictor.embed(Image.open(PHOTO).convert("RGB"))
            predictor.at_size(embedded, predictor.decode(embedded, prompts).best_logits())

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
    for name in args.peers:
        yield name, peer(name, torch.device(args.device), dtype, count)


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
    parser.add_argument("--peers", nargs="*", default=[], choices=list(PEERS))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    if args.variant:
        model = EfficientSamModel(EfficientSamConfig(vision_config=VARIANTS[args.variant])).eval()
        processor = EfficientSamProcessor.from_model_config(model.config)
    else:
        model, processor = load_checkpoint(device="cpu", dtype="float32")
    with torch.device("meta"):
        # With a config of its own, which counting changes.
        work = encoder_operations(EfficientSamModel(deepcopy(model.config)), model.config.vision_config.image_size)
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
