"""The image encoder without its neck, for other tasks: feature maps for any head, and classes of whole pictures.

B pictures of H x W pixels, h x w their grid of patches, C the encoder's channels.

The pyramid is ViTDet's: Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection", ECCV 2022.
"""

import math
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_outputs import BackboneOutput, ImageClassifierOutput
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_efficientsam import PYRAMID_STRIDES, EfficientSamVisionConfig
from .modeling_efficientsam import (
    EfficientSamAttention,
    EfficientSamLayerNorm2d,
    EfficientSamPreTrainedModel,
    EfficientSamVisionEmbeddings,
    EfficientSamVisionLayer,
    EfficientSamVisionNeck,
    vision_layers,
)

# What other checkpoints of this package have besides the encoder.
OTHER_PARTS = [
    r"^shared_image_embedding",
    r"^vision_encoder\.embeddings\.patch_embedding\.details",
    r"^prompt_encoder",
    r"^mask_decoder",
    r"^decoder\.",
    r"^pyramid\.",
    r"^layer_norm\.",
    r"^classifier\.",
    r"^class_token$",
    r"^vision_encoder\.neck\.",
]


@dataclass
class EfficientSamTrunkOutput(ModelOutput):
    """What the encoder gives before its neck.

    Args:
        last_hidden_state: (B, h, w, C); with a class token (B, 1, 1 + h * w, C), the token first.
        hidden_states: Input of the first layer and output of each, in the same shape, if asked for.
        attentions: Attention weights of each layer, if asked for; only the eager implementation has them.
    """

    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class EfficientSamTrunk(EfficientSamPreTrainedModel):
    """The image encoder up to its last layer, its weights named as in all models of this package.

    Args:
        with_neck: Have the neck's weights, too, for whom wants to apply it.
    """

    config: EfficientSamVisionConfig
    _can_record_outputs = {"hidden_states": EfficientSamVisionLayer, "attentions": EfficientSamAttention}

    def __init__(self, config: EfficientSamVisionConfig, with_neck: bool = False):
        super().__init__(config)
        self.embeddings = EfficientSamVisionEmbeddings(config, with_details=False)
        self.layers = vision_layers(config)
        if with_neck:
            self.neck = EfficientSamVisionNeck(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values: Tensor, class_token: Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> EfficientSamTrunkOutput:
        """Pictures (B, 3, H, W), H and W multiples of the patch size, and perhaps a token (1, 1, C) that joins in."""
        hidden_states = self.embeddings(pixel_values)[0]
        if class_token is not None:
            patches = hidden_states.flatten(1, 2)
            # The first row of the position table is the token's.
            token = (class_token + self.embeddings.position_embedding[:, :1]).to(patches.dtype)
            # A grid of one row, as the layers want it.
            hidden_states = torch.cat([token.expand(len(patches), -1, -1), patches], dim=1)[:, None]
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        return EfficientSamTrunkOutput(last_hidden_state=hidden_states)


class KeptNames(WeightRenaming):
    """Undoes inside the encoder what a head's own renaming does to all weights; where none did, it finds nothing.

    DETR of transformers reads every `out_proj` of a checkpoint as `o_proj`, its backbone's too, which it then misses.
    """

    __slots__ = ()

    def reverse_transform(self) -> WeightRenaming:
        """What happens on saving: the same, for the names are the checkpoint's already."""
        return self


register_checkpoint_conversion_mapping(
    EfficientSamTrunk.__name__, [KeptNames(r"\.o_proj\.", ".out_proj.")], overwrite=True
)


# --------------------------------------------------------------------------------------------------------------------
# Backbone


class EfficientSamPyramidLevel(nn.Module):
    """One map of the simple feature pyramid: (B, C, h, w) -> (B, pyramid_channels, H / stride, W / stride).

    Transposed convolutions enlarge the last layer's map, the maximum shrinks it; then a 1 x 1 and a 3 x 3 convolution.
    """

    def __init__(self, config: EfficientSamVisionConfig, stride: int):
        super().__init__()
        channels, times = config.hidden_size, math.log2(config.patch_size / stride)
        if not times.is_integer():
            raise ValueError(
                f"a pyramid wants patch_size {stride} times or divided by a power of 2, got {config.patch_size}"
            )
        resize: list[nn.Module] = [nn.MaxPool2d(2 ** int(-times))] if times < 0 else []
        for _ in range(int(times)):
            if resize:
                resize += [EfficientSamLayerNorm2d(channels, eps=config.layer_norm_eps), nn.GELU()]
            resize.append(nn.ConvTranspose2d(channels, channels // 2, kernel_size=2, stride=2))
            channels //= 2
        width = config.pyramid_channels
        self.resize = nn.Sequential(*resize)
        self.conv1 = nn.Conv2d(channels, width, kernel_size=1, bias=False)
        self.layer_norm1 = EfficientSamLayerNorm2d(width, eps=config.layer_norm_eps)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False)
        self.layer_norm2 = EfficientSamLayerNorm2d(width, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = self.layer_norm1(self.conv1(self.resize(hidden_states)))
        return self.layer_norm2(self.conv2(hidden_states))


def pad_to_multiple(pixel_values: Tensor, multiple: int) -> Tensor:
    """(B, C, H, W) -> the same with zeros (the mean colour) below and right, until both sides are multiples."""
    height, width = pixel_values.shape[2:]
    return F.pad(pixel_values, (0, -width % multiple, 0, -height % multiple))


class EfficientSamBackbone(BackboneMixin, EfficientSamPreTrainedModel):
    """Feature maps for any head that takes a backbone of transformers. Loads from any checkpoint of this package.

    `out_features` chooses the maps: `stem` is what the first layer reads, `stageN` what the Nth layer gives, `neck`
    what `EfficientSamVisionModel` gives, `stride4` to `stride32` the simple feature pyramid made of the last layer's.
    Only what is asked for has weights; without `out_features` it is the last layer's map alone.

    Pictures may have any size: zeros are added below and right until both sides are multiples of the patch size, and
    of 32 if `stride32` is asked for. The maps cover the picture with that padding; cell (i, j) of a map of stride s
    is the square of s pixels a side whose corner is at (i * s, j * s).
    """

    config: EfficientSamVisionConfig
    _keys_to_ignore_on_load_unexpected = OTHER_PARTS

    def __init__(self, config: EfficientSamVisionConfig):
        config = copy(config)  # whose maps are chosen here; the caller's goes on without
        if config.out_features is None:
            config.out_indices = [config.num_hidden_layers]
        super().__init__(config)
        layers = [config.hidden_size] * (1 + config.num_hidden_layers)
        self.num_features = [*layers, config.output_channels, *[config.pyramid_channels] * len(PYRAMID_STRIDES)]
        self.vision_encoder = EfficientSamTrunk(config, with_neck="neck" in config.out_features)
        strides = {name: stride for name, stride in PYRAMID_STRIDES.items() if name in config.out_features}
        self.pyramid = nn.ModuleDict({name: EfficientSamPyramidLevel(config, side) for name, side in strides.items()})
        self.multiple = max([config.patch_size, *strides.values()])
        self.post_init()

    @merge_with_config_defaults
    @can_return_tuple
    def forward(  # type: ignore[override]  # transformers' own passes them on as keywords, too
        self, pixel_values: Tensor, **kwargs: Any
    ) -> BackboneOutput:
        """Pictures (B, 3, H, W), normalised, of any size -> `feature_maps`, one (B, channels, h, w) a name.

        `hidden_states`, if asked for, are those of `EfficientSamVisionModel`: (B, h, w, C).
        """
        asked = kwargs.pop("output_hidden_states", None)
        asked = self.config.output_hidden_states if asked is None else asked
        padded = pad_to_multiple(pixel_values, self.multiple)
        outputs = self.vision_encoder(padded, **{**kwargs, "output_hidden_states": True, "return_dict": True})
        maps = tuple(self.feature_map(name, outputs.hidden_states) for name in self.out_features)
        hidden_states = outputs.hidden_states if asked else None
        return BackboneOutput(feature_maps=maps, hidden_states=hidden_states, attentions=outputs.attentions)

    def feature_map(self, name: str, hidden_states: tuple[Tensor, ...]) -> Tensor:
        """One of `stage_names`, (B, channels, h, w), from the input of the first layer and the output of each."""
        if name in self.pyramid:
            return self.pyramid[name](hidden_states[-1].permute(0, 3, 1, 2))
        if name == "neck" and hasattr(self.vision_encoder, "neck"):
            return self.vision_encoder.neck(hidden_states[-1])
        number = self.stage_names.index(name)
        if number >= len(hidden_states):
            raise ValueError(
                f"the backbone was built without {name!r}: name it in out_features when it is made, "
                f"found {', '.join(name for name in self.pyramid) or 'layers only'}"
            )
        return hidden_states[number].permute(0, 3, 1, 2).contiguous()


# --------------------------------------------------------------------------------------------------------------------
# Classification


def check_labels(labels: Tensor, problem: str, num_labels: int) -> None:
    """Labels are class numbers (B,), or a share of each class (B, num_labels); for other problems always the latter.

    Raises:
        ValueError: if they are neither, or a number is outside the range.
    """
    if problem != "single_label_classification":
        if labels.shape[1:] != (num_labels,) and (labels.ndim, num_labels) != (1, 1):
            raise ValueError(f"labels of {problem} must be (B, {num_labels}), got {tuple(labels.shape)}")
    elif labels.is_floating_point():
        if labels.shape[1:] != (num_labels,):
            raise ValueError(f"labels with shares must be (B, {num_labels}), got {tuple(labels.shape)}")
    elif labels.ndim != 1 or (len(labels) and not 0 <= labels.min() <= labels.max() < num_labels):
        found = f"from {labels.min()} to {labels.max()}" if labels.ndim == 1 else f"of shape {tuple(labels.shape)}"
        raise ValueError(f"labels must be (B,) with numbers from 0 to {num_labels - 1}, got {found}")


def classification_loss(logits: Tensor, labels: Tensor, problem: str) -> Tensor:
    """The loss that transformers has for the problem: logits (B, num_labels), labels as `check_labels` wants them."""
    if problem == "single_label_classification":
        return F.cross_entropy(logits, labels)
    labels = labels.to(logits.dtype).view_as(logits)
    return (
        F.mse_loss(logits, labels) if problem == "regression" else F.binary_cross_entropy_with_logits(logits, labels)
    )


class EfficientSamForImageClassification(EfficientSamPreTrainedModel):
    """The encoder, the mean of its patches or a class token, a norm, and a linear layer.

    Loads from any checkpoint of this package; the parts that a checkpoint does not have start anew.
    """

    config: EfficientSamVisionConfig
    # Takes keyword arguments, but none that tell how many batches a step has: the Trainer must divide the loss.
    accepts_loss_kwargs = False
    _keys_to_ignore_on_load_unexpected = OTHER_PARTS

    def __init__(self, config: EfficientSamVisionConfig):
        super().__init__(config)
        if config.pooling == "class_token" and config.window_size:
            raise ValueError(
                f"pooling='class_token' wants window_size 0, got {config.window_size}: it is in no window"
            )
        self.vision_encoder = EfficientSamTrunk(config)
        token = config.pooling == "class_token"
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size)) if token else None
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, EfficientSamForImageClassification) and module.class_token is not None:
            init.normal_(module.class_token, std=self.config.initializer_range)

    def pool(self, hidden_states: Tensor) -> Tensor:
        """What the last layer gives, see `EfficientSamTrunkOutput` -> (B, C)."""
        return hidden_states.flatten(1, 2).mean(1) if self.class_token is None else hidden_states[:, 0, 0]

    def get_image_features(self, pixel_values: Tensor, **kwargs: Unpack[TransformersKwargs]) -> Tensor:
        """Pictures (B, 3, H, W) -> the pooled features before the norm (B, C), as k-NN and probes want them."""
        return self.pool(self.vision_encoder(pixel_values, self.class_token, **kwargs).last_hidden_state)

    @merge_with_config_defaults
    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> ImageClassifierOutput:
        """Classify.

        Args:
            pixel_values: Pictures (B, 3, H, W), normalised, H and W multiples of the patch size.
            labels: Class numbers (B,), or a share of each class (B, num_labels), as mixup makes them; give a loss.
                Where the config's `problem_type` is "multi_label_classification", 1 or 0 for each class; where it is
                "regression", or there is a single label, the values wanted; both (B, num_labels).
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`, arguments of the attention function.

        Returns:
            `loss`, if there are labels, and `logits` (B, num_labels).
        """
        default = "regression" if self.config.num_labels == 1 else "single_label_classification"
        problem = self.config.problem_type or default
        if labels is not None and not torch.compiler.is_compiling():
            check_labels(labels, problem, self.config.num_labels)
        outputs = self.vision_encoder(pixel_values, self.class_token, **kwargs)
        logits = self.classifier(self.layer_norm(self.pool(outputs.last_hidden_state)))
        return ImageClassifierOutput(
            loss=None if labels is None else classification_loss(logits.float(), labels, problem),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = ["EfficientSamBackbone", "EfficientSamForImageClassification"]
