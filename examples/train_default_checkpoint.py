"""The bundled checkpoint from photos with masks: SAMI pretraining, fine-tuning at growing size, a mean, float16.

    python examples/train_default_checkpoint.py --sources COCO COCO BSDS ANIMALS --output_dir run \
        --stem efficientnet-lite0-57934424.pth --teacher lite0.onnx --teacher_output feat16

Each part is one of the real scripts, examples/pretrain_sami.py or examples/finetune_sa1b.py, with a folder of its own
in OUTPUT_DIR; the mean of what the last two have learnt is the checkpoint. A source that is named twice is drawn twice
as often; every tenth of its photos is held out of all parts of the fine-tuning, for choosing between recipes. The same
command started again goes on where the last one stopped.

OUTPUT_DIR/checkpoint is what could be bundled; benchmarks/default_checkpoint.py --every 10 scores it on what was held
out. Without --teacher there is no pretraining, without --stem the stem starts anew.
"""

import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch.optim.swa_utils import AveragedModel
from transformers import HfArgumentParser

from efficientsam_hf import (
    EfficientSamConfig,
    EfficientSamForPreTraining,
    EfficientSamModel,
    EfficientSamProcessor,
    save_for_hub,
)
from efficientsam_hf.efficientnet import start_from_efficientnet

EXAMPLES = Path(__file__).parent
PATCH = "vision_encoder.embeddings.patch_embedding"
# The stem's first blocks know edges and colours, and the gradients of depthwise filters are slow on a CPU.
FROZEN = (f"{PATCH}.conv.*", f"{PATCH}.blocks.[0-4].*", f"{PATCH}.blocks.*.filter.*")
PRETRAINING_DECODER = {"hidden_size": 192, "num_hidden_layers": 2, "num_attention_heads": 3}
COMMON = (
    "--schedule cosine --weight_decay 0.05 --hold_out 10 --flip 0.5 --color 0.3 --smallest_crop 0.4 --every_iou "
    "--box_chance 0.6 --encoder_rate 0.5 --stem_rate 0.1"
)
WHOLE = (
    "--mask_prompts --answer_chance 0.5 --closer 0.45 --copy_paste 0.35 --objects 0.1 --box_chance 0.5 "
    "--smallest_crop 0.5 --smallest_mask 0.0003 --learning_rate 1e-3 --rounds 3 --ema 0.99"
)
AVERAGED = 2  # so many of the last fine-tunings; their mean is better than either (benchmarks/checkpoint/card.md)


@dataclass(frozen=True)
class Stage:
    """A fine-tuning: its side in pixels (0: the model's own), pasted and drawn masks, and how fast it learns what."""

    name: str
    image_size: int
    options: str
    frozen: tuple[str, ...] = FROZEN


STAGES = [
    Stage("coarse", 256, "--objects 0.25 --masks_per_image 4 --smallest_mask 0.002 --learning_rate 1.5e-3 --rounds 2"),
    Stage(
        "many", 256, "--copy_paste 0.4 --masks_per_image 10 --smallest_mask 0.002 --learning_rate 1.5e-3 --rounds 2"
    ),
    Stage(
        "fine",
        0,
        "--mask_prompts --closer 0.5 --copy_paste 0.35 --masks_per_image 6 --smallest_mask 0.0003 "
        "--learning_rate 8e-4 --rounds 3",
    ),
    # As the bundled checkpoint had them on a GPU, with --batch_size 96.
    Stage("whole", 0, f"{WHOLE} --masks_per_image 8", FROZEN[:1]),
    Stage("again", 0, f"{WHOLE} --masks_per_image 6 --stem_rate 0.2", (*FROZEN[:1], f"{PATCH}.blocks.[01].*")),
]


@dataclass
class Arguments:
    """Every knob; what the stages differ in stands in STAGES."""

    sources: list[str] = field(metadata={"help": "photos with masks, as finetune_sa1b.py takes them"})
    output_dir: str = field(metadata={"help": "a folder for each part, and the checkpoint"})
    pictures: list[str] = field(default_factory=list, metadata={"help": "for pretraining; default: the sources"})
    config: str = field(default=str(EXAMPLES / "configs" / "nano.json"), metadata={"help": "of the model"})
    stem: str | None = field(
        default=None, metadata={"help": "EfficientNet-Lite weights (.pth) to start the stem from"}
    )
    teacher: str | None = field(default=None, metadata={"help": "of the pretraining; none: no pretraining"})
    teacher_output: str | None = field(default=None, metadata={"help": "an ONNX file's output with the features"})
    pretrain_steps: int = field(default=2000, metadata={"help": "weight updates of the pretraining"})
    steps: list[int] = field(
        default_factory=lambda: [3000, 2500, 2500, 700, 700], metadata={"help": "of each fine-tuning"}
    )
    batch_size: int = field(default=8, metadata={"help": "pictures a weight update"})
    launch: str = field(default="--mixed_precision bf16", metadata={"help": "options of `accelerate launch`"})
    more: str = field(default="", metadata={"help": "further options of every part, such as '--workers 4'"})
    seed: int = field(default=0, metadata={"help": "start of all random choices"})

    def __post_init__(self) -> None:
        if len(self.steps) != len(STAGES):
            names = ", ".join(stage.name for stage in STAGES)
            raise ValueError(f"--steps wants a number for each of {names}, got {len(self.steps)}")


def main(args: Arguments) -> None:
    """One part after the other; what is finished is left as it is."""
    room = Path(args.output_dir)
    room.mkdir(parents=True, exist_ok=True)
    pretrained = pretrain(args, room) if args.teacher else None
    models = [begin(args, pretrained, room / "start")]
    for number, (stage, steps) in enumerate(zip(STAGES, args.steps, strict=True), start=1):
        options = [*shlex.split(COMMON), *shlex.split(stage.options), "--sources", *args.sources]
        options += ["--model", str(models[-1]), "--max_steps", str(steps), "--warmup", str(steps // 20)]
        options += ["--freeze", *stage.frozen] if args.stem else []
        options += ["--image_size", str(stage.image_size)] if stage.image_size else []
        models.append(launch(args, "finetune_sa1b.py", room / stage.name, number, options) / "model")
    print(f"checkpoint in {pack(models[-AVERAGED:], room)}")


def launch(args: Arguments, script: str, folder: Path, number: int, options: list[str]) -> Path:
    """Run a script in its folder, unless it is done."""
    if not (folder / "model" / "config.json").is_file():
        given = ["--output_dir", str(folder), "--seed", str(args.seed + number), *shlex.split(args.more)]
        batches = ["--batch_size", str(args.batch_size), "--total_batch", str(args.batch_size)]
        accelerate = [sys.executable, "-m", "accelerate.commands.launch", *shlex.split(args.launch)]
        subprocess.run([*accelerate, str(EXAMPLES / script), *options, *batches, *given], check=True)
    return folder


def pretrain(args: Arguments, room: Path) -> Path:
    """The folder of the pretrained encoder."""
    fields = json.loads(Path(args.config).read_text())
    student = {"vision_config": fields["vision_config"], "decoder_config": PRETRAINING_DECODER}
    (room / "student.json").write_text(json.dumps(student))
    options = ["--config", str(room / "student.json"), "--sources", *dict.fromkeys(args.pictures or args.sources)]
    options += ["--teacher", str(args.teacher), "--max_steps", str(args.pretrain_steps), "--base_rate", "5e-3"]
    for name in ("teacher_output", "stem"):
        options += [f"--{name}", getattr(args, name)] if getattr(args, name) else []
    return launch(args, "pretrain_sami.py", room / "pretrained", 0, options) / "model"


def begin(args: Arguments, pretrained: Path | None, folder: Path) -> Path:
    """The folder of the model to fine-tune: new but for what the stem or the encoder has learnt."""
    if (folder / "config.json").is_file():
        return folder
    torch.manual_seed(args.seed)
    model = EfficientSamModel(EfficientSamConfig(**json.loads(Path(args.config).read_text())))
    if args.stem:
        start_from_efficientnet(model.vision_encoder.embeddings.patch_embedding, args.stem)
    if pretrained:
        EfficientSamForPreTraining.from_pretrained(pretrained).to_efficientsam(model)
    processor = EfficientSamProcessor.from_model_config(model.config)
    processor.image_processor.antialias = True
    save_for_hub(model, processor, folder, overwrite=True)
    return folder


def mean_of(folders: list[Path]) -> EfficientSamModel:
    """The model whose weights are the mean of those in the folders (Wortsman et al., 2022, "model soups")."""
    models = [EfficientSamModel.from_pretrained(folder) for folder in folders]
    mean = AveragedModel(models[0])
    for model in models:
        mean.update_parameters(model)
    return cast(EfficientSamModel, mean.module)


def pack(trained: list[Path], room: Path) -> Path:
    """The folder of the checkpoint: a mean in float16, and without the code that a folder for the Hub carries."""
    model, processor = mean_of(trained), EfficientSamProcessor.from_pretrained(trained[-1])
    save_for_hub(model.half(), processor, room / "half", overwrite=True)
    folder = room / "checkpoint"
    folder.mkdir(exist_ok=True)
    shutil.copyfile(room / "half" / "model.safetensors", folder / "model.safetensors")
    for name in ("config.json", "processor_config.json"):
        config = json.loads((room / "half" / name).read_text())
        del config["auto_map"]
        (folder / name).write_text(json.dumps(config, indent=2) + "\n")
    shutil.rmtree(room / "half")
    return folder


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
