"""Train EfficientSAM on pictures with masks in SA-1B's layout: folders or tar shards of .jpg and .json pairs.

From a model (a folder or a Hub id), or from scratch with a config:

    accelerate launch examples/finetune_sa1b.py --model MODEL --sources sa_000000.tar sa_000001.tar --output_dir run
    accelerate launch examples/finetune_sa1b.py --config examples/configs/nano.json --sources FOLDER --output_dir run

The same command started again goes on where the last one stopped. Progress goes to the terminal and to tensorboard;
the trained model and its processor lie in OUTPUT_DIR/model.
"""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import HfArgumentParser

from efficientsam_hf import EfficientSamConfig, EfficientSamModel, EfficientSamProcessor
from efficientsam_hf.data.augmentation import Augmentation
from efficientsam_hf.data.sa1b import Pair, Sa1bSamples, find_pairs
from efficientsam_hf.training.checkpoints import Checkpoints
from efficientsam_hf.training.finetuning import InteractiveSegmentation
from efficientsam_hf.training.optimization import (
    parameter_groups,
    seeded_generator,
    set_learning_rate,
    warmup_cosine,
    warmup_linear,
)


@dataclass
class Arguments:
    """Every knob. The defaults are the paper's where it names a value (section 4.1)."""

    sources: list[str] = field(metadata={"help": "folders or tars; each is drawn with equal chance"})
    output_dir: str = field(metadata={"help": "states of the run, and the model at its end"})
    model: str | None = field(default=None, metadata={"help": "folder or Hub id of the model to start from"})
    config: str | None = field(default=None, metadata={"help": "config JSON of a model to train from scratch"})
    image_size: int | None = field(default=None, metadata={"help": "side in pixels to train at; default: the model's"})
    masks_per_image: int = field(default=64, metadata={"help": "masks drawn from a picture"})
    smallest_mask: float = field(default=0.0, metadata={"help": "masks covering less of the picture are left out"})
    rounds: int = field(default=1, metadata={"help": "prompts an object gets: one, then a click on an error each"})
    box_chance: float = field(default=0.5, metadata={"help": "how often the first prompt is a box"})
    every_iou: bool = field(default=False, metadata={"help": "train the predicted IoU of all masks of a prompt"})
    smallest_crop: float = field(default=1.0, metadata={"help": "random crops down to this share of each side"})
    flip: float = field(default=0.0, metadata={"help": "chance of a mirror image"})
    color: float = field(default=0.0, metadata={"help": "largest relative change of brightness, contrast, saturation"})
    shapes: float = field(default=0.0, metadata={"help": "chance that masks are random shapes of another picture"})
    objects: float = field(default=0.0, metadata={"help": "chance that masks are objects pasted from other pictures"})
    hold_out: int = field(default=0, metadata={"help": "every so many-th pair of a source is not trained on; 0: all"})
    batch_size: int = field(default=2, metadata={"help": "pictures a process and step"})
    accumulate: int = field(default=1, metadata={"help": "batches before the weights move"})
    max_steps: int = field(default=437_000, metadata={"help": "weight updates; 5 epochs of SA-1B, 128 pictures each"})
    learning_rate: float = field(default=4e-4, metadata={"help": "at its peak"})
    encoder_rate: float = field(default=1.0, metadata={"help": "the image encoder's learning rate, as a share of it"})
    schedule: str = field(default="linear", metadata={"help": "linear or cosine, down to 0"})
    warmup: int = field(default=250, metadata={"help": "steps of linear climb"})
    weight_decay: float = field(default=0.1, metadata={"help": "of matrices"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradients longer than this are cut"})
    max_minutes: float | None = field(default=None, metadata={"help": "stop and save after this time, to go on later"})
    seed: int = field(default=0, metadata={"help": "start of all random choices"})
    workers: int = field(default=0, metadata={"help": "processes that read pictures"})
    log_every: int = field(default=50, metadata={"help": "steps between two lines"})
    save_every: int = field(default=1000, metadata={"help": "steps between two states"})
    keep: int = field(default=2, metadata={"help": "states kept"})

    def __post_init__(self) -> None:
        if (self.model is None) == (self.config is None):
            raise ValueError("give either --model or --config, got " + ("neither" if self.model is None else "both"))
        if self.schedule not in ("linear", "cosine"):
            raise ValueError(f"--schedule must be linear or cosine, got {self.schedule!r}")


def build(args: Arguments) -> tuple[EfficientSamModel, EfficientSamProcessor]:
    """The model to train and its processor."""
    if args.model is not None:
        model = EfficientSamModel.from_pretrained(args.model, dtype=torch.float32)
        return model, EfficientSamProcessor.from_pretrained(args.model)
    config = EfficientSamConfig(**json.loads(Path(args.config).read_text()))
    processor = EfficientSamProcessor.from_model_config(config)
    # The released weights saw pictures shrunk without antialiasing; whoever starts anew need not.
    processor.image_processor.antialias = True
    return EfficientSamModel(config), processor


def main(args: Arguments) -> None:
    """Build, prepare, loop, save."""
    accelerator = Accelerator(
        gradient_accumulation_steps=args.accumulate,
        log_with="tensorboard",
        project_dir=args.output_dir,
        # Mask token 0 answers no training prompt, so its network gets no gradient.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    accelerator.init_trackers("log", {k: v for k, v in asdict(args).items() if isinstance(v, int | float | str)})
    set_seed(args.seed)
    model, processor = build(args)
    task = InteractiveSegmentation(model, rounds=args.rounds, box_chance=args.box_chance, every_iou=args.every_iou)
    groups = parameter_groups(task, args.weight_decay, {"model.vision_encoder.": args.encoder_rate})
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate)
    task, optimizer = accelerator.prepare(task, optimizer)
    checkpoints = Checkpoints(accelerator, args.output_dir, keep=args.keep)
    step = checkpoints.resume()
    loader = accelerator.prepare(build_loader(args, processor, step, accelerator.num_processes))
    schedule = {"linear": warmup_linear, "cosine": warmup_cosine}[args.schedule]
    size, processes = sum(parameter.numel() for parameter in model.parameters()), accelerator.num_processes
    accelerator.print(f"{size:,} parameters, {processes} process(es), {step} of {args.max_steps} steps done")

    task.train()
    start, first_step = time.monotonic(), step
    for number, batch in enumerate(loader):
        set_learning_rate(optimizer, schedule(step, peak=args.learning_rate, warmup=args.warmup, total=args.max_steps))
        with accelerator.accumulate(task):
            # Called, never task.forward: the call is what synchronises the processes.
            draw = (args.seed, first_step * args.accumulate + number, accelerator.process_index)
            losses = task(**batch, generator=seeded_generator(*draw, device=accelerator.device))
            accelerator.backward(losses["loss"])
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(task.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        step += 1
        elapsed = time.monotonic() - start
        if step % args.log_every == 0 or step == args.max_steps:
            values = {name: value.item() for name, value in losses.items()}
            accelerator.log(values, step=step)
            text = " ".join(f"{name} {value:.4f}" for name, value in values.items())
            accelerator.print(f"step {step}: {text} ({elapsed / (step - first_step):.3f} s a step)", flush=True)
        if step % args.save_every == 0:
            checkpoints.save(step)
        if args.max_minutes is not None and elapsed > 60 * args.max_minutes:
            accelerator.set_trigger()
        # Asked of all, because each process has a clock of its own, and one that stopped alone would hang the others.
        if args.max_minutes is not None and accelerator.check_trigger():
            break

    checkpoints.save(step)
    accelerator.end_training()
    if accelerator.is_main_process:
        folder = Path(args.output_dir) / "model"
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        print(f"{step} of {args.max_steps} steps done, model in {folder}")


def training_pairs(source: str, hold_out: int) -> list[Pair]:
    """The pairs of a source without every `hold_out`-th, the first one among them: those choose between models."""
    return [pair for number, pair in enumerate(find_pairs(source)) if not hold_out or number % hold_out]


def build_loader(args: Arguments, processor: EfficientSamProcessor, step: int, processes: int) -> DataLoader:
    """Batches from `step` on; the numbers of their samples are all that they depend on."""
    image_processor = processor.image_processor
    if args.image_size is not None:
        fields = {**image_processor.to_dict(), "size": {"height": args.image_size, "width": args.image_size}}
        image_processor = type(image_processor).from_dict(fields)
    per_step = args.batch_size * args.accumulate * processes
    samples = Sa1bSamples(
        [training_pairs(source, args.hold_out) for source in args.sources],
        image_processor,
        length=args.max_steps * per_step,
        masks_per_image=args.masks_per_image,
        augmentation=Augmentation(args.smallest_crop, args.flip, args.color, args.shapes, args.objects),
        seed=args.seed,
        first=step * per_step,
        smallest_share=args.smallest_mask,
    )
    return DataLoader(samples, batch_size=args.batch_size, num_workers=args.workers)


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
