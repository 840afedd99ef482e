"""The mask decoder with each prompt's image written out, as SAM's decoder has it: for a GPU.

The model's own way writes no prompt's image out: that saves arithmetic, which is what is dear on a CPU, and memory
where a picture has many prompts. But it takes many small operations, which a GPU waits for: this way it is done
sooner with few prompts a picture, and when it learns, which takes nearly twice as many operations the other way, with
many, too. The answers are the same.

N = B * Q prompts of B pictures, T tokens, S cells, C channels. The decoder and its parts are those of
`modeling_efficientsam`, which imports this.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def decode_tiled(
    decoder: Any,
    image_embeddings: Tensor,
    image_positions: Tensor,
    prompts: Tensor,
    dense: Tensor | None,
    last_stands_for: int | Tensor,
    chosen: slice,
) -> tuple[Tensor, Tensor]:
    """Takes what the decoder's `forward` does -> predicted IoU (B, Q, M) and logits (B, Q, M, 4h, 4w)."""
    batch, count = prompts.shape[:2]
    size, width = image_embeddings.shape[-2:], decoder.config.hidden_size
    image = image_embeddings[:, None, :width].flatten(3).transpose(2, 3)
    image = (image if dense is None else image + dense).expand(batch, count, -1, -1).flatten(0, 1)
    prompts, repeats = write_out_slots(prompts, last_stands_for)
    first = torch.cat([decoder.output_tokens().expand(len(prompts), -1, -1), prompts], dim=1)
    if repeats is not None:
        repeats = F.pad(repeats, (first.shape[1] - repeats.shape[-1], 0))
    tokens, answering = first, [0, *decoder.numbers(chosen)]
    for block in decoder.transformer.blocks:
        tokens, image = take_block(block, tokens, first, image, image_positions, repeats)
    tokens, first = (torch.stack([part[:, number] for number in answering], dim=1) for part in (tokens, first))
    looked = attend(decoder.transformer.final_token_to_image, tokens + first, image + image_positions, image)
    tokens = decoder.transformer.final_layer_norm(tokens + looked)[:, None]
    upscaled = upscale(decoder, image.transpose(1, 2).unflatten(2, size), image_embeddings[:, width:], count)
    masks = (decoder.mask_weights(tokens[:, :, 1:], chosen)[:, 0] @ upscaled.flatten(2)).unflatten(0, (batch, count))
    scores = decoder.predict_iou(tokens, chosen).view(batch, count, -1)
    return scores, masks.unflatten(-1, upscaled.shape[-2:])


def upscale(decoder: Any, images: Tensor, details: Tensor, count: int) -> Tensor:
    """Images (N, C, h, w), details (B, channels, h, w) of `count` prompts each -> (N, channels, 4h, 4w)."""
    widths = decoder.config.upscaling_channels
    coarse, fine = details.split([4 * widths[0], 16 * widths[1]], dim=1) if details.shape[1] else (None, None)
    halves = add_details(decoder.upscale_conv1(images), coarse, widths[0], count)
    halves = decoder.activation(decoder.upscale_norm(halves))
    return decoder.activation(add_details(decoder.upscale_conv2(halves), fine, widths[1], count))


def add_details(images: Tensor, details: Tensor | None, width: int, count: int) -> Tensor:
    """Images (N, width, H, W) and details that lie in the embeddings' cells, by row and column of half and quarter."""
    if details is None:
        return images
    parts = details.unflatten(1, (-1, width)).transpose(1, 2)
    if parts.shape[2] == 16:
        # What comes last is spread first: halves, then their quarters.
        parts = parts.unflatten(2, (4, 4)).transpose(2, 3).flatten(2, 3)
    details = parts.flatten(1, 2)
    while details.shape[1] > width:
        details = F.pixel_shuffle(details, 2)
    return (images.unflatten(0, (-1, count)) + details[:, None]).flatten(0, 1)


def write_out_slots(prompts: Tensor, last_stands_for: int | Tensor) -> tuple[Tensor, Tensor | None]:
    """Prompts (B, Q, P, C) -> (N, P', C), the free slots as many tokens.

    Where each token stands for a share of a slot, the logarithms of the shares besides, (N, 1, 1, P).
    """
    if isinstance(last_stands_for, Tensor):
        return prompts.flatten(0, 1), last_stands_for.log().to(prompts.dtype).flatten(0, 1)[:, None, None]
    free = prompts[:, :, -1:].expand(-1, -1, last_stands_for - 1, -1)
    return torch.cat([prompts, free], dim=2).flatten(0, 1), None


def take_block(
    block: Any,
    tokens: Tensor,
    first: Tensor,
    image: Tensor,
    positions: Tensor,
    repeats: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Tokens (N, T, C), as they were at first, and images (N, S, C) with positions (S, C) -> both, updated."""
    tokens = tokens if block.is_first else tokens + first
    tokens = block.layer_norm1(tokens + attend(block.self_attention, tokens, tokens, tokens, repeats))
    placed = image + positions
    tokens = block.layer_norm2(tokens + attend(block.token_to_image, tokens + first, placed, image))
    tokens = block.layer_norm3(tokens + block.mlp(tokens))
    seen = attend(block.image_to_token, placed, tokens + first, tokens, repeats)
    # Not called, since this norm is asked for the terms of an image that is not written out.
    norm = block.layer_norm4
    return tokens, F.layer_norm(image + seen, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def attend(attention: Any, query: Tensor, key: Tensor, value: Tensor, repeats: Tensor | None = None) -> Tensor:
    """Query (N, T, C), key and value (N, S, C) -> (N, T, C); `repeats` (N, 1, 1, S) is added to all scores."""
    query, key, value = (
        project(states).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        for project, states in ((attention.q_proj, query), (attention.k_proj, key), (attention.v_proj, value))
    )
    dropout = attention.dropout if attention.training else 0.0
    looked = F.scaled_dot_product_attention(query, key, value, attn_mask=repeats, dropout_p=dropout)
    return attention.out_proj(looked.transpose(1, 2).flatten(2))
