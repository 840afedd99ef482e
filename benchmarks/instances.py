"""What a pretrained encoder is worth to Mask R-CNN on a few photos of COCO.

    python benchmarks/instances.py instances_train2017_subset.json COCO_TRAIN/images --output_dir out \
        --models mae=RUN0,RUN1,RUN2 sami=RUN0,RUN1,RUN2

Each photo whose place in the JSON is a multiple of `--every` is held out, the others are trained on, by
examples/finetune_detection.py with the same options for every start: `none`, the config of the first model with
weights drawn by the seed, and the next checkpoint of each name for each seed. The heads start from the same weights in
all of them, and see the same photos in the same order. All things are one class, for most of COCO's eighty are on too
few photos to be learnt. Printed is the AP of masks and of boxes on the photos held out, mean and range over the seeds,
all starts of a seed before the next seed. What is finished is not done again.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from efficientsam_hf import EfficientSamBackbone
from efficientsam_hf.configuration_efficientsam import PYRAMID_STRIDES
from efficientsam_hf.training.encoders import load_encoder_model

RECIPE = Path(__file__).parents[1] / "examples" / "finetune_detection.py"
# Fewer proposals and narrower heads than torchvision's.
HEAD = {"rpn_batch_size_per_image": 64, "box_batch_size_per_image": 64, "box_detections_per_img": 50}
HEAD |= {f"rpn_{which}_nms_top_n_{mode}": 100 for which in ("pre", "post") for mode in ("train", "test")}
MEASURES = {"AP": "mask AP", "AP50": "mask AP50", "AP_box": "box AP"}


def split(source: Path, every: int, folder: Path) -> dict[str, Path]:
    """COCO's JSON in two, all classes made one."""
    content, files = json.loads(source.read_text()), {}
    held_out = {image["id"] for image in content["images"][::every]}
    for name in ("train", "test"):
        images = [image for image in content["images"] if (image["id"] in held_out) == (name == "test")]
        numbers = {image["id"] for image in images}
        rows = [{**row, "category_id": 1} for row in content["annotations"] if row["image_id"] in numbers]
        files[name] = folder / f"{name}.json"
        categories = [{"id": 1, "name": "thing"}]
        files[name].write_text(json.dumps({"images": images, "annotations": rows, "categories": categories}))
        print(f"{name}: {len(images)} photos with {len(rows)} things")
    return files


def begin(source: str, fresh: bool, seed: int, width: int, folder: Path) -> Path:
    """A checkpoint of the encoder, its pyramid of the width that is wanted."""
    fields = {"out_features": list(PYRAMID_STRIDES), "pyramid_channels": width}
    model = load_encoder_model(EfficientSamBackbone, source, **fields)
    if fresh:
        torch.manual_seed(seed)
        model = EfficientSamBackbone(model.config)
    model.save_pretrained(folder)
    return folder


def measure(args: argparse.Namespace, files: dict[str, Path], start: str, source: str, seed: int) -> dict[str, float]:
    """One start of one seed from its encoder to its figures."""
    room = args.output_dir / f"{start}_{seed}"
    if not (room / "figures.json").is_file():
        begun, head = begin(source, start == "none", seed, args.width, room / "begun"), room / "head.json"
        head.write_text(json.dumps({**HEAD, "head_channels": args.width}))
        options = ["--model", begun, "--output_dir", room, "--head_config", head, "--seed", seed, "--drop_path", 0]
        options += ["--annotations", files["train"], "--test_annotations", files["test"], "--window_size", 0]
        options += ["--pictures", args.pictures, "--test_pictures", args.pictures, "--image_size", args.image_size]
        options += ["--smallest_scale", 0.8, "--largest_scale", 1.25, "--total_batch", 8, "--batch_size", 8]
        options += ["--max_steps", args.steps, "--learning_rate", args.learning_rate, "--max_grad_norm", 1]
        command = [sys.executable, str(RECIPE), *map(str, options), "--report_to", "none"]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        told = printed[printed.rindex("evaluation after") :]
        figures = {name: float(re.search(rf"\b{name} (\S+?)(?:,|\n)", told)[1]) for name in MEASURES}
        (room / "figures.json").write_text(json.dumps(figures))
    return json.loads((room / "figures.json").read_text())


def print_table(rows: dict[str, list[dict[str, float]]]) -> None:
    """Mean and range over the seeds."""
    print(f"\n{len(rows['none'])} seed(s)\n| start | {' | '.join(MEASURES.values())} |\n|---|---|---|---|")
    for start, found in rows.items():
        values = [[figures[name] for figures in found] for name in MEASURES]
        cells = [f"{statistics.fmean(row):.4f} ({min(row):.4f} to {max(row):.4f})" for row in values]
        print(f"| {start} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("annotations", type=Path)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--models", nargs="+", required=True, help="NAME=FOLDER or Hub id, one a seed, with commas")
    parser.add_argument("--every", type=int, default=4, help="one photo of so many is held out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--image_size", type=int, default=160)
    parser.add_argument("--width", type=int, default=64, help="channels of the pyramid and of the heads")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    files = split(args.annotations, args.every, args.output_dir)
    sources = {name: folders.split(",") for name, folders in (given.split("=", 1) for given in args.models)}
    sources = {"none": next(iter(sources.values())), **sources}
    rows: dict[str, list[dict[str, float]]] = {start: [] for start in sources}
    for number, seed in enumerate(args.seeds):
        for start, folders in sources.items():
            rows[start].append(measure(args, files, start, folders[number % len(folders)], seed))
        print_table(rows)


if __name__ == "__main__":
    main()
