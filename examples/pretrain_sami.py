"""Pretrain the image encoder by SAMI: guess a teacher's features of a picture from a quarter of its patches.

From folders or tars of pictures, or a data set of the Hub; with SAM as the teacher, or with none (MAE, the baseline):

    accelerate launch examples/pretrain_sami.py --sources imagenet --teacher facebook/sam-vit-huge --output_dir run
    accelerate launch examples/pretrain_sami.py --dataset ILSVRC/imagenet-1k --pictures 1281167 --mae --output_dir run

Launch files for several GPUs lie in examples/accelerate. The same command started again goes on where the last one
stopped. OUTPUT_DIR/model is what was trained, OUTPUT_DIR/efficientsam the start for examples/finetune_sa1b.py.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import HfArgumentParser

from efficientsam_hf import (
    MAE_BASELINE,
    VARIANTS,
    EfficientSamForPreTraining,
    EfficientSamImageProcessor,
    EfficientSamProcessor,
    EfficientSamSamiConfig,
    push_to_hub,
    save_for_hub,
)
from efficientsam_hf.data.crops import RandomResizedCrop, SampleMaker
from efficientsam_hf.data.images import CorruptPictures, Picture, StreamedImages, UnlabelledImages, find_pictures
from efficientsam_hf.efficientnet import start_from_efficientnet
from efficientsam_hf.training.checkpoints import Checkpoints
from efficientsam_hf.training.feature_cache import FeatureCache, cached_channels, cutting_as_cached, read_index
from efficientsam_hf.training.optimization import parameter_groups, warmup_cosine
from efficientsam_hf.training.progress import log_pictures, steps_of, warmup_steps
from efficientsam_hf.training.runs import Report, RunOptions, start_run, tell_the_start
from efficientsam_hf.training.sami import draw_reconstruction, model_inputs
from efficientsam_hf.training.teachers import Teacher, load_teacher
from efficientsam_hf.training.updates import weight_updates
from efficientsam_hf.training.weights import averaged_model


@dataclass(kw_only=True)
class Arguments(RunOptions):
    """Every knob. The defaults are the paper's where it names a value (section 4.1), MAE's where it does not."""

    sources: list[str] = field(default_factory=list, metadata={"help": "folders or tars of pictures"})
    dataset: str | None = field(default=None, metadata={"help": "a data set of the Hub, or a local one, streamed"})
    split: str = field(default="train", metadata={"help": "of the data set"})
    column: str = field(default="image", metadata={"help": "of the data set, with the pictures"})
    pictures: int | None = field(default=None, metadata={"help": "how many the data set has; sources are counted"})
    variant: str | None = field(default=None, metadata={"help": "size of the encoder: tiny (default), small or base"})
    config: str | None = field(default=None, metadata={"help": "JSON of an EfficientSamSamiConfig's fields instead"})
    stem: str | None = field(default=None, metadata={"help": "EfficientNet-Lite weights (.pth) the stem starts from"})
    loss: str | None = field(default=None, metadata={"help": "mse or cosine; default: the config's, mse"})
    mask_ratio: float | None = field(default=None, metadata={"help": "share that is hidden; default: 0.75"})
    decoder: str | None = field(default=None, metadata={"help": "cross, the default, or self, as in MAE"})
    mae: bool = field(default=False, metadata={"help": "MAE, the baseline: pixels instead of a teacher's features"})
    teacher: str | None = field(default=None, metadata={"help": "folder or Hub id of a vision model, or an ONNX file"})
    teacher_size: int | None = field(default=None, metadata={"help": "side it looks at; default: the student's"})
    before_neck: bool = field(default=False, metadata={"help": "a SAM encoder's features before its neck"})
    teacher_output: str | None = field(default=None, metadata={"help": "an ONNX file's output with the features"})
    teacher_mean: list[float] | None = field(default=None, metadata={"help": "three numbers; default: its own"})
    teacher_std: list[float] | None = field(default=None, metadata={"help": "three numbers; default: its own"})
    cache: str | None = field(
        default=None,
        metadata={"help": "folder that `efficientsam cache-features` wrote; --teacher is then what it must be of"},
    )
    crops: int | None = field(
        default=None,
        metadata={"help": "different crops of a picture, then repeated; default: endless, or the cache's"},
    )
    smallest_area: float = field(default=0.2, metadata={"help": "of a picture in a crop, or the cache's"})
    total_batch: int = field(default=4096, metadata={"help": "pictures a weight update, all processes together"})
    batch_size: int = field(default=256, metadata={"help": "pictures a process takes at once"})
    epochs: float = field(default=400, metadata={"help": "times that all pictures are seen"})
    warmup_epochs: float | None = field(
        default=None,
        metadata={"help": "of them, linear climb of the learning rate; default: 40, or a tenth of --max_steps"},
    )
    base_rate: float = field(default=1.5e-4, metadata={"help": "learning rate for 256 pictures a weight update"})
    weight_decay: float = field(default=0.05, metadata={"help": "of layers' weights"})
    beta2: float = field(default=0.95, metadata={"help": "AdamW's second beta"})
    draw_every: int = field(default=1000, metadata={"help": "weight updates between two reconstruction pictures"})

    def __post_init__(self) -> None:
        if bool(self.sources) == (self.dataset is not None):
            raise ValueError("give either --sources or --dataset, got " + ("both" if self.sources else "neither"))
        if self.dataset is not None and self.pictures is None and self.max_steps is None:
            raise ValueError("a stream does not say how long it is: give --pictures or --max_steps, got neither")
        if self.mae and self.teacher:
            raise ValueError("MAE has no teacher: give either --mae or --teacher, got both")
        if self.cache and (self.mae or self.dataset):
            raise ValueError("--cache stands for the teacher of --sources: give no --mae or --dataset with it")
        if self.variant is not None and self.config is not None:
            raise ValueError("give either --config or --variant, got both")
        if self.variant is not None and self.variant not in VARIANTS:
            raise ValueError(f"--variant must be one of {', '.join(VARIANTS)}, got {self.variant!r}")


def build_config(args: Arguments) -> EfficientSamSamiConfig:
    """The student's config, before the teacher has said how many channels it has."""
    fields = {"vision_config": VARIANTS[args.variant or "tiny"]}
    if args.config is not None:
        fields = json.loads(Path(args.config).read_text())
    decoder = fields.get("decoder_config") or {}
    if args.mae:
        fields |= MAE_BASELINE
        decoder |= MAE_BASELINE["decoder_config"]
    if args.decoder is not None:
        decoder["attention"] = args.decoder
    given = {name: getattr(args, name) for name in ("loss", "mask_ratio") if getattr(args, name) is not None}
    return EfficientSamSamiConfig(**{**fields, "decoder_config": decoder, **given})


def teacher_dtype(args: Arguments, accelerator: Accelerator) -> torch.dtype:
    """That of its features in the cache, or half for a student that learns in half."""
    if args.cache:
        return getattr(torch, read_index(args.cache)["teacher"]["dtype"])
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)


def build_teacher(args: Arguments, config: EfficientSamSamiConfig, accelerator: Accelerator) -> Teacher | None:
    """The teacher, on the device; its channels go into the config."""
    if args.cache:
        config.target_channels = cached_channels(args.cache)
    if args.teacher is None:
        return None
    size = args.teacher_size or config.vision_config.pretrain_image_size
    given = {"mean": args.teacher_mean, "std": args.teacher_std, "dtype": teacher_dtype(args, accelerator)}
    with accelerator.main_process_first():
        teacher = load_teacher(args.teacher, size, not args.before_neck, args.teacher_output, **given)
    teacher = teacher.to(accelerator.device)
    config.target_channels = teacher(torch.zeros(1, 3, size, size, device=accelerator.device)).shape[1]
    return teacher


def build_model(args: Arguments, config: EfficientSamSamiConfig) -> EfficientSamForPreTraining:
    """The student, in training mode."""
    model = EfficientSamForPreTraining(config).train()
    if args.stem is not None:
        start_from_efficientnet(model.vision_encoder.embeddings.patch_embedding, args.stem)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model


def main(args: Arguments) -> None:
    """Build, train, save."""
    accelerator = start_run(args, "sami", shards=True)
    config = build_config(args)
    teacher = build_teacher(args, config, accelerator)
    pictures = find_pictures(args.sources) if args.sources else None
    count = args.pictures or (len(pictures) if pictures else None)
    max_steps = steps_of(args.epochs, count, args.total_batch) if args.max_steps is None else args.max_steps
    warmup = warmup_steps(args.warmup_epochs, 40, args.max_steps, count, args.total_batch)
    rate = partial(warmup_cosine, peak=args.base_rate * args.total_batch / 256, warmup=warmup, total=max_steps)
    state, step = train(args, accelerator, config, teacher, pictures, CorruptPictures(count), rate, max_steps)
    accelerator.end_training()
    if accelerator.is_main_process:
        save(args, config, state)
        print(f"{step} of {max_steps} steps done, models in {args.output_dir}")


def train(
    args: Arguments,
    accelerator: Accelerator,
    config: EfficientSamSamiConfig,
    teacher: Teacher | None,
    pictures: list[Picture] | None,
    corrupt: CorruptPictures,
    rate: Callable[[int], float],
    max_steps: int,
) -> tuple[dict[str, torch.Tensor], int]:
    """The student's weights, or their average, after the last update, and how many there have been."""
    model = build_model(args, config)
    ema = averaged_model(accelerator, model, args.ema)
    groups = parameter_groups(model, args.weight_decay)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(groups, lr=rate(0), betas=(0.9, args.beta2)))
    checkpoints = Checkpoints(accelerator, args.output_dir, keep=args.keep)
    step = first = checkpoints.resume()
    loader = build_loader(args, config, pictures, accelerator, first, max_steps, teacher)
    tell_the_start(accelerator, model, first, max_steps)
    last = max_steps if args.stop_at is None else min(max_steps, args.stop_at)
    names: list[str] = []

    def inputs(batch: dict, generator: torch.Generator) -> dict:
        names.extend(name for name in batch.pop("corrupt") if name)
        # With a cache the teacher was asked who it is, no more.
        return model_inputs(batch, config, None if args.cache else teacher)

    report = Report(accelerator, args, first, checkpoints)
    updates = weight_updates(
        accelerator, model, optimizer, loader, inputs=inputs, rate=rate, first=first, last=last,
        seed=args.seed, max_grad_norm=args.max_grad_norm,
    )  # fmt: skip
    for update in tqdm(updates, total=max_steps, initial=first, disable=not accelerator.is_main_process, unit="step"):
        step = update.step
        report.meter.add(update.losses)
        if ema is not None:
            ema.update_parameters(accelerator.unwrap_model(model))
        if step % args.log_every == 0 or step % args.save_every == 0 or step == last:
            corrupt.add(gather_object(names), (step - report.step) * args.total_batch)
            names.clear()
            report.losses(step, rate(step - 1), f" corrupt {len(corrupt.names)}")
        if accelerator.is_main_process and (step % args.draw_every == 0 or step == last):
            outputs = update.outputs
            drawn = draw_reconstruction(update.inputs, outputs.prediction, outputs.mask, config)
            log_pictures(accelerator, {"reconstruction": drawn}, step)
        if step % args.save_every == 0 and step != last:
            checkpoints.save(step)

    checkpoints.save(step)
    # Under FSDP all processes give their part of it.
    state = accelerator.get_state_dict(model) if ema is None else ema.module.state_dict()
    # The wrapper goes before the process group: the other way round the last of gloo's threads may wait for Python
    # while Python waits for it.
    accelerator.free_memory(model, optimizer)
    return state, step


def build_loader(
    args: Arguments,
    config: EfficientSamSamiConfig,
    pictures: list[Picture] | None,
    accelerator: Accelerator,
    step: int,
    max_steps: int,
    teacher: Teacher | None,
) -> DataLoader | Iterator:
    """Batches from `step` on; seed and numbers are all that they depend on."""
    side = config.vision_config.pretrain_image_size
    maker = SampleMaker(
        size=side,
        patches=config.vision_config.position_grid_size**2,
        seed=args.seed,
        crop=RandomResizedCrop(args.smallest_area),
        teacher_size=None if args.cache else args.teacher_size,
        crops=args.crops,
    )
    options = {"batch_size": args.batch_size, "num_workers": args.workers, "pin_memory": torch.cuda.is_available()}
    if pictures is not None:
        total, first = max_steps * args.total_batch, step * args.total_batch
        features = None
        if args.cache:
            maker, identity = cutting_as_cached(maker, args.cache), None if teacher is None else teacher.identity()
            grid = config.vision_config.position_grid_size
            features = FeatureCache(args.cache, pictures, grid, maker, identity)
        return accelerator.prepare(DataLoader(UnlabelledImages(pictures, total, maker, first, features), **options))
    from datasets import load_dataset
    from datasets.distributed import split_dataset_by_node

    stream = load_dataset(args.dataset, split=args.split, streaming=True)
    stream = split_dataset_by_node(stream, accelerator.process_index, accelerator.num_processes)
    done = step * accelerator.gradient_accumulation_steps
    share = {"rank": accelerator.process_index, "ranks": accelerator.num_processes}
    samples = StreamedImages(stream, maker, args.batch_size, first_batch=done, column=args.column, **share)
    # Already this process's part, which accelerate must not divide again.
    return (send_to_device(batch, accelerator.device) for batch in DataLoader(samples, **options))


def save(args: Arguments, config: EfficientSamSamiConfig, state: dict[str, torch.Tensor]) -> None:
    """The trained model, the EfficientSAM that starts from it, and the upload."""
    model = EfficientSamForPreTraining(config)
    model.load_state_dict(state)
    folder, side = Path(args.output_dir), config.vision_config.pretrain_image_size
    processor = EfficientSamImageProcessor(size={"height": side, "width": side}, antialias=True)
    taught = "its own pixels" if config.target == "pixels" else f"the features of {args.teacher or args.cache}"
    card = f"---\npipeline_tag: image-feature-extraction\n---\n\n# {args.push_to_hub or folder.name}\n\n"
    card += f"An EfficientSAM image encoder, pretrained to guess {taught} from a part of the patches."
    save_for_hub(model, processor, folder / "model", card, overwrite=True)
    whole = model.to_efficientsam()
    save_for_hub(whole, EfficientSamProcessor.from_model_config(whole.config), folder / "efficientsam", overwrite=True)
    if args.push_to_hub:
        print(push_to_hub(model, processor, args.push_to_hub, card))


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
