"""Fine-tune a pretrained encoder for semantic segmentation with Mask2Former: the paper's Table 3.

From a folder in ADE20K's layout (images/training/1.jpg, annotations/training/1.png, .../validation/...), or a data set
of the Hub with the columns `image` and `annotation`; the classes' names come from a file, a line each:

    accelerate launch examples/finetune_semantic_segmentation.py --model run/model --dataset ADEChallengeData2016 \
        --names ADEChallengeData2016/objectInfo150.txt --output_dir runs/ade20k

Launch files for several GPUs lie in examples/accelerate. The same command started again goes on where the last one
stopped. OUTPUT_DIR/model is a Mask2Former of transformers, for `pipeline("image-segmentation")` after
`import efficientsam_hf`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import HfArgumentParser, Mask2FormerImageProcessorPil

from efficientsam_hf.data.epochs import EpochSamples
from efficientsam_hf.data.instances import keep_lists
from efficientsam_hf.data.scale_jitter import ScaleJitter, WholePicture
from efficientsam_hf.data.semantic import SemanticSample, open_semantic, read_names
from efficientsam_hf.evaluation.mask_sets import masks_at_full_size, pixel_classes
from efficientsam_hf.evaluation.semantic import ConfusionMatrix
from efficientsam_hf.training.classification import normalize_pixels
from efficientsam_hf.training.encoders import find_backbone, trunk_shares
from efficientsam_hf.training.mask_sets import build_mask2former, mask2former_inputs
from efficientsam_hf.training.optimization import decay_polynomial, parameter_groups
from efficientsam_hf.training.runs import TaskOptions, loader_of, start_run, train


@dataclass(kw_only=True)
class Arguments(TaskOptions):
    """Every knob. The defaults are the paper's where it names a value (section 4.1), Mask2Former's where not."""

    model: str = field(metadata={"help": "folder or Hub id of any checkpoint with an encoder"})
    dataset: str = field(metadata={"help": "folder in ADE20K's layout, or a data set of the Hub"})
    names: str = field(metadata={"help": "file with the names of the classes, or ADE20K's objectInfo150.txt"})
    train_split: str = field(default="training", metadata={"help": "of the data set"})
    test_split: str = field(default="validation", metadata={"help": "of the data set"})
    zero_is_a_class: bool = field(default=False, metadata={"help": "number 0 is a class, as it is not in ADE20K"})
    image_size: int = field(default=512, metadata={"help": "side of the training square; in tests the short side"})
    smallest_scale: float = field(default=0.5, metadata={"help": "pictures are resized from this times that ..."})
    largest_scale: float = field(default=2.0, metadata={"help": "... to this"})
    flip: float = field(default=0.5, metadata={"help": "chance of a mirror image"})
    color: float = field(default=0.4, metadata={"help": "largest change of brightness, contrast and saturation"})
    drop_path: float = field(default=0.1, metadata={"help": "chance that the last layer is skipped"})
    head_config: str | None = field(default=None, metadata={"help": "JSON of a Mask2FormerConfig's fields"})
    total_batch: int = field(default=16, metadata={"help": "pictures a weight update, all processes together"})
    batch_size: int = field(default=2, metadata={"help": "pictures a process takes at once"})
    max_steps: int = field(default=160_000, metadata={"help": "weight updates"})
    learning_rate: float = field(default=2e-4, metadata={"help": "at the start; falls by a polynomial"})
    encoder_rate: float = field(
        default=0.1, metadata={"help": "the pretrained encoder's learning rate, as a share of it"}
    )
    weight_decay: float = field(default=0.05, metadata={"help": "of layers' weights"})
    max_grad_norm: float | None = field(default=0.01, metadata={"help": "gradients longer than this are cut"})


@torch.no_grad()
def evaluate(model: torch.nn.Module, items: Sequence, size: int, accelerator: Accelerator) -> dict[str, float]:
    """Mean IoU; each process looks at its part of the pictures."""
    plain = accelerator.unwrap_model(model).eval()
    matrix, whole = ConfusionMatrix(len(items.names)), WholePicture(size, by="short")
    for index in range(accelerator.process_index, len(items), accelerator.num_processes):
        picture = items[index]
        prepared = whole(picture.image)
        pixels = normalize_pixels(prepared.pop("pixels")[None].to(accelerator.device))
        with accelerator.autocast():
            outputs = plain(pixel_values=pixels)
        masks = masks_at_full_size(outputs.masks_queries_logits[0], **prepared)
        matrix.add(pixel_classes(outputs.class_queries_logits[0], masks).cpu(), torch.from_numpy(picture.classes))
    matrix.counts = accelerator.reduce(matrix.counts.to(accelerator.device)).cpu()
    return matrix.figures()


def main(args: Arguments) -> None:
    """Build, train, save."""
    # The masks' loss looks at some layers' masks only, so that in some updates some weights get no gradient.
    accelerator = start_run(args, "semantic_segmentation", find_unused=True)
    names = read_names(args.names)
    with accelerator.main_process_first():
        items = open_semantic(args.dataset, args.train_split, names, reduce=not args.zero_is_a_class)
        held_out = open_semantic(args.dataset, args.test_split, names, reduce=not args.zero_is_a_class)
    head = json.loads(Path(args.head_config).read_text()) if args.head_config else {}
    model = build_mask2former(args.model, names, {"drop_path_rate": args.drop_path}, **head).train()
    if args.gradient_checkpointing:
        find_backbone(model).gradient_checkpointing_enable()
    groups = parameter_groups(model, args.weight_decay, trunk_shares(model, args.encoder_rate))
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.999))
    accelerator.print(f"{len(items)} pictures of {len(names)} classes, {len(held_out)} held out", flush=True)
    scales = {"smallest": args.smallest_scale, "largest": args.largest_scale}
    maker = SemanticSample(ScaleJitter(args.image_size, **scales, by="short", flip=args.flip, color=args.color))
    length = args.max_steps * args.total_batch
    trained = train(
        accelerator,
        args,
        model,
        optimizer,
        lambda done: loader_of(args, EpochSamples(items, maker, length, args.seed, done), keep_lists),
        total=args.max_steps,
        inputs=mask2former_inputs,
        rate=partial(decay_polynomial, peak=args.learning_rate, total=args.max_steps),
        evaluate=partial(evaluate, items=held_out, size=args.image_size, accelerator=accelerator),
    )
    if trained is not None:
        folder = Path(args.output_dir) / "model"
        # The longest side is what transformers calls the limit of a picture whose short side is resized.
        size = {"shortest_edge": args.image_size, "longest_edge": 4 * args.image_size}
        processor = Mask2FormerImageProcessorPil(
            size=size, ignore_index=255, do_reduce_labels=not args.zero_is_a_class, num_labels=len(names)
        )
        for part in (trained, processor):
            part.save_pretrained(folder)
            if args.push_to_hub:
                part.push_to_hub(args.push_to_hub)
        print(f"model in {folder}")


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
