"""Segment everything against two peers, in one run: time, prompts a second, peak memory.

    python benchmarks/everything.py --size 1920x1080 --peer_points_per_side 8
    python benchmarks/everything.py --device cuda --dtype bfloat16 --no_decoder --peer_points_per_side 8 --threads 8

The peers are (a) the plain way: embeddings tiled for each prompt, all masks brought to full size, then
filtered; and (b) transformers' own pipeline with a SamModel whose decoder has the same size. Weights are random, so
thresholds are set to let through the shares `--trusted` and, of those, `--stable` of the masks; their boxes are all
alike, so that nothing is suppressed, and what passes is what stays: by default 150 of 1024 prompts' masks, each of
which is drawn at full size and encoded. Encoding the picture is timed alone. A prompt costs the peers as much however
many there are, so that they may be given fewer (`--peer_points_per_side`); their time for all prompts follows. Each
row's memory is measured beyond what model and picture take, on a CPU in a process of its own.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from operations import place
from PIL import Image
from torch import Tensor
from transformers import SamConfig, SamImageProcessorPil, SamModel, pipeline

from efficientsam_hf import (
    VARIANTS,
    EfficientSamConfig,
    EfficientSamImageProcessor,
    EfficientSamModel,
    EfficientSamProcessor,
    segment_everything,
)
from efficientsam_hf.cpu_threads import map_on_threads
from efficientsam_hf.mask_search import MOST_THREADS
from efficientsam_hf.masks_efficientsam import encode_rle, masks_to_boxes, nms, point_grid, stability_score

CLOCK = time.perf_counter


def plain_decode(model: EfficientSamModel, embeddings: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings (1, C, h, w), clicks (Q, 2) -> logits (Q, 3, 4h, 4w), predicted IoU (Q, 3), embeddings tiled."""
    inputs = model.get_decoder_inputs(embeddings, points[None, :, None])
    scores, masks = model.mask_decoder.write_out(**inputs, chosen=slice(1, None))
    return masks[0], scores[0]


def plain_everything(model, processor, photo: Image.Image, side: int, iou: float, stability: float) -> list[dict]:
    """The plain way: 64 prompts at a time, upsampled, then filtered."""
    inputs = processor(images=photo, return_tensors="pt")
    embeddings = model.get_image_embeddings(inputs["pixel_values"].to(model.device))
    image_size = model.config.vision_config.image_size
    kept, scores, boxes = [], [], []
    for points in (point_grid(side) * image_size).to(model.device).split(64):
        masks, predicted = plain_decode(model, embeddings, points)
        masks = F.interpolate(masks, photo.size[::-1], mode="bicubic", align_corners=False)
        masks, predicted = masks.flatten(0, 1), predicted.flatten()
        masks, predicted = masks[predicted > iou], predicted[predicted > iou]
        stable = stability_score(masks) > stability
        masks, predicted = masks[stable] >= 0, predicted[stable]
        boxes.append(masks_to_boxes(masks))
        scores.append(predicted)
        kept += [encode_rle(mask) for mask in masks]
    return [kept[index] for index in nms(torch.cat(boxes), torch.cat(scores), 1.0).tolist()]


class PeerImageProcessor(SamImageProcessorPil):
    """transformers' own, with the suppression of doubles in torch, so that it needs no torchvision."""

    post_process_for_mask_generation = EfficientSamImageProcessor.post_process_for_mask_generation


def build(name: str, args: argparse.Namespace):
    torch.manual_seed(0)
    kind = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    if name != "transformers":
        model = EfficientSamModel(EfficientSamConfig(vision_config=VARIANTS["tiny"])).eval().to(**kind)
        return model, EfficientSamProcessor.from_model_config(model.config)
    vision = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "mlp_dim": 768}
    vision |= {"window_size": 0, "global_attn_indexes": list(range(12))}
    return SamModel(SamConfig(vision_config=vision)).eval().to(**kind), PeerImageProcessor()


def make_photo(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


@torch.inference_mode()
def thresholds(name: str, model, processor, photo: Image.Image, trusted: float, stable: float) -> dict[str, float]:
    """What lets through these shares of the masks of 64 prompts, by the row's own judgement."""
    inputs = processor(images=photo, return_tensors="pt")
    embeddings = model.get_image_embeddings(inputs["pixel_values"].to(model.device, model.dtype))
    points = (point_grid(8) * 1024)[None, :, None].to(model.device)
    output = model(image_embeddings=embeddings, input_points=points)
    scores = output.iou_scores.flatten().float()
    iou = max(float(scores.quantile(1 - trusted)), 1e-6)
    trusted_masks = output.pred_masks.flatten(0, 2)[scores > iou]
    stability = torch.cat([stability_score(judged(name, processor, inputs, m)) for m in trusted_masks.split(1)])
    return {"iou": iou, "stability": max(float(stability.quantile(1 - stable)), 1e-6)}


def judged(name: str, processor, inputs, masks: Tensor) -> Tensor:
    """Logits (N, 4h, 4w) as a row judges their stability: ours on the grid, the peers at full size."""
    if name == "ours":
        return masks
    sizes = inputs["original_sizes"]
    if name == "plain":
        return F.interpolate(masks[None], tuple(sizes[0].tolist()), mode="bicubic", align_corners=False)[0]
    return processor.post_process_masks([masks[None]], sizes, inputs["reshaped_input_sizes"], binarize=False)[0][0]


@torch.inference_mode()
def encoding_seconds(model, processor, photo: Image.Image, rounds: int = 3) -> float:
    times = []
    for _ in range(rounds):
        start = CLOCK()
        pixels = processor(images=photo, return_tensors="pt")["pixel_values"].to(model.device, model.dtype)
        model.get_image_embeddings(pixels)[0, 0, 0, 0].item()  # a GPU is done only then
        times.append(CLOCK() - start)
    return float(np.median(times))


@torch.inference_mode()
def run(name: str, model, processor, photo: Image.Image, side: int, limits: dict[str, float]) -> int:
    """Segment everything; how many masks there are."""
    if name == "plain":
        return len(plain_everything(model, processor, photo, side, **limits))
    options = {"pred_iou_thresh": limits["iou"], "stability_score_thresh": limits["stability"]}
    if name == "ours":
        options |= {"box_nms_thresh": 1.0}
        return len(segment_everything(model, processor, photo, points_per_side=side, **options))
    generator = pipeline("mask-generation", model=model, image_processor=processor, device=model.device)
    return len(generator(photo, points_per_crop=side, points_per_batch=64, crops_nms_thresh=1.0, **options)["masks"])


@torch.no_grad()
def liven(name: str, model) -> None:
    """Give random weights the range of trained ones: predicted IoU about 0.5, logits of some units."""
    head = model.mask_decoder.iou_head if name != "transformers" else model.mask_decoder.iou_prediction_head
    last = head.layers[-1] if name != "transformers" else head.proj_out
    last.bias.fill_(0.5)
    networks = (
        model.mask_decoder.hypernetworks if name != "transformers" else model.mask_decoder.output_hypernetworks_mlps
    )
    for network in networks:
        (network.layers[-1] if name != "transformers" else network.proj_out).weight.mul_(2000)


def peak_memory(name: str, args: argparse.Namespace, side: int, again: Callable[[], int]) -> float:
    """MiB that one row takes beyond its model and picture; on a GPU of doing it `again`."""
    if args.device != "cpu":
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        again()
        return (torch.cuda.max_memory_allocated() - held) / 2**20
    command = [sys.executable, __file__, "--size", args.size, "--memory_of", name, "--points_per_side", str(side)]
    command += ["--dtype", args.dtype, "--trusted", str(args.trusted), "--stable", str(args.stable)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def own_memory(args: argparse.Namespace, photo: Image.Image) -> float:
    """What one row takes beyond its model and picture, in MiB; to be asked in a process of its own."""
    name = args.memory_of
    model, processor = build(name, args)
    liven(name, model)
    # Before anything has run: what an earlier run gave back and the next one takes again counts, too.
    before = status_mebibytes("VmRSS")
    limits = thresholds(name, model, processor, photo, args.trusted, args.stable)
    Path("/proc/self/clear_refs").write_text("5")  # starts the peak anew (Linux)
    run(name, model, processor, photo, args.points_per_side, limits)
    return status_mebibytes("VmHWM") - before


def status_mebibytes(name: str) -> float:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) / 1024


def decode_prepared(
    model, embeddings: Tensor, batches: Sequence[Tensor], mapped: Callable = map
) -> tuple[Tensor, Tensor]:
    """Clicks (Q, 2) on a picture that is prepared but once, as in `segment_everything`."""
    decoder, chosen = model.mask_decoder, slice(1, None)
    prepared = decoder.prepare(**model.get_image_inputs(embeddings))

    def decode(points: Tensor) -> tuple[Tensor, Tensor]:
        tokens, image = decoder.look(prepared, **model.get_prompt_inputs(embeddings, points[None, :, None]))
        answers = decoder.last_look(tokens, image, prepared, [0, *decoder.numbers(chosen)])
        masks = decoder.draw_masks(answers[:, :, 1:], image, prepared, chosen)
        return masks[0], decoder.predict_iou(answers, chosen)[0]

    masks, scores = zip(*mapped(decode, batches), strict=True)
    return torch.cat(masks), torch.cat(scores)


def decoder_rates(model, rounds: int, batch: int) -> None:
    """Prompts a second of the decoder alone, all masks drawn."""
    embeddings = torch.randn(1, 256, 64, 64, generator=torch.Generator().manual_seed(0)).to(model.device, model.dtype)
    points = (point_grid(8) * 1024).to(model.device)
    batches = points.split(batch)
    compiled = torch.compile(model.forward)

    def decode(forward) -> tuple[Tensor, Tensor]:
        output = [forward(image_embeddings=embeddings, input_points=some[None, :, None]) for some in batches]
        return torch.cat([o.pred_masks[0] for o in output]), torch.cat([o.iou_scores[0] for o in output])

    def tile() -> tuple[Tensor, Tensor]:
        masks, scores = zip(*(plain_decode(model, embeddings, some) for some in points.split(16)), strict=True)
        return torch.cat(masks), torch.cat(scores)

    def decode_on_threads() -> tuple[Tensor, Tensor]:
        with map_on_threads(MOST_THREADS) as mapped:
            return decode_prepared(model, embeddings, batches, mapped)

    ways = {
        "tiled": tile,
        "shared, prepared for each batch": lambda: decode(model.forward),
        "the same, compiled": lambda: decode(compiled),
        "shared, prepared once": lambda: decode_prepared(model, embeddings, batches),
    }
    if model.device.type == "cpu":
        ways["prepared once, a batch for each thread"] = decode_on_threads
    with torch.inference_mode():
        results = {name: way() for name, way in ways.items()}
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, way in ways.items():
                start = CLOCK()
                way()[1][0, 0].item()
                times[name].append(CLOCK() - start)
    print("| decoder alone | prompts a second | tiled / this | largest difference |\n|---|---|---|---|")
    for name, row in times.items():
        ratios = sorted(tiled / this for tiled, this in zip(times["tiled"], row, strict=True))
        difference = max((a - b).abs().max().item() for a, b in zip(results["tiled"], results[name], strict=True))
        spread = f"{ratios[len(ratios) // 2]:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"| {name} | {len(points) / float(np.median(row)):.1f} | {spread} | {difference:.1e} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1920x1080")
    parser.add_argument("--points_per_side", type=int, default=32)
    parser.add_argument("--peer_points_per_side", type=int, default=32)
    parser.add_argument("--peers", nargs="*", default=["plain", "transformers"], choices=["plain", "transformers"])
    parser.add_argument("--trusted", type=float, default=0.4, help="share of masks whose predicted IoU suffices")
    parser.add_argument("--stable", type=float, default=0.122, help="share of those that are stable")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7, help="of the decoder alone")
    parser.add_argument("--repeats", type=int, default=3, help="of everything, the rows in turns")
    parser.add_argument(
        "--processor_time", action="store_true", help="the processor's time, for busy machines; with --threads 1"
    )
    parser.add_argument("--no_memory", action="store_true", help="leave the memory out")
    parser.add_argument("--no_decoder", action="store_true", help="leave the decoder alone out")
    parser.add_argument("--decoder_batch", type=int, default=4, help="prompts at one time, decoder alone")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--memory_of", choices=["ours", "plain", "transformers"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.processor_time:
        global CLOCK
        CLOCK = time.process_time
    photo = make_photo(*map(int, args.size.split("x")))
    if args.memory_of:
        print(own_memory(args, photo))
        return
    names = ["ours", *args.peers]
    models = {name: build(name, args) for name in names}
    if not args.no_decoder:
        liven("ours", models["ours"][0])
        decoder_rates(models["ours"][0], args.rounds, args.decoder_batch)
        models["ours"] = build("ours", args)
    limits = {}
    for name in names:
        liven(name, models[name][0])
        limits[name] = thresholds(name, *models[name], photo, args.trusted, args.stable)
    sides = {name: args.points_per_side if name == "ours" else args.peer_points_per_side for name in names}
    encoding: dict[str, list[float]] = {name: [] for name in names}
    each: dict[str, list[float]] = {name: [] for name in names}
    counts = {}
    for _ in range(args.repeats):
        for name in names:
            encoding[name].append(encoding_seconds(*models[name], photo))
            start = CLOCK()
            counts[name] = run(name, *models[name], photo, sides[name], limits[name])
            each[name].append(max(CLOCK() - start - encoding[name][-1], 0.0) / sides[name] ** 2)
    everything = args.points_per_side**2
    device, digits = ("", 0) if args.device == "cpu" else (f"{place(args.device)}, ", 2)
    print(f"{args.size}, Ti, {args.dtype}, {device}{args.threads} threads, torch {torch.__version__}; "
          f"medians of {args.repeats}")  # fmt: skip
    print(f"| | prompts | encoder s | ms a prompt | s for {everything} | masks | peak memory MiB |")
    print("|---|---|---|---|---|---|---|")
    seconds = {
        name: [once + prompt * everything for once, prompt in zip(encoding[name], each[name], strict=True)]
        for name in names
    }
    for name in names:
        again = partial(run, name, *models[name], photo, sides[name], limits[name])
        memory = float("nan") if args.no_memory else peak_memory(name, args, sides[name], again)
        prompt = f"{1000 * median(each[name]):.{1 + digits}f}"
        figures = f"{median(encoding[name]):.{2 + digits}f} | {prompt} | {median(seconds[name]):.{1 + digits}f}"
        print(f"| {name} | {sides[name] ** 2} | {figures} | {counts[name]} | {memory:.0f} |")
    for name in names[1:]:
        ratios = sorted(theirs / ours for theirs, ours in zip(seconds[name], seconds["ours"], strict=True))
        print(f"{name} / ours, all prompts: {median(ratios):.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f})")


if __name__ == "__main__":
    main()
