"""Fine-tune a pretrained encoder as an image classifier: the paper's Table 1.

From a folder with a folder of pictures for each class (FOLDER/train/dog/1.jpg, FOLDER/validation/dog/2.jpg), or a data
set of the Hub with the columns `image` and `label`:

    accelerate launch examples/finetune_classification.py --model sami --dataset imagenet --output_dir run
    accelerate launch examples/finetune_classification.py --model sami --dataset ILSVRC/imagenet-1k --output_dir to

Launch files for several GPUs lie in examples/accelerate. The same command started again goes on where the last one
stopped. OUTPUT_DIR/model is the classifier, for `pipeline("image-classification")`.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import HfArgumentParser

from efficientsam_hf import (
    VARIANTS,
    EfficientSamForImageClassification,
    EfficientSamVisionConfig,
    push_to_hub,
    save_for_hub,
)
from efficientsam_hf.data.classified_images import (
    CollateForTest,
    TrainingCrop,
    centre_crop_processor,
    open_classified,
)
from efficientsam_hf.data.crops import RandomResizedCrop
from efficientsam_hf.data.epochs import EpochSamples
from efficientsam_hf.data.randaugment import RandAugment
from efficientsam_hf.evaluation.classification import top_accuracy
from efficientsam_hf.training.classification import classification_inputs
from efficientsam_hf.training.encoders import load_encoder_model
from efficientsam_hf.training.optimization import encoder_shares, parameter_groups, warmup_cosine
from efficientsam_hf.training.progress import steps_of, warmup_steps
from efficientsam_hf.training.runs import TaskOptions, loader_of, start_run, train


@dataclass(kw_only=True)
class Arguments(TaskOptions):
    """Every knob. The defaults are the paper's where it names a value (section 4.1), MAE's where it does not."""

    dataset: str = field(metadata={"help": "folder with a folder for each split, or a data set of the Hub"})
    model: str | None = field(default=None, metadata={"help": "folder or Hub id of any checkpoint with an encoder"})
    variant: str | None = field(default=None, metadata={"help": "start from noise instead: tiny, small or base"})
    train_split: str = field(default="train", metadata={"help": "of the data set"})
    test_split: str = field(default="validation", metadata={"help": "of the data set"})
    image_column: str = field(default="image", metadata={"help": "of a data set of the Hub, with the pictures"})
    label_column: str = field(default="label", metadata={"help": "of a data set of the Hub, with the classes"})
    image_size: int = field(default=224, metadata={"help": "side of the square that is looked at"})
    pooling: str = field(default="mean", metadata={"help": "mean of the patches, or class_token"})
    drop_path: float = field(default=0.1, metadata={"help": "chance that the last layer is skipped; MAE's"})
    smallest_area: float = field(default=0.08, metadata={"help": "least share of a picture that a crop covers"})
    flip: float = field(default=0.5, metadata={"help": "chance of a mirror image"})
    changes: int = field(default=2, metadata={"help": "RandAugment's changes of a picture"})
    magnitude: float = field(default=9.0, metadata={"help": "RandAugment's strength, 0 to 10"})
    label_smoothing: float = field(default=0.1, metadata={"help": "share of a label given to all classes"})
    mixup: float = field(default=0.8, metadata={"help": "alpha of the ratio in which pictures are mixed; 0: none"})
    total_batch: int = field(default=1024, metadata={"help": "pictures a weight update, all processes together"})
    batch_size: int = field(default=32, metadata={"help": "pictures a process takes at once"})
    epochs: float = field(default=100, metadata={"help": "times that all pictures are seen"})
    warmup_epochs: float | None = field(
        default=None,
        metadata={"help": "of them, linear climb of the learning rate; default: 5, or a tenth of --max_steps"},
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "highest learning rate"})
    layer_decay: float | None = field(
        default=None, metadata={"help": "learning rate left a layer further down; default: 0.75, but 1 for tiny"}
    )
    weight_decay: float = field(default=0.05, metadata={"help": "of layers' weights"})

    def __post_init__(self) -> None:
        if (self.model is None) == (self.variant is None):
            raise ValueError("give either --model or --variant, got " + ("both" if self.model else "neither"))
        if self.variant is not None and self.variant not in VARIANTS:
            raise ValueError(f"--variant must be one of {', '.join(VARIANTS)}, got {self.variant!r}")


def build_model(args: Arguments, names: list[str]) -> EfficientSamForImageClassification:
    """The classifier, its encoder from the checkpoint."""
    fields = {
        "id2label": dict(enumerate(names)),
        "label2id": {name: number for number, name in enumerate(names)},
        "drop_path_rate": args.drop_path,
        "pooling": args.pooling,
    }
    if args.model is not None:
        return load_encoder_model(EfficientSamForImageClassification, args.model, **fields)
    return EfficientSamForImageClassification(EfficientSamVisionConfig(**VARIANTS[args.variant], **fields))


def build_optimizer(args: Arguments, model: EfficientSamForImageClassification) -> torch.optim.Optimizer:
    """AdamW, the lower layers slower."""
    layers, decay = model.config.num_hidden_layers, args.layer_decay
    if decay is None:
        decay = 1.0 if model.config.hidden_size <= VARIANTS["tiny"]["hidden_size"] else 0.75
    shares = encoder_shares(layers, layer_decay=decay, prefix="vision_encoder.")
    groups = parameter_groups(model, args.weight_decay, shares)
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.999))


@torch.no_grad()
def evaluate(model: torch.nn.Module, loader: DataLoader, accelerator: Accelerator) -> dict[str, float]:
    """Accuracy over the pictures of all processes."""
    model.eval()
    gathered = []
    for batch in loader:
        logits = model(pixel_values=batch["pixel_values"]).logits
        gathered.append(accelerator.gather_for_metrics((logits.float(), batch["labels"])))
    scores, labels = (torch.cat(part) for part in zip(*gathered, strict=True))
    return top_accuracy(scores, labels)


def main(args: Arguments) -> None:
    """Build, train, save."""
    accelerator = start_run(args, "classification")
    columns = {"image": args.image_column, "label": args.label_column}
    with accelerator.main_process_first():
        items = open_classified(args.dataset, args.train_split, **columns)
        held_out = open_classified(args.dataset, args.test_split, items.names, **columns)
    classes, processor = len(items.names), centre_crop_processor(args.image_size)
    total = steps_of(args.epochs, len(items), args.total_batch) if args.max_steps is None else args.max_steps
    warmup = warmup_steps(args.warmup_epochs, 5, args.max_steps, len(items), args.total_batch)
    model = build_model(args, items.names).train()
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    accelerator.print(f"{len(items)} pictures of {classes} classes, {len(held_out)} held out", flush=True)
    crop = RandomResizedCrop(args.smallest_area, flip=args.flip)
    maker = TrainingCrop(args.image_size, crop, RandAugment(args.changes, args.magnitude))
    test = accelerator.prepare(loader_of(args, held_out, CollateForTest(processor)))
    trained = train(
        accelerator,
        args,
        model,
        build_optimizer(args, model),
        lambda done: loader_of(args, EpochSamples(items, maker, total * args.total_batch, args.seed, done)),
        total=total,
        inputs=partial(classification_inputs, classes=classes, smoothing=args.label_smoothing, mixup=args.mixup),
        rate=partial(warmup_cosine, peak=args.learning_rate, warmup=warmup, total=total),
        evaluate=partial(evaluate, loader=test, accelerator=accelerator),
    )
    if trained is not None:
        folder = Path(args.output_dir) / "model"
        card = (
            f"---\npipeline_tag: image-classification\n---\n\n# {args.push_to_hub or Path(args.output_dir).name}\n\n"
        )
        card += f"An EfficientSAM image encoder, fine-tuned to tell {classes} classes."
        save_for_hub(trained, processor, folder, card, overwrite=True)
        print(f"model in {folder}")
        if args.push_to_hub:
            print(push_to_hub(trained, processor, args.push_to_hub, card))


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
