"""EfficientSAM: encode the picture once, then turn each prompt into masks.

B images, Q prompts an image, P slots a prompt, T tokens, M masks a prompt, C channels, h x w the embedding grid.

Paper: Xiong et al., "EfficientSAM: Leveraged Masked Image Pretraining for Efficient Segment Anything", CVPR 2024.
With converted weights the numbers are those of the authors' implementation (github.com/yformer/EfficientSAM).
"""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple, maybe_autocast, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_efficientsam import (
    EfficientSamConfig,
    EfficientSamMaskDecoderConfig,
    EfficientSamPromptEncoderConfig,
    EfficientSamVisionConfig,
)
from .loss_efficientsam import segmentation_loss
from .masks_efficientsam import rank_masks, resizing_matrix
from .prompts_efficientsam import (
    BACKGROUND,
    BOX_BOTTOM_RIGHT,
    BOX_TOP_LEFT,
    NO_POINT,
    OBJECT,
    drop_padding,
    gather_slots,
)
from .tiled_decoding_efficientsam import decode_tiled

# How keywords begin that are meant for prompts, under names of other packages or misspelt.
PROMPT_LIKE = ("input_", "point", "box", "bbox", "mask", "multimask", "label")

# What a CPU's cache holds, rows of an MLP's hidden layer and cells enlarged four times.
MLP_ROWS, DRAWN_CELLS = 512, 2048

# Up to so many prompts of a picture a GPU that is told each operation is quicker with each one's image written out;
# what CUDA graphs start is about as quick either way.
FEW_PROMPTS = 4


@dataclass
class EfficientSamVisionOutput(ModelOutput):
    """What the image encoder gives.

    Args:
        last_hidden_state: Image embeddings after the neck, (B, embedding_channels, h, w).
        hidden_states: Input of the first layer and output of each, (B, h, w, hidden_size), if asked for.
        attentions: Attention weights of each layer, if asked for; only the eager implementation has them.
    """

    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class EfficientSamMaskDecoderOutput(ModelOutput):
    """What the mask decoder gives.

    Args:
        iou_scores: Predicted IoU of each mask, (B, Q, M).
        pred_masks: Mask logits, (B, Q, M, 4h, 4w).
        mask_decoder_attentions: From tokens to image in each block, (B * Q, heads, T, h * w), if asked for; free
            slots are one token.
    """

    iou_scores: Tensor | None = None
    pred_masks: Tensor | None = None
    mask_decoder_attentions: tuple[Tensor, ...] | None = None


@dataclass
class EfficientSamOutput(ModelOutput):
    """What the whole model gives.

    Args:
        loss: Scalar, if `labels` were given.
        iou_scores: Predicted IoU of each mask, (B, Q, M).
        pred_masks: Mask logits at four times the embedding grid, (B, Q, M, 4h, 4w); 0 or more is the object.
        image_embeddings: (B, C, h, w), to be given back for the next prompt on the same picture.
        vision_hidden_states: As in `EfficientSamVisionOutput`, if asked for.
        vision_attentions: As in `EfficientSamVisionOutput`, if asked for.
        mask_decoder_attentions: As in `EfficientSamMaskDecoderOutput`, if asked for.
    """

    loss: Tensor | None = None
    iou_scores: Tensor | None = None
    pred_masks: Tensor | None = None
    image_embeddings: Tensor | None = None
    vision_hidden_states: tuple[Tensor, ...] | None = None
    vision_attentions: tuple[Tensor, ...] | None = None
    mask_decoder_attentions: tuple[Tensor, ...] | None = None


class EfficientSamPreTrainedModel(PreTrainedModel):
    """What all EfficientSAM models share: weights' first values and what transformers may do with them."""

    config: EfficientSamConfig
    base_model_prefix = "efficientsam"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules: set[str] | list[str] | None = [
        "EfficientSamInvertedResidual",
        "EfficientSamVisionLayer",
        "EfficientSamMaskDecoder",
    ]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _keep_in_fp32_modules_strict = ["shared_image_embedding"]

    def post_init(self) -> None:
        """As transformers', but without names of layers that this model lacks, which Accelerate's FSDP refuses."""
        super().post_init()
        kinds = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = kinds.intersection(self._no_split_modules or ())

    def get_input_embeddings(self) -> nn.Module:
        """The layer whose output the encoder's first block reads, where transformers asks for it."""
        embeddings = getattr(getattr(self, "vision_encoder", self), "embeddings", None)
        return super().get_input_embeddings() if embeddings is None else embeddings.input_layer

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, EfficientSamSilentConv2d):
            init.zeros_(module.weight)
            return
        super()._init_weights(module)
        if isinstance(module, EfficientSamCellProjection):
            init.normal_(module.weight, std=self.config.initializer_range)
            init.zeros_(module.bias)
        elif isinstance(module, EfficientSamPositionalEmbedding):
            init.normal_(module.gaussian_matrix, std=module.scale)
        elif isinstance(module, EfficientSamVisionEmbeddings):
            init.trunc_normal_(module.position_embedding, std=self.config.initializer_range)
        elif isinstance(module, EfficientSamPromptEncoder | EfficientSamMaskDecoder):
            # Tokens stand beside positional encodings of sines and cosines; a small start would take long to be heard.
            for token in module.parameters(recurse=False):
                init.normal_(token, std=1.0)


# --------------------------------------------------------------------------------------------------------------------
# Bricks


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out, the one that can show its weights: (N, heads, T, d) each -> (N, T, heads, d), weights."""
    weights = query @ key.transpose(-2, -1) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = weights.softmax(-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2), weights


class EfficientSamAttention(nn.Module):
    """Multi-head attention through transformers' attention interface.

    (..., T, C) -> (..., T, C) and the weights, if the implementation gives them.
    """

    is_causal = False

    def __init__(self, config: EfficientSamVisionConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: Tensor, context: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """(..., T, C) look at themselves, or at a context (..., S, C).

        -> (..., T, C) and the weights (N, heads, T, S), or None where the implementation has none.
        """
        context = hidden_states if context is None else context
        attention_function: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention_function(
            self,
            self.split_heads(self.q_proj(hidden_states)),
            self.split_heads(self.k_proj(context)),
            self.split_heads(self.v_proj(context)),
            attention_mask=None,
            scaling=self.scaling,
            dropout=self.config.attention_dropout if self.training else 0.0,
            is_causal=False,
            **kwargs,
        )
        return self.out_proj(output.reshape(hidden_states.shape)), weights

    def split_heads(self, tokens: Tensor) -> Tensor:
        """(..., T, heads * d) -> (product of leading, heads, T, d)."""
        return tokens.reshape(-1, tokens.shape[-2], tokens.shape[-1] // self.head_dim, self.head_dim).transpose(1, 2)


class EfficientSamMLP(nn.Module):
    """Linear layers through the given widths, with an activation between them."""

    def __init__(self, *widths: int, hidden_act: str):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(widths))
        self.activation = ACT2FN[hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        if hidden_states.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.think(hidden_states)
        # Some rows at a time, so that what is wide stays in the cache and in memory that is used again.
        rows = [self.think(part) for part in hidden_states.flatten(0, -2).split(MLP_ROWS)]
        return torch.cat(rows).view(*hidden_states.shape[:-1], rows[0].shape[-1])

    def think(self, hidden_states: Tensor) -> Tensor:
        """The same of all rows at one time."""
        for layer in self.layers[:-1]:
            hidden_states = self.activation(layer(hidden_states))
        return self.layers[-1](hidden_states)


class EfficientSamLayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of (B, C, h, w)."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class EfficientSamPositionalEmbedding(nn.Module):
    """Random Fourier features of coordinates (Tancik et al., 2020), in float32 whatever the model's dtype.

    In bfloat16 a coordinate of a 1024-pixel picture is off by two pixels; so the matrix, too, never leaves float32.
    """

    gaussian_matrix: Tensor

    def __init__(self, config: EfficientSamPromptEncoderConfig):
        super().__init__()
        self.scale = config.position_scale
        self.register_buffer("gaussian_matrix", torch.zeros(2, config.hidden_size // 2))

    def forward(self, coordinates: Tensor) -> Tensor:
        """Coordinates x, y as fractions of the picture (..., 2) -> (..., C), float32."""
        with maybe_autocast(coordinates.device.type, enabled=False):
            # Loading in float64 has made the matrix float64.
            angles = 2 * math.pi * ((2 * coordinates.float() - 1) @ self.gaussian_matrix.float())
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    def grid(self, height: int, width: int) -> Tensor:
        """The encoding of each cell's centre in a height x width grid, (height * width, C)."""
        device = self.gaussian_matrix.device
        y = (torch.arange(height, device=device, dtype=torch.float32) + 0.5) / height
        x = (torch.arange(width, device=device, dtype=torch.float32) + 0.5) / width
        return self(torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).flatten(0, 1))

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        exact = self.gaussian_matrix
        super()._apply(fn, recurse)
        if self.gaussian_matrix.dtype != torch.float32 and not exact.is_meta:
            self.gaussian_matrix = exact.to(self.gaussian_matrix.device, torch.float32)
        return self


# --------------------------------------------------------------------------------------------------------------------
# Image encoder


class EfficientSamSameConv2d(nn.Conv2d):
    """A convolution that gives H / stride x W / stride, of which H and W are multiples.

    An odd padding has its longer side below and right. No convolution pads so by itself, and to pad its input would
    copy it: so both sides get the shorter one and a stride, and the answer's first row and column are left out.
    """

    def __init__(self, channels: int, output_channels: int, kernel_size: int, stride: int = 1, **options: Any):
        super().__init__(channels, output_channels, kernel_size, stride, **options)
        total = max(self.dilation[0] * (kernel_size - 1) + 1 - stride, 0)
        self.is_odd, self.shorter = bool(total % 2), total // 2
        self.padding = (self.shorter + self.is_odd * stride,) * 2

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.is_odd and torch.compiler.is_exporting():
            # Other runtimes make padding and convolution one.
            padded = F.pad(hidden_states, (self.shorter, self.shorter + 1) * 2)
            return F.conv2d(padded, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)
        if self.dilation[0] > 1 and hidden_states.device.type == "cpu" and torch.is_grad_enabled():
            # Of channels last in bfloat16, torch 2.13 gives a dilated depthwise filter a wrong gradient on CPUs.
            hidden_states = hidden_states.contiguous()
        answer = super().forward(hidden_states)
        return answer[:, :, 1:, 1:].contiguous(memory_format=torch.channels_last) if self.is_odd else answer


def stem_activation(name: str) -> nn.Module:
    """The activation, in place if its answer tells its gradient: nothing else needs the convolution's own answer.

    The widened channels are the stem's largest tensors, and for a CPU new memory is as dear as the arithmetic.
    """
    activation = ACT2FN[name]
    if isinstance(activation, nn.ReLU | nn.Hardtanh):
        activation.inplace = True
    return activation


class EfficientSamInvertedResidual(nn.Module):
    """Widen, filter each channel by itself, narrow (Sandler et al., 2018): (B, C, H, W) -> (B, C', H', W').

    Without norms: a trained network's are folded into its convolutions, and training goes on from there.
    """

    def __init__(self, channels: int, row: Sequence[int], first: bool, act: str):
        super().__init__()
        kernel, stride, expansion, output_channels, _, dilation = row
        stride, inner = stride if first else 1, channels * expansion
        self.has_residual = stride == 1 and channels == output_channels
        self.expand = nn.Conv2d(channels, inner, kernel_size=1) if expansion > 1 else None
        self.filter = EfficientSamSameConv2d(inner, inner, kernel, stride, dilation=dilation, groups=inner)
        self.narrow = nn.Conv2d(inner, output_channels, kernel_size=1)
        self.activation = stem_activation(act)

    def forward(self, hidden_states: Tensor) -> Tensor:
        inner = self.activation(self.expand(hidden_states)) if self.expand else hidden_states
        output = self.narrow(self.activation(self.filter(inner)))
        return output + hidden_states if self.has_residual else output


class EfficientSamSilentConv2d(nn.Conv2d):
    """A convolution that gives nothing until it is trained, so that a model which gains it answers as before."""


class EfficientSamStemDetails(nn.Module):
    """Features at strides 8 and 4 for the mask decoder, as SAM 2 has them (Ravi et al., 2024).

    They lie in the embeddings as further channels of each cell, so that one tensor still says all of a picture.
    """

    def __init__(self, inputs: tuple[int, int], config: EfficientSamVisionConfig):
        super().__init__()
        self.coarse = EfficientSamSilentConv2d(inputs[0], config.detail_channels[0], kernel_size=1, bias=False)
        self.fine = EfficientSamSilentConv2d(inputs[1], config.detail_channels[1], kernel_size=1, bias=False)

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        """(B, C1, 2h, 2w), (B, C2, 4h, 4w) -> (B, channels, h, w), 4 coarse and 16 fine a cell."""
        coarse = self.coarse(coarse).unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
        fine = self.fine(fine).unflatten(3, (-1, 2, 2)).unflatten(2, (-1, 2, 2))
        coarse, fine = coarse.permute(0, 3, 5, 1, 2, 4), fine.permute(0, 3, 6, 4, 7, 1, 2, 5)
        return torch.cat([coarse.flatten(1, 3), fine.flatten(1, 5)], dim=1)


class EfficientSamConvolutionalStem(nn.Module):
    """Convolutions in place of the patch embedding, as in the hybrid ViT (Dosovitskiy et al., 2021, section 3.1).

    What few photos cannot teach a transformer, a small convolutional network brings along from its own pretraining.
    """

    def __init__(self, config: EfficientSamVisionConfig, with_details: bool = True):
        super().__init__()
        channels = config.stem_channels
        self.conv = EfficientSamSameConv2d(config.num_channels, channels, kernel_size=3, stride=2)
        self.blocks = nn.ModuleList()
        # Stride -> number and channels of the last block there.
        self.last_blocks: dict[int, tuple[int, int]] = {}
        stride = 2
        for row in config.stem_stages:
            stride *= row[1]
            for repeat in range(row[4]):
                self.blocks.append(EfficientSamInvertedResidual(channels, row, repeat == 0, config.stem_act))
                channels = row[3]
            self.last_blocks[stride] = (len(self.blocks) - 1, channels)
        self.projection = nn.Conv2d(channels, config.hidden_size, kernel_size=1)
        self.activation = stem_activation(config.stem_act)
        if config.detail_channels and with_details:
            self.details = EfficientSamStemDetails((self.last_blocks[8][1], self.last_blocks[4][1]), config)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, 3, H, W) -> (B, hidden_size, H / patch, W / patch), and the details of as many cells, if any."""
        # Channels last in memory: on a CPU the depthwise filters take half the time.
        hidden_states = self.activation(self.conv(pixel_values.contiguous(memory_format=torch.channels_last)))
        outputs = []
        for block in self.blocks:
            hidden_states = block(hidden_states)
            outputs.append(hidden_states)
        details = None
        if hasattr(self, "details"):
            details = self.details(*(outputs[self.last_blocks[stride][0]] for stride in (8, 4)))
        return self.projection(hidden_states), details


class EfficientSamPatchConv2d(nn.Conv2d):
    """Patches next to each other, so that one matrix product does it; its channels lie side by side in memory."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, h, w)."""
        height, width = self.kernel_size
        rows = pixel_values.unflatten(3, (-1, width)).unflatten(2, (-1, height))
        patches = rows.permute(0, 2, 4, 1, 3, 5).flatten(3)
        return F.linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class EfficientSamVisionEmbeddings(nn.Module):
    """Patches, or a convolutional stem's features, and their positions; with a stem perhaps details, too.

    Where nobody asks for details, `with_details` leaves their weights out: without a gradient they would stop
    several processes that train together.
    """

    def __init__(self, config: EfficientSamVisionConfig, with_details: bool = True):
        super().__init__()
        self.grid_size = config.position_grid_size
        self.num_channels = config.num_channels
        self.patch_size = config.patch_size
        self.patch_embedding = (
            EfficientSamConvolutionalStem(config, with_details)
            if config.stem_stages
            else EfficientSamPatchConv2d(config.num_channels, config.hidden_size, config.patch_size, config.patch_size)
        )
        # The first row is a class token's from pretraining, which the encoder does not use.
        self.position_embedding = nn.Parameter(torch.zeros(1, 1 + self.grid_size**2, config.hidden_size))

    @property
    def input_layer(self) -> nn.Module:
        """The layer that gives the patches, as one tensor; a stem gives details beside them."""
        return getattr(self.patch_embedding, "projection", self.patch_embedding)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, 3, H, W) -> (B, h, w, C), and details (B, channels, h, w) or None."""
        channels, sides = pixel_values.shape[1:2], pixel_values.shape[2:]
        fits = channels == (self.num_channels,) and len(sides) == 2
        if not fits or any(side < self.patch_size or side % self.patch_size for side in sides):
            raise ValueError(
                f"pixel_values must be (B, {self.num_channels}, H, W) with H and W multiples of {self.patch_size}, "
                f"got {tuple(pixel_values.shape)}"
            )
        patches, details = self.patch_embedding(pixel_values.to(self.position_embedding.dtype)), None
        if isinstance(patches, tuple):
            patches, details = patches
        # Channels last in memory, too: every layer norm and residual after this would otherwise copy.
        patches = patches.permute(0, 2, 3, 1).contiguous()
        return patches + self.positions(*patches.shape[1:3]).to(patches.dtype), details

    def positions(self, height: int, width: int) -> Tensor:
        """The position table brought to a height x width grid by bicubic interpolation, (1, height, width, C)."""
        table = self.position_embedding[:, 1:].unflatten(1, (self.grid_size, self.grid_size))
        if (height, width) == (self.grid_size, self.grid_size):
            return table
        # Two matrix products give the same numbers as interpolating all channels, several times as fast.
        rows, columns = (resizing_matrix(self.grid_size, side, "bicubic", table.device) for side in (height, width))
        with maybe_autocast(table.device.type, enabled=False):
            stretched = (rows @ table[0].float().flatten(1)).unflatten(1, (self.grid_size, -1))
            return (columns @ stretched)[None]


def partition_windows(hidden_states: Tensor, size: int) -> Tensor:
    """(B, h, w, C) -> (B, windows, size * size, C); the grid is padded with zeros to whole windows."""
    height, width = hidden_states.shape[1:3]
    hidden_states = F.pad(hidden_states, (0, 0, 0, -width % size, 0, -height % size))
    windows = hidden_states.unflatten(2, (-1, size)).unflatten(1, (-1, size))
    return windows.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def join_windows(windows: Tensor, size: int, height: int, width: int) -> Tensor:
    """The inverse of `partition_windows`: (B, windows, size * size, C) -> (B, height, width, C)."""
    rows, columns = -(-height // size), -(-width // size)
    hidden_states = windows.unflatten(1, (rows, columns)).unflatten(3, (size, size)).transpose(2, 3)
    return hidden_states.flatten(3, 4).flatten(1, 2)[:, :height, :width]


def drop_path(branch: Tensor, rate: float) -> Tensor:
    """Stochastic depth (Huang et al., 2016): the branch of each picture (B, ...) is left out with this chance.

    What is kept is enlarged, so that the expectation stays.
    """
    kept = torch.rand(branch.shape[:1] + (1,) * (branch.ndim - 1), device=branch.device) >= rate
    return branch * (kept / (1 - rate)).to(branch.dtype)


class EfficientSamVisionLayer(GradientCheckpointingLayer):
    """A pre-norm transformer block over the whole grid, or inside windows: (B, h, w, C) -> (B, h, w, C)."""

    def __init__(self, config: EfficientSamVisionConfig, window_size: int, drop_path_rate: float = 0.0):
        super().__init__()
        self.window_size = window_size
        self.drop_path_rate = drop_path_rate
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = EfficientSamAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = EfficientSamMLP(
            config.hidden_size, config.mlp_dim, config.hidden_size, hidden_act=config.hidden_act
        )

    def forward(self, hidden_states: Tensor, **kwargs: Unpack[TransformersKwargs]) -> Tensor:
        hidden_states = hidden_states + self.skip(self.attend(self.layer_norm1(hidden_states), **kwargs))
        return hidden_states + self.skip(self.mlp(self.layer_norm2(hidden_states)))

    def skip(self, branch: Tensor) -> Tensor:
        """The branch, or in training nothing by chance."""
        return drop_path(branch, self.drop_path_rate) if self.training and self.drop_path_rate else branch

    def attend(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Self-attention over all patches, or inside each window."""
        height, width = hidden_states.shape[1:3]
        if self.window_size:
            tokens = partition_windows(hidden_states, self.window_size)
            tokens = self.attention(tokens, **kwargs)[0]
            return join_windows(tokens, self.window_size, height, width)
        tokens = hidden_states.flatten(1, 2)
        return self.attention(tokens, **kwargs)[0].unflatten(1, (height, width))


def vision_layers(config: EfficientSamVisionConfig, windows: bool = True) -> nn.ModuleList:
    """The blocks of the encoder, each with its windows and its chance of being skipped."""
    deepest = max(config.num_hidden_layers - 1, 1)
    return nn.ModuleList(
        EfficientSamVisionLayer(
            config,
            window_size=config.window_size if windows and index not in config.global_attention_layers else 0,
            drop_path_rate=config.drop_path_rate * index / deepest,
        )
        for index in range(config.num_hidden_layers)
    )


class EfficientSamVisionNeck(nn.Module):
    """Brings the encoder to the decoder's width: (B, h, w, C) -> (B, output_channels, h, w)."""

    def __init__(self, config: EfficientSamVisionConfig):
        super().__init__()
        self.conv1 = nn.Conv2d(config.hidden_size, config.output_channels, kernel_size=1, bias=False)
        self.layer_norm1 = EfficientSamLayerNorm2d(config.output_channels, eps=config.layer_norm_eps)
        self.conv2 = nn.Conv2d(config.output_channels, config.output_channels, kernel_size=3, padding=1, bias=False)
        self.layer_norm2 = EfficientSamLayerNorm2d(config.output_channels, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = self.layer_norm1(self.conv1(hidden_states.permute(0, 3, 1, 2)))
        return self.layer_norm2(self.conv2(hidden_states))


class EfficientSamVisionEncoder(EfficientSamPreTrainedModel):
    """Plain ViT and neck: (B, 3, H, W) -> (B, embedding_channels, H / patch, W / patch)."""

    config: EfficientSamVisionConfig
    _can_record_outputs = {"hidden_states": EfficientSamVisionLayer, "attentions": EfficientSamAttention}

    def __init__(self, config: EfficientSamVisionConfig):
        super().__init__(config)
        self.embeddings = EfficientSamVisionEmbeddings(config)
        self.layers = vision_layers(config)
        self.neck = EfficientSamVisionNeck(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: Tensor, **kwargs: Unpack[TransformersKwargs]) -> EfficientSamVisionOutput:
        hidden_states, details = self.embeddings(pixel_values)
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        embeddings = self.neck(hidden_states)
        embeddings = embeddings if details is None else torch.cat([embeddings, details], dim=1)
        return EfficientSamVisionOutput(last_hidden_state=embeddings)


# --------------------------------------------------------------------------------------------------------------------
# Prompt encoder


class EfficientSamMaskEmbedding(nn.Module):
    """Reads mask logits as a prompt, as SAM does: (N, 1, 4h, 4w) -> (N, C, h, w)."""

    def __init__(self, config: EfficientSamPromptEncoderConfig):
        super().__init__()
        channels = config.mask_input_channels
        self.conv1 = nn.Conv2d(1, channels // 4, kernel_size=2, stride=2)
        self.layer_norm1 = EfficientSamLayerNorm2d(channels // 4, eps=config.layer_norm_eps)
        self.conv2 = nn.Conv2d(channels // 4, channels, kernel_size=2, stride=2)
        self.layer_norm2 = EfficientSamLayerNorm2d(channels, eps=config.layer_norm_eps)
        self.conv3 = nn.Conv2d(channels, config.hidden_size, kernel_size=1)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, masks: Tensor) -> Tensor:
        hidden_states = self.activation(self.layer_norm1(self.conv1(masks)))
        hidden_states = self.activation(self.layer_norm2(self.conv2(hidden_states)))
        return self.conv3(hidden_states)


class EfficientSamPromptEncoder(EfficientSamPreTrainedModel):
    """Points and box corners become tokens, a mask becomes an image-wide embedding."""

    config: EfficientSamPromptEncoderConfig

    def __init__(self, config: EfficientSamPromptEncoderConfig):
        super().__init__(config)
        self.no_point = nn.Parameter(torch.zeros(1, config.hidden_size))
        self.foreground = nn.Parameter(torch.zeros(1, config.hidden_size))
        self.box_top_left = nn.Parameter(torch.zeros(1, config.hidden_size))
        self.box_bottom_right = nn.Parameter(torch.zeros(1, config.hidden_size))
        if config.negative_points:
            self.background = nn.Parameter(torch.zeros(1, config.hidden_size))
        if config.mask_prompts:
            self.no_mask = nn.Parameter(torch.zeros(1, config.hidden_size))
            self.mask_embedding = EfficientSamMaskEmbedding(config)
        self.post_init()

    def forward(self, positional_embedding: nn.Module, points: Tensor, labels: Tensor, size: Tensor) -> Tensor:
        """Points (B, Q, P, 2) in pixels of a picture of `size` (width, height), labels (B, Q, P) -> (B, Q, P + 1, C).

        The weights expect no fewer than `filled_slots` tokens, free slots holding the trained "no point" token. Those
        are all alike and stay so, so that the last token stands for all of them; without a free slot it is left out.
        """
        if points.shape[2] > self.config.filled_slots:
            points, labels = drop_padding(points, labels, self.config.max_prompt_points)
        one_free = int(points.shape[2] < self.config.filled_slots)
        labels = F.pad(labels, (0, one_free), value=NO_POINT)
        points = F.pad(points.float(), (0, 0, 0, one_free)).masked_fill((labels == NO_POINT)[..., None], -1.0)
        tokens = positional_embedding((points + 0.5) / size)
        for label, embedding in self.label_embeddings():
            tokens = tokens + (labels == label)[..., None] * embedding
        return tokens.to(self.no_point.dtype)

    def slots_of_tokens(self, labels: Tensor, tokens: int) -> int | Tensor:
        """How many slots the last token stands for; where a prompt is longer than `filled_slots`, how many each does.

        Labels (B, Q, P) and the number of tokens they became -> an int or (B, Q, tokens).
        """
        filled = self.config.filled_slots
        if tokens <= filled:
            return filled - tokens + 1
        # Beside a long prompt a short one has more padding than it would have alone: its tokens count as fewer.
        used = (labels != NO_POINT).sum(-1, keepdim=True)
        shares = (filled - used).clamp(min=0) / (tokens - used).clamp(min=1)
        is_free = torch.arange(tokens, device=labels.device) >= used
        return torch.where(is_free, shares, 1.0)

    def label_embeddings(self) -> list[tuple[int, Tensor]]:
        """What each label adds. Without trained background clicks label 0 adds nothing, as in the released weights."""
        embeddings: list[tuple[int, Tensor]] = [
            (NO_POINT, self.no_point),
            (OBJECT, self.foreground),
            (BOX_TOP_LEFT, self.box_top_left),
            (BOX_BOTTOM_RIGHT, self.box_bottom_right),
        ]
        if self.config.negative_points:
            embeddings.append((BACKGROUND, self.background))
        return embeddings

    def embed_masks(self, masks: Tensor | None) -> Tensor | None:
        """Mask logits (B, Q, 4h, 4w) -> what they add to the image tokens, (B, Q, h * w, C); without masks (1, C)."""
        if not self.config.mask_prompts:
            return None
        if masks is None:
            return self.no_mask
        embedded = self.mask_embedding(masks.flatten(0, 1)[:, None].to(self.no_mask.dtype))
        return embedded.flatten(2).transpose(1, 2).unflatten(0, masks.shape[:2])


# --------------------------------------------------------------------------------------------------------------------
# Mask decoder


# All prompts of a picture start from one image. What a prompt adds to it are a few vectors, weighed differently in
# each cell, and a layer norm divides each cell by a number of its own. So no prompt's image is written out, but few of
# them on a GPU; it is
#
#     factor * (common + weights^T (values bases)) + shift
#
# where common (S, C), bases and shift are the same for all prompts, so that linear layers are applied to them once a
# picture, and factor (S), weights (R, S) and values are a prompt's own, with R = heads * T for each time that the
# image looked at the tokens. A layer norm keeps that form: the variance of a cell is a quadratic form of its weights.


@dataclass
class EfficientSamImageTerms:
    """What the images of all prompts are made of, in C channels or in the N that a linear layer gives.

    Args:
        common: (B, S, N).
        bases: For each time that the image looked at the tokens, (heads, d + 1, N).
        shift: (N,), or each cell's own, (B, 1, S, N).
    """

    common: Tensor
    bases: list[Tensor]
    shift: Tensor

    def through(self, weight: Tensor) -> "EfficientSamImageTerms":
        """The terms after a matrix (N', N)."""
        common, shift, *bases = (F.linear(part, weight) for part in (self.common, self.shift, *self.bases))
        return EfficientSamImageTerms(common, bases, shift)

    def averaged(self) -> "EfficientSamImageTerms":
        """The terms of the mean over all channels, N = 1."""
        common, shift, *bases = (part.mean(-1, keepdim=True) for part in (self.common, self.shift, *self.bases))
        return EfficientSamImageTerms(common, bases, shift)

    def with_basis(self, basis: Tensor) -> "EfficientSamImageTerms":
        """The terms with one more basis, which includes the shift, and their channels' mean taken out."""
        common, *bases = (part - part.mean(-1, keepdim=True) for part in (self.common, *self.bases, basis))
        return EfficientSamImageTerms(common, bases, torch.zeros_like(self.shift))

    def scaled(self, norm: nn.LayerNorm) -> "EfficientSamImageTerms":
        """Terms without a mean, with the gain and bias of a layer norm."""
        return EfficientSamImageTerms(
            self.common * norm.weight, [basis * norm.weight for basis in self.bases], norm.bias
        )


@dataclass
class EfficientSamPromptedImage:
    """What is a prompt's own of its image; indexed by prompts.

    Args:
        factor: (B, Q, 1, S).
        weights: (B, Q, R, S).
        values: For each time that the image looked at the tokens, (B, Q, heads, T, d + 1), the last of them 1.
    """

    factor: Tensor
    weights: Tensor
    values: list[Tensor]

    def __getitem__(self, prompts: Tensor | slice) -> "EfficientSamPromptedImage":
        return EfficientSamPromptedImage(
            self.factor[:, prompts], self.weights[:, prompts], [values[:, prompts] for values in self.values]
        )

    def rows(self, bases: list[Tensor]) -> Tensor:
        """The vectors that the weights weigh, (B, Q, R, N)."""
        parts = [(values @ basis).flatten(2, 3) for values, basis in zip(self.values, bases, strict=True)]
        return torch.cat(parts, dim=2)

    def written_out(self, terms: EfficientSamImageTerms, less: EfficientSamImageTerms | None = None) -> Tensor:
        """(B * Q, S, N); without their mean over cells and channels if `less` are the channels' means of the terms."""
        weights, factor, shift = self.weights * self.factor, self.factor.transpose(2, 3), terms.shift
        if less is not None:
            mean = torch.addcmul(less.shift, factor, less.common[:, None]).mean((2, 3), keepdim=True)
            mean = mean + (weights.mean(-1, keepdim=True) * self.rows(less.bases)).sum((2, 3), keepdim=True)
            shift = shift - mean
        shared = torch.addcmul(shift, factor, terms.common[:, None]).flatten(0, 1)
        return add_product(shared, weights.flatten(0, 1).transpose(1, 2), self.rows(terms.bases).flatten(0, 1))


@dataclass
class EfficientSamProjectedCells:
    """The terms after one of an attention's projections, its heads apart.

    Args:
        bases: In the projection's channels, (heads, d + 1, heads * d) for each time that the image looked.
        shift: (heads * d,).
        common: (B, heads, d, S).
        positions: What the cells' positions add, (heads, d, S); None where they are part of `common`.
    """

    bases: list[Tensor]
    shift: Tensor
    common: Tensor
    positions: Tensor | None = None


def may_reuse_memory(tensor: Tensor) -> bool:
    """Whether work may be done bit by bit and in place: on a CPU, for which new memory is as dear as arithmetic.

    Not where something is to be learnt, nor while autocast chooses the types or a compiler writes a graph.
    """
    if tensor.device.type != "cpu" or torch.is_grad_enabled():
        return False
    return not (torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"))


def add_product(tensor: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Tensor (N, I, J) + left (N, I, K) @ right (N, K, J); the tensor may be gone."""
    return tensor.baddbmm_(left, right) if may_reuse_memory(tensor) else torch.baddbmm(tensor, left, right)


def multiply_shared(vectors: Tensor, shared: Tensor) -> Tensor:
    """Vectors of each prompt (B, Q, heads, T, d) times what all share (B or 1, heads, d, N) -> (B, Q, heads, T, N)."""
    if may_reuse_memory(vectors):
        # Each prompt's product is written where it belongs; that of all prompts would have to be moved there.
        product = vectors.new_empty(*vectors.shape[:-1], shared.shape[-1])
        for own, same, place in zip(vectors, shared.expand(len(vectors), -1, -1, -1), product, strict=True):
            for prompt, result in zip(own, place, strict=True):
                torch.bmm(prompt, same, out=result)
        return product
    product = vectors.transpose(1, 2).flatten(2, 3) @ shared
    return product.unflatten(2, (vectors.shape[1], vectors.shape[3])).transpose(1, 2)


class EfficientSamCellProjection(nn.Module):
    """A linear layer for the cells, whose weights are applied to what the prompts' images are made of.

    None of torch's `Linear`: what takes the place of those, such as an adapter or a layer of 8 bits, has to be called,
    and this one is not.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        layer = nn.Linear(in_features, out_features)
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, cells: Tensor) -> Tensor:
        """(..., in) -> (..., out), for cells that are written out."""
        return F.linear(cells, self.weight, self.bias)


class EfficientSamDecoderAttention(nn.Module):
    """Projections and heads of the decoder's attention, in which one side is a few tokens and written out."""

    of_cells = ""  # which of q, k, v and o project the other side

    def __init__(self, config: EfficientSamMaskDecoderConfig, downsample_rate: int = 1):
        super().__init__()
        inner = config.hidden_size // downsample_rate
        self.heads = config.num_attention_heads
        self.scaling = (inner // self.heads) ** -0.5
        self.dropout = config.attention_dropout
        q, k, v, out = (EfficientSamCellProjection if name in self.of_cells else nn.Linear for name in "qkvo")
        self.q_proj = q(config.hidden_size, inner)
        self.k_proj = k(config.hidden_size, inner)
        self.v_proj = v(config.hidden_size, inner)
        self.out_proj = out(inner, config.hidden_size)

    def split_heads(self, tokens: Tensor) -> Tensor:
        """(..., T, heads * d) -> (..., heads, T, d)."""
        return tokens.unflatten(-1, (self.heads, -1)).transpose(-3, -2)

    def join_heads(self, tokens: Tensor) -> Tensor:
        """(..., heads, T, d) -> (..., T, heads * d)."""
        return tokens.transpose(-3, -2).flatten(-2)

    def weigh(self, scores: Tensor, dim: int) -> Tensor:
        """Attention weights of scores, softmax in float32."""
        weights = scores.softmax(dim, dtype=torch.float32).to(scores.dtype)
        return F.dropout(weights, self.dropout, self.training)

    def project_places(
        self, terms: EfficientSamImageTerms, positions: Tensor, projection: EfficientSamCellProjection
    ) -> EfficientSamProjectedCells:
        """Keys or queries of the cells, terms and positions (S, C) together, without the projection's bias."""
        projected, places = self.project_cells(terms, projection), projection.weight @ positions.t()
        if not terms.bases:
            return replace(projected, common=projected.common + places.unflatten(0, (self.heads, -1)))
        return replace(projected, positions=places.unflatten(0, (self.heads, -1)))

    def project_cells(
        self, terms: EfficientSamImageTerms, projection: EfficientSamCellProjection
    ) -> EfficientSamProjectedCells:
        """The cells after a projection, without its bias."""
        weight = projection.weight
        # With the matrix on the left heads and cells come out in the order that is wanted, and nothing is moved.
        common = weight.expand(terms.common.shape[0], -1, -1) @ terms.common.transpose(1, 2)
        shift, *bases = (F.linear(part, weight) for part in (terms.shift, *terms.bases))
        return EfficientSamProjectedCells(bases, shift, common.unflatten(1, (self.heads, -1)))

    def score(
        self, vectors: Tensor, image: EfficientSamPromptedImage | None, cells: EfficientSamProjectedCells
    ) -> Tensor:
        """Vectors (B, Q, heads, T, d) times the cells of their prompt's image -> (B, Q, heads, T, S).

        Without what bias and shift add to all cells alike.
        """
        scores = multiply_shared(vectors, cells.common)
        if image is None or cells.positions is None:
            return scores
        mixed = vectors @ self.split_heads(image.rows(cells.bases)).transpose(-2, -1)
        mixed, added = (part.flatten(2, 3).flatten(0, 1) for part in (mixed, scores))
        scores = add_product(added, mixed, image.weights.flatten(0, 1)).view(scores.shape)
        return torch.addcmul(multiply_shared(vectors, cells.positions), scores, image.factor[:, :, None])


class EfficientSamTokenAttention(EfficientSamDecoderAttention):
    """Tokens look at each other: (B, Q, T, C) -> (B, Q, T, C)."""

    def forward(self, tokens: Tensor, repeats: Tensor) -> Tensor:
        """`repeats` (T,) or (B, Q, T) is the logarithm of how many tokens each token stands for."""
        query, key, value = (self.split_heads(project(tokens)) for project in (self.q_proj, self.k_proj, self.v_proj))
        repeats = repeats[..., None, None, :]
        weights = self.weigh(query @ key.transpose(-2, -1) * self.scaling + repeats, dim=-1)
        return self.out_proj(self.join_heads(weights @ value))


class EfficientSamTokenToImageAttention(EfficientSamDecoderAttention):
    """Tokens look at the image."""

    of_cells = "kv"

    def prepare(
        self, terms: EfficientSamImageTerms, positions: Tensor
    ) -> tuple[EfficientSamProjectedCells, EfficientSamProjectedCells]:
        """Keys and values of the cells, once a picture."""
        return self.project_places(terms, positions, self.k_proj), self.project_cells(terms, self.v_proj)

    def forward(
        self,
        tokens: Tensor,
        image: EfficientSamPromptedImage | None,
        keys: EfficientSamProjectedCells,
        values: EfficientSamProjectedCells,
    ) -> tuple[Tensor, Tensor]:
        """Tokens (B, Q, T, C) -> (B, Q, T, C), weights (B * Q, heads, T, S).

        The keys' bias shifts all scores of a token alike, which a softmax does not see.
        """
        weights = self.weigh(self.score(self.split_heads(self.q_proj(tokens) * self.scaling), image, keys), dim=-1)
        common = values.common.transpose(2, 3)
        if image is None:
            looked = multiply_shared(weights, common)
        else:
            scaled = weights * image.factor[:, :, None]
            own = (scaled.flatten(2, 3) @ image.weights.transpose(2, 3)).unflatten(2, weights.shape[2:4])
            looked = own @ self.split_heads(image.rows(values.bases)) + multiply_shared(scaled, common)
        output = self.out_proj(self.join_heads(looked) + (self.v_proj.bias + values.shift))
        return output, weights.flatten(0, 1)


class EfficientSamImageToTokenAttention(EfficientSamDecoderAttention):
    """The image looks at the tokens."""

    of_cells = "qo"

    def prepare(
        self, terms: EfficientSamImageTerms, positions: Tensor
    ) -> tuple[EfficientSamProjectedCells, EfficientSamImageTerms]:
        """Queries of the cells, once a picture, and the terms of what they will be given, without a mean."""
        matrix = self.out_proj.weight.t().unflatten(0, (self.heads, -1))
        # Over the tokens a head's weights add up to 1: what every cell gets may stand in the answers, in parts.
        everywhere = (self.out_proj.bias + terms.shift) / self.heads
        basis = torch.cat([matrix, everywhere.expand(self.heads, 1, -1)], dim=1)
        return self.project_places(terms, positions, self.q_proj), terms.with_basis(basis)

    def forward(
        self,
        keys: Tensor,
        values: Tensor,
        repeats: Tensor,
        image: EfficientSamPromptedImage | None,
        queries: EfficientSamProjectedCells,
    ) -> tuple[Tensor, Tensor]:
        """How the cells weigh the tokens, and what those say.

        Args:
            keys: (B, Q, T, C).
            values: (B, Q, T, C).
            repeats: (T,) or (B, Q, T), the logarithm of how many tokens each token stands for.
            image: Before.
            queries: Of the cells.

        Returns:
            Weights (B, Q, heads, T, S), values (B, Q, heads, T, d + 1).
        """
        keys = self.split_heads(self.k_proj(keys) * self.scaling)
        everywhere = (self.q_proj.bias + queries.shift).unflatten(0, (self.heads, -1))
        offsets = keys @ everywhere[..., None] + repeats[..., None, :, None]
        weights = self.weigh(self.score(keys, image, queries) + offsets, dim=-2)
        return weights, F.pad(self.split_heads(self.v_proj(values)), (0, 1), value=1.0)


class EfficientSamImageLayerNorm(nn.LayerNorm):
    """Layer norm over the channels of the prompts' images, in float32 as layer norms are."""

    def prepare(self, terms: EfficientSamImageTerms) -> tuple[Tensor, list[Tensor]]:
        """Products of terms without a mean, once a picture.

        -> squares (B, 1, 1, S), and for each basis twice its products with the cells (B, heads, d + 1, S).
        """
        with maybe_autocast(terms.common.device.type, enabled=False):
            common = terms.common.float()
            # All heads at one time: each by itself would want a copy of all cells.
            rows = [(2 * basis.float()).flatten(0, 1).expand(common.shape[0], -1, -1) for basis in terms.bases]
            products = [
                (own @ common.transpose(1, 2)).unflatten(1, basis.shape[:2])
                for own, basis in zip(rows, terms.bases, strict=True)
            ]
            return common.square().sum(-1)[:, None, None], products

    def add(
        self,
        image: EfficientSamPromptedImage | None,
        weights: Tensor,
        values: Tensor,
        terms: EfficientSamImageTerms,
        products: tuple[Tensor, list[Tensor]],
    ) -> EfficientSamPromptedImage:
        """Add what the image saw, weights (B, Q, heads, T, S) of values (B, Q, heads, T, d + 1), and divide."""
        weights, all_values = weights.flatten(2, 3), [values]
        if image is not None:
            # What comes in will be multiplied by the factor of before as well.
            weights = torch.cat([image.weights, weights * image.factor.reciprocal()], dim=2)
            all_values = [*image.values, values]
        with maybe_autocast(weights.device.type, enabled=False):
            variance = self.sum_of_squares(weights, all_values, terms, products) / self.weight.shape[0]
            variance = variance if image is None else variance * image.factor.float().square()
            factor = (variance.clamp(min=0) + self.eps).rsqrt().to(weights.dtype)
        return EfficientSamPromptedImage(factor if image is None else image.factor * factor, weights, all_values)

    def sum_of_squares(
        self,
        weights: Tensor,
        values: list[Tensor],
        terms: EfficientSamImageTerms,
        products: tuple[Tensor, list[Tensor]],
    ) -> Tensor:
        """Of each cell's channels before the factor, (B, Q, 1, S), as a quadratic form of the weights (B, Q, R, S)."""
        weights, values = weights.float(), [part.float() for part in values]
        rows = [(part @ basis.float()).flatten(2, 3) for part, basis in zip(values, terms.bases, strict=True)]
        parts = weights.split([row.shape[2] for row in rows], dim=2)
        total = products[0]
        for number, (part, product) in enumerate(zip(values, products[1], strict=True)):
            crossed = multiply_shared(part, product).flatten(2, 3)
            # Of two looks the products count twice, so that the later ones need not look back at the earlier ones.
            later = [2 * row for row in rows[number + 1 :]]
            form = rows[number] @ torch.cat([rows[number], *later], dim=2).transpose(2, 3)
            looks = parts[number] if not later else torch.cat(parts[number:], dim=2) if number else weights
            form = add_product(crossed.flatten(0, 1), form.flatten(0, 1), looks.flatten(0, 1))
            total = total + (form.view_as(crossed) * parts[number]).sum(2, keepdim=True)
        return total


@dataclass
class EfficientSamPreparedBlock:
    """What a block computes once a picture."""

    keys: EfficientSamProjectedCells
    values: EfficientSamProjectedCells
    queries: EfficientSamProjectedCells
    terms: EfficientSamImageTerms
    products: tuple[Tensor, list[Tensor]]


class EfficientSamTwoWayBlock(GradientCheckpointingLayer):
    """Tokens look at each other, at the image, think, and the image looks back.

    Unlike SAM's block, token positions enter the residual stream here (in every block but the first), and the first
    block keeps its residual.
    """

    def __init__(self, config: EfficientSamMaskDecoderConfig, is_first: bool):
        super().__init__()
        self.is_first = is_first
        self.self_attention = EfficientSamTokenAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.token_to_image = EfficientSamTokenToImageAttention(config, config.attention_downsample_rate)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = EfficientSamMLP(
            config.hidden_size, config.mlp_dim, config.hidden_size, hidden_act=config.hidden_act
        )
        self.layer_norm3 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.image_to_token = EfficientSamImageToTokenAttention(config, config.attention_downsample_rate)
        self.layer_norm4 = EfficientSamImageLayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def prepare(
        self, terms: EfficientSamImageTerms, positions: Tensor
    ) -> tuple[EfficientSamPreparedBlock, EfficientSamImageTerms]:
        """What does not depend on the prompts, and the terms that the next block starts from."""
        keys, values = self.token_to_image.prepare(terms, positions)
        queries, seen = self.image_to_token.prepare(terms, positions)
        prepared = EfficientSamPreparedBlock(keys, values, queries, seen, self.layer_norm4.prepare(seen))
        return prepared, seen.scaled(self.layer_norm4)

    def forward(
        self,
        tokens: Tensor,
        image: EfficientSamPromptedImage | None,
        token_positions: Tensor,
        repeats: Tensor,
        prepared: EfficientSamPreparedBlock,
    ) -> tuple[Tensor, EfficientSamPromptedImage]:
        """Tokens (B, Q, T, C) and the prompts' images, None before the first block -> both, updated."""
        if not self.is_first:
            tokens = tokens + token_positions
        tokens = self.layer_norm1(tokens + self.self_attention(tokens, repeats))
        looked = self.token_to_image(tokens + token_positions, image, prepared.keys, prepared.values)[0]
        tokens = self.layer_norm2(tokens + looked)
        tokens = self.layer_norm3(tokens + self.mlp(tokens))
        weights, values = self.image_to_token(tokens + token_positions, tokens, repeats, image, prepared.queries)
        return tokens, self.layer_norm4.add(image, weights, values, prepared.terms, prepared.products)


class EfficientSamTwoWayTransformer(nn.Module):
    """Tokens and image inform each other; the tokens have the last look."""

    def __init__(self, config: EfficientSamMaskDecoderConfig):
        super().__init__()
        self.blocks = nn.ModuleList(
            EfficientSamTwoWayBlock(config, is_first=index == 0) for index in range(config.num_hidden_layers)
        )
        self.final_token_to_image = EfficientSamTokenToImageAttention(config, config.attention_downsample_rate)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def prepare(self, image: Tensor, positions: Tensor) -> tuple[list, EfficientSamImageTerms]:
        """Image (B, S, C), positions (S, C) -> what blocks and last look compute once a picture; the last terms."""
        terms, prepared = EfficientSamImageTerms(image, [], torch.zeros_like(image[0, 0])), []
        for block in self.blocks:
            block_prepared, terms = cast(EfficientSamTwoWayBlock, block).prepare(terms, positions)
            prepared.append(block_prepared)
        return [*prepared, self.final_token_to_image.prepare(terms, positions)], terms

    def forward(self, tokens: Tensor, repeats: Tensor, prepared: list) -> tuple[Tensor, EfficientSamPromptedImage]:
        """Tokens (B, Q, T, C) -> tokens (B, Q, T, C) before their last look, and the prompts' images."""
        token_positions, image = tokens, cast(EfficientSamPromptedImage, None)
        for block, block_prepared in zip(self.blocks, prepared[:-1], strict=True):
            tokens, image = block(tokens, image, token_positions, repeats, block_prepared)
        return tokens, image

    def last_look(
        self, tokens: Tensor, token_positions: Tensor, image: EfficientSamPromptedImage, prepared: list
    ) -> Tensor:
        """Any of the tokens (B, Q, T, C) with their positions, (T, C) -> (B, Q, T, C)."""
        looked = self.final_token_to_image(tokens + token_positions, image, *prepared[-1])[0]
        return self.final_layer_norm(tokens + looked)


@dataclass
class EfficientSamPreparedImage:
    """What the mask decoder computes once a picture, however many prompts follow.

    Args:
        transformer: For each block and the last look.
        upscaling: The last terms after the first of the upscaling convolutions, the coarse details in their shift.
        channel_means: Of these terms.
        size: h, w.
        fine: The fine details, (B, h * w, 4, 4 * channels), or None.
    """

    transformer: list
    upscaling: EfficientSamImageTerms
    channel_means: EfficientSamImageTerms
    size: tuple[int, int]
    fine: Tensor | None = None


class EfficientSamMaskDecoder(EfficientSamPreTrainedModel):
    """Prompt tokens and image embeddings become masks and how good they are."""

    config: EfficientSamMaskDecoderConfig
    _can_record_outputs = {
        "mask_decoder_attentions": OutputRecorder(
            EfficientSamTokenToImageAttention, index=1, layer_name="token_to_image"
        )
    }

    def __init__(self, config: EfficientSamMaskDecoderConfig):
        super().__init__(config)
        width, (width1, width2) = config.hidden_size, config.upscaling_channels
        self.iou_token = nn.Parameter(torch.zeros(1, width))
        self.mask_tokens = nn.Parameter(torch.zeros(config.num_mask_tokens, width))
        self.transformer = EfficientSamTwoWayTransformer(config)
        self.upscale_conv1 = nn.ConvTranspose2d(width, width1, kernel_size=2, stride=2)
        # One group: the mean and variance run over all channels and pixels of a prompt's embedding.
        self.upscale_norm = nn.GroupNorm(1, width1)
        self.upscale_conv2 = nn.ConvTranspose2d(width1, width2, kernel_size=2, stride=2)
        self.activation = ACT2FN[config.hidden_act]
        self.hypernetworks = nn.ModuleList(
            EfficientSamMLP(width, width, width, width2, hidden_act=config.hidden_act)
            for _ in range(config.num_mask_tokens)
        )
        hidden = [config.iou_head_hidden_dim] * (config.iou_head_depth - 1)
        self.iou_head = EfficientSamMLP(width, *hidden, config.num_mask_tokens, hidden_act=config.hidden_act)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        image_embeddings: Tensor,
        image_positions: Tensor,
        prompts: Tensor,
        dense: Tensor | None,
        last_stands_for: int | Tensor,
        chosen: slice,
        **kwargs: Unpack[TransformersKwargs],
    ) -> EfficientSamMaskDecoderOutput:
        """Decode each prompt by itself.

        Args:
            image_embeddings: (B, C, h, w); further channels are details, as the vision encoder gives them.
            image_positions: (h * w, C).
            prompts: (B, Q, P, C).
            dense: What mask prompts add to the image, (B, Q, h * w, C) or (1, C), or None.
            last_stands_for: How many slots the last of the P tokens stands for; as (B, Q, P), how many each does.
            chosen: Which of the mask tokens answer.
            **kwargs: Nothing that the decoder uses.
        """
        batch, count = prompts.shape[:2]
        if self.writes_images_out(prompts) and not kwargs.get("output_attentions", self.config.output_attentions):
            scores, masks = self.write_out(
                image_embeddings=image_embeddings,
                image_positions=image_positions,
                prompts=prompts,
                dense=dense,
                last_stands_for=last_stands_for,
                chosen=chosen,
            )
            return EfficientSamMaskDecoderOutput(iou_scores=scores, pred_masks=masks)
        if dense is not None and dense.ndim == 4:
            # With a mask each prompt has an image of its own.
            image_embeddings = image_embeddings[:, None].expand(-1, count, -1, -1, -1).flatten(0, 1)
            dense, prompts = dense.flatten(0, 1), prompts.flatten(0, 1)[:, None]
            if isinstance(last_stands_for, Tensor):
                last_stands_for = last_stands_for.flatten(0, 1)[:, None]
        prepared = self.prepare(image_embeddings, image_positions, dense)
        tokens, image = self.look(prepared, prompts, last_stands_for)
        answers = self.last_look(tokens, image, prepared, [0, *self.numbers(chosen)])
        scores, masks = self.predict_iou(answers, chosen), self.draw_masks(answers[:, :, 1:], image, prepared, chosen)
        return EfficientSamMaskDecoderOutput(
            iou_scores=scores.reshape(batch, count, scores.shape[-1]),
            pred_masks=masks.reshape(batch, count, *masks.shape[2:]),
        )

    def writes_images_out(self, prompts: Tensor) -> bool:
        """Whether each prompt's image is written out, which changes how long the answer takes and nothing else."""
        if prompts.device.type == "cpu" or torch.is_grad_enabled() or torch.compiler.is_exporting():
            return False  # before an exported graph, whose number of prompts is open, is asked for it
        return 0 < prompts.shape[1] <= FEW_PROMPTS

    def write_out(self, **inputs: Any) -> tuple[Tensor, Tensor]:
        """What `forward` takes, with each prompt's image written out -> scores, masks."""
        return decode_tiled(self, **inputs)

    def prepare(
        self, image_embeddings: Tensor, image_positions: Tensor, dense: Tensor | None
    ) -> EfficientSamPreparedImage:
        """What all prompts share: image (B, C, h, w), its positions (h * w, C), what is added to it or None.

        Details are added to what the upscaling convolutions give, as in SAM 2; so they are biases of each cell.
        """
        width1, width2 = self.config.upscaling_channels
        cells = image_embeddings.flatten(2).transpose(1, 2)
        image, details = cells[..., : self.config.hidden_size].contiguous(), cells[..., self.config.hidden_size :]
        image = image if dense is None else image + dense
        prepared, terms = self.transformer.prepare(image, image_positions)
        upscaling, fine = terms.through(spreading_matrix(self.upscale_conv1)), None
        upscaling.shift = upscaling.shift + self.upscale_conv1.bias.repeat(4)
        if details.shape[2]:
            coarse, fine = details.split([4 * width1, 16 * width2], dim=2)
            upscaling.shift = (upscaling.shift + coarse[:, None]).contiguous()
            fine = fine.unflatten(2, (4, -1)).contiguous()
        size = image_embeddings.shape[-2], image_embeddings.shape[-1]
        return EfficientSamPreparedImage(prepared, upscaling, upscaling.averaged(), size, fine)

    def look(
        self, prepared: EfficientSamPreparedImage, prompts: Tensor, last_stands_for: int | Tensor
    ) -> tuple[Tensor, EfficientSamPromptedImage]:
        """The two-way transformer: prompts (B, Q, P, C) -> tokens (B, Q, T, C) and the prompts' images.

        The tokens, of which the first is for the IoU and the next for the masks, have their last look still to come.
        """
        output_tokens = self.output_tokens().expand(*prompts.shape[:2], -1, -1)
        tokens = torch.cat([output_tokens, prompts], dim=2)
        if isinstance(last_stands_for, Tensor):
            repeats = F.pad(last_stands_for.log().to(tokens.dtype), (output_tokens.shape[2], 0))
        else:
            # A scalar tensor, because an exported graph learns only from its inputs how many slots are free.
            count = torch.scalar_tensor(last_stands_for, device=tokens.device)
            repeats = F.pad(count.log().to(tokens.dtype)[None], (tokens.shape[2] - 1, 0))
        return self.transformer(tokens, repeats, prepared.transformer)

    def output_tokens(self) -> Tensor:
        """What answers before it has seen anything: one for the IoU, one for each mask (1 + masks, C)."""
        return torch.cat([self.iou_token, self.mask_tokens])

    def numbers(self, chosen: slice) -> list[int]:
        """Places of the chosen mask tokens among all tokens."""
        return list(range(1, 1 + self.config.num_mask_tokens)[chosen])

    def last_look(
        self, tokens: Tensor, image: EfficientSamPromptedImage, prepared: EfficientSamPreparedImage, numbers: list[int]
    ) -> Tensor:
        """The tokens of these numbers look at the image once more, (B, Q, T, C) -> (B, Q, len(numbers), C).

        No other token sees what they do, so that only those take it whose answer is wanted.
        """
        # Not by a list of numbers, for which a GPU would be waited for.
        chosen, first = (torch.stack([t[..., n, :] for n in numbers], dim=-2) for t in (tokens, self.output_tokens()))
        return self.transformer.last_look(chosen, first, image, prepared.transformer)

    def bytes_per_prompt(self, cells: int) -> int:
        """About what one prompt takes while its masks are drawn over an embedding grid of so many cells."""
        return cells * self.config.values_per_cell * self.iou_token.element_size()

    def predict_iou(self, tokens: Tensor, chosen: slice) -> Tensor:
        """How good the chosen masks will be, known before they are drawn.

        Tokens (B, Q, T, C) after the last look, the first of them for the IoU -> (B, Q, M).
        """
        return self.iou_head(tokens[:, :, 0])[..., chosen]

    def draw_masks(
        self, tokens: Tensor, image: EfficientSamPromptedImage, prepared: EfficientSamPreparedImage, chosen: slice
    ) -> Tensor:
        """The chosen masks' tokens (B, Q, M, C) after the last look, and the images -> logits (B, Q, M, 4h, 4w)."""
        height, width = prepared.size
        # One group of all channels: mean and variance run over everything but the batch.
        cells = image.written_out(prepared.upscaling, less=prepared.channel_means)
        weights = self.mask_weights(tokens, chosen).flatten(0, 1)
        # Cell by cell first: one sum of a million squares would lose digits.
        precise = torch.promote_types(cells.dtype, torch.float32)
        lengths = torch.linalg.vector_norm(cells, dim=2, keepdim=True, dtype=precise)
        variance = lengths.square().sum(1, keepdim=True) / math.prod(cells.shape[1:])
        factor = (variance + self.upscale_norm.eps).rsqrt().to(cells.dtype)
        gain, shift = self.upscale_norm.weight.repeat(4) * factor, self.upscale_norm.bias.repeat(4)
        halving = spreading_matrix(self.upscale_conv2), self.upscale_conv2.bias.repeat(4)
        fine = prepared.fine
        if fine is not None:
            fine = fine[:, None].expand(-1, tokens.shape[1], -1, -1, -1).flatten(0, 1)
        if not may_reuse_memory(cells):
            masks = self.draw_cells(cells, gain, shift, halving, weights, fine)
        else:
            # Some cells at a time, so that what is large stays in the cache and in memory that is used again.
            size = max(1, DRAWN_CELLS // max(1, len(cells)))
            parts = cells.split(size, dim=1)
            details = [None] * len(parts) if fine is None else fine.split(size, dim=1)
            parts = [
                self.draw_cells(part, gain, shift, halving, weights, own)
                for part, own in zip(parts, details, strict=True)
            ]
            masks = torch.cat(parts, dim=2)
        masks = in_rows_and_columns(masks, height, width)
        return masks.reshape(*tokens.shape[:2], *masks.shape[1:])

    def draw_cells(
        self,
        cells: Tensor,
        gain: Tensor,
        shift: Tensor,
        halving: tuple[Tensor, Tensor],
        weights: Tensor,
        fine: Tensor | None = None,
    ) -> Tensor:
        """Cells (N, S, 4 * channels) to be normed and enlarged, filters (N, M, channels) -> logits (N, M, S, 16).

        `halving` is the second enlargement's matrix and bias, `fine` (N, S, 4, 4 * channels) the fine details, if any.
        """
        halves = self.activate(torch.addcmul(shift, cells, gain)).unflatten(-1, (4, -1))
        quarters = F.linear(halves, *halving)
        quarters = quarters if fine is None else quarters.add_(fine)
        quarters = self.activate(quarters).unflatten(-1, (4, -1)).flatten(1, 3)
        return (weights @ quarters.transpose(1, 2)).unflatten(-1, (-1, 16))

    def activate(self, values: Tensor) -> Tensor:
        """The activation, in place where nothing is to be learnt: new memory costs a CPU as much as the arithmetic."""
        if self.config.hidden_act == "gelu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return torch.ops.aten.gelu_(values)
        return self.activation(values)

    def mask_weights(self, mask_tokens: Tensor, chosen: slice) -> Tensor:
        """Each chosen mask token's own network turns it into a filter: (B, Q, M, C) -> (B, Q, M, channels)."""
        networks = enumerate(self.hypernetworks[chosen])
        return torch.stack([network(mask_tokens[:, :, number]) for number, network in networks], dim=2)


def in_rows_and_columns(masks: Tensor, height: int, width: int) -> Tensor:
    """Of each cell, by row and column, its halves and their halves (N, M, h * w, 16) -> (N, M, 4h, 4w)."""
    pair = {4: torch.float64, 2: torch.float32}.get(masks.element_size())
    if pair is None or not may_reuse_memory(masks):
        masks = masks.unflatten(2, (height, width)).unflatten(-1, (2, 2, 2, 2)).permute(0, 1, 2, 4, 6, 3, 5, 7)
        return masks.reshape(*masks.shape[:2], 4 * height, 4 * width)
    # Two neighbours are moved as if they were one number, in half the time.
    pairs = masks.view(pair).unflatten(2, (height, width)).unflatten(-1, (2, 2, 2)).permute(0, 1, 2, 4, 6, 3, 5)
    return pairs.reshape(*pairs.shape[:2], 4 * height, 2 * width).view(masks.dtype)


def spreading_matrix(convolution: nn.ConvTranspose2d) -> Tensor:
    """What a 2 x 2 transposed convolution of stride 2 does with a cell: (4 * output channels, channels)."""
    return convolution.weight.permute(2, 3, 1, 0).flatten(0, 2)


# --------------------------------------------------------------------------------------------------------------------
# Whole models


class EfficientSamVisionModel(EfficientSamPreTrainedModel):
    """The image encoder alone; loads from a whole model's checkpoint too."""

    config: EfficientSamVisionConfig
    _keys_to_ignore_on_load_unexpected = [r"^prompt_encoder", r"^mask_decoder", r"^shared_image_embedding"]

    def __init__(self, config: EfficientSamVisionConfig):
        super().__init__(config)
        self.vision_encoder = EfficientSamVisionEncoder(config)
        self.post_init()

    def forward(self, pixel_values: Tensor, **kwargs: Unpack[TransformersKwargs]) -> EfficientSamVisionOutput:
        """Pictures (B, 3, H, W), normalised, H and W multiples of the patch size -> `EfficientSamVisionOutput`."""
        return self.vision_encoder(pixel_values, **kwargs)


def refuse_other_prompts(keywords: Iterable[str]) -> None:
    """Refuse keywords that look like prompts.

    Raises:
        TypeError: names the first, and what prompts are called.
    """
    for keyword in keywords:
        if keyword.startswith(PROMPT_LIKE):
            wanted = "input_points, input_labels, input_boxes, input_masks, labels, multimask_output"
            raise TypeError(f"EfficientSamModel takes no {keyword!r}, wanted some of {wanted}")


class EfficientSamModel(EfficientSamPreTrainedModel):
    """The paper's figure: an image encoder, a prompt encoder, a mask decoder."""

    # Takes keyword arguments, but none that tell how many batches a step has: the Trainer must divide the loss.
    accepts_loss_kwargs = False

    def __init__(self, config: EfficientSamConfig):
        super().__init__(config)
        self.shared_image_embedding = EfficientSamPositionalEmbedding(config.prompt_encoder_config)
        self.vision_encoder = EfficientSamVisionEncoder(config.vision_config)
        self.prompt_encoder = EfficientSamPromptEncoder(config.prompt_encoder_config)
        self.mask_decoder = EfficientSamMaskDecoder(config.mask_decoder_config)
        self.post_init()

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """As transformers' own, which notes one Auto class of a class that travels with its code: here it is both."""
        if self._auto_class is not None:
            own = f"{type(self).__module__.rpartition('.')[2]}.{type(self).__name__}"
            noted = getattr(self.config, "auto_map", None) or {}
            self.config.auto_map = {**noted, "AutoModel": own, "AutoModelForMaskGeneration": own}
        super().save_pretrained(save_directory, **kwargs)

    def _set_gradient_checkpointing(self, *arguments: Any, **options: Any) -> None:
        """As transformers' own, for the only kind that follows tensors into the decoder's records."""
        chosen = getattr(options.get("gradient_checkpointing_func"), "keywords", {"use_reentrant": False})
        if chosen.get("use_reentrant", True):
            raise ValueError(f"gradient checkpointing must have use_reentrant=False, got {chosen}")
        super()._set_gradient_checkpointing(*arguments, **options)

    def get_image_embeddings(self, pixel_values: Tensor, **kwargs: Unpack[TransformersKwargs]) -> Tensor:
        """Pictures (B, 3, H, W) -> embeddings (B, C, h, w), once a picture, however many prompts follow."""
        return self.vision_encoder(pixel_values, **kwargs).last_hidden_state

    def get_image_wide_positional_embeddings(self, height: int, width: int) -> Tensor:
        """Positional encodings of the embedding grid's cells, (height * width, C), float32."""
        return self.shared_image_embedding.grid(height, width)

    def get_prompt_embeddings(
        self, input_points: Tensor | None, input_labels: Tensor | None, input_boxes: Tensor | None, size: Tensor
    ) -> Tensor:
        """Prompts in pixels of a picture of `size` (width, height) -> tokens (B, Q, P + 1, C), see the encoder's."""
        points, labels = gather_slots(input_points, input_labels, input_boxes)
        return self.prompt_encoder(self.shared_image_embedding, points, labels, size)

    @merge_with_config_defaults
    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_points: Tensor | None = None,
        input_labels: Tensor | None = None,
        input_boxes: Tensor | None = None,
        input_masks: Tensor | None = None,
        image_embeddings: Tensor | None = None,
        labels: Tensor | None = None,
        multimask_output: bool = True,
        **kwargs: Unpack[TransformersKwargs],
    ) -> EfficientSamOutput:
        """Encode, prompt, decode.

        Args:
            pixel_values: Pictures (B, 3, H, W), normalised, H and W multiples of the patch size.
            input_points: (B, Q, P, 2) x, y in pixels of the H x W square; the processor scales them.
            input_labels: (B, Q, P): 1 object, 0 background, -1 no point (padding). All 1 if left out.
            input_boxes: (B, Q, 4) x0, y0, x1, y1 in the same pixels; four times -1 is no box (padding).
            input_masks: Logits of an earlier answer, (B, Q, 4h, 4w), for configs with `mask_prompts`.
            image_embeddings: (B, C, h, w), instead of `pixel_values`, for the next prompt on the same pictures.
            labels: True masks (B, Q, any, any), 1, 0, or below 0 for unknown; give a loss (see `loss_efficientsam`).
            multimask_output: All three masks of an ambiguous prompt, or the single best one.
            **kwargs: What `TransformersKwargs` lists, such as `output_hidden_states`; and the processor's
                `original_sizes`, which nothing here depends on.

        Returns:
            `EfficientSamOutput`.

        Raises:
            TypeError: for a prompt under another name, which would be left out of the answer without a word.
            ValueError: if the inputs do not fit together or ask for what the config does not have.
        """
        kwargs.pop("original_sizes", None)
        refuse_other_prompts(kwargs)
        if (pixel_values is None) == (image_embeddings is None):
            found = "neither" if pixel_values is None else "both"
            raise ValueError(f"give either pixel_values or image_embeddings, got {found}")
        vision = EfficientSamVisionOutput(last_hidden_state=image_embeddings)
        if image_embeddings is None:
            vision = self.vision_encoder(pixel_values, **kwargs)
        embeddings = vision.last_hidden_state
        decoded = self.decode(
            embeddings, input_points, input_labels, input_boxes, input_masks, multimask_output, **kwargs
        )
        loss = None
        if labels is not None:
            loss = segmentation_loss(decoded.pred_masks, decoded.iou_scores, labels)["loss"]
        return EfficientSamOutput(
            loss=loss,
            iou_scores=decoded.iou_scores,
            pred_masks=decoded.pred_masks,
            image_embeddings=embeddings,
            vision_hidden_states=vision.hidden_states,
            vision_attentions=vision.attentions,
            mask_decoder_attentions=decoded.mask_decoder_attentions,
        )

    def decode(
        self,
        embeddings: Tensor,
        input_points: Tensor | None,
        input_labels: Tensor | None,
        input_boxes: Tensor | None,
        input_masks: Tensor | None,
        multimask_output: bool,
        **kwargs: Any,
    ) -> EfficientSamMaskDecoderOutput:
        """Embeddings (B, C, h, w) and prompts as in `forward` -> masks and their predicted IoU."""
        inputs = self.get_decoder_inputs(embeddings, input_points, input_labels, input_boxes, input_masks)
        single = not multimask_output and self.config.mask_decoder_config.single_mask_token
        chosen = slice(0, 1) if single else slice(1, None)
        decoded = self.mask_decoder(**inputs, chosen=chosen, **kwargs)
        if not multimask_output and not single:
            decoded.pred_masks, decoded.iou_scores = best_mask(
                decoded.pred_masks, decoded.iou_scores, self.config.rank_by_stability
            )
        return decoded

    def get_decoder_inputs(
        self,
        embeddings: Tensor,
        input_points: Tensor | None = None,
        input_labels: Tensor | None = None,
        input_boxes: Tensor | None = None,
        input_masks: Tensor | None = None,
    ) -> dict[str, Any]:
        """Embeddings (B, C, h, w) and prompts as in `forward` -> what the mask decoder's `forward` takes."""
        check_prompts(self.config, embeddings, input_points, input_labels, input_boxes, input_masks)
        if input_points is None and input_boxes is None:
            input_boxes = embeddings.new_full((*input_masks.shape[:2], 4), -1.0)
        image_inputs = self.get_image_inputs(embeddings, input_masks)
        return {**image_inputs, **self.get_prompt_inputs(embeddings, input_points, input_labels, input_boxes)}

    def get_image_inputs(self, embeddings: Tensor, input_masks: Tensor | None = None) -> dict[str, Any]:
        """Embeddings (B, C, h, w) and mask prompts as in `forward` -> what the mask decoder's `prepare` takes."""
        positions = self.get_image_wide_positional_embeddings(*embeddings.shape[-2:]).to(embeddings.dtype)
        dense = self.prompt_encoder.embed_masks(input_masks)
        return {"image_embeddings": embeddings, "image_positions": positions, "dense": dense}

    def get_prompt_inputs(
        self,
        embeddings: Tensor,
        input_points: Tensor | None,
        input_labels: Tensor | None = None,
        input_boxes: Tensor | None = None,
    ) -> dict[str, Any]:
        """Prompts as in `forward` -> what the mask decoder's `look` takes beside the prepared image."""
        patch, (height, width) = self.config.vision_config.patch_size, embeddings.shape[-2:]
        points, labels = gather_slots(input_points, input_labels, input_boxes)
        # Not copied from the main memory, for which no CUDA graph would be recorded.
        size = torch.cat([points.new_full((1,), patch * side, dtype=torch.float32) for side in (width, height)])
        prompts = self.prompt_encoder(self.shared_image_embedding, points, labels, size)
        return {"prompts": prompts, "last_stands_for": self.prompt_encoder.slots_of_tokens(labels, prompts.shape[2])}


def check_prompts(
    config: EfficientSamConfig,
    embeddings: Tensor,
    points: Tensor | None,
    labels: Tensor | None,
    boxes: Tensor | None,
    masks: Tensor | None,
) -> None:
    """Refuse embeddings and prompts of the wrong shape, or never taught; the processor has looked at their values.

    Raises:
        ValueError: naming what was found and what was wanted.
    """
    if points is None and boxes is None and masks is None:
        raise ValueError("give input_points, input_boxes or input_masks: got no prompt")
    if labels is not None and points is None:
        raise ValueError("got input_labels without the input_points that they are of")
    if masks is not None and not config.prompt_encoder_config.mask_prompts:
        raise ValueError("got input_masks, but this model never learnt mask prompts (config: mask_prompts=False)")
    check_shape("image_embeddings", embeddings, None, config.vision_config.embedding_channels, None, None)
    batch, _, height, width = embeddings.shape
    given = {"input_points": (points, (None, 2)), "input_boxes": (boxes, (4,))}
    given["input_masks"] = (masks, (4 * height, 4 * width))
    count = None
    for name, (tensor, shape) in given.items():
        if tensor is not None:
            check_shape(name, tensor, batch, count, *shape)
            count = tensor.shape[1]


def check_shape(name: str, tensor: Tensor, *wanted: int | None) -> None:
    """Refuse a tensor of another shape than wanted; where None is wanted, any number will do."""
    fits = tensor.ndim == len(wanted) and all(
        want is None or want == found for want, found in zip(wanted, tensor.shape, strict=True)
    )
    if not fits:
        text = ", ".join("*" if want is None else str(want) for want in wanted)
        raise ValueError(f"{name} must be ({text}), got {tuple(tensor.shape)}")


def best_mask(masks: Tensor, scores: Tensor, by_stability: bool = False) -> tuple[Tensor, Tensor]:
    """The best mask and its predicted IoU: (B, Q, M, h, w), (B, Q, M) -> (B, Q, 1, h, w), (B, Q, 1)."""
    best = rank_masks(masks, scores, by_stability).argmax(-1, keepdim=True)
    return masks.take_along_dim(best[..., None, None], dim=2), scores.take_along_dim(best, dim=2)


__all__ = [
    "EfficientSamModel",
    "EfficientSamOutput",
    "EfficientSamPreTrainedModel",
    "EfficientSamVisionModel",
    "EfficientSamVisionOutput",
]
