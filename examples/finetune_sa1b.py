"""Train EfficientSAM on pictures with masks: SA-1B's shards, COCO's or LVIS's instances, folders with masks.

From a model (a folder or a Hub id), or from scratch with a config:

    accelerate launch examples/finetune_sa1b.py --model MODEL --sources sa_000000.tar sa_000001.tar --output_dir run
    accelerate launch examples/finetune_sa1b.py --config examples/configs/nano.json --sources FOLDER --output_dir run

A source is a folder or a tar of .jpg and .json pairs, `instances.json:FOLDER`, or a folder of `images/` and `masks/`;
all are drawn from by number. A pattern such as "sa_*.tar" (in quotes) or an address such as hf://... is streamed.

The same command started again goes on where the last one stopped. Progress goes to the terminal and to tensorboard;
the trained model and its processor lie in OUTPUT_DIR/model.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import send_to_device, set_seed
from torch.utils.data import DataLoader
from transformers import BaseImageProcessor, HfArgumentParser

from efficientsam_hf import EfficientSamConfig, EfficientSamModel, EfficientSamProcessor
from efficientsam_hf.data.augmentation import Augmentation
from efficientsam_hf.data.pair_reading import PairReader
from efficientsam_hf.data.sa1b import LabelledPicture, Sa1bSamples
from efficientsam_hf.data.shards import find_shards, is_streamed
from efficientsam_hf.data.sources import find_labelled_pictures
from efficientsam_hf.data.streaming import ShardStream, StreamPosition
from efficientsam_hf.efficientnet import start_from_efficientnet
from efficientsam_hf.training.checkpoints import Checkpoints
from efficientsam_hf.training.finetuning import InteractiveSegmentation
from efficientsam_hf.training.optimization import (
    freeze,
    parameter_groups,
    seeded_generator,
    set_learning_rate,
    warmup_cosine,
    warmup_linear,
)


@dataclass
class Arguments:
    """Every knob. The defaults are the paper's where it names a value (section 4.1)."""

    sources: list[str] = field(metadata={"help": "where pictures and masks are; each is drawn with equal chance"})
    output_dir: str = field(metadata={"help": "states of the run, and the model at its end"})
    model: str | None = field(default=None, metadata={"help": "folder or Hub id of the model to start from"})
    config: str | None = field(default=None, metadata={"help": "config JSON of a model to train from scratch"})
    stem: str | None = field(
        default=None, metadata={"help": "EfficientNet-Lite weights (.pth) to start the stem from"}
    )
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
    lanes: int = field(
        default=0, metadata={"help": "streams read side by side, a multiple of processes x workers; 0: just that"}
    )
    batch_size: int = field(default=2, metadata={"help": "pictures a process and step"})
    accumulate: int = field(default=1, metadata={"help": "batches before the weights move"})
    max_steps: int = field(default=437_000, metadata={"help": "weight updates; 5 epochs of SA-1B, 128 pictures each"})
    learning_rate: float = field(default=4e-4, metadata={"help": "at its peak"})
    encoder_rate: float = field(default=1.0, metadata={"help": "the image encoder's learning rate, as a share of it"})
    stem_rate: float = field(
        default=1.0, metadata={"help": "the convolutional stem's learning rate, as a share of it"}
    )
    freeze: list[str] = field(
        default_factory=list, metadata={"help": "names or patterns of parameters that stay as they are"}
    )
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
        if self.stem is not None and self.config is None:
            raise ValueError("--stem starts a new model's stem: give it with --config")
        if self.schedule not in ("linear", "cosine"):
            raise ValueError(f"--schedule must be linear or cosine, got {self.schedule!r}")
        if len({is_streamed(source) for source in self.sources}) > 1:
            raise ValueError(f"--sources must be all streamed (patterns, addresses) or none, got {self.sources}")


def build(args: Arguments) -> tuple[EfficientSamModel, EfficientSamProcessor]:
    """The model to train and its processor."""
    if args.model is not None:
        model = EfficientSamModel.from_pretrained(args.model, dtype=torch.float32)
        return model, EfficientSamProcessor.from_pretrained(args.model)
    config = EfficientSamConfig(**json.loads(Path(args.config).read_text()))
    processor = EfficientSamProcessor.from_model_config(config)
    # The released weights saw pictures shrunk without antialiasing; whoever starts anew need not.
    processor.image_processor.antialias = True
    model = EfficientSamModel(config)
    if args.stem is not None:
        start_from_efficientnet(model.vision_encoder.embeddings.patch_embedding, args.stem)
    return model, processor


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
    freeze(model, args.freeze)
    rates = {"model.vision_encoder.embeddings.patch_embedding.blocks": args.stem_rate}
    rates["model.vision_encoder."] = args.encoder_rate
    groups = parameter_groups(task, args.weight_decay, rates)
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate)
    task, optimizer = accelerator.prepare(task, optimizer)
    checkpoints = Checkpoints(accelerator, args.output_dir, keep=args.keep)
    position = None
    if is_streamed(args.sources[0]):
        position = StreamPosition(args.lanes or accelerator.num_processes * max(args.workers, 1))
        accelerator.register_for_checkpointing(position)
    step = checkpoints.resume()
    if position is None:
        loader = accelerator.prepare(build_loader(args, processor, step, accelerator.num_processes))
    else:
        loader = streamed_batches(args, processor, step, accelerator, position)
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
    # Saving has gathered what all processes skipped.
    if position is not None and position.skipped:
        accelerator.print(f"{len(position.skipped)} skipped, such as: {'; '.join(sorted(position.skipped)[:3])}")
    # The wrapper goes before the process group: the other way round the last of gloo's threads may wait for Python
    # while Python waits for it.
    task, optimizer = accelerator.free_memory(task, optimizer)
    accelerator.end_training()
    if accelerator.is_main_process:
        folder = Path(args.output_dir) / "model"
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        print(f"{step} of {args.max_steps} steps done, model in {folder}")


def training_pairs(source: str, hold_out: int) -> list[LabelledPicture]:
    """The pictures of a source without every `hold_out`-th, the first one among them: those choose between models."""
    return [pair for number, pair in enumerate(find_labelled_pictures(source)) if not hold_out or number % hold_out]


def training_size(args: Arguments, processor: EfficientSamProcessor) -> BaseImageProcessor:
    """The image processor, at the size to train at."""
    image_processor = processor.image_processor
    if args.image_size is None:
        return image_processor
    fields = {**image_processor.to_dict(), "size": {"height": args.image_size, "width": args.image_size}}
    return type(image_processor).from_dict(fields)


def streamed_batches(
    args: Arguments, processor: EfficientSamProcessor, step: int, accelerator: Accelerator, position: StreamPosition
) -> Iterator[dict[str, torch.Tensor]]:
    """This process's batches from `step` on, which move `position`; Accelerate would divide them once more."""
    reader = PairReader(
        training_size(args, processor),
        args.masks_per_image,
        Augmentation(args.smallest_crop, args.flip, args.color, args.shapes, args.objects),
        args.smallest_mask,
    )
    stream = ShardStream(
        find_shards(args.sources),
        reader.read,
        position,
        args.batch_size,
        first_batch=step * args.accumulate * accelerator.num_processes,
        rank=accelerator.process_index,
        ranks=accelerator.num_processes,
        seed=args.seed,
        hold_out=args.hold_out,
    )
    loader = DataLoader(stream, args.batch_size, num_workers=args.workers, pin_memory=torch.cuda.is_available())
    for batch in islice(loader, (args.max_steps - step) * args.accumulate):
        yield send_to_device(position.advance(batch), accelerator.device, non_blocking=True)


def build_loader(args: Arguments, processor: EfficientSamProcessor, step: int, processes: int) -> DataLoader:
    """Batches from `step` on; the numbers of their samples are all that they depend on."""
    per_step = args.batch_size * args.accumulate * processes
    samples = Sa1bSamples(
        [training_pairs(source, args.hold_out) for source in args.sources],
        training_size(args, processor),
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
