"""Low-rank adapters (Hu et al., 2022) in the image encoder, through peft: little to train, and to remember."""

from collections.abc import Sequence
from copy import deepcopy

from ..modeling_efficientsam import EfficientSamModel

# The layers of the encoder's blocks. The decoder multiplies its projections' matrices without calling them, so that an
# adapter there would be trained and never heard.
LAYERS = {name: rf"attention\.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")} | {
    "mlp": r"mlp\.layers\.\d+"
}


def add_lora(
    model: EfficientSamModel, rank: int = 8, alpha: int | None = None, layers: Sequence[str] = ("q_proj", "v_proj")
) -> None:
    """Put adapters into the encoder, in place, and freeze the rest of it; prompt encoder and decoder stay as they are.

    An adapter begins as nothing, so that the first answer is the old one.

    Args:
        model: In which the adapters come to lie.
        rank: Of each adapter.
        alpha: The adapter's output is weighed by `alpha / rank`; None is twice the rank.
        layers: Of each block that are adapted, names of `LAYERS`.

    Raises:
        ValueError: if a layer is none of the encoder's.
        ImportError: if peft is not installed.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if not layers or not set(layers) <= set(LAYERS):
        raise ValueError(f"layers must be some of {', '.join(LAYERS)}, got {', '.join(layers) or 'none'}")
    pattern = rf"vision_encoder\.layers\.\d+\.({'|'.join(LAYERS[name] for name in layers)})"
    rest = [
        part
        for name, part in model.named_parameters()
        if part.requires_grad and not name.startswith("vision_encoder.")
    ]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha or 2 * rank, target_modules=pattern), model)
    # peft freezes all that it does not adapt.
    for part in rest:
        part.requires_grad_(True)


def merge_lora(model: EfficientSamModel) -> EfficientSamModel:
    """A copy with the adapters taken into its weights, which no longer needs peft."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            model.set_submodule(name, module.get_base_layer())
    return model
