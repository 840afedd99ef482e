"""The encoder in every runtime: time, size and difference, all in turn in one run. EfficientSAM-Ti at 1024 pixels.

    python benchmarks/exports.py --folder exports --prepare
    python benchmarks/exports.py --folder exports
    python benchmarks/exports.py --folder exports --rounds 15 --rows "torch, sdpa" openvino

The first call writes the files, the second measures them beside torch. Random weights: the time does not depend on
their values; how accurate 8 bits are says benchmarks/agreement.py. "TorchScript" is the eager model exported as the
authors exported theirs (opset 17, no fusion), a stand-in for the official ONNX file.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import openvino
import torch

from efficientsam_hf import VARIANTS, EfficientSamConfig, EfficientSamModel, EfficientSamProcessor
from efficientsam_hf.export.formats import FORMATS
from efficientsam_hf.export.graphs import VisionEncoderGraph, trace_one, tracing
from efficientsam_hf.export.quantization import quantize_encoder

PHOTO = Path(__file__).parents[1] / "examples" / "images" / "coffee.jpg"
EAGER, SCRIPT = "torch, eager", "TorchScript, onnxruntime"
FILES = {
    SCRIPT: "script.onnx",
    "onnx": "encoder.onnx",
    "onnx, int8 dynamic": "encoder_dynamic.onnx",
    "onnx, int8 static": "encoder_static.onnx",
    "openvino": "encoder.xml",
    "openvino, bfloat16": "encoder.xml",
    "openvino, int8 static": "encoder_static.xml",
}


def build(variant: str) -> EfficientSamModel:
    torch.manual_seed(0)
    return EfficientSamModel(EfficientSamConfig(vision_config=VARIANTS[variant])).eval()


def prepare(model: EfficientSamModel, folder: Path) -> None:
    """All files; what is there stays."""
    folder.mkdir(parents=True, exist_ok=True)
    processor = EfficientSamProcessor.from_model_config(model.config)
    wrapper, side = VisionEncoderGraph(model), model.config.vision_config.image_size
    example = torch.zeros(2, 3, side, side)
    if not (folder / FILES[SCRIPT]).exists():
        model.set_attn_implementation("eager")
        names = {"input_names": ["pixel_values"], "output_names": ["image_embeddings"]}
        torch.onnx.export(
            wrapper, (example[:1],), str(folder / FILES[SCRIPT]), opset_version=17, dynamo=False, **names
        )
    with tracing(model):
        shapes = {"pixel_values": (example, {0: torch.export.Dim("batch", min=1, max=1024)})}
        graph = trace_one(wrapper, shapes, ("image_embeddings",))
    for name, file in FILES.items():
        path, (to, _, quantize) = folder / file, (name.partition(", int8 "))
        if path.exists() or name == SCRIPT:
            continue
        print(f"writing {file}", flush=True)
        FORMATS[to][1](graph, path)
        if quantize:
            quantize_encoder(to, path, quantize, processor, [PHOTO] * 2)


def runner(path: Path, threads: int, precision: str) -> Callable[[np.ndarray], np.ndarray]:
    if path.suffix == ".xml":
        settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
        compiled = openvino.Core().compile_model(path, "CPU", settings)
        return lambda pixels: compiled([pixels])[0]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda pixels: session.run(None, {"pixel_values": pixels})[0]


def megabytes(path: Path) -> str:
    parts = (path, path.with_suffix(".bin")) if path.suffix == ".xml" else (path,)
    return f"{sum(part.stat().st_size for part in parts) / 1e6:.1f}"


def in_torch(model: EfficientSamModel, attention: str, compiled: bool = False) -> Callable[[np.ndarray], np.ndarray]:
    encode = torch.compile(model.get_image_embeddings, dynamic=False) if compiled else model.get_image_embeddings

    @torch.inference_mode()
    def run(pixels: np.ndarray) -> np.ndarray:
        model.set_attn_implementation(attention)
        return encode(torch.from_numpy(pixels).to(model.dtype)).float().numpy()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("exports"))
    parser.add_argument("--prepare", action="store_true", help="write the files and stop")
    parser.add_argument("--variant", default="tiny", choices=list(VARIANTS))
    parser.add_argument("--rows", nargs="+", help="of the table, these and those that ratios are to; default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no round after so many")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="torch.compile, too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    began = time.perf_counter()
    model = build(args.variant)
    if args.prepare:
        prepare(model, args.folder)
        return
    rows = {EAGER: in_torch(model, "eager"), "torch, sdpa": in_torch(model, "sdpa")}
    if args.compile:
        rows["torch, sdpa, compiled"] = in_torch(model, "sdpa", compiled=True)
    rows["torch, bfloat16"] = in_torch(build(args.variant).bfloat16(), "sdpa")
    for name, file in FILES.items():
        rows[name] = runner(args.folder / file, args.threads, "bf16" if name.endswith("bfloat16") else "f32")
    if args.rows:
        if unknown := set(args.rows) - set(rows):
            parser.error(f"--rows must be of {'; '.join(rows)}, got {'; '.join(sorted(unknown))}")
        rows = {name: run for name, run in rows.items() if name in (EAGER, SCRIPT, *args.rows)}
    side = model.config.vision_config.image_size
    pixels = np.random.default_rng(0).standard_normal((1, 3, side, side), dtype=np.float32)
    answers = {name: run(pixels) for name, run in rows.items()}  # the first round warms up
    times: dict[str, list[float]] = {name: [] for name in rows}
    for number in range(args.rounds):
        if number and time.perf_counter() - began > args.seconds:
            break
        for name, run in rows.items():
            start = time.perf_counter()
            run(pixels)
            times[name].append(time.perf_counter() - start)
    print(f"EfficientSAM {args.variant}, {side} x {side}, batch 1, {args.threads} threads, torch {torch.__version__}, "
          f"onnxruntime {onnxruntime.__version__}, openvino {openvino.__version__}")  # fmt: skip
    print("| encoder | median s | p95 s | eager / this | TorchScript / this | largest difference | MB |")
    print("|---|---|---|---|---|---|---|")
    for name, row in times.items():
        ratios = [
            statistics.median(other / this for other, this in zip(times[peer], row, strict=True))
            for peer in (EAGER, SCRIPT)
        ]
        difference = np.abs(answers[name] - answers[EAGER]).max()
        size = megabytes(args.folder / FILES[name]) if name in FILES else ""
        print(
            f"| {name} | {statistics.median(row):.3f} | {np.percentile(row, 95):.3f} | {ratios[0]:.2f} | "
            f"{ratios[1]:.2f} | {difference:.1e} | {size} |"
        )


if __name__ == "__main__":
    main()
