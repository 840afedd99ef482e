"""What parts of the default checkpoint's recipe are worth: the whole recipe, and each part left out, over some seeds.

    python benchmarks/recipe_contrasts.py --sources FOLDER ... --stem efficientnet-lite0-57934424.pth --folder RUN

Every run starts anew from the stem and the same seed's noise and pictures. Measured on the tenth of the photos
that training leaves out: the true box, and clicks by protocol `ritm`, each shown with the last answer where the model
has learnt that. All runs of a seed are done before the next seed; what is finished is not done again.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from efficientsam_hf import EfficientSamModel, EfficientSamProcessor
from efficientsam_hf.data.sources import find_labelled_pictures
from efficientsam_hf.evaluation.interactive import evaluate_interactive

EXAMPLES = Path(__file__).parents[1] / "examples"
HOLD_OUT = 10
TRAINING = f"""--image_size 256 --flip 0.5 --color 0.3 --smallest_crop 0.5 --schedule cosine --weight_decay 0.05
    --box_chance 0.5 --rounds 3 --every_iou --encoder_rate 0.5 --stem_rate 0.1 --batch_size 4 --total_batch 4
    --masks_per_image 4 --smallest_mask 0.002 --learning_rate 1.5e-3 --warmup 30 --hold_out {HOLD_OUT}
    --save_every 50 --eval_every 1000000 --eval_pictures 1 --log_every 20 --report_to none
    --freeze vision_encoder.embeddings.patch_embedding.conv.* vision_encoder.embeddings.patch_embedding.blocks.*"""
# What the prompts are made of, and the chance of copy-paste.
WAYS = {
    "the whole recipe": ({"mask_prompts": True, "negative_points": True}, 0.4),
    "without copy-paste": ({"mask_prompts": True, "negative_points": True}, 0.0),
    "without mask prompts": ({"mask_prompts": False, "negative_points": True}, 0.4),
    "without background clicks": ({"mask_prompts": True, "negative_points": False}, 0.4),
}
COLUMNS = ("box", "1 click", "3 clicks", "5 clicks")


def train(args: argparse.Namespace, way: str, seed: int) -> Path:
    """The folder of the trained model."""
    room = args.folder / way.replace(" ", "_") / str(seed)
    if not (room / "model" / "config.json").exists():
        prompts, copy_paste = WAYS[way]
        fields = json.loads((EXAMPLES / "configs" / "nano.json").read_text())
        fields["prompt_encoder_config"] |= {**prompts, "mask_input_channels": 16}
        room.mkdir(parents=True, exist_ok=True)
        (room / "config.json").write_text(json.dumps(fields))
        command = [sys.executable, str(EXAMPLES / "finetune_sa1b.py"), "--config", str(room / "config.json")]
        command += ["--stem", args.stem, "--output_dir", str(room), "--sources", *args.sources, *TRAINING.split()]
        command += ["--copy_paste", str(copy_paste), "--max_steps", str(args.steps), "--seed", str(seed)]
        subprocess.run(command, check=True)
    return room / "model"


def measure(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Mean IoU over the held-out masks, by COLUMNS; kept beside the model."""
    kept = folder.parent / "figures.json"
    if not kept.exists():
        model, processor = EfficientSamModel.from_pretrained(folder), EfficientSamProcessor.from_pretrained(folder)
        held_out = [
            p for s in dict.fromkeys(args.sources) for p in find_labelled_pictures(s)[::HOLD_OUT][: args.photos]
        ]
        box, clicks = (
            evaluate_interactive(model, processor, held_out, name, prompts, oracle=False, masks=args.masks, **options)
            for name, prompts, options in (
                ("box", (1,), {}),
                ("ritm", (1, 3, 5), {"show_answer": processor.mask_prompts}),
            )
        )
        found = [box["at"]["1"], *(clicks["at"][number] for number in "135")]
        figures = {name: one["miou"] for name, one in zip(COLUMNS, found, strict=True)}
        kept.write_text(json.dumps({**figures, "photos": box["pictures"], "masks": box["masks"]}))
    return json.loads(kept.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", nargs="+", required=True, help="folders of .jpg and .json pairs")
    parser.add_argument("--stem", required=True, help="EfficientNet-Lite weights (.pth)")
    parser.add_argument("--folder", type=Path, required=True, help="where the runs lie")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--photos", type=int, default=12, help="most held-out photos of a source")
    parser.add_argument("--masks", type=int, default=4, help="most masks of a photo")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found: dict[str, list[dict]] = {way: [] for way in WAYS}
    for seed in range(args.seeds):
        for way, rows in found.items():
            rows.append(measure(args, train(args, way, seed)))
            print(f"seed {seed}, {way}: {rows[-1]}", flush=True)
    one = found[next(iter(WAYS))][0]
    print(f"{args.steps} steps of 4 photos at 256 pixels; {one['photos']} photos, {one['masks']} masks held out")
    print(f"| recipe | {' | '.join(COLUMNS)} |\n|{'---|' * (1 + len(COLUMNS))}")
    for way, rows in found.items():
        columns = [[row[name] for row in rows] for name in COLUMNS]
        print(
            f"| {way} | "
            + " | ".join(f"{statistics.fmean(c):.3f} ({min(c):.3f} to {max(c):.3f})" for c in columns)
            + " |"
        )


if __name__ == "__main__":
    main()
