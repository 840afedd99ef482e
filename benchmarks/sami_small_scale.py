"""Does SAMI help? The same small ViT pretrained three ways, fine-tuned alike, measured on masks it never saw.

    efficientsam cache-features FOLDER ... --teacher lite0.onnx --teacher-output feat16 --output cache
    python benchmarks/sami_small_scale.py --pictures FOLDER ... --cache cache --sources FOLDER ... \
        --evaluate GRABCUT BERKELEY --kinds BALLOONS KITCHEN ... --species ANIMALS --output_dir out

`none` starts from noise, `mae` from guessing pixels, `sami` from guessing the teacher's features, for as many steps of
as many pictures. Each then gets the same new neck and mask decoder, and is fine-tuned by examples/finetune_sa1b.py
with the same options and the same pictures, clicks and boxes in the same order. Reported for each start, with the
range over the seeds: mean IoU by the protocols box and centroid (one click, in the middle of the mask); and, before
fine-tuning, how often the nearest neighbour by the mean of the encoder's last patches is of the same kind (`--kinds`:
each folder is one; `--species`: the masks of a folder say).

All starts of a seed are done before the next seed, so that there is a comparison early. What is finished is not done
again, and what was stopped goes on.
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
    EfficientSamConfig,
    EfficientSamForPreTraining,
    EfficientSamImageProcessor,
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
MEASURES = {"box": "box IoU", "click": "one-click IoU", "kind": "same kind", "species": "same species"}


def launch(script: str, *options: str) -> None:
    subprocess.run([sys.executable, str(EXAMPLES / script), *options], check=True)


def read_configs(path: str) -> tuple[EfficientSamSamiConfig, EfficientSamConfig]:
    """What is pretrained, and what is fine-tuned; they share the encoder."""
    fields = json.loads(Path(path).read_text())
    decoder = fields.pop("decoder_config")
    return EfficientSamSamiConfig(vision_config=fields["vision_config"], decoder_config=decoder), EfficientSamConfig(
        **fields
    )


def pretrain(args: argparse.Namespace, start: str, seed: int, room: Path) -> Path:
    """The folder of the pretrained model."""
    folder = room / "model"
    if (folder / "config.json").is_file():
        return folder
    config = read_configs(args.config)[0]
    if start == "none":
        torch.manual_seed(seed)
        EfficientSamForPreTraining(config).save_pretrained(folder)
        return folder
    room.mkdir(parents=True, exist_ok=True)
    (room / "student.json").write_text(json.dumps(config.to_dict()))
    options = ["--sources", *args.pictures, "--config", str(room / "student.json"), "--output_dir", str(room)]
    options += ["--seed", str(seed), "--max_steps", str(args.pretrain_steps), "--base_rate", str(args.base_rate)]
    options += ["--total_batch", str(args.batch), "--batch_size", str(args.batch), "--save_every", "200"]
    launch("pretrain_sami.py", *options, *(["--mae"] if start == "mae" else ["--cache", args.cache]))
    return folder


def begin(args: argparse.Namespace, pretrained: Path, seed: int, folder: Path) -> Path:
    """The folder of the EfficientSAM to fine-tune: all but the encoder is the same for every start."""
    if not (folder / "config.json").is_file():
        torch.manual_seed(seed)
        model = EfficientSamModel(read_configs(args.config)[1])
        processor = EfficientSamProcessor.from_model_config(model.config)
        processor.image_processor.antialias = True
        processor.save_pretrained(folder)
        EfficientSamForPreTraining.from_pretrained(pretrained).to_efficientsam(model).save_pretrained(folder)
    return folder


def finetune(args: argparse.Namespace, model: Path, seed: int, room: Path) -> Path:
    """The folder of the fine-tuned model."""
    if not (room / "model" / "config.json").is_file():
        options = ["--model", str(model), "--sources", *args.sources, "--output_dir", str(room), "--seed", str(seed)]
        options += ["--max_steps", str(args.finetune_steps), "--learning_rate", str(args.finetune_rate)]
        options += ["--total_batch", "4", "--batch_size", "4", "--masks_per_image", "4", "--rounds", "1"]
        options += ["--warmup", "50", "--save_every", "200"]
        launch("finetune_sa1b.py", *options, "--flip", "0.5", "--smallest_crop", "0.5")
    return room / "model"


def mean_iou(folder: Path, sets: list[str]) -> dict[str, float]:
    """With the true box, and with one click."""
    model, processor = load_checkpoint(folder, device="cpu")
    pairs = [pair for name in sets for pair in find_pairs(name)]
    found = {}
    for kind, protocol in (("box", "box"), ("click", "centroid")):
        scores = evaluate_interactive(model, processor, pairs, protocol, prompts=(1,), oracle=False)
        found[kind] = scores["at"]["1"]["miou"]
    return found


def pictures_of_kinds(folders: list[str]) -> list[tuple]:
    """Pictures, each with the folder that it is from."""
    return [(picture.read(), folder) for folder in folders for picture in find_pictures([folder])]


def pictures_of_species(folders: list[str]) -> list[tuple]:
    """Pictures, each with the `label` of its first mask."""
    pairs = [pair for folder in folders for pair in find_pairs(folder)]
    return [(pair.read_image(), pair.read_annotations()[0]["label"]) for pair in pairs]


@torch.no_grad()
def neighbours(folder: Path, labelled: list[tuple]) -> float:
    """How often the nearest other picture by the encoder's features has the same label."""
    model = EfficientSamForPreTraining.from_pretrained(folder).eval()
    vision = model.config.vision_config
    side = {"height": vision.pretrain_image_size, "width": vision.pretrain_image_size}
    processor, patches = (
        EfficientSamImageProcessor(size=side, antialias=True),
        torch.arange(vision.position_grid_size**2),
    )
    features = []
    for picture, _ in labelled:
        pixels = processor(images=picture, return_tensors="pt")["pixel_values"]
        features.append(model.vision_encoder(pixels, patches[None]).last_hidden_state.mean(1)[0])
    unit = torch.nn.functional.normalize(torch.stack(features), dim=1)
    nearest = (unit @ unit.T).fill_diagonal_(-2).argmax(1).tolist()
    labels = [label for _, label in labelled]
    return float(np.mean([labels[place] == label for place, label in zip(nearest, labels, strict=True)]))


def measure(args: argparse.Namespace, start: str, seed: int) -> dict[str, float]:
    """One start of one seed from pretraining to its numbers."""
    room = Path(args.output_dir) / f"{start}_{seed}"
    if not (room / "numbers.json").is_file():
        pretrained = pretrain(args, start, seed, room / "pretrained")
        tuned = finetune(args, begin(args, pretrained, seed, room / "begun"), seed, room / "finetuned")
        numbers = mean_iou(tuned, args.evaluate)
        if args.kinds:
            numbers["kind"] = neighbours(pretrained, pictures_of_kinds(args.kinds))
        if args.species:
            numbers["species"] = neighbours(pretrained, pictures_of_species(args.species))
        (room / "numbers.json").write_text(json.dumps(numbers))
    return json.loads((room / "numbers.json").read_text())


def print_table(rows: dict[str, list[dict[str, float]]]) -> None:
    """Mean and range over the seeds."""
    names = [name for name in MEASURES if name in rows["none"][0]]
    print(f"\n{len(rows['none'])} seed(s)\n| start | {' | '.join(MEASURES[name] for name in names)} |")
    print("|---|" + "---|" * len(names))
    for start, found in rows.items():
        values = [[numbers[name] for numbers in found] for name in names]
        cells = [f"{statistics.mean(row):.3f} ({min(row):.3f} to {max(row):.3f})" for row in values]
        print(f"| {start} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("pictures", "sources", "evaluate"):
        parser.add_argument(f"--{name}", nargs="+", required=True)
    for name in ("cache", "output_dir"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--kinds", nargs="+")
    parser.add_argument("--species", nargs="+")
    parser.add_argument("--config", default=str(Path(__file__).with_suffix(".json")))
    parser.add_argument("--pretrain_steps", type=int, default=400)
    parser.add_argument("--finetune_steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--base_rate", type=float, default=8e-3, help="for 256 pictures a step")
    parser.add_argument("--finetune_rate", type=float, default=4e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    rows: dict[str, list[dict[str, float]]] = {start: [] for start in STARTS}
    for seed in args.seeds:
        for start in STARTS:
            rows[start].append(measure(args, start, seed))
        print_table(rows)


if __name__ == "__main__":
    main()
