"""Fine-tune a pretrained encoder for instance segmentation on COCO: the paper's Table 2.

With Mask R-CNN over ViTDet's simple feature pyramid, as in the paper, where torchvision is installed; with Mask2Former
of transformers anywhere. From COCO's JSON beside a folder of pictures:

    accelerate launch examples/finetune_detection.py --model run/model --output_dir runs/coco \
        --annotations coco/annotations/instances_train2017.json --pictures coco/train2017 \
        --test_annotations coco/annotations/instances_val2017.json --test_pictures coco/val2017
    accelerate launch examples/finetune_detection.py --head mask2former --model run/model --output_dir runs/coco ...

or from a data set of the Hub whose `annotation` is a picture of classes (red) and numbers of instances (green), as in
transformers' own examples, with the classes' names in a file:

    accelerate launch examples/finetune_detection.py --head mask2former --model run/model --output_dir runs/mini \
        --dataset qubvel-hf/ade20k-mini --names names.txt

Launch files for several GPUs lie in examples/accelerate. The same command started again goes on where the last one
stopped. OUTPUT_DIR/model is the trained model: Mask2Former for `pipeline("image-segmentation")` after
`import efficientsam_hf`, Mask R-CNN for `load_mask_rcnn` of efficientsam_hf.training.mask_rcnn.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import HfArgumentParser, Mask2FormerImageProcessorPil

from efficientsam_hf.data.coco import read_dataset
from efficientsam_hf.data.epochs import EpochSamples
from efficientsam_hf.data.instances import CocoInstances, InstanceSample, keep_lists, open_instance_column
from efficientsam_hf.data.scale_jitter import ScaleJitter, WholePicture
from efficientsam_hf.data.semantic import read_names
from efficientsam_hf.evaluation.coco_ap import average_precision, truth_of
from efficientsam_hf.evaluation.mask_sets import predict_instances
from efficientsam_hf.training.classification import normalize_pixels
from efficientsam_hf.training.encoders import backbone_config, find_backbone, trunk_shares, windowed
from efficientsam_hf.training.mask_rcnn import build_mask_rcnn, mask_rcnn_inputs, save_mask_rcnn
from efficientsam_hf.training.mask_sets import build_mask2former, mask2former_inputs
from efficientsam_hf.training.optimization import parameter_groups, warmup_cosine
from efficientsam_hf.training.progress import steps_of, warmup_steps
from efficientsam_hf.training.runs import TaskOptions, loader_of, start_run, train


@dataclass(kw_only=True)
class Arguments(TaskOptions):
    """Every knob. The defaults are the paper's where it names a value (section 4.1), ViTDet's where it does not."""

    model: str = field(metadata={"help": "folder or Hub id of any checkpoint with an encoder"})
    head: str = field(default="mask_rcnn", metadata={"help": "mask_rcnn (wants torchvision) or mask2former"})
    annotations: str | None = field(default=None, metadata={"help": "COCO's JSON to train on"})
    pictures: str | None = field(default=None, metadata={"help": "folder or tar of its pictures"})
    test_annotations: str | None = field(default=None, metadata={"help": "COCO's JSON to evaluate on"})
    test_pictures: str | None = field(default=None, metadata={"help": "folder or tar of its pictures"})
    dataset: str | None = field(default=None, metadata={"help": "a data set of the Hub instead"})
    names: str | None = field(default=None, metadata={"help": "its classes' names, a line each"})
    train_split: str = field(default="train", metadata={"help": "of the data set of the Hub"})
    test_split: str = field(default="validation", metadata={"help": "of the data set of the Hub"})
    image_size: int = field(default=1024, metadata={"help": "side of the square"})
    smallest_scale: float = field(default=0.1, metadata={"help": "pictures are resized from this times that ..."})
    largest_scale: float = field(default=2.0, metadata={"help": "... to this"})
    flip: float = field(default=0.5, metadata={"help": "chance of a mirror image"})
    window_size: int = field(default=14, metadata={"help": "patches along attention's windows; 0: none"})
    drop_path: float = field(default=0.1, metadata={"help": "chance that the last layer is skipped"})
    head_config: str | None = field(
        default=None, metadata={"help": "JSON of fields of a Mask2FormerConfig, or of MaskRcnn"}
    )
    total_batch: int = field(default=64, metadata={"help": "pictures a weight update, all processes together"})
    epochs: float = field(default=100, metadata={"help": "times that all pictures are seen"})
    warmup_epochs: float | None = field(
        default=None,
        metadata={"help": "of them, linear climb of the learning rate; default: 10, or a tenth of --max_steps"},
    )
    learning_rate: float = field(default=2e-4, metadata={"help": "highest learning rate"})
    encoder_rate: float = field(
        default=1.0, metadata={"help": "the pretrained encoder's learning rate, as a share of it"}
    )
    weight_decay: float = field(default=0.1, metadata={"help": "of layers' weights"})

    def __post_init__(self) -> None:
        if self.head not in ("mask_rcnn", "mask2former"):
            raise ValueError(f"--head must be mask_rcnn or mask2former, got {self.head!r}")
        coco = [self.annotations, self.pictures, self.test_annotations, self.test_pictures]
        if (self.dataset is None) != all(coco) or (self.dataset is None) != (self.names is None):
            raise ValueError(
                "give either --annotations, --pictures, --test_annotations and --test_pictures, "
                "or --dataset and --names"
            )


def build_data(args: Arguments) -> tuple[Sequence, Sequence]:
    """Pictures to train on, and pictures held out."""
    if args.dataset is None:
        test = CocoInstances(args.test_annotations, args.test_pictures, with_masks=False)
        return CocoInstances(args.annotations, args.pictures), test
    names = read_names(args.names)
    return tuple(open_instance_column(args.dataset, split, names) for split in (args.train_split, args.test_split))


def build_model(args: Arguments, names: list[str]) -> tuple[torch.nn.Module, Callable]:
    """The head over the checkpoint's encoder, and what makes its inputs of a batch."""
    fields = json.loads(Path(args.head_config).read_text()) if args.head_config else {}
    layers = backbone_config(args.model).num_hidden_layers
    encoder = {"drop_path_rate": args.drop_path, **windowed(layers, args.window_size)}
    if args.head == "mask2former":
        return build_mask2former(args.model, names, encoder, **fields), mask2former_inputs
    return build_mask_rcnn(args.model, names, args.image_size, encoder, **fields), mask_rcnn_inputs


@torch.no_grad()
def evaluate(model: torch.nn.Module, items: Sequence, args: Arguments, accelerator: Accelerator) -> dict[str, float]:
    """COCO's AP of the masks, and of the boxes: the detector's own, or those around Mask2Former's masks.

    Each process looks at its part of the pictures.
    """
    plain, whole = accelerator.unwrap_model(model).eval(), WholePicture(args.image_size)
    rows = []
    for index in range(accelerator.process_index, len(items), accelerator.num_processes):
        picture = items[index]
        prepared = whole(picture.image)
        pixels = normalize_pixels(prepared.pop("pixels")[None].to(accelerator.device))
        with accelerator.autocast():
            rows += predict_instances(plain, pixels, picture.number, items.category_ids, **prepared)
    rows = gather_object(rows)
    truth = read_dataset(args.test_annotations) if args.test_annotations else truth_of(items, items.names)
    figures = {**average_precision(truth, rows), "AP_box": average_precision(truth, rows, "bbox")["AP"]}
    return {name: value for name, value in figures.items() if value is not None}


def main(args: Arguments) -> None:
    """Build, train, save."""
    # A picture without instances gives no gradient to a part of the head.
    accelerator = start_run(args, "detection", find_unused=True)
    with accelerator.main_process_first():
        items, held_out = build_data(args)
    total = steps_of(args.epochs, len(items), args.total_batch) if args.max_steps is None else args.max_steps
    warmup = warmup_steps(args.warmup_epochs, 10, args.max_steps, len(items), args.total_batch)
    model, inputs = build_model(args, items.names)
    model.train()
    if args.gradient_checkpointing:
        find_backbone(model).gradient_checkpointing_enable()
    groups = parameter_groups(model, args.weight_decay, trunk_shares(model, args.encoder_rate))
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.999))
    accelerator.print(f"{len(items)} pictures of {len(items.names)} classes, {len(held_out)} held out", flush=True)
    maker = InstanceSample(ScaleJitter(args.image_size, args.smallest_scale, args.largest_scale, flip=args.flip))
    length = total * args.total_batch
    trained = train(
        accelerator,
        args,
        model,
        optimizer,
        lambda done: loader_of(args, EpochSamples(items, maker, length, args.seed, done), keep_lists),
        total=total,
        inputs=inputs,
        rate=partial(warmup_cosine, peak=args.learning_rate, warmup=warmup, total=total),
        evaluate=partial(evaluate, items=held_out, args=args, accelerator=accelerator),
    )
    if trained is not None:
        save(args, trained, len(items.names))


def save(args: Arguments, trained: torch.nn.Module, classes: int) -> None:
    """The trained model, and the upload."""
    folder = Path(args.output_dir) / "model"
    if args.head == "mask_rcnn":
        save_mask_rcnn(trained, folder, args.push_to_hub)
    else:
        size = {"shortest_edge": args.image_size, "longest_edge": args.image_size}
        for part in (trained, Mask2FormerImageProcessorPil(size=size, ignore_index=255, num_labels=classes)):
            part.save_pretrained(folder)
            if args.push_to_hub:
                part.push_to_hub(args.push_to_hub)
    print(f"model in {folder}")


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
