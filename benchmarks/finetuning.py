"""The fine-tuning step alone, on random pictures: pictures a second, memory, the share of the arithmetic that is used.

    python benchmarks/finetuning.py --variant tiny --batch_size 8 --bfloat16
    python benchmarks/finetuning.py --variant small --batch_size 8 --bfloat16 --gradient_checkpointing

On the first CUDA device, or on the CPU. Floating-point operations are those that the step needs, a multiplication with
its addition counting as two; what gradient checkpointing computes again does not count, nor what writing out each
prompt's image costs. They are compared with what the largest matrix products get on the same device in the same
precision, and with `--peak_tflops`, the maker's figure. Memory is the most that was held at one time; on a CPU by the
process, so far.

Both ways to decode, in turn: the prompts' images shared, and written out (`tiled_decoding_efficientsam.py`), of which
training takes the second one on a GPU and with mask prompts. Operations to start and bytes to move are counted on one
picture, without the optimizer's.
"""

import argparse
import resource
import statistics
import time
from contextlib import nullcontext

import torch
from operations import Traffic
from torch.utils.flop_counter import FlopCounterMode

from efficientsam_hf import VARIANTS, EfficientSamConfig, EfficientSamModel
from efficientsam_hf.training.finetuning import InteractiveSegmentation
from efficientsam_hf.training.optimization import parameter_groups
from efficientsam_hf.training.recipes import RECIPES

SHARED = "shared"
WAYS = {SHARED: False, "written out": True}


def draw_batch(pictures: int, masks: int, side: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Noise, and discs to ask for."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(side // 4), torch.arange(side // 4), indexing="ij")
    centres = torch.randint(0, side // 4, (2, pictures, masks, 1, 1), generator=generator)
    radius = torch.randint(side // 64, side // 12, (pictures, masks, 1, 1), generator=generator)
    labels = ((y - centres[0]) ** 2 + (x - centres[1]) ** 2 < radius**2).float()
    pixels = torch.randn(pictures, 3, side, side, generator=generator)
    return {"pixel_values": pixels.to(device), "labels": labels.to(device)}


def precision(args: argparse.Namespace, device: torch.device):
    return torch.autocast(device.type, torch.bfloat16) if args.bfloat16 else nullcontext()


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def memory(device: torch.device) -> float:
    """GiB, the most so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def best_matrix_product(args: argparse.Namespace, device: torch.device) -> float:
    """TFLOP a second of large square products."""
    side = 8192 if device.type == "cuda" else 1536
    dtype = torch.bfloat16 if args.bfloat16 else torch.float32
    one, other = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(7):
        wait_for(device)
        start = time.perf_counter()
        one @ other
        wait_for(device)
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds) / 1e12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=VARIANTS, default="tiny")
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--masks", type=int, default=32)
    parser.add_argument("--recipe", choices=RECIPES, default="paper")
    parser.add_argument("--image_size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=10, help="that are timed; two go before")
    parser.add_argument("--bfloat16", action="store_true")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument(
        "--peak_tflops", type=float, help="of the device, by its maker: 989 for H100 and H200 in bfloat16"
    )
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak = best_matrix_product(args, device)
    abilities = (
        {"negative_points": True, "mask_prompts": True, "max_prompt_points": 10} if args.recipe != "paper" else {}
    )
    config = EfficientSamConfig(vision_config=VARIANTS[args.variant], prompt_encoder_config=abilities)
    model = EfficientSamModel(config).to(device).train()
    task = InteractiveSegmentation(model, RECIPES[args.recipe])
    optimizer = torch.optim.AdamW(parameter_groups(task, 0.1), lr=1e-5)

    def learn(batch: dict[str, torch.Tensor], written_out: bool) -> None:
        task.tiles = lambda *_: written_out
        with precision(args, device):
            loss = task(**batch, generator=torch.Generator(device).manual_seed(0))["loss"]
        loss.backward()

    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    batch = draw_batch(args.batch_size, args.masks, args.image_size, device)
    seconds, held = {name: [] for name in WAYS}, dict.fromkeys(WAYS, 0.0)
    for _ in range(args.steps + 2):
        for name, written_out in WAYS.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            wait_for(device)
            start = time.perf_counter()
            learn(batch, written_out)
            optimizer.step()
            optimizer.zero_grad()
            wait_for(device)
            seconds[name].append(time.perf_counter() - start)
            held[name] = memory(device)
    # Counted on one picture, where nothing is computed twice; a batch is so many times that.
    model.gradient_checkpointing_disable()
    one = draw_batch(1, args.masks, args.image_size, device)
    with FlopCounterMode(display=False) as counter:
        learn(one, written_out=False)
    needed = counter.get_total_flops()
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    print(
        f"{name}, torch {torch.__version__}, {args.variant} at {args.image_size}, batch {args.batch_size}, "
        f"{args.masks} masks, recipe {args.recipe}, {'bfloat16' if args.bfloat16 else 'float32'}"
        f"{', gradient checkpointing' if args.gradient_checkpointing else ''}; "
        f"{needed / 1e12:.2f} TFLOP a picture, matrix products get {peak:.3f} TFLOP/s\n\n"
        "| images of prompts | s a step | pictures/s | shared / this | of matrix products | of the maker's figure | "
        f"operations a step | GB a picture | GiB at most |\n|{'---|' * 9}"
    )
    for name, written_out in WAYS.items():
        with Traffic() as traffic:
            learn(one, written_out)
        ratio = statistics.median(a / b for a, b in zip(*(seconds[way][2:] for way in (SHARED, name)), strict=True))
        taken = statistics.median(seconds[name][2:])
        speed = args.batch_size / taken
        reached = needed * speed / 1e12
        makers = f"{reached / args.peak_tflops:.1%}" if args.peak_tflops else ""
        print(
            f"| {name} | {taken:.3f} | {speed:.3f} | {ratio:.2f} | {reached / peak:.1%} | {makers} | "
            f"{traffic.operations} | {traffic.bytes / 1e9:.1f} | {held[name]:.2f} |"
        )


if __name__ == "__main__":
    main()
