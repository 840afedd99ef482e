"""SAMI: the image encoder learns to guess a teacher's features of the whole picture from a quarter of its patches.

B pictures, T = h * w patches of a picture, V visible and M hidden ones, C the encoder's channels, D the decoder's.

Paper: Xiong et al., "EfficientSAM: Leveraged Masked Image Pretraining for Efficient Segment Anything", CVPR 2024,
section 3.2. Its authors released no code for this part; `docs/concepts/sami.md` says what the paper leaves open.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_efficientsam import EfficientSamConfig, EfficientSamVisionConfig
from .configuration_efficientsam_sami import EfficientSamSamiConfig, EfficientSamSamiDecoderConfig
from .modeling_efficientsam import (
    EfficientSamAttention,
    EfficientSamModel,
    EfficientSamPreTrainedModel,
    EfficientSamVisionEmbeddings,
    EfficientSamVisionLayer,
    vision_layers,
)


@dataclass
class EfficientSamMaskedEncoderOutput(ModelOutput):
    """What the encoder makes of the patches that it may see.

    Args:
        last_hidden_state: (B, V, C), in the order in which they were named.
        hidden_states: Input of the first layer and output of each, (B, 1, V, C), if asked for.
        attentions: Attention weights of each layer, (B, heads, V, V), if asked for and the implementation has them.
    """

    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class EfficientSamSamiOutput(ModelOutput):
    """What pretraining gives.

    Args:
        loss: Scalar, if there is a target.
        prediction: Guessed features or pixels of every patch, (B, h, w, prediction_channels).
        mask: True where a patch was hidden, (B, h, w).
        order: Numbers of the patches, row by row, the visible ones first, (B, h * w).
        hidden_states: As in `EfficientSamMaskedEncoderOutput`.
        attentions: As in `EfficientSamMaskedEncoderOutput`.
    """

    loss: Tensor | None = None
    prediction: Tensor | None = None
    mask: Tensor | None = None
    order: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


# --------------------------------------------------------------------------------------------------------------------
# Encoder and decoder


class EfficientSamMaskedEncoder(EfficientSamPreTrainedModel):
    """The image encoder without its neck, and for a part of the patches only: (B, 3, H, W) -> (B, V, C).

    Windows are off: chance leaves no neighbours to share one, and at 224 pixels a window of 14 patches is the picture.
    """

    config: EfficientSamVisionConfig
    _can_record_outputs = {"hidden_states": EfficientSamVisionLayer, "attentions": EfficientSamAttention}

    def __init__(self, config: EfficientSamVisionConfig):
        super().__init__(config)
        self.embeddings = EfficientSamVisionEmbeddings(config, with_details=False)
        self.layers = vision_layers(config, windows=False)
        self.gradient_checkpointing = False
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, EfficientSamVisionEmbeddings):
            # From noise a place would have to be learnt from the few patches that chance leaves around it.
            table = sines_and_cosines(module.grid_size, module.grid_size, self.config.hidden_size)
            table = F.pad(table.flatten(0, 1), (0, 0, 1, 0))[None]
            init.copy_(module.position_embedding, table.to(module.position_embedding))

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values: Tensor, visible: Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> EfficientSamMaskedEncoderOutput:
        """Pictures (B, 3, H, W), normalised, and the numbers (B, V) of the patches to see."""
        patches = self.embeddings(pixel_values)[0].flatten(1, 2)
        # A grid of one row, as the layers want it.
        hidden_states = patches.take_along_dim(visible[..., None], dim=1)[:, None]
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        return EfficientSamMaskedEncoderOutput(last_hidden_state=hidden_states[:, 0])


class EfficientSamCrossAttentionLayer(EfficientSamVisionLayer):
    """A pre-norm block in which only the hidden patches move: they look at the visible ones and at each other."""

    def forward(  # type: ignore[override]  # it needs two sets of patches
        self, hidden_states: Tensor, visible: Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> Tensor:
        """Hidden patches (B, M, D), visible ones (B, V, D) -> hidden patches (B, M, D)."""
        context = self.layer_norm1(torch.cat([visible, hidden_states], dim=1))
        queries = context[:, visible.shape[1] :]
        hidden_states = hidden_states + self.attention(queries, context=context, **kwargs)[0]
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


class EfficientSamSamiDecoder(EfficientSamPreTrainedModel):
    """Guesses every patch from the visible ones: (B, V, input_channels) -> (B, h, w, output_channels)."""

    config: EfficientSamSamiDecoderConfig

    def __init__(self, config: EfficientSamSamiDecoderConfig, input_channels: int, output_channels: int):
        super().__init__(config)
        self.is_cross = config.attention == "cross"
        layer = EfficientSamCrossAttentionLayer if self.is_cross else EfficientSamVisionLayer
        # The encoder's own last norm, which it has none of once a neck follows it.
        self.encoder_norm = nn.LayerNorm(input_channels, eps=config.layer_norm_eps)
        self.projection = nn.Linear(input_channels, config.hidden_size)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.layers = nn.ModuleList(layer(config, window_size=0) for _ in range(config.num_hidden_layers))
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.head = nn.Linear(config.hidden_size, output_channels)
        self.gradient_checkpointing = False
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, EfficientSamSamiDecoder):
            init.normal_(module.mask_token, std=self.config.initializer_range)

    def forward(self, encoded: Tensor, order: Tensor, size: tuple[int, int]) -> Tensor:
        """Encoded visible patches (B, V, C), all patches' order (B, T), size (h, w) of their grid."""
        visible, count = self.projection(self.encoder_norm(encoded)), encoded.shape[1]
        positions = sines_and_cosines(*size, visible.shape[-1], visible.device).flatten(0, 1).to(visible.dtype)[order]
        hidden = self.mask_token.to(visible.dtype) + positions[:, count:]
        placed = visible + positions[:, :count]
        if self.is_cross:
            for layer in self.layers:
                hidden = layer(hidden, placed)
            # The visible patches go round the decoder.
            grid = in_picture_order(torch.cat([visible, hidden], dim=1), order, size)
        else:
            grid = in_picture_order(torch.cat([placed, hidden], dim=1), order, size)
            for layer in self.layers:
                grid = layer(grid)
        return self.head(self.layer_norm(grid))


def in_picture_order(tokens: Tensor, order: Tensor, size: tuple[int, int]) -> Tensor:
    """Tokens (B, T, D) of the patches named by `order` (B, T) -> (B, h, w, D)."""
    return tokens.take_along_dim(order.argsort(dim=1)[..., None], dim=1).unflatten(1, size)


def sines_and_cosines(height: int, width: int, channels: int, device: torch.device | None = None) -> Tensor:
    """Fixed positions of a grid's cells, by column and by row (Vaswani et al., 2017), (height, width, channels)."""
    frequencies = 10_000 ** -torch.linspace(0, 1, channels // 4 + 1, device=device)[:-1]
    rows, columns = (torch.arange(side, device=device)[:, None] * frequencies for side in (height, width))
    rows, columns = (torch.cat([angles.sin(), angles.cos()], dim=1) for angles in (rows, columns))
    rows, columns = rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)
    return torch.cat([columns, rows], dim=-1)


# --------------------------------------------------------------------------------------------------------------------
# Targets and loss


def patch_pixels(pixel_values: Tensor, patch_size: int) -> Tensor:
    """Pictures (B, 3, H, W) -> the pixels of each patch (B, h, w, patch_size * patch_size * 3)."""
    patches = pixel_values.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))
    return patches.permute(0, 2, 4, 3, 5, 1).flatten(3)


def join_patches(patches: Tensor, patch_size: int) -> Tensor:
    """The inverse of `patch_pixels`: (B, h, w, patch_size * patch_size * 3) -> (B, 3, H, W)."""
    patches = patches.unflatten(3, (patch_size, patch_size, -1))
    return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def normalize_patches(targets: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the last dimension."""
    return F.layer_norm(targets, targets.shape[-1:], eps=1e-6)


def reconstruction_loss(prediction: Tensor, targets: Tensor, counted: Tensor, kind: str) -> Tensor:
    """The mean over patches of what is wrong with each, in float32.

    The mean squared error is over channels, too: the paper's sum over them is the same but for a factor, to which
    AdamW does not listen.

    Args:
        prediction: (B, h, w, channels).
        targets: (B, h, w, channels).
        counted: (B, h, w) bool, the patches that the mean is over.
        kind: "mse" or "cosine".
    """
    prediction, targets = prediction.float(), targets.float()
    if kind == "cosine":
        errors = 1 - F.cosine_similarity(prediction, targets, dim=-1)
    else:
        errors = (prediction - targets).square().mean(-1)
    return (errors * counted).sum() / counted.sum()


# --------------------------------------------------------------------------------------------------------------------
# The whole


class EfficientSamForPreTraining(EfficientSamPreTrainedModel):
    """Masked encoder, decoder, linear head, loss: SAMI, or MAE, as the config says."""

    config: EfficientSamSamiConfig
    _no_split_modules = ["EfficientSamVisionLayer", "EfficientSamCrossAttentionLayer"]
    _keys_to_ignore_on_load_unexpected = [r"^vision_encoder\.embeddings\.patch_embedding\.details"]
    # Takes keyword arguments, but none that tell how many batches a step has: the Trainer must divide the loss.
    accepts_loss_kwargs = False

    def __init__(self, config: EfficientSamSamiConfig):
        super().__init__(config)
        self.vision_encoder = EfficientSamMaskedEncoder(config.vision_config)
        self.decoder = EfficientSamSamiDecoder(
            config.decoder_config, config.vision_config.hidden_size, config.prediction_channels
        )
        self.post_init()

    @merge_with_config_defaults
    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        target_features: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> EfficientSamSamiOutput:
        """Hide, encode, guess, compare.

        Args:
            pixel_values: Pictures (B, 3, H, W), normalised, H and W multiples of the patch size.
            target_features: The teacher's (B, target_channels, h, w), for a config with that target.
            noise: (B, h * w): the patches with the smallest numbers stay visible. Drawn if left out.
            generator: Source of the noise if it is drawn.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`, arguments of the attention function.

        Returns:
            `EfficientSamSamiOutput`.

        Raises:
            ValueError: if the inputs do not fit together, or not the config.
        """
        size = tuple(side // self.config.vision_config.patch_size for side in pixel_values.shape[2:])
        order = self.draw_order(pixel_values, size, noise, generator)
        count = max(1, int(order.shape[1] * (1 - self.config.mask_ratio)))
        encoded = self.vision_encoder(pixel_values, order[:, :count], **kwargs)
        prediction = self.decoder(encoded.last_hidden_state, order, size)
        mask = (order.argsort(dim=1) >= count).unflatten(1, size)
        loss, targets = None, self.get_targets(pixel_values, target_features, size)
        if targets is not None:
            counted = torch.ones_like(mask) if self.config.loss_on_visible else mask
            loss = reconstruction_loss(prediction, targets, counted, self.config.loss)
        return EfficientSamSamiOutput(
            loss=loss,
            prediction=prediction,
            mask=mask,
            order=order,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    def draw_order(
        self, pixel_values: Tensor, size: tuple[int, ...], noise: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        """The patches' numbers in the order of their noise, (B, h * w)."""
        wanted = (pixel_values.shape[0], size[0] * size[1])
        if noise is None:
            # Where the generator lives; then wherever the pictures are.
            device = pixel_values.device if generator is None else generator.device
            noise = torch.rand(wanted, generator=generator, device=device)
        if tuple(noise.shape) != wanted:
            raise ValueError(f"noise must be {wanted}, a number a patch; got {tuple(noise.shape)}")
        return noise.to(pixel_values.device).argsort(dim=1)

    def get_targets(self, pixel_values: Tensor, features: Tensor | None, size: tuple[int, ...]) -> Tensor | None:
        """What is to be guessed, (B, h, w, channels); None if no features are given where they are the target."""
        if self.config.target == "pixels":
            if features is not None:
                raise ValueError("got target_features for a model that guesses pixels (config: target='pixels')")
            targets = patch_pixels(pixel_values, self.config.vision_config.patch_size)
        elif features is None:
            return None
        else:
            wanted = (pixel_values.shape[0], self.config.target_channels, *size)
            if tuple(features.shape) != wanted:
                raise ValueError(f"target_features must be {wanted}, got {tuple(features.shape)}")
            targets = features.permute(0, 2, 3, 1)
        return normalize_patches(targets.float()) if self.config.normalize_targets else targets

    def to_efficientsam(self, model: PreTrainedModel | None = None) -> PreTrainedModel:
        """A model that starts from the pretrained encoder; its neck, which pretraining does not have, starts anew.

        Args:
            model: Any with the same encoder, such as an `EfficientSamVisionModel`; it is changed. If None, an
                `EfficientSamModel` with a new prompt encoder and mask decoder.

        Raises:
            ValueError: if the encoders differ in more than the neck.
        """
        if model is None:
            vision = self.config.vision_config
            width = {"hidden_size": vision.output_channels}
            details = {"upscaling_channels": vision.detail_channels} if vision.detail_channels else {}
            parts = {"prompt_encoder_config": width, "mask_decoder_config": {**width, **details}}
            model = EfficientSamModel(EfficientSamConfig(vision_config=vision.to_dict(), **parts))
        own, other = self.vision_encoder.state_dict(), model.vision_encoder.state_dict()
        wanted = {name: tuple(value.shape) for name, value in own.items()}
        found = {name: tuple(value.shape) for name, value in other.items() if not name.startswith("neck.")}
        if wanted != found:
            name = sorted(name for name in wanted | found if wanted.get(name) != found.get(name))[0]
            raise ValueError(
                f"the encoders differ: {name} is {wanted.get(name)} in the pretrained one, "
                f"{found.get(name)} in the model"
            )
        model.vision_encoder.load_state_dict(own, strict=False)
        return model


__all__ = ["EfficientSamForPreTraining", "EfficientSamSamiOutput"]
