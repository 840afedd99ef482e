"""Does SAMI help? The same small ViT pretrained three ways, fine-tuned alike, measured on masks it never saw.

    python benchmarks/sami_small_scale.py --pictures FOLDER ... --sources FOLDER ... --evaluate GRABCUT BERKELEY \
        --labelled BALLOONS KITCHEN ... --teacher lite0.onnx --teacher_output feat16 --config student.json \
        --output_dir out

`none` starts from noise, `mae` from guessing pixels, `sami` from guessing the teacher's features, for as many steps.
Each is then fine-tuned by examples/finetune_sa1b.py with the same options and seed. Reported for each start, with the
range over the seeds: mean IoU by the protocols box and centroid (one click, in the middle of the mask), and, before
fine-tuning, how often the nearest neighbour by the mean of the encoder's last patches comes from the same of the
`--labelled` folders, each of which is a class. What is finished is not done again.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from efficientsam_hf import (
    EfficientSamForPreTraining,
    EfficientSamModel,
    EfficientSamProcessor,
    EfficientSamSamiConfig,
    load_checkpoint,
)
from efficientsam_hf.data.images import find_pictures
from efficientsam_hf.data.sa1b import find_pairs
from efficientsam_hf.evaluation.interactive import evaluate_interactive

EXAMPLES = Path(__file__).parents[1] / "examples"
STARTS = ("none", "mae", "sami")


def launch(script: str, *options: str) -> None:
    subprocess.run([sys.executable, str(EXAMPLES / script), *options], check=True)


def pretrain(args: argparse.Namespace, start: str, seed: int, room: Path) -> Path:
    """The folder of the EfficientSAM to fine-tune."""
    folder = room / "efficientsam"
    if (folder / "config.json").is_file():
        return folder
    if start == "none":
        torch.manual_seed(seed)
        fields = json.loads(Path(args.config).read_text())
        model = EfficientSamForPreTraining(EfficientSamSamiConfig(**fields)).to_efficientsam()
        model.save_pretrained(folder)
        EfficientSamProcessor.from_model_config(model.config).save_pretrained(folder)
        return folder
    teacher = ["--teacher", args.teacher, *(["--teacher_output", args.teacher_output] if args.teacher_output else [])]
    for name in ("teacher_mean", "teacher_std"):
        teacher += [f"--{name}", *map(str, getattr(args, name))] if getattr(args, name) else []
    options = ["--sources", *args.pictures, "--config", args.config, "--output_dir", str(room), "--seed", str(seed)]
    options += ["--max_steps", str(args.pretrain_steps), "--report_to", "none", "--base_rate", str(args.base_rate)]
    options += ["--total_batch", str(args.batch), "--batch_size", str(args.batch)]
    launch("pretrain_sami.py", *options, *(["--mae"] if start == "mae" else teacher))
    return folder


def finetune(args: argparse.Namespace, model: Path, seed: int, room: Path) -> Path:
    """The folder of the fine-tuned model."""
    if not (room / "model" / "config.json").is_file():
        options = ["--model", str(model), "--sources", *args.sources, "--output_dir", str(room), "--seed", str(seed)]
        options += ["--max_steps", str(args.finetune_steps), "--batch_size", "4", "--masks_per_image", "8"]
        options += ["--image_size", str(args.image_size), "--flip", "0.5", "--smallest_crop", "0.5"]
        launch("finetune_sa1b.py", *options)
    return room / "model"


def mean_iou(folder: Path, sets: list[str], most: int | None) -> dict[str, float]:
    """With the true box, and with one click."""
    model, processor = load_checkpoint(folder, device="cpu")
    pairs = [pair for name in sets for pair in find_pairs(name)][:most]
    found = {}
    for kind, protocol in (("box", "box"), ("click", "centroid")):
        scores = evaluate_interactive(model, processor, pairs, protocol, prompts=(1,), oracle=False)
        found[kind] = scores["at"]["1"]["miou"]
    return found


@torch.no_grad()
def neighbours(folder: Path, classes: list[str], most: int | None) -> float:
    """How often the nearest picture by the encoder's features is from the same folder."""
    model = EfficientSamModel.from_pretrained(folder, dtype=torch.float32).eval()
    processor, features, labels = EfficientSamProcessor.from_pretrained(folder), [], []
    processor.image_processor.size = {"height": 224, "width": 224}
    for label, picture in [(name, picture) for name in classes for picture in find_pictures([name])[:most]]:
        pixels = processor(images=picture.read(), return_tensors="pt")["pixel_values"]
        last = model.vision_encoder(pixels, output_hidden_states=True).hidden_states[-1]
        features.append(torch.nn.functional.normalize(last.mean((1, 2))[0], dim=0))
        labels.append(label)
    alike = torch.stack(features) @ torch.stack(features).T
    nearest = alike.fill_diagonal_(-2).argmax(1).tolist()
    return float(np.mean([labels[place] == label for place, label in zip(nearest, labels, strict=True)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("pictures", "sources", "evaluate"):
        parser.add_argument(f"--{name}", nargs="+", required=True)
    for name in ("teacher", "config", "output_dir"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--labelled", nargs="+")
    parser.add_argument("--teacher_output")
    parser.add_argument("--teacher_mean", nargs=3, type=float)
    parser.add_argument("--teacher_std", nargs=3, type=float)
    parser.add_argument("--pretrain_steps", type=int, default=3000)
    parser.add_argument("--finetune_steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--base_rate", type=float, default=6e-4)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--most", type=int, help="pictures of a measurement, or of each class")
    args = parser.parse_args()
    print("| start | " + " | ".join(("box IoU", "one-click IoU", "nearest neighbour")) + " |\n|---|---|---|---|")
    for start in STARTS:
        rows: dict[str, list[float]] = {"box": [], "click": [], "neighbour": []}
        for seed in args.seeds:
            room = Path(args.output_dir) / f"{start}_{seed}"
            begun = pretrain(args, start, seed, room / "pretrained")
            tuned = finetune(args, begun, seed, room / "finetuned")
            for kind, value in mean_iou(tuned, args.evaluate, args.most).items():
                rows[kind].append(value)
            if args.labelled:
                rows["neighbour"].append(neighbours(begun, args.labelled, args.most))
        cells = [f"{statistics.mean(row):.3f} ({min(row):.3f} to {max(row):.3f})" for row in rows.values() if row]
        print(f"| {start} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
