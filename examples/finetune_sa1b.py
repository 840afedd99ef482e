"""Train EfficientSAM on pictures with masks: SA-1B's shards, COCO's or LVIS's instances, folders with masks.

From a model (a folder or a Hub id), or from scratch with a config:

    accelerate launch examples/finetune_sa1b.py --model MODEL --sources sa_000000.tar sa_000001.tar --output_dir run
    accelerate launch examples/finetune_sa1b.py --config examples/configs/nano.json --sources FOLDER --output_dir run

A source is a folder or a tar of .jpg and .json pairs, `instances.json:FOLDER`, or a folder of `images/` and `masks/`;
all are drawn from by number. A pattern such as "sa_*.tar" (in quotes) or an address such as hf://... is streamed.

Launch files for several GPUs lie in examples/accelerate. The same command started again goes on where the last one
stopped. The trained model and its processor lie in OUTPUT_DIR/model, the best one so far in OUTPUT_DIR/best.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch.utils.data import DataLoader
from transformers import BaseImageProcessor, HfArgumentParser

from efficientsam_hf import EfficientSamConfig, EfficientSamModel, EfficientSamProcessor, push_to_hub, save_for_hub
from efficientsam_hf.data.augmentation import Augmentation
from efficientsam_hf.data.numbered_samples import Sa1bSamples
from efficientsam_hf.data.pair_reading import PairReader
from efficientsam_hf.data.sa1b import LabelledPicture
from efficientsam_hf.data.shards import find_shards, is_streamed
from efficientsam_hf.data.skipped import SkippedPictures
from efficientsam_hf.data.sources import find_labelled_pictures, split_pictures
from efficientsam_hf.data.streaming import ShardStream, StreamPosition
from efficientsam_hf.efficientnet import start_from_efficientnet
from efficientsam_hf.evaluation.held_out import score_held_out
from efficientsam_hf.training.checkpoints import Checkpoints
from efficientsam_hf.training.extension import extend_prompts, with_details
from efficientsam_hf.training.finetuning import InteractiveSegmentation, segmentation_inputs
from efficientsam_hf.training.lora import add_lora, merge_lora
from efficientsam_hf.training.optimization import (
    encoder_shares,
    freeze,
    parameter_groups,
    warmup_cosine,
    warmup_linear,
)
from efficientsam_hf.training.overlays import answer_boxes, draw_answers, find_examples
from efficientsam_hf.training.progress import (
    BestScore,
    log_pictures,
    sam_warmup,
    steps_of,
)
from efficientsam_hf.training.recipes import RECIPES, PromptRecipe
from efficientsam_hf.training.runs import Report, RunOptions, start_run, tell_the_start
from efficientsam_hf.training.updates import weight_updates
from efficientsam_hf.training.weights import (
    averaged_model,
    is_shared_out,
    trained_model,
    twin_for_shards,
)

# The mean squared error of a predicted IoU is below 1 unless something has gone wrong; early on it may be a bit more.
MOST_IOU_ERROR = 10.0


@dataclass(kw_only=True)
class Arguments(RunOptions):
    """Every knob. The defaults are the paper's where it names a value (section 4.1)."""

    sources: list[str] = field(metadata={"help": "where pictures and masks are; each is drawn with equal chance"})
    model: str | None = field(default=None, metadata={"help": "folder or Hub id of the model to start from"})
    config: str | None = field(default=None, metadata={"help": "config JSON of a model to train from scratch"})
    stem: str | None = field(
        default=None, metadata={"help": "EfficientNet-Lite weights (.pth) to start the stem from"}
    )
    details: bool = field(
        default=False, metadata={"help": "hand the stem's details to the decoder of a model without"}
    )
    negative_points: bool = field(default=False, metadata={"help": "add background clicks to a model without them"})
    mask_prompts: bool = field(default=False, metadata={"help": "add mask prompts to a model without them"})
    max_prompt_points: int | None = field(default=None, metadata={"help": "give a model's prompts so many slots"})
    single_mask: bool = field(default=False, metadata={"help": "train mask token 0 to answer alone"})
    image_size: int | None = field(
        default=None, metadata={"help": "side in pixels to train at; it is measured and saved at the model's own"}
    )
    masks_per_image: int = field(default=32, metadata={"help": "masks drawn from a picture; SAM: 64 a GPU"})
    smallest_mask: float = field(default=0.0, metadata={"help": "masks covering less of the picture are left out"})
    recipe: str = field(default="paper", metadata={"help": f"what an object is asked: {', '.join(RECIPES)}"})
    rounds: int | None = field(default=None, metadata={"help": "prompts an object gets, in place of the recipe's"})
    box_chance: float | None = field(default=None, metadata={"help": "how often the first prompt is a box, likewise"})
    answer_chance: float | None = field(
        default=None, metadata={"help": "in how many steps further prompts show the last answer, for mask prompts"}
    )
    answered_share: float | None = field(
        default=None, metadata={"help": "how much of the loss is of the mask with the best predicted IoU, likewise"}
    )
    every_iou: bool = field(default=False, metadata={"help": "train the predicted IoU of all masks of a prompt"})
    smallest_crop: float = field(default=1.0, metadata={"help": "random crops down to this share of each side"})
    closer: float = field(default=0.0, metadata={"help": "chance of a crop around one of the masks instead"})
    smallest_scale: float = field(default=1.0, metadata={"help": "pictures are shrunk down to this share"})
    flip: float = field(default=0.0, metadata={"help": "chance of a mirror image"})
    color: float = field(default=0.0, metadata={"help": "largest relative change of brightness, contrast, saturation"})
    shapes: float = field(default=0.0, metadata={"help": "chance that masks are random shapes of another picture"})
    objects: float = field(default=0.0, metadata={"help": "chance that masks are objects pasted from other pictures"})
    copy_paste: float = field(default=0.0, metadata={"help": "chance that such objects join the picture's own"})
    hold_out: int = field(default=0, metadata={"help": "every so many-th pair of a source is not trained on; 0: all"})
    eval_sources: list[str] = field(
        default_factory=list, metadata={"help": "to measure on; default: what is held out"}
    )
    eval_pictures: int = field(default=50, metadata={"help": "of them, how many are looked at"})
    eval_every: int = field(default=1000, metadata={"help": "steps between two measurements"})
    patience: int = field(default=0, metadata={"help": "measurements without a better one to stop after; 0: go on"})
    lanes: int = field(
        default=0, metadata={"help": "streams read side by side, a multiple of processes x workers; 0: just that"}
    )
    total_batch: int = field(default=128, metadata={"help": "pictures a weight update, all processes together"})
    batch_size: int = field(default=2, metadata={"help": "pictures a process takes at once"})
    epochs: float = field(
        default=5, metadata={"help": "so many times as many pictures as there are, drawn from all sources alike"}
    )
    pictures: int | None = field(default=None, metadata={"help": "in an epoch; default: those by number are counted"})
    learning_rate: float = field(default=4e-4, metadata={"help": "at its peak"})
    encoder_rate: float = field(default=1.0, metadata={"help": "the image encoder's learning rate, as a share of it"})
    layer_decay: float = field(
        default=1.0, metadata={"help": "what a layer of the encoder has of the next one's rate"}
    )
    stem_rate: float | None = field(
        default=None, metadata={"help": "the convolutional stem's learning rate, as a share of it, in place of theirs"}
    )
    freeze: list[str] = field(
        default_factory=list, metadata={"help": "names or patterns of parameters that stay as they are"}
    )
    lora: int = field(default=0, metadata={"help": "rank of adapters in the encoder, which stays as it is; 0: none"})
    schedule: str = field(default="linear", metadata={"help": "linear or cosine, down to 0"})
    warmup: int | None = field(
        default=None,
        metadata={"help": "steps of linear climb; 250, as SAM's, or a tenth of fewer than 2500 if left out"},
    )
    weight_decay: float = field(default=0.1, metadata={"help": "of layers' weights"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradients longer than this are cut"})
    max_minutes: float | None = field(default=None, metadata={"help": "stop and save after this time, to go on later"})

    def __post_init__(self) -> None:
        if (self.model is None) == (self.config is None):
            raise ValueError("give either --model or --config, got " + ("neither" if self.model is None else "both"))
        if self.stem is not None and self.config is None:
            raise ValueError("--stem starts a new model's stem: give it with --config")
        if self.schedule not in ("linear", "cosine"):
            raise ValueError(f"--schedule must be linear or cosine, got {self.schedule!r}")
        if self.recipe not in RECIPES:
            raise ValueError(f"--recipe must be one of {', '.join(RECIPES)}, got {self.recipe!r}")
        if len({is_streamed(source) for source in self.sources}) > 1:
            raise ValueError(f"--sources must be all streamed (patterns, addresses) or none, got {self.sources}")
        if is_streamed(self.sources[0]) and self.pictures is None and self.max_steps is None:
            raise ValueError("a stream does not say how long it is: give --pictures or --max_steps, got neither")

    def prompt_recipe(self) -> PromptRecipe:
        """The recipe with what is given in place of its own."""
        recipe, names = RECIPES[self.recipe], ("rounds", "box_chance", "answer_chance", "answered_share")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return replace(recipe, every_iou=recipe.every_iou or self.every_iou, **given)

    def augmentation(self) -> Augmentation:
        """Changes of the pictures; the paper has none."""
        names = ("smallest_crop", "flip", "color", "shapes", "objects", "smallest_scale", "copy_paste", "closer")
        return Augmentation(**{name: getattr(self, name) for name in names})


def build(args: Arguments) -> tuple[EfficientSamModel, EfficientSamProcessor]:
    """The model to train and its processor."""
    if args.model is not None:
        config = EfficientSamConfig.from_pretrained(args.model)
        config = with_details(config) if args.details else config
        model = EfficientSamModel.from_pretrained(args.model, config=config, dtype=torch.float32)
        processor = EfficientSamProcessor.from_pretrained(args.model)
    else:
        config = EfficientSamConfig(**json.loads(Path(args.config).read_text()))
        config = with_details(config) if args.details else config
        model, processor = EfficientSamModel(config), EfficientSamProcessor.from_model_config(config)
        # The released weights saw pictures shrunk without antialiasing; whoever starts anew need not.
        processor.image_processor.antialias = True
    if args.stem is not None:
        start_from_efficientnet(model.vision_encoder.embeddings.patch_embedding, args.stem)
    extend_prompts(
        model,
        negative_points=args.negative_points,
        mask_prompts=args.mask_prompts,
        max_prompt_points=args.max_prompt_points,
        seed=args.seed,
    )
    model.config.mask_decoder_config.single_mask_token |= args.single_mask
    freeze(model, args.freeze)
    if args.lora:
        add_lora(model, args.lora)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model, processor.extended(model.config)


def main(args: Arguments) -> None:
    """Build, train, save."""
    # A mask token that answers no prompt, or is never nearest, has a network without a gradient.
    accelerator = start_run(args, "log", find_unused=True, shards=True)
    sources, held = find_pictures(args)
    count = args.pictures or sum(map(len, sources))
    max_steps = steps_of(args.epochs, count, args.total_batch) if args.max_steps is None else args.max_steps
    model, processor = build(args)
    model, step = train(args, accelerator, model, processor, sources, held, max_steps)
    accelerator.end_training()
    if accelerator.is_main_process:
        save(args, model, processor, Path(args.output_dir) / "model")
        print(f"{step} of {max_steps} steps done, model in {Path(args.output_dir) / 'model'}")
        if args.push_to_hub:
            print(push_to_hub(merge_lora(model) if args.lora else model, processor, args.push_to_hub, card(args)))


def train(
    args: Arguments,
    accelerator: Accelerator,
    model: EfficientSamModel,
    processor: EfficientSamProcessor,
    sources: list[list[LabelledPicture]],
    held: list[LabelledPicture],
    max_steps: int,
) -> tuple[EfficientSamModel, int]:
    """The model with the weights, or their average, of the last update, and how many there have been."""
    twin, ema = twin_for_shards(accelerator, model), averaged_model(accelerator, model, args.ema)
    task, optimizer = accelerator.prepare(*build_task(args, model))
    checkpoints = Checkpoints(accelerator, args.output_dir, keep=args.keep)
    position: SkippedPictures = SkippedPictures()
    if not sources:
        position = StreamPosition(args.lanes or accelerator.num_processes * max(args.workers, 1))
    best = BestScore(args.patience)
    accelerator.register_for_checkpointing(position, best)
    step = first = checkpoints.resume()
    tell_the_start(accelerator, model, first, max_steps)
    accelerator.print(f"{len(held)} pictures to measure on")
    last = max_steps if args.stop_at is None else min(max_steps, args.stop_at)
    if best.is_over:  # what ended for want of patience has ended
        last = step
    schedule = {"linear": warmup_linear, "cosine": warmup_cosine}[args.schedule]
    rate = partial(schedule, peak=args.learning_rate, warmup=sam_warmup(args.warmup, max_steps), total=max_steps)
    report = Report(accelerator, args, first, checkpoints, most={"iou": MOST_IOU_ERROR})
    updates = weight_updates(
        accelerator, task.train(), optimizer,
        batches(args, accelerator, sources, processor, position, first, max_steps),
        inputs=segmentation_inputs, rate=rate, first=first, last=last,
        seed=args.seed, max_grad_norm=args.max_grad_norm,
    )  # fmt: skip
    start = time.monotonic()
    for update in updates:
        step = update.step
        report.meter.add(update.losses)
        if ema is not None:
            ema.update_parameters(accelerator.unwrap_model(task).model)
        stopping, saving = is_late(args, accelerator, start), step % args.save_every == 0
        measuring = step % args.eval_every == 0 or step == max_steps
        if step % args.log_every == 0 or saving or measuring or stopping or step == last:
            report.losses(step, rate(step - 1))
        if measuring and held:
            measure(args, report, trained_model(accelerator, task, ema, twin), processor, held, best, step)
        if saving and step != last:
            checkpoints.save(step)
        if stopping or best.is_over:
            break

    checkpoints.save(step)
    # Saving has gathered what all processes skipped.
    if position.skipped:
        accelerator.print(position)
    model = trained_model(accelerator, task, ema, twin)
    # The wrapper goes before the process group: the other way round the last of gloo's threads may wait for Python
    # while Python waits for it.
    accelerator.free_memory(task, optimizer)
    return model, step


def build_task(args: Arguments, model: EfficientSamModel) -> tuple[InteractiveSegmentation, torch.optim.Optimizer]:
    """What is trained, with the losses, and its optimizer."""
    task = InteractiveSegmentation(model, args.prompt_recipe())
    layers = model.config.vision_config.num_hidden_layers
    shares = encoder_shares(layers, args.encoder_rate, args.stem_rate, args.layer_decay)
    return task, torch.optim.AdamW(parameter_groups(task, args.weight_decay, shares), lr=args.learning_rate)


def is_late(args: Arguments, accelerator: Accelerator, start: float) -> bool:
    """Whether --max_minutes are over in any process: one that stopped alone would hang the others."""
    if args.max_minutes is None:
        return False
    if time.monotonic() - start > 60 * args.max_minutes:
        accelerator.set_trigger()
    return accelerator.check_trigger()


def measure(
    args: Arguments,
    report: Report,
    model: EfficientSamModel,
    processor: EfficientSamProcessor,
    pictures: list[LabelledPicture],
    best: BestScore,
    step: int,
) -> None:
    """Mean IoU on held-out pictures by box and clicks, some of them drawn, the best model kept."""
    accelerator = report.accelerator
    share = pictures[accelerator.process_index :: accelerator.num_processes]
    if is_shared_out(accelerator):  # the main process alone has gathered all weights
        share = pictures if accelerator.is_main_process else []
    scores = score_held_out(model, processor, share, masks=args.masks_per_image, gather=gather_object)
    better = best.add(sum(scores.values()) / len(scores), step)
    if accelerator.is_main_process:
        examples = find_examples(pictures)
        drawn = draw_answers(examples, [[answer_boxes(model, processor, example)] for example in examples])
        log_pictures(accelerator, {"truth_and_answer": drawn}, step)
        if better:
            save(args, model, processor, Path(args.output_dir) / "best")
    accelerator.wait_for_everyone()
    report.figures(step, {f"held_out_{name}": value for name, value in scores.items()})


def find_pictures(args: Arguments) -> tuple[list[list[LabelledPicture]], list[LabelledPicture]]:
    """Pictures to train on by source, none where they are streamed, and those to measure on."""
    streamed = is_streamed(args.sources[0])
    splits = [] if streamed else [split_pictures(find_labelled_pictures(name), args.hold_out) for name in args.sources]
    for name, (trained_on, held_out) in zip(args.sources, splits, strict=False):
        if not trained_on:
            raise ValueError(f"--hold_out {args.hold_out} leaves nothing of {name} to train on: found {len(held_out)}")
    held = [held for _, held in splits]
    if args.eval_sources:
        held = [find_labelled_pictures(name) for name in args.eval_sources]
    # From all of them alike, a source being sorted by name.
    each = -(-args.eval_pictures // max(len(held), 1))
    measured = [part[:: -(-len(part) // each) or 1] for part in held] if each else []
    if args.patience and not any(measured):
        raise ValueError(f"--patience {args.patience} wants pictures to measure on, found none: give --eval_sources")
    return [train for train, _ in splits], list(chain.from_iterable(measured))


def training_size(args: Arguments, processor: EfficientSamProcessor) -> BaseImageProcessor:
    """The image processor, at the size to train at."""
    image_processor = processor.image_processor
    if args.image_size is None:
        return image_processor
    fields = {**image_processor.to_dict(), "size": {"height": args.image_size, "width": args.image_size}}
    return type(image_processor).from_dict(fields)


def batches(
    args: Arguments,
    accelerator: Accelerator,
    sources: list[list[LabelledPicture]],
    processor: EfficientSamProcessor,
    position: SkippedPictures,
    step: int,
    max_steps: int,
) -> Iterator[dict[str, torch.Tensor]]:
    """This process's batches from `step` on, which move `position`."""
    if sources:
        loader = accelerator.prepare(numbered_batches(args, sources, processor, step, max_steps))
        return map(position.advance, loader)
    return streamed_batches(args, processor, step, accelerator, position)


def streamed_batches(
    args: Arguments, processor: EfficientSamProcessor, step: int, accelerator: Accelerator, position: StreamPosition
) -> Iterator[dict[str, torch.Tensor]]:
    """This process's batches from `step` on, which move `position`; Accelerate would divide them once more."""
    size = training_size(args, processor)
    reader = PairReader(size, args.masks_per_image, args.augmentation(), args.smallest_mask)
    stream = ShardStream(
        find_shards(args.sources),
        reader.read,
        position,
        args.batch_size,
        first_batch=step * accelerator.gradient_accumulation_steps * accelerator.num_processes,
        rank=accelerator.process_index,
        ranks=accelerator.num_processes,
        seed=args.seed,
        hold_out=args.hold_out,
    )
    loader = DataLoader(stream, args.batch_size, num_workers=args.workers, pin_memory=torch.cuda.is_available())
    for batch in loader:
        yield send_to_device(position.advance(batch), accelerator.device, non_blocking=True)


def numbered_batches(
    args: Arguments, sources: list[list[LabelledPicture]], processor: EfficientSamProcessor, step: int, max_steps: int
) -> DataLoader:
    """Batches from `step` on; the numbers of their samples are all that they depend on."""
    samples = Sa1bSamples(
        sources,
        training_size(args, processor),
        length=max_steps * args.total_batch,
        masks_per_image=args.masks_per_image,
        augmentation=args.augmentation(),
        seed=args.seed,
        first=step * args.total_batch,
        smallest_share=args.smallest_mask,
    )
    return DataLoader(samples, args.batch_size, num_workers=args.workers, pin_memory=torch.cuda.is_available())


def save(args: Arguments, model: EfficientSamModel, processor: EfficientSamProcessor, folder: Path) -> None:
    """A folder ready for the Hub; adapters are in the weights."""
    save_for_hub(merge_lora(model) if args.lora else model, processor, folder, card(args), overwrite=True)


def card(args: Arguments) -> str:
    """What the model's page says."""
    name = args.push_to_hub or Path(args.output_dir).name
    return f"# {name}\n\nEfficientSAM, trained from {args.model or args.config} on {', '.join(args.sources)}."


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
