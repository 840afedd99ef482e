"""New inputs for trained weights, which answer the old ones as before until they are trained."""

from copy import deepcopy
from typing import Any

import torch

from ..configuration_efficientsam import EfficientSamConfig
from ..modeling_efficientsam import EfficientSamModel, EfficientSamPromptEncoder


def with_details(config: EfficientSamConfig) -> EfficientSamConfig:
    """The config of a model whose stem also hands its details to the decoder.

    Weights of the given config load into such a model and give the same masks: what is missing begins as nothing.

    Raises:
        ValueError: if the model has no stem with features at strides 8 and 4.
    """
    fields = config.to_dict()
    fields["vision_config"]["detail_channels"] = list(config.mask_decoder_config.upscaling_channels)
    return EfficientSamConfig.from_dict(fields)


def extend_prompts(
    model: EfficientSamModel,
    *,
    negative_points: bool = False,
    mask_prompts: bool = False,
    max_prompt_points: int | None = None,
    seed: int = 0,
) -> list[str]:
    """Give a model, in place, what its prompts lack: the released weights have none of these.

    Only parameters are added, and whatever could be asked before gets the same answer. Background clicks begin as the
    nothing that label 0 meant, mask prompts as the nothing of no mask. Shorter prompts stay filled up to the slots
    that they were trained with (`padded_prompt_points`). A processor has to be told, too: see
    `EfficientSamProcessor.extended`.

    Args:
        model: Any, trained or not.
        negative_points: Background clicks; a model that has them keeps its own.
        mask_prompts: Earlier logits as a prompt; a model that has them keeps its own.
        max_prompt_points: Slots of a prompt, no fewer than it has; None leaves them.
        seed: Start of the convolutions that read mask prompts.

    Returns:
        Names of the new parameters, all of them trainable.

    Raises:
        ValueError: if there would be fewer slots.
    """
    config: Any = deepcopy(model.config.prompt_encoder_config)
    slots = max_prompt_points or config.max_prompt_points
    if slots < config.max_prompt_points:
        raise ValueError(f"max_prompt_points must be {config.max_prompt_points} or more, got {slots}")
    if slots > config.max_prompt_points:
        config.padded_prompt_points, config.max_prompt_points = config.filled_slots, slots
    config.negative_points = config.negative_points or negative_points
    config.mask_prompts = config.mask_prompts or mask_prompts
    old = model.prompt_encoder
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        new = EfficientSamPromptEncoder(config)
    added = new.load_state_dict(old.state_dict(), strict=False).missing_keys
    parameters = dict(new.named_parameters())
    with torch.no_grad():
        for name in {"background", "no_mask", "mask_embedding.conv3.weight", "mask_embedding.conv3.bias"} & {*added}:
            parameters[name].zero_()
    for name, parameter in old.named_parameters():
        parameters[name].requires_grad_(parameter.requires_grad)
    model.prompt_encoder = new.to(old.no_point.device, old.no_point.dtype).train(old.training)
    model.config.prompt_encoder_config = config
    return [f"prompt_encoder.{name}" for name in added]
