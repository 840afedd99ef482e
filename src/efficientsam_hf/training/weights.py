"""The model that a run has trained so far, wherever its weights are: behind a wrapper, averaged, or in shards."""

from copy import deepcopy
from typing import cast

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..modeling_efficientsam import EfficientSamModel


def is_shared_out(accelerator: Accelerator) -> bool:
    """Whether each process has a share of the weights (FSDP) rather than all of them."""
    return accelerator.distributed_type == DistributedType.FSDP


def keep_shares_whole(accelerator: Accelerator) -> None:
    """Leave the halves of mixed precision to autocast, as under DDP; call the model in `accelerator.autocast()`.

    FSDP's own policy would round the sums of gradients and the losses to halves, too.
    """
    if is_shared_out(accelerator):
        accelerator.state.fsdp_plugin.mixed_precision_policy = None


def twin_for_shards(accelerator: Accelerator, model: EfficientSamModel) -> EfficientSamModel | None:
    """A copy that takes the whole weights where processes share them out; None where each has all of them."""
    return deepcopy(model).to(accelerator.device) if is_shared_out(accelerator) else None


def trained_model(
    accelerator: Accelerator,
    task: nn.Module,
    ema: AveragedModel | None = None,
    twin: EfficientSamModel | None = None,
) -> EfficientSamModel:
    """The model with its weights of now, on the main process: call it on all of them.

    Args:
        accelerator: Which prepared the task.
        task: An `InteractiveSegmentation`, prepared.
        ema: The moving average of its model, which is then meant.
        twin: As `twin_for_shards` gives it.
    """
    if ema is not None:
        return cast(EfficientSamModel, ema.module)
    if twin is None:
        return accelerator.unwrap_model(task).model
    # Whole on the main process alone; the others have helped to gather it.
    state = accelerator.get_state_dict(task)
    if accelerator.is_main_process:
        twin.load_state_dict({name.removeprefix("model."): value for name, value in state.items()})
    return twin


def averaged_model(accelerator: Accelerator, model: nn.Module, decay: float) -> AveragedModel | None:
    """The exponential moving average of a model that is not yet prepared; None where `decay` is 0.

    Raises:
        ValueError: if processes share the weights out, which the average does not follow.
    """
    if not decay:
        return None
    if is_shared_out(accelerator):
        raise ValueError(
            f"--ema {decay} keeps all weights in one place, and FSDP divides them: give one of both, got both"
        )
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)).to(accelerator.device)
    accelerator.register_for_checkpointing(ema)
    return ema
