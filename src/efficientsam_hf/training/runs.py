"""What all training of one model by one loss shares: its options, and the way from the first update to the last."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, set_seed
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .checkpoints import Checkpoints
from .progress import LossMeter, batches_per_step
from .updates import Inputs, weight_updates
from .weights import averaged_model, is_shared_out, keep_shares_whole


@dataclass(kw_only=True)
class RunOptions:
    """Options of a run whatever is trained."""

    output_dir: str = field(metadata={"help": "states of the run, and the model at its end"})
    total_batch: int = field(default=16, metadata={"help": "pictures a weight update, all processes together"})
    batch_size: int = field(default=1, metadata={"help": "pictures a process takes at once"})
    max_steps: int | None = field(default=None, metadata={"help": "weight updates, instead of epochs"})
    max_grad_norm: float | None = field(default=None, metadata={"help": "gradients longer than this are cut"})
    ema: float = field(default=0.0, metadata={"help": "decay of the weights' moving average, such as 0.9999; 0: none"})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "less memory, more time"})
    seed: int = field(default=0, metadata={"help": "start of all random choices"})
    workers: int = field(default=0, metadata={"help": "processes that read pictures, for each process that trains"})
    report_to: str = field(default="tensorboard", metadata={"help": "tensorboard, trackio, wandb, all or none"})
    log_every: int = field(default=50, metadata={"help": "weight updates between two reports"})
    save_every: int = field(default=1000, metadata={"help": "weight updates between two states"})
    keep: int = field(default=2, metadata={"help": "states kept"})
    stop_at: int | None = field(default=None, metadata={"help": "stop and save after this update, to go on later"})
    push_to_hub: str | None = field(default=None, metadata={"help": "repository for OUTPUT_DIR/model"})


@dataclass(kw_only=True)
class TaskOptions(RunOptions):
    """Options of a recipe that `train` follows."""

    eval_every: int = field(default=5000, metadata={"help": "weight updates between two evaluations"})


def start_run(options: RunOptions, name: str, find_unused: bool = False, shards: bool = False) -> Accelerator:
    """The accelerator of a run, its trackers started and everything seeded.

    Args:
        options: Of the run.
        name: Under which trackers file it.
        find_unused: Whether some weights get no gradient in some updates, which several processes must know.
        shards: Whether processes may share the weights out (FSDP).

    Raises:
        ValueError: under FSDP, where processes may not.
    """
    accelerator = Accelerator(
        log_with=None if options.report_to == "none" else options.report_to,
        project_dir=options.output_dir,
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=find_unused),
            # Others wait while one process measures (of weights in shards), draws and saves.
            InitProcessGroupKwargs(timeout=timedelta(hours=1)),
        ],
    )
    if shards:
        keep_shares_whole(accelerator)
    elif is_shared_out(accelerator):
        raise ValueError(
            f"{name} trains the whole model in each process, found FSDP: take a launch file without it, as gpu_x8_bf16"
        )
    told = {key: value for key, value in asdict(options).items() if isinstance(value, int | float | str)}
    accelerator.init_trackers(name, told)
    accelerator.gradient_accumulation_steps = batches_per_step(
        options.total_batch, options.batch_size, accelerator.num_processes
    )
    set_seed(options.seed)
    return accelerator


def tell_the_start(accelerator: Accelerator, model: nn.Module, first: int, total: int) -> None:
    """Print what there is to do."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    size, trained = sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained)
    processes, accumulate = accelerator.num_processes, accelerator.gradient_accumulation_steps
    accelerator.print(f"{size:,} parameters, {trained:,} of them trained")
    told = f"{processes} process(es) of {accumulate} batch(es) a step, {first} of {total} steps done"
    accelerator.print(told, flush=True)


def loader_of(options: RunOptions, samples: Dataset, collate: Callable | None = None) -> DataLoader:
    """Batches of samples in their order."""
    return DataLoader(
        samples,
        batch_size=options.batch_size,
        collate_fn=collate,
        num_workers=options.workers,
        pin_memory=torch.cuda.is_available(),
    )


def train(
    accelerator: Accelerator,
    options: TaskOptions,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader_from: Callable[[int], DataLoader],
    *,
    total: int,
    inputs: Inputs,
    rate: Callable[[int], float],
    evaluate: Callable[[nn.Module], dict[str, float]],
) -> nn.Module | None:
    """All weight updates, from the newest state on if there is one; reports, evaluations and states between them.

    Args:
        accelerator: Of the run, see `start_run`.
        options: Of the run.
        model: What is trained, in training mode; gives a mapping with a `loss`.
        optimizer: Of its parameters.
        loader_from: Samples taken before -> the loader of those that follow.
        total: Weight updates in all.
        inputs: See `weight_updates`.
        rate: Updates done -> the learning rate of the next.
        evaluate: The model -> figures; called in all processes.

    Returns:
        The trained model, moving averages in place of its weights if there are any; None but on the main process.
    """
    ema = averaged_model(accelerator, model, options.ema)
    model, optimizer = accelerator.prepare(model, optimizer)
    checkpoints = Checkpoints(accelerator, options.output_dir, keep=options.keep)
    step = first = checkpoints.resume()
    loader = accelerator.prepare(loader_from(first * options.total_batch))
    last = total if options.stop_at is None else min(total, options.stop_at)
    tell_the_start(accelerator, model, first, total)
    updates = weight_updates(
        accelerator, model, optimizer, loader, inputs=inputs, rate=rate, first=first, last=last,
        seed=options.seed, max_grad_norm=options.max_grad_norm,
    )  # fmt: skip
    report = Report(accelerator, options, first, checkpoints)
    for update in tqdm(updates, total=total, initial=first, disable=not accelerator.is_main_process, unit="step"):
        step = update.step
        report.meter.add(update.losses)
        if ema is not None:
            ema.update_parameters(accelerator.unwrap_model(model))
        if step % options.log_every == 0 or step % options.save_every == 0 or step == last:
            report.losses(step, rate(step - 1))
        if step % options.eval_every == 0 and step != last:
            report.figures(step, evaluate(ema.module if ema is not None else model))
            model.train()
        if step % options.save_every == 0 and step != last:
            checkpoints.save(step)
    checkpoints.save(step)
    trained = ema.module if ema is not None else model
    report.figures(step, evaluate(trained))
    accelerator.end_training()
    if not accelerator.is_main_process:
        return None
    accelerator.print(f"{step} of {total} steps done")
    return (trained if ema is not None else accelerator.unwrap_model(model)).cpu().eval()


class Report:
    """What a run says of itself, on the terminal and to its trackers.

    Args:
        accelerator: Of the run.
        options: Of the run.
        first: Weight updates done before.
        checkpoints: Of the run.
        most: See `LossMeter`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        options: RunOptions,
        first: int,
        checkpoints: Checkpoints,
        most: dict[str, float] | None = None,
    ):
        self.accelerator, self.batch = accelerator, options.total_batch
        self.meter, self.step, self.start = LossMeter(accelerator, checkpoints, most), first, time.monotonic()

    def losses(self, step: int, learning_rate: float, note: str = "") -> None:
        """The mean losses and the pictures a second since the last time."""
        speed = (step - self.step) * self.batch / (time.monotonic() - self.start)
        losses, self.step, self.start = self.meter.read(step), step, time.monotonic()
        self.accelerator.log({**losses, "learning_rate": learning_rate, "images_per_second": speed}, step=step)
        told = " ".join(f"{name} {value:.6f}" for name, value in losses.items()) + f" rate {learning_rate:.3g}{note}"
        self.accelerator.print(f"step {step}: {told} ({speed:.1f} images/s)", flush=True)

    def figures(self, step: int, figures: dict[str, Any]) -> None:
        """What an evaluation found; its time does not count as training's."""
        self.accelerator.log(figures, step=step)
        told = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
        self.accelerator.print(f"evaluation after {step}: {told}", flush=True)
        self.start = time.monotonic()
