"""The field's other models as transformers has them, with random weights: what the benchmarks compare with."""

from collections.abc import Callable
from typing import Any

from transformers import (
    EdgeTamConfig,
    EdgeTamModel,
    EdgeTamVisionConfig,
    Sam2Config,
    Sam2Model,
    SamConfig,
    SamModel,
    TimmWrapperConfig,
)

# transformers' defaults are ViT-B's; these are what ViT-H changes.
HUGE = {
    "hidden_size": 1280,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "global_attn_indexes": [7, 15, 23, 31],
    "mlp_dim": 5120,
}


def edge_tam() -> EdgeTamModel:
    """Its encoder is timm's, which wants a torchvision that can be imported; named, its config needs no Hub."""
    backbone = TimmWrapperConfig(
        architecture="repvit_m1", model_args={"in_chans": 3, "features_only": True, "out_indices": [0, 1, 2, 3]}
    )
    return EdgeTamModel(EdgeTamConfig(vision_config=EdgeTamVisionConfig(backbone_config=backbone)))


SAM, SAM2 = "SamModel ViT-B", "Sam2Model Hiera-T"
PEERS: dict[str, Callable[[], Any]] = {
    SAM: lambda: SamModel(SamConfig()),
    "SamModel ViT-H": lambda: SamModel(SamConfig(vision_config=HUGE)),
    SAM2: lambda: Sam2Model(Sam2Config()),
    "EdgeTamModel": edge_tam,
}
