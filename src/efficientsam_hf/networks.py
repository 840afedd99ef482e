"""What `segment` and `segment_everything` ask of a model: whatever offers this can take its place.

B pictures, Q prompts a picture, P slots a prompt, M masks a prompt, T tokens, C channels, h x w the embedding grid.
`EfficientSamModel` offers it, and so does `ExportedEfficientSam`, which has no network of torch at all.
"""

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class SegmentationAnswer(Protocol):
    """What a network answers: `iou_scores` (B, Q, M), `pred_masks` (B, Q, M, 4h, 4w), `image_embeddings`."""

    iou_scores: Any
    pred_masks: Any
    image_embeddings: Any


@runtime_checkable
class MaskDecoder(Protocol):
    """Decodes clicks in two steps, so that masks that nobody wants need not be drawn."""

    def bytes_per_prompt(self, cells: int) -> int:
        """About what one prompt takes on an embedding grid of so many cells."""

    def prepare(self, **image_inputs: Any) -> Any:
        """What `get_image_inputs` gave -> what all prompts of a picture share, which only those below understand."""

    def look(self, prepared: Any, **prompt_inputs: Any) -> tuple[Tensor, Any]:
        """And what `get_prompt_inputs` gave -> tokens (B, Q, ...), and the prompts' images, indexed by prompts."""

    def numbers(self, chosen: slice) -> list[int]:
        """Which tokens are those of the chosen masks; number 0 is the one for the predicted IoU."""

    def last_look(self, tokens: Tensor, image: Any, prepared: Any, numbers: list[int]) -> Tensor:
        """Tokens and images, or the same prompts of both -> what the tokens of these numbers answer."""

    def predict_iou(self, tokens: Tensor, chosen: slice) -> Tensor:
        """The answer of token 0 -> predicted IoU (B, Q, M) of the chosen masks."""

    def draw_masks(self, tokens: Tensor, image: Any, prepared: Any, chosen: slice) -> Tensor:
        """The answers of the chosen masks' tokens, and the images -> logits (B, Q, M, 4h, 4w)."""


@runtime_checkable
class SegmentationNetwork(Protocol):
    """Encodes pictures once and answers prompts. `config` is an `EfficientSamConfig`; tensors live on `device`.

    Embeddings are given to it in `dtype`.
    """

    config: Any
    device: torch.device
    dtype: torch.dtype
    mask_decoder: Any  # a MaskDecoder

    def get_image_embeddings(self, pixel_values: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), normalised -> embeddings (B, C, h, w)."""

    def get_image_inputs(self, embeddings: Tensor) -> dict[str, Any]:
        """Embeddings -> what `mask_decoder.prepare` takes."""

    def get_prompt_inputs(self, embeddings: Tensor, input_points: Tensor) -> dict[str, Any]:
        """Embeddings and clicks (B, Q, P, 2) -> what `mask_decoder.look` takes beside the prepared image."""

    def __call__(self, **inputs: Any) -> SegmentationAnswer:
        """`pixel_values` or `image_embeddings`, and prompts as `EfficientSamModel.forward` takes them."""
