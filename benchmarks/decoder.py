"""The decoder in every runtime and those of transformers' SAM and SAM 2: many clicks, in turn in one run.

    python benchmarks/decoder.py --folder exports --prepare
    python benchmarks/decoder.py --folder exports
    python benchmarks/decoder.py --device cuda --dtype bfloat16 --prompts 64

All three have the same width and grid; SAM 2's gets finer features, too, and EdgeTAM's is like it. Random weights.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from encoder import build
from operations import place
from peers import PEERS, SAM, SAM2

from efficientsam_hf import EfficientSamModel, compile_model
from efficientsam_hf.export.formats import FORMATS
from efficientsam_hf.export.graphs import trace
from efficientsam_hf.exported.engines import start_engine
from efficientsam_hf.exported.manifest import Manifest

FORMS = ("onnx", "openvino")


def prepare(model: EfficientSamModel, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    graph = trace(model)["mask_decoder"]
    for to in FORMS:
        suffix, write = FORMATS[to]
        write(graph, folder / f"decoder_{to}{suffix}")


def exported(to: str, folder: Path, inputs: dict[str, torch.Tensor], threads: int) -> Callable[[], Any]:
    graph = {"file": f"decoder_{to}{FORMATS[to][0]}", "inputs": list(inputs), "outputs": ["iou_scores", "pred_masks"]}
    engine = start_engine(folder, Manifest(to, {"mask_decoder": graph}, {}, 1024), "cpu", threads)
    arrays = {name: value.numpy() for name, value in inputs.items()}
    return lambda: engine("mask_decoder", arrays)[1]


def peer(name: str, clicks: torch.Tensor, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> Callable[[], Any]:
    """A peer's prompt encoder and mask decoder on embeddings of these shapes."""
    with clicks.device:
        model = PEERS[name]().to(dtype).eval()
        features = [torch.randn(1, *shape, dtype=dtype) for shape in shapes]
    embeddings = features if len(features) > 1 else features[0]
    return lambda: model(image_embeddings=embeddings, input_points=clicks, multimask_output=True).pred_masks


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("exports"))
    parser.add_argument("--prepare", action="store_true", help="write the files and stop")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="torch.compile, too")
    parser.add_argument("--device", default="cpu", help="with another than the CPU only torch is measured")
    parser.add_argument("--dtype", default="float32", help="with another than float32 only torch is measured")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    model = build("torch", "tiny")
    if args.prepare:
        prepare(model, args.folder)
        return
    generator = torch.Generator().manual_seed(0)
    clicks = torch.rand(1, args.prompts, 1, 2, generator=generator) * 1024
    embeddings = torch.randn(1, 256, 64, 64, generator=generator)
    forms = FORMS if (args.device, args.dtype) == ("cpu", "float32") else ()
    clicks = clicks.to(device)
    model.to(device, dtype)
    inputs = {
        "image_embeddings": embeddings.to(device, dtype),
        "input_points": clicks,
        "input_labels": torch.ones(1, args.prompts, 1, dtype=torch.int64, device=device),
    }
    rows: dict[str, Callable[[], Any]] = {
        SAM: peer(SAM, clicks, [(256, 64, 64)], dtype),
        SAM2: peer(SAM2, clicks, [(32, 256, 256), (64, 128, 128), (256, 64, 64)], dtype),
        "torch": lambda: model(**inputs).pred_masks,
    }
    if args.compile:
        compiled = compile_model(build("torch", "tiny").to(device, dtype))
        rows["torch, compiled"] = lambda: compiled(**inputs).pred_masks
    rows |= {to: exported(to, args.folder, inputs, args.threads) for to in forms}
    # The first round warms up.
    answers = {name: torch.as_tensor(run()).float().cpu().numpy() for name, run in rows.items()}
    times: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(args.rounds):
        for name, run in rows.items():
            start = time.perf_counter()
            run()[0, 0, 0, 0, 0].item()  # a GPU is done only then
            times[name].append(time.perf_counter() - start)
    print(f"{args.prompts} clicks on one picture, " + ("" if forms else f"{place(args.device)}, {args.dtype}, ")
          + f"{args.threads} threads, torch {torch.__version__}"
          + (f", onnxruntime {version('onnxruntime')}, openvino {version('openvino')}" if forms else ""))  # fmt: skip
    digits = 3 if forms else 5
    print("| decoder | median s | p95 s | prompts a second | SAM's / this | largest difference from torch |")
    print("|---|---|---|---|---|---|")
    for name, row in times.items():
        ratio = statistics.median(other / this for other, this in zip(times[SAM], row, strict=True))
        difference = "" if name in PEERS else f"{np.abs(answers[name] - answers['torch']).max():.1e}"
        median = statistics.median(row)
        print(f"| {name} | {median:.{digits}f} | {np.percentile(row, 95):.{digits}f} | {args.prompts / median:.1f} | "
              f"{ratio:.2f} | {difference} |")  # fmt: skip


if __name__ == "__main__":
    main()
