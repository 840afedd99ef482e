"""What half precision and 8 bits cost in accuracy: masks from true boxes, beside the same model in float32.

    efficientsam export --to onnx --quantize dynamic --output onnx-dynamic
    python benchmarks/agreement.py GRABCUT BERKELEY --exported onnx-dynamic ...

Every photo is asked of every variant in turn. IoU is with the true mask, agreement with float32's masks; the mask with
the best predicted IoU counts. The time is the encoder's and the decoder's, without reading and resizing; ratios are
pair by pair to the variant of the same runtime without quantisation, the first of it that is named.
"""

import argparse
import copy
import io
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from operations import place

from efficientsam_hf import ExportedEfficientSam, load_checkpoint
from efficientsam_hf.data.sa1b import find_pairs
from efficientsam_hf.masks_efficientsam import decode_rle, masks_to_boxes


def iou(answer: torch.Tensor, mask: torch.Tensor) -> float:
    return float((answer & mask).sum() / max(int((answer | mask).sum()), 1))


@torch.inference_mode()
def best_masks(model: Any, processor: Any, image: Any, boxes: list) -> tuple[torch.Tensor, float]:
    """(Q, H, W) and how long encoder and decoder took."""
    inputs = processor(image, input_boxes=[boxes]).to(model.device)
    sizes = inputs.pop("original_sizes")
    start = time.perf_counter()
    outputs = model(**inputs)
    outputs.pred_masks[0, 0, 0, 0, 0].item()  # a GPU is done only then
    seconds = time.perf_counter() - start
    best = outputs.iou_scores.float().argmax(-1, keepdim=True)
    masks = outputs.pred_masks.float().take_along_dim(best[..., None, None], dim=2)
    return processor.post_process_masks(masks, sizes)[0][:, 0].cpu(), seconds


def in_8_bits(model: Any) -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    small = copy.deepcopy(model).to(torch.bfloat16)
    quantize_(small.vision_encoder, Int8DynamicActivationInt8WeightConfig())
    return small


def megabytes(model: Any) -> float:
    if isinstance(model, ExportedEfficientSam):
        return sum((model.folder / name).stat().st_size for name in model.manifest.files) / 1e6
    # One of 8 bits is an object of tensors; what it takes is what is written of it.
    written = io.BytesIO()
    torch.save(model.state_dict(), written)
    return written.tell() / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path, nargs="+", help="folders or tars of .jpg and .json pairs")
    parser.add_argument("--model", help="folder or Hub id; the bundled checkpoint if left out")
    parser.add_argument("--exported", type=Path, nargs="*", default=[], help="folders written by efficientsam export")
    parser.add_argument("--dtypes", nargs="*", default=["float16", "bfloat16"])
    parser.add_argument("--device", default="cpu", help="of the models in torch")
    parser.add_argument("--torchao", action="store_true", help="also the encoder's linear layers in 8 bits by torchao")
    parser.add_argument("--every", type=int, default=1, help="only every so many-th photo")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    exact, processor = load_checkpoint(args.model, device=args.device, dtype="float32")
    variants: dict[str, Any] = {"torch float32": exact}
    variants |= {f"torch {dtype}": copy.deepcopy(exact).to(getattr(torch, dtype)) for dtype in args.dtypes}
    if args.torchao:
        variants["torch bfloat16, int8 by torchao"] = in_8_bits(exact)
    variants |= {folder.name: ExportedEfficientSam(folder, threads=args.threads) for folder in args.exported}
    first: dict[str, str] = {}  # of each runtime, to compare the others with
    for name, model in variants.items():
        first.setdefault(model.manifest.format if isinstance(model, ExportedEfficientSam) else "torch", name)
    if args.device != "cpu":
        print(f"{place(args.device)}, torch {torch.__version__}")
    print("| set | masks | variant | MB | mean IoU | change | agreement | median s | first of its runtime / this |")
    print("|---|---|---|---|---|---|---|---|---|")
    for source in args.sources:
        table: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for pair in find_pairs(source)[:: args.every]:
            image, records = pair.read_image(), pair.read_annotations()
            masks = [decode_rle(record["segmentation"]) for record in records]
            boxes = [masks_to_boxes(mask).tolist() for mask in masks]
            wanted: torch.Tensor | None = None
            for name, model in variants.items():
                answers, seconds = best_masks(model, processor, image, boxes)
                wanted = answers if wanted is None else wanted
                table[name]["seconds"].append(seconds)
                for record, mask, answer, other in zip(records, masks, answers, wanted, strict=True):
                    seen = ~decode_rle(record["ignore"]) if "ignore" in record else torch.ones_like(mask)
                    table[name]["iou"].append(iou(answer & seen, mask & seen))
                    table[name]["agreement"].append(iou(answer, other))
        for name, row in table.items():
            model = variants[name]
            peer = table[first[model.manifest.format if isinstance(model, ExportedEfficientSam) else "torch"]]
            ratio = statistics.median(a / b for a, b in zip(peer["seconds"], row["seconds"], strict=True))
            mean, exactly = np.mean(row["iou"]), np.mean(table["torch float32"]["iou"])
            print(
                f"| {source.name} | {len(row['iou'])} | {name} | {megabytes(model):.1f} | {mean:.4f} | "
                f"{mean - exactly:+.4f} | {np.mean(row['agreement']):.4f} | {statistics.median(row['seconds']):.3f} | "
                f"{ratio:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
