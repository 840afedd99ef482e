"""Teach EfficientSAM your own objects: twenty pictures with masks, one small GPU or a CPU, some minutes.

    python examples/finetune_custom.py --sources FOLDER --output_dir run

FOLDER holds `images/` and `masks/`, or SA-1B's pairs, or is `instances.json:FOLDER`. Some of the pictures choose when
to stop and are not trained on; the best model lies in OUTPUT_DIR/model, and OUTPUT_DIR/before_after.png shows them
with the truth, the old answers and the new ones.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from PIL import Image
from torch.utils.data import DataLoader
from transformers import HfArgumentParser

from efficientsam_hf import EfficientSamModel, EfficientSamProcessor, default_checkpoint, save_for_hub
from efficientsam_hf.data.augmentation import Augmentation
from efficientsam_hf.data.numbered_samples import Sa1bSamples
from efficientsam_hf.data.sa1b import LabelledPicture
from efficientsam_hf.data.skipped import SkippedPictures
from efficientsam_hf.data.sources import find_labelled_pictures, split_pictures
from efficientsam_hf.evaluation.held_out import score_held_out
from efficientsam_hf.training.finetuning import InteractiveSegmentation, segmentation_inputs
from efficientsam_hf.training.lora import add_lora, merge_lora
from efficientsam_hf.training.optimization import freeze, parameter_groups, warmup_cosine
from efficientsam_hf.training.overlays import answer_boxes, draw_answers, find_examples
from efficientsam_hf.training.progress import BestScore
from efficientsam_hf.training.recipes import PromptRecipe
from efficientsam_hf.training.updates import weight_updates


@dataclass
class Arguments:
    """Every knob; the defaults suit twenty pictures."""

    sources: list[str] = field(metadata={"help": "where the pictures and their masks are"})
    output_dir: str = field(metadata={"help": "the model and the picture of its answers"})
    model: str | None = field(default=None, metadata={"help": "folder or Hub id; default: the bundled checkpoint"})
    train: str = field(default="decoder", metadata={"help": "decoder, lora (and the decoder), or all"})
    hold_out: int = field(default=4, metadata={"help": "every so many-th picture chooses when to stop"})
    rounds: int = field(default=3, metadata={"help": "prompts an object gets: one, then a click on an error each"})
    masks_per_image: int = field(default=8, metadata={"help": "masks drawn from a picture"})
    batch_size: int = field(default=4, metadata={"help": "pictures a step"})
    max_steps: int = field(default=200, metadata={"help": "steps, if nothing stops it before"})
    learning_rate: float = field(default=2e-4, metadata={"help": "at its peak"})
    warmup: int = field(default=10, metadata={"help": "steps of linear climb"})
    eval_every: int = field(default=10, metadata={"help": "steps between two measurements"})
    patience: int = field(default=4, metadata={"help": "measurements without a better one to stop after"})
    seed: int = field(default=0, metadata={"help": "start of all random choices"})

    def __post_init__(self) -> None:
        if self.train not in ("decoder", "lora", "all"):
            raise ValueError(f"--train must be decoder, lora or all, got {self.train!r}")
        if self.hold_out < 2:
            raise ValueError(f"--hold_out must be 2 or more, or nothing is trained on; got {self.hold_out}")


def main(args: Arguments) -> None:
    """Measure, train, measure, keep the best, draw."""
    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        found = accelerator.num_processes
        raise ValueError(f"a few pictures are one process's work, found {found}: examples/finetune_sa1b.py takes more")
    set_seed(args.seed)
    name = args.model or default_checkpoint()
    model = EfficientSamModel.from_pretrained(name, dtype=torch.float32)
    processor = EfficientSamProcessor.from_pretrained(name)
    found = [picture for source in args.sources for picture in find_labelled_pictures(source)]
    pictures, held = split_pictures(found, args.hold_out)
    if not pictures:
        raise ValueError(f"wanted two pictures with masks or more in {', '.join(args.sources)}, found {len(held)}")
    if args.train == "decoder":
        freeze(model, ["vision_encoder.*"])
    elif args.train == "lora":
        add_lora(model)
    # All predicted IoUs are trained: of three masks the user sees the one that has the highest.
    task = InteractiveSegmentation(model, PromptRecipe(rounds=args.rounds, every_iou=True))
    optimizer = torch.optim.AdamW(parameter_groups(task, weight_decay=0.01), lr=args.learning_rate)
    task, optimizer, loader = accelerator.prepare(task, optimizer, batches(args, pictures, processor))
    parameters = sum(part.numel() for part in model.parameters() if part.requires_grad)
    print(f"{len(pictures)} pictures to train on, {len(held)} to choose by, {parameters:,} parameters trained")

    folder, best, skipped = Path(args.output_dir), BestScore(args.patience), SkippedPictures()
    examples = find_examples(held)
    before = [answer_boxes(model, processor, example) for example in examples]
    report(0, model, processor, held, best)
    keep(model, processor, folder, args)
    rate = partial(warmup_cosine, peak=args.learning_rate, warmup=args.warmup, total=args.max_steps)
    updates = weight_updates(
        accelerator, task.train(), optimizer, map(skipped.advance, loader),
        inputs=segmentation_inputs, rate=rate, first=0, last=args.max_steps, seed=args.seed, max_grad_norm=1.0,
    )  # fmt: skip
    for update in updates:
        if update.step % args.eval_every and update.step != args.max_steps:
            continue
        if not update.losses["loss"].isfinite():
            raise FloatingPointError(f"the loss is no number at step {update.step}; {folder / 'model'} is still good")
        if report(update.step, model, processor, held, best):
            keep(model, processor, folder, args)
        if best.is_over:
            break

    model = EfficientSamModel.from_pretrained(folder / "model").to(accelerator.device)
    after = [answer_boxes(model, processor, example) for example in examples]
    drawn = draw_answers(examples, list(zip(before, after, strict=True)))
    Image.fromarray(drawn).save(folder / "before_after.png")
    if skipped.skipped:
        print(skipped)
    print(f"best after step {best.step}: {folder / 'model'}; truth, before, after: {folder / 'before_after.png'}")


def batches(args: Arguments, pictures: list[LabelledPicture], processor: EfficientSamProcessor) -> DataLoader:
    """Pictures cropped, mirrored and coloured at random: of so few, the model would soon know each by heart."""
    samples = Sa1bSamples(
        [pictures],
        processor.image_processor,
        length=args.max_steps * args.batch_size,
        masks_per_image=args.masks_per_image,
        augmentation=Augmentation(smallest_crop=0.6, flip=0.5, color=0.2),
        seed=args.seed,
    )
    return DataLoader(samples, args.batch_size)


def report(
    step: int,
    model: EfficientSamModel,
    processor: EfficientSamProcessor,
    held: list[LabelledPicture],
    best: BestScore,
) -> bool:
    """Print how good the model is on the pictures held out; whether it has never been better."""
    scores = score_held_out(model, processor, held)
    print(f"step {step}: mean IoU " + " ".join(f"{name} {value:.3f}" for name, value in scores.items()), flush=True)
    return best.add(sum(scores.values()) / len(scores), step)


def keep(model: EfficientSamModel, processor: EfficientSamProcessor, folder: Path, args: Arguments) -> None:
    """Write the model, adapters taken into its weights."""
    model = merge_lora(model) if args.train == "lora" else model
    save_for_hub(model, processor, folder / "model", overwrite=True)


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
