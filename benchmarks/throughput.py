"""From files to masks: pictures a second with one box each, by batch and runtime, beside transformers' models.

    python benchmarks/throughput.py --exported openvino-float32 onnx-float32
    python benchmarks/throughput.py --variant tiny --pictures 2 --rounds 3 --peers "SamModel ViT-B" "Sam2Model Hiera-T"
    python benchmarks/throughput.py --variant tiny --device cuda --dtype bfloat16 --batches 1 8 32 --compile \
        --peers "SamModel ViT-H"
    python benchmarks/throughput.py --pixels --variant tiny --device cuda --dtype bfloat16 --batches 1 32 --compile \
        --mode reduce-overhead --peers "SamModel ViT-H" --peer_batches 1 8

Reading, resizing, encoder, decoder, masks at the photo's size; with `--pixels` encoder and decoder alone, masks on the
decoder's grid. Every way does the same pictures in turn in one run. The model's share of the device's measured matrix
rate (MFU) counts the encoder's operations alone.
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
from operations import encoder_operations, matrix_rate, place
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
    record_model,
    segment,
)
from efficientsam_hf.evaluation.peers import Sam2Predictor, SamPredictor
from efficientsam_hf.evaluation.predictor import Prompts

PHOTO = Path(__file__).parents[1] / "examples" / "images" / "coffee.jpg"
BOX = [75, 15, 480, 385]
SIDE = 1024  # of the peers' pictures and of ours


def in_stream(
    model: Any, processor: EfficientSamProcessor, batch_size: int, count: int, readers: int
) -> Callable[[], None]:
    stream = SegmentationStream(model, processor, batch_size=batch_size, readers=readers)

    def run() -> None:
        for answer in stream((PHOTO, {"boxes": BOX}) for _ in range(count)):
            answer.masks.cpu()

    return run


def on_pixels(model: Any, batch_size: int) -> Callable[[], None]:
    """Encoder and decoder alone: random pixels and a box each -> masks on the decoder's grid."""
    pixels = torch.randn(batch_size, 3, SIDE, SIDE, device=model.device, dtype=model.dtype)
    boxes = torch.tensor(BOX, device=model.device, dtype=torch.float32).expand(batch_size, 1, -1)

    @torch.inference_mode()
    def run() -> None:
        model(pixel_values=pixels, input_boxes=boxes).pred_masks[0, 0, 0, 0, 0].item()  # a GPU is done only then

    return run


def build_peer(name: str, args: argparse.Namespace) -> Any:
    """With random weights."""
    with torch.device(args.device):
        return PEERS[name]().to(getattr(torch, args.dtype)).eval()


def peer(name: str, args: argparse.Namespace) -> Callable[[], None]:
    """A peer, pictures read as its processor reads them."""
    model = build_peer(name, args)
    predictor = SamPredictor(model, name) if isinstance(model, SamModel) else Sam2Predictor(model, name)
    prompts = Prompts(boxes=np.array([BOX], dtype=np.float64))

    def run() -> None:
        for _ in range(args.pictures):
            embedded = predictor.embed(Image.open(PHOTO).convert("RGB"))
            predictor.at_size(embedded, predictor.decode(embedded, prompts).best_logits())

    return run


def ways_on_pixels(args: argparse.Namespace, model: Any) -> Iterator[tuple[str, Callable, int]]:
    """Names, what to run, and of how many pictures; the peers first."""
    for name in args.peers:
        other = build_peer(name, args)
        for batch_size in args.peer_batches:
            yield f"{name}, batch {batch_size}", on_pixels(other, batch_size), batch_size
    for batch_size in args.batches:
        yield f"model, batch {batch_size}", on_pixels(model, batch_size), batch_size


def ways(args: argparse.Namespace, model: Any, processor: Any) -> Iterator[tuple[str, Callable, int]]:
    """Names, what to run, and of how many pictures."""
    count, batches, readers = args.pictures, args.batches, args.readers

    def one_by_one() -> None:
        for _ in range(count):
            segment(model, processor, PHOTO, boxes=BOX).masks.cpu()

    yield "`segment`, one by one", one_by_one, count
    for batch_size in batches:
        yield f"stream, batch {batch_size}", in_stream(model, processor, batch_size, count, readers), count
    for folder in args.exported:
        exported = ExportedEfficientSam(folder, threads=args.threads)
        run = in_stream(exported, processor, batches[0], count, readers)
        yield f"stream, batch {batches[0]}, {folder.name}", run, count
    for name in args.peers:
        yield name, peer(name, args), count


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
    parser.add_argument("--readers", type=int, default=2, help="threads of the stream that read")
    parser.add_argument("--pixels", action="store_true", help="encoder and decoder alone, without files")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--mode", help="of torch.compile; reduce-overhead records CUDA graphs")
    parser.add_argument("--record", action="store_true", help="CUDA graphs of the whole model")
    parser.add_argument("--peers", nargs="*", default=[], choices=list(PEERS))
    parser.add_argument("--peer_batches", type=int, nargs="+", default=[1], help="with --pixels")
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
        compile_model(model, args.mode)
    if args.record:
        record_model(model)
    rows = list(ways_on_pixels(args, model) if args.pixels else ways(args, model, processor))
    times: dict[str, list[float]] = {name: [] for name, _, _ in rows}
    for _, run, _ in rows:
        for _ in range(1 if args.device == "cpu" else 3):  # CUDA graphs are recorded at the second call
            run()
    for _ in range(args.rounds):
        for name, run, count in rows:
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) / count)
    rate = matrix_rate(torch.device(args.device), dtype)
    first, digits = rows[0][0], 0 if args.device == "cpu" else 2
    print(
        f"{args.variant or 'bundled checkpoint'}, {place(args.device)}, {args.dtype}, {args.threads} threads, "
        f"torch {torch.__version__}, {work / 1e9:.1f} G operations a picture, matrix rate {rate / 1e9:.0f} G/s"
    )
    print("| way | pictures a second | p50 ms | p95 ms | first / this | MFU |\n|---|---|---|---|---|---|")
    for name, row in times.items():
        ratio = statistics.median(other / this for other, this in zip(times[first], row, strict=True))
        median = statistics.median(row)
        share = "" if name.startswith(tuple(PEERS)) else f"{work / median / rate:.2f}"
        milliseconds = f"{1000 * median:.{digits}f} | {1000 * np.percentile(row, 95):.{digits}f}"
        print(f"| {name} | {1 / median:.2f} | {milliseconds} | "
              f"{ratio:.2f} | {share} |", flush=True)  # fmt: skip
    if args.device == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
