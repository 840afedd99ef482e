"""Models for other tasks that start from the encoder of a checkpoint of this package, and say so if it has none."""

import pickle
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..configuration_efficientsam import EfficientSamVisionConfig
from ..modeling_efficientsam_backbone import EfficientSamBackbone, EfficientSamTrunk

Model = TypeVar("Model", bound=PreTrainedModel)


def load_encoder_model(
    model_class: type[Model],
    source: str | Path,
    whole: bool = False,
    dtype: torch.dtype = torch.float32,
    **fields: Any,
) -> Model:
    """An `EfficientSamBackbone` or `EfficientSamForImageClassification` with a checkpoint's weights.

    Args:
        model_class: Which of them.
        source: Folder or Hub id of any model of this package: whole, vision, pretraining's, or of the class itself.
        whole: Whether the head, too, must be in the checkpoint; otherwise it starts anew where it is not.
        dtype: Of the weights; training wants float32 whatever the checkpoint has.
        **fields: Of the config, in place of the checkpoint's.

    Raises:
        ValueError: if the checkpoint lacks weights that the model needs, or has them in other shapes.
        OSError: if there is no such folder or Hub id.
    """
    check_encoder(source)
    try:
        model, report = model_class.from_pretrained(
            source, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **fields
        )
    except (SafetensorError, pickle.UnpicklingError) as fault:
        raise ValueError(f"{source}: its weights cannot be read: {str(fault).splitlines()[0]}") from fault
    mismatched = {name for name, *_ in report["mismatched_keys"]}
    lacking = sorted(
        name for name in {*report["missing_keys"], *mismatched} if whole or name.startswith("vision_encoder.")
    )
    if lacking:
        part = lacking[0].split(".")[0] if not lacking[0].startswith("vision_encoder.neck") else "neck"
        raise ValueError(
            f"{source} lacks the {part} that {model_class.__name__} needs: {len(lacking)} weights are missing or of "
            f"another shape, as {lacking[0]}"
        )
    return model


def check_encoder(source: str | Path) -> None:
    """Raise ValueError if a checkpoint's config has no encoder of this package, OSError if there is none."""
    fields = PreTrainedConfig.get_config_dict(source)[0]
    found = fields.get(EfficientSamVisionConfig.base_config_key, fields).get("model_type")
    if found != EfficientSamVisionConfig.model_type:
        raise ValueError(f"{source} holds a model of type {found!r}: wanted one with an encoder of EfficientSAM")


def backbone_config(source: str | Path, **fields: Any) -> EfficientSamVisionConfig:
    """The encoder's config out of any checkpoint of this package, for a head's `backbone_config`.

    Raises:
        ValueError: if the checkpoint has no encoder of this package.
        OSError: if there is no such folder or Hub id.
    """
    check_encoder(source)
    config = EfficientSamVisionConfig.from_pretrained(source, **fields)
    # What the checkpoint's weights were stored in says nothing about what a head trains in.
    config.dtype = None
    return config


def find_backbone(head: nn.Module) -> EfficientSamBackbone:
    """The backbone inside any head.

    Raises:
        ValueError: if there is none.
    """
    found = next((module for module in head.modules() if isinstance(module, EfficientSamBackbone)), None)
    if found is None:
        raise ValueError(f"wanted an EfficientSamBackbone inside the head, found none in {type(head).__name__}")
    return found


def load_backbone(head: nn.Module, source: str | Path) -> EfficientSamBackbone:
    """Give the backbone inside any head the encoder of a checkpoint; the head itself stays.

    Raises:
        ValueError: if there is no `EfficientSamBackbone` in it, or the checkpoint lacks its encoder.
    """
    found = find_backbone(head)
    donor = load_encoder_model(
        EfficientSamBackbone, source, out_features=["neck" if "neck" in found.out_features else "stem"]
    )
    own, other = found.vision_encoder.state_dict(), donor.vision_encoder.state_dict()
    for name, tensor in own.items():
        if name not in other or other[name].shape != tensor.shape:
            given = tuple(other[name].shape) if name in other else None
            raise ValueError(f"{source} has another encoder: wanted {name} {tuple(tensor.shape)}, found {given}")
    found.vision_encoder.load_state_dict({name: other[name] for name in own})
    return found


def windowed(layers: int, window_size: int = 14, rounds: int = 4) -> dict[str, Any]:
    """Fields of a config with ViTDet's windows: the last layer of each of `rounds` even parts sees the whole picture.

    Args:
        layers: How many the encoder has.
        window_size: Side in patches; 0 for no windows.
        rounds: Layers that see everything.
    """
    ends = sorted({-(-layers * number // rounds) - 1 for number in range(1, rounds + 1)})
    return {"window_size": window_size, "global_attention_layers": ends if window_size else []}


def trunk_shares(model: nn.Module, share: float) -> dict[str, float]:
    """Rate shares for `parameter_groups`: the pretrained encoder learns at a share of the rate, its pyramid at all."""
    return {f"{name}.": share for name, module in model.named_modules() if isinstance(module, EfficientSamTrunk)}
