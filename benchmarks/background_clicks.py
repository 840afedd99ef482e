"""What background clicks are worth when they are added to a checkpoint that never had them: IoU after k clicks.

    python benchmarks/background_clicks.py --sources FOLDER ... --measured_on FOLDER --folder RUN

The bundled checkpoint knows background clicks, so one without them is made of it first: their embedding is taken out,
and the rest trained on, with clicks on the object alone, as the released weights were. From that model two runs of
the same length and the same pictures go on: one with background clicks added (`--negative_points`), one without.
Started again it goes on where it was stopped.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from efficientsam_hf import EfficientSamConfig, EfficientSamModel, EfficientSamProcessor, load_checkpoint
from efficientsam_hf.data.sources import find_labelled_pictures
from efficientsam_hf.evaluation.interactive import evaluate_interactive

FINETUNE = Path(__file__).parents[1] / "examples" / "finetune_sa1b.py"
# The encoder stays as it is: clicks are the decoder's business, and it is cheap to train.
TRAINING = """--freeze vision_encoder.* --total_batch 4 --batch_size 4 --masks_per_image 4 --smallest_mask 0.002
    --rounds 4 --box_chance 0.3 --flip 0.5 --smallest_crop 0.6 --hold_out 10 --learning_rate 3e-4 --warmup 20
    --schedule cosine --weight_decay 0.05 --save_every 100 --eval_every 1000000 --eval_pictures 1
    --log_every 20 --report_to none"""


def without_background_clicks(folder: Path) -> Path:
    """The bundled checkpoint with the embedding of background clicks taken out."""
    if not folder.exists():
        model, processor = load_checkpoint(device="cpu")
        fields = model.config.to_dict()
        fields["prompt_encoder_config"]["negative_points"] = False
        stripped = EfficientSamModel(EfficientSamConfig(**fields))
        left = stripped.load_state_dict(model.float().state_dict(), strict=False)
        assert (left.unexpected_keys, left.missing_keys) == (["prompt_encoder.background"], [])
        stripped.save_pretrained(folder)
        processor.extended(stripped.config).save_pretrained(folder)
    return folder


def train(args: argparse.Namespace, name: str, start: Path, steps: int, *options: str) -> Path:
    """Fine-tune with the recipe of this page; where it lies then."""
    folder = args.folder / name
    command = [sys.executable, str(FINETUNE), "--model", str(start), "--output_dir", str(folder)]
    command += ["--sources", *args.sources, *TRAINING.split(), "--max_steps", str(steps), *options]
    subprocess.run(command, check=True)
    return folder / "model"


def measure(args: argparse.Namespace, name: str, folder: Path) -> str:
    """A row of the table."""
    model, processor = EfficientSamModel.from_pretrained(folder), EfficientSamProcessor.from_pretrained(folder)
    pictures = find_labelled_pictures(args.measured_on)[: args.pictures]
    result = evaluate_interactive(model.eval(), processor, pictures, "sam", (1, 2, 3, 5), oracle=False)
    scores = " | ".join(f"{figures['miou']:.3f}" for figures in result["at"].values())
    (args.folder / f"{name.replace(' ', '_')}.json").write_text(json.dumps(result, indent=1))
    return f"| {name} | {scores} | {result['masks']} masks, {result['pictures']} pictures |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", nargs="+", required=True, help="folders to train on")
    parser.add_argument("--measured_on", required=True, help="folder with pictures and masks that are not trained on")
    parser.add_argument("--folder", type=Path, required=True, help="where the three runs lie")
    parser.add_argument("--steps", type=int, default=300, help="of the run with clicks on the object alone")
    parser.add_argument("--further_steps", type=int, default=300, help="of each of the two runs that go on from there")
    parser.add_argument("--pictures", type=int, default=None, help="of `--measured_on`; default: all")
    args = parser.parse_args()
    stripped = without_background_clicks(args.folder / "stripped")
    before = train(args, "object_clicks", stripped, args.steps)
    longer = train(args, "object_clicks_longer", before, args.further_steps, "--seed", "1")
    after = train(args, "background_clicks", before, args.further_steps, "--seed", "1", "--negative_points")
    print(f"{args.steps} steps, then {args.further_steps}; protocol sam: deepest clicks, best mask by its score")
    print("| model | 1 click | 2 clicks | 3 clicks | 5 clicks | measured on |\n|---|---|---|---|---|---|")
    rows = {"bundled, embedding taken out": stripped, "before: object clicks only": before}
    rows |= {"as long again, object clicks only": longer, "after: background clicks added": after}
    for name, folder in rows.items():
        print(measure(args, name, folder), flush=True)


if __name__ == "__main__":
    main()
