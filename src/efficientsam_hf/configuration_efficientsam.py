"""Configuration of EfficientSAM: image encoder, prompt encoder, mask decoder, the whole."""

import math
from typing import ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig

# Names of the maps of the simple feature pyramid, and how many pixels a cell of each is wide.
PYRAMID_STRIDES = {"stride4": 4, "stride8": 8, "stride16": 16, "stride32": 32}


def check_heads(hidden_size: int, heads: int) -> None:
    """Refuse heads that do not share the channels evenly, since others would be made than were asked for."""
    if heads < 1 or hidden_size % heads:
        raise ValueError(f"num_attention_heads must divide hidden_size {hidden_size}, got {heads}")


@strict
class EfficientSamVisionConfig(BackboneConfigMixin, PreTrainedConfig):
    """The plain ViT that sees the picture. The defaults are EfficientSAM-Ti's.

    Args:
        image_size: Side in pixels of the square that pictures are stretched to.
        pretrain_image_size: Side in pixels that the stored position table belongs to; other grids get it interpolated.
        output_channels: Channels of the image embeddings; the width of the prompt encoder and the mask decoder.
        stem_stages: Inverted residual blocks that read the picture in place of the patch embedding; the released
            weights have none. A row for each run of equal blocks: kernel, stride of the first, expansion, channels,
            repeats, dilation. Before them is a 3 x 3 convolution of stride 2 with `stem_channels`.
        stem_channels: Channels of the stem's first convolution.
        stem_act: Activation of the stem.
        detail_channels: Channels of the stem's features at strides 8 and 4 that are handed on to the mask decoder;
            its `upscaling_channels`. The released weights have none.
        window_size: Side in patches of the attention windows; 0 means that every layer sees the whole picture.
        global_attention_layers: Layers that see the whole picture although `window_size` is set.
        drop_path_rate: Chance in training that the last layer is skipped for a picture; it grows evenly from 0.
        pyramid_channels: Channels of each map of a backbone's simple feature pyramid.
        pooling: What an image classifier reads: the "mean" of all patches, or a "class_token" that sees them.
        out_features: Names out of `stage_names` that a backbone gives (or `out_indices`); the last layer's if None.
    """

    model_type = "efficientsam_vision_model"
    base_config_key = "vision_config"

    image_size: int = 1024
    pretrain_image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    hidden_size: int = 192
    num_hidden_layers: int = 12
    num_attention_heads: int = 3
    mlp_ratio: float | int = 4.0
    qkv_bias: bool = True
    output_channels: int = 256
    stem_stages: list[list[int]] | tuple[tuple[int, ...], ...] = ()
    stem_channels: int = 32
    stem_act: str = "relu6"
    detail_channels: list[int] | tuple[int, ...] = ()
    window_size: int = 0
    global_attention_layers: list[int] | tuple[int, ...] = ()
    hidden_act: str = "gelu"
    attention_dropout: float | int = 0.0
    drop_path_rate: float | int = 0.0
    pyramid_channels: int = 256
    pooling: Literal["mean", "class_token"] = "mean"
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        check_heads(self.hidden_size, self.num_attention_heads)
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate must be at least 0 and below 1, got {self.drop_path_rate}")
        if self.window_size < 0 or self.pyramid_channels < 1:
            raise ValueError(
                "window_size must be at least 0 and pyramid_channels at least 1, "
                f"got {self.window_size} and {self.pyramid_channels}"
            )
        if any(len(row) != 6 for row in self.stem_stages):
            raise ValueError(
                "a row of stem_stages is kernel, stride, expansion, channels, repeats, dilation; "
                f"got {[list(row) for row in self.stem_stages]}"
            )
        stride = 2 * math.prod(row[1] for row in self.stem_stages)
        if self.stem_stages and stride != self.patch_size:
            raise ValueError(f"the stem must shrink the picture by patch_size {self.patch_size}, got {stride}")
        out_features, out_indices = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        if out_features is not None or out_indices is not None:
            self.set_output_features_output_indices(out_features, out_indices)
        strides = {
            2 * math.prod(row[1] for row in self.stem_stages[: end + 1]) for end in range(len(self.stem_stages))
        }
        if self.detail_channels and not (strides >= {16, 8, 4} and len(self.detail_channels) == 2):
            raise ValueError(
                "detail_channels are two, of the features at strides 8 and 4 of a stem that ends at 16; "
                f"got {list(self.detail_channels)} for a stem of strides {sorted(strides)}"
            )
        super().__post_init__(**kwargs)

    def set_output_features_output_indices(self, out_features: list | None, out_indices: list | None) -> None:
        """As transformers', with negative numbers counted from the last layer's output.

        Raises:
            ValueError: for one that lies before the first.
        """
        first = -self.num_hidden_layers - 1
        if out_indices is not None:
            if min(out_indices, default=0) < first:
                raise ValueError(f"out_indices wants {first} or more, found {min(out_indices)}")
            out_indices = [index - first if index < 0 else index for index in out_indices]
        super().set_output_features_output_indices(out_features, out_indices)

    @property
    def stage_names(self) -> list[str]:
        """All that a backbone can give: the input of the first layer, the output of each, the neck's, the pyramid."""
        layers = [f"stage{number}" for number in range(1, self.num_hidden_layers + 1)]
        return ["stem", *layers, "neck", *PYRAMID_STRIDES]

    @property
    def mlp_dim(self) -> int:
        """Width of the hidden layer of the layers' MLPs."""
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def embedding_channels(self) -> int:
        """Channels of the image embeddings: the neck's, then those of the details, 4 and 16 to a cell."""
        coarse, fine = self.detail_channels or (0, 0)
        return self.output_channels + 4 * coarse + 16 * fine

    @property
    def position_grid_size(self) -> int:
        """Side in patches of the stored position table: 14 for the released weights."""
        return self.pretrain_image_size // self.patch_size


@strict
class EfficientSamPromptEncoderConfig(PreTrainedConfig):
    """How points, boxes and masks become tokens. The defaults say what the released weights were taught.

    Args:
        max_prompt_points: Slots of a prompt; a point takes one, a box two, the rest hold the trained "no point" token.
        padded_prompt_points: Slots that shorter prompts are filled up to; None is `max_prompt_points`. It is smaller
            in weights that learnt longer prompts later, so that the shorter ones are still answered as before.
        negative_points: Whether background clicks (label 0) were trained. Without it a label 0 has no embedding.
        mask_prompts: Whether earlier mask logits were trained as a prompt.
        mask_input_channels: Width of the convolutions that read a mask prompt.
        position_scale: Standard deviation of the positional encodings' random frequencies when training starts anew;
            a checkpoint brings its own. Smaller makes places easier to find, and close ones harder to tell apart.
    """

    model_type = "efficientsam_prompt_encoder"
    base_config_key = "prompt_encoder_config"

    hidden_size: int = 256
    max_prompt_points: int = 6
    padded_prompt_points: int | None = None
    negative_points: bool = False
    mask_prompts: bool = False
    mask_input_channels: int = 16
    position_scale: float | int = 1.0
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if not 1 <= self.filled_slots <= self.max_prompt_points:
            raise ValueError(
                f"padded_prompt_points must be 1 to max_prompt_points = {self.max_prompt_points}, "
                f"got {self.padded_prompt_points}"
            )
        super().__post_init__(**kwargs)

    @property
    def filled_slots(self) -> int:
        """Slots that the model sees of a prompt that fills fewer."""
        return self.max_prompt_points if self.padded_prompt_points is None else self.padded_prompt_points


@strict
class EfficientSamMaskDecoderConfig(PreTrainedConfig):
    """The two-way transformer that turns prompt tokens and image embeddings into masks.

    Args:
        attention_downsample_rate: Cross-attention works at `hidden_size` divided by this.
        upscaling_channels: Widths of the two transposed convolutions that enlarge the embedding four times.
        num_multimask_outputs: Masks offered for an ambiguous prompt.
        iou_head_depth: Linear layers in the head that predicts each mask's IoU.
        single_mask_token: Whether mask token 0 was trained to answer alone. The released weights' was not, so that
            "a single mask" means the best of `num_multimask_outputs` by predicted IoU.
    """

    model_type = "efficientsam_mask_decoder"
    base_config_key = "mask_decoder_config"

    hidden_size: int = 256
    num_hidden_layers: int = 2
    num_attention_heads: int = 8
    attention_downsample_rate: int = 2
    mlp_dim: int = 2048
    upscaling_channels: list[int] | tuple[int, ...] = (64, 32)
    num_multimask_outputs: int = 3
    iou_head_depth: int = 3
    iou_head_hidden_dim: int = 256
    single_mask_token: bool = False
    hidden_act: str = "gelu"
    attention_dropout: float | int = 0.0
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        check_heads(self.hidden_size, self.num_attention_heads)
        check_heads(self.hidden_size // self.attention_downsample_rate, self.num_attention_heads)
        if self.num_hidden_layers < 1:
            raise ValueError(f"num_hidden_layers must be at least 1, got {self.num_hidden_layers}")
        super().__post_init__(**kwargs)

    @property
    def values_per_cell(self) -> int:
        """About how many numbers exist at one time for a cell of the embedding while a prompt's masks are drawn."""
        width1, width2 = self.upscaling_channels
        return 5 * self.hidden_size + 3 * 4 * width1 + 2 * 16 * width2

    @property
    def num_mask_tokens(self) -> int:
        """The single-mask token and one token for each mask of an ambiguous prompt."""
        return self.num_multimask_outputs + 1


@strict
class EfficientSamConfig(PreTrainedConfig):
    """The whole model; each part may be given as a config, a dict of its fields, or left out for EfficientSAM-Ti's.

    Args:
        vision_config: The image encoder.
        prompt_encoder_config: The prompt encoder.
        mask_decoder_config: The mask decoder.
        mask_generation: Options of `segment_everything` that suit these weights, where the caller gives none.
        zoom: How close `segment` looks at an object with these weights, where the caller does not say.
        rank_by_stability: The best of a prompt's masks is the one with the highest predicted IoU times stability; by
            predicted IoU alone, as in the official code, if not.

    Raises:
        ValueError: if the three parts do not have one embedding width.

    Example:
        config = EfficientSamConfig(vision_config=VARIANTS["small"])
    """

    model_type = "efficientsam"
    # transformers 5.17 finds the parts by the first name, 5.23 by the second.
    sub_configs: ClassVar[dict] = {
        "vision_config": EfficientSamVisionConfig,
        "prompt_encoder_config": EfficientSamPromptEncoderConfig,
        "mask_decoder_config": EfficientSamMaskDecoderConfig,
    }
    sub_configs_defaults: ClassVar[dict] = dict(sub_configs)
    # What transformers' Trainer would otherwise collect of every evaluated picture.
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["image_embeddings"]

    vision_config: dict | PreTrainedConfig | None = None
    prompt_encoder_config: dict | PreTrainedConfig | None = None
    mask_decoder_config: dict | PreTrainedConfig | None = None
    mask_generation: dict | None = None
    zoom: float | int | None = None
    rank_by_stability: bool = False

    def __post_init__(self, **kwargs):
        for name, part in self.sub_configs.items():
            given = getattr(self, name)
            if given is None or isinstance(given, dict):
                setattr(self, name, part(**(given or {})))
        widths = (
            self.vision_config.output_channels,
            self.prompt_encoder_config.hidden_size,
            self.mask_decoder_config.hidden_size,
        )
        if len(set(widths)) > 1:
            raise ValueError(
                "vision_config.output_channels, prompt_encoder_config.hidden_size and mask_decoder_config.hidden_size "
                f"must be equal, got {widths}"
            )
        side, patch = self.vision_config.image_size, self.vision_config.patch_size
        if side < 1 or side % patch:
            raise ValueError(f"image_size must be a multiple of patch_size {patch}, got {side}")
        if self.zoom and not 1 <= self.zoom < math.inf:
            raise ValueError(f"zoom must be 0 or a number from 1 on, got {self.zoom}")
        details, wanted = self.vision_config.detail_channels, self.mask_decoder_config.upscaling_channels
        if details and list(details) != list(wanted):
            raise ValueError(
                "vision_config.detail_channels must be mask_decoder_config.upscaling_channels "
                f"{list(wanted)}, got {list(details)}"
            )
        super().__post_init__(**kwargs)


#: The encoder's fields that tell one published size from another (Xiong et al., section 4.1); Ti and S were released.
VARIANTS = {
    "tiny": {"hidden_size": 192, "num_attention_heads": 3},
    "small": {"hidden_size": 384, "num_attention_heads": 6},
    "base": {"hidden_size": 768, "num_attention_heads": 12},
}

__all__ = [
    "VARIANTS",
    "EfficientSamConfig",
    "EfficientSamMaskDecoderConfig",
    "EfficientSamPromptEncoderConfig",
    "EfficientSamVisionConfig",
]
