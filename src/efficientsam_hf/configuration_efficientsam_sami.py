"""Configuration of EfficientSAM's pretraining: SAMI, and MAE as its baseline."""

from typing import ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from .configuration_efficientsam import EfficientSamVisionConfig, check_heads


@strict
class EfficientSamSamiDecoderConfig(PreTrainedConfig):
    """The decoder of pretraining, thrown away after it. The defaults are the paper's, or MAE's where it says nothing.

    Args:
        attention: "cross": the hidden patches alone are decoded, looking at the visible ones and at each other.
            "self": all patches go through the decoder, as in MAE.
        num_attention_heads: Not in the paper; MAE's.
    """

    model_type = "efficientsam_sami_decoder"
    base_config_key = "decoder_config"

    attention: Literal["cross", "self"] = "cross"
    hidden_size: int = 512
    num_hidden_layers: int = 8
    num_attention_heads: int = 16
    mlp_ratio: float | int = 4.0
    qkv_bias: bool = True
    hidden_act: str = "gelu"
    attention_dropout: float | int = 0.0
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        check_heads(self.hidden_size, self.num_attention_heads)
        super().__post_init__(**kwargs)

    @property
    def mlp_dim(self) -> int:
        """Width of the hidden layer of the layers' MLPs."""
        return int(self.hidden_size * self.mlp_ratio)


@strict
class EfficientSamSamiConfig(PreTrainedConfig):
    """Masked pretraining of the image encoder: SAMI, and MAE as its baseline (see `MAE_BASELINE`).

    Args:
        vision_config: The encoder to pretrain; pictures have sides of its `pretrain_image_size`.
        decoder_config: What guesses the hidden patches.
        mask_ratio: Share of the patches that the encoder does not see.
        target: "features" of a teacher, or "pixels" of the patches.
        target_channels: Channels of the teacher's features: 256 after the neck of SAM, 1280 before ViT-H's.
        normalize_targets: Give each patch's target mean 0 and variance 1 over its channels.
        loss: "mse" or "cosine" (one minus the cosine between prediction and target of a patch).
        loss_on_visible: Whether visible patches count, too, as in the paper; in MAE they do not.

    Raises:
        ValueError: if a number is out of its range.
    """

    model_type = "efficientsam_sami"
    # transformers 5.17 finds the parts by the first name, 5.23 by the second.
    sub_configs: ClassVar[dict] = {
        "vision_config": EfficientSamVisionConfig,
        "decoder_config": EfficientSamSamiDecoderConfig,
    }
    sub_configs_defaults: ClassVar[dict] = dict(sub_configs)

    vision_config: dict | PreTrainedConfig | None = None
    decoder_config: dict | PreTrainedConfig | None = None
    mask_ratio: float = 0.75
    target: Literal["features", "pixels"] = "features"
    target_channels: int = 256
    normalize_targets: bool = False
    loss: Literal["mse", "cosine"] = "mse"
    loss_on_visible: bool = True
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        for name, part in self.sub_configs.items():
            given = getattr(self, name)
            if given is None or isinstance(given, dict):
                setattr(self, name, part(**(given or {})))
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"mask_ratio must be between 0 and 1, got {self.mask_ratio}")
        for name in self.sub_configs:
            width = getattr(self, name).hidden_size
            if width % 4:
                raise ValueError(f"{name}.hidden_size must be a multiple of 4 (sines and cosines), got {width}")
        super().__post_init__(**kwargs)

    @property
    def prediction_channels(self) -> int:
        """Numbers predicted for a patch."""
        if self.target == "features":
            return self.target_channels
        return self.vision_config.num_channels * self.vision_config.patch_size**2


#: The fields that make MAE of SAMI (He et al., 2022): what the paper compares itself with.
MAE_BASELINE = {
    "target": "pixels",
    "normalize_targets": True,
    "loss_on_visible": False,
    "decoder_config": {"attention": "self"},
}

__all__ = ["MAE_BASELINE", "EfficientSamSamiConfig", "EfficientSamSamiDecoderConfig"]
