"""What is exported: thin wrappers of the model's own forward, traced once for every format.

B pictures, Q prompts a picture, P slots a prompt, M masks a prompt, C channels, h x w the embedding grid.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..modeling_efficientsam import EfficientSamModel
from ..prompts_efficientsam import NO_POINT

MOST_PICTURES, MOST_PROMPTS = 1024, 65536


def plain_copy(model: EfficientSamModel) -> EfficientSamModel:
    """The model as graphs are traced, in float32 on the CPU; a copy where it is another."""
    plain = model.dtype == torch.float32 and model.device.type == "cpu"
    return model if plain else copy.deepcopy(model).float().cpu()


class VisionEncoderGraph(nn.Module):
    """Pictures (B, 3, H, W), normalised -> embeddings (B, C, h, w), both float32 whatever the weights are."""

    def __init__(self, model: EfficientSamModel):
        super().__init__()
        self.vision_encoder = model.vision_encoder  # alone: torch.export saves all weights, used or not

    def forward(self, pixel_values: Tensor) -> Tensor:
        """The whole graph."""
        return self.vision_encoder(pixel_values.to(self.vision_encoder.dtype)).last_hidden_state.float()


class MaskDecoderGraph(nn.Module):
    """Embeddings and prompts -> predicted IoU (B, Q, M) and mask logits (B, Q, M, 4h, 4w), float32.

    Boxes come as two slots with labels 2 and 3, as `gather_slots` makes them. The model leaves out the token of the
    free slots when none is free; a graph cannot. Here it always stays, and when it stands for no slot its logarithm
    is minus infinity, which no attention sees: the same numbers. With `padded_prompt_points` all free tokens
    of a prompt share its free slots.
    """

    def __init__(self, model: EfficientSamModel):
        super().__init__()
        self.model = copy.deepcopy(model)
        del self.model.vision_encoder
        prompts: Any = self.model.config.prompt_encoder_config
        self.filled, self.shares = prompts.filled_slots, prompts.padded_prompt_points is not None
        prompts.max_prompt_points += 1
        prompts.padded_prompt_points = None
        self.model.prompt_encoder.config = prompts

    def forward(
        self, image_embeddings: Tensor, input_points: Tensor, input_labels: Tensor, input_masks: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The whole graph."""
        embeddings = image_embeddings.to(self.model.dtype)
        inputs = self.model.get_decoder_inputs(embeddings, input_points, input_labels, input_masks=input_masks)
        inputs["last_stands_for"] = (
            self.shares_of_slots(input_labels) if self.shares else inputs["last_stands_for"] - 1
        )
        decoded = self.model.mask_decoder(**inputs, chosen=slice(1, None))
        return decoded.iou_scores.float(), decoded.pred_masks.float()

    def shares_of_slots(self, labels: Tensor) -> Tensor:
        """Labels (B, Q, P) -> how many slots each token stands for, and a free one behind them: (B, Q, P + 1)."""
        free = F.pad(labels, (0, 1), value=NO_POINT) == NO_POINT
        slots = (self.filled - (~free).sum(-1, keepdim=True)).clamp(min=0)
        return torch.where(free, slots / free.sum(-1, keepdim=True), 1.0)


@dataclass(frozen=True)
class Graph:
    """A traced graph.

    Args:
        program: What torch made of it.
        inputs: Names, in order.
        outputs: Names, in order.
    """

    program: ExportedProgram
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def trace(model: EfficientSamModel) -> dict[str, Graph]:
    """The graphs of a model by name: `vision_encoder`, `mask_decoder`, and `mask_refiner` if it reads masks.

    Pictures, prompts and slots may be any number, up to the slots that the model has.
    """
    vision, prompts = model.config.vision_config, model.config.prompt_encoder_config
    side, cells = vision.image_size, vision.image_size // vision.patch_size
    batch, queries = Dim("batch", min=1, max=MOST_PICTURES), Dim("queries", min=1, max=MOST_PROMPTS)
    slots = Dim("slots", min=1, max=prompts.max_prompt_points)
    outputs = ("iou_scores", "pred_masks")
    # No size is 1, nor the same as another: what a trace finds to be so it takes to be always so.
    decoder = {
        "image_embeddings": (torch.zeros(2, vision.embedding_channels, cells, cells), {0: batch}),
        "input_points": (torch.full((2, 3, 4, 2), side / 2), {0: batch, 1: queries, 2: slots}),
        "input_labels": (torch.ones(2, 3, 4, dtype=torch.int64), {0: batch, 1: queries, 2: slots}),
    }
    refiner = {**decoder, "input_masks": (torch.zeros(2, 3, 4 * cells, 4 * cells), {0: batch, 1: queries})}
    with tracing(model):
        pixels = {"pixel_values": (torch.zeros(2, 3, side, side), {0: batch})}
        graphs = {
            "vision_encoder": trace_one(VisionEncoderGraph(model), pixels, ("image_embeddings",)),
            "mask_decoder": trace_one(MaskDecoderGraph(model), decoder, outputs),
        }
        if prompts.mask_prompts:
            graphs["mask_refiner"] = trace_one(MaskDecoderGraph(model), refiner, outputs)
    return graphs


def trace_one(module: nn.Module, inputs: dict[str, tuple[Tensor, dict]], outputs: tuple[str, ...]) -> Graph:
    """Trace a wrapper with example inputs and the dimensions of each that may change."""
    examples = tuple(example for example, _ in inputs.values())
    shapes = {name: dimensions for name, (_, dimensions) in inputs.items()}
    program = torch.export.export(
        module.eval(),
        examples,
        dynamic_shapes=shapes,
        strict=False,
        # Of strides it asks whether (s + 6)(2 s + 12) is below 2 s + 12, and does not see that it never is.
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    return Graph(program, tuple(inputs), outputs)


@contextmanager
def tracing(model: EfficientSamModel) -> Iterator[None]:
    """Without gradients, and with the attention that every exporter knows; the model is left as it was."""
    attention, modes = model.config._attn_implementation, [(part, part.training) for part in model.modules()]
    model.set_attn_implementation("sdpa")
    # Torch looks up what it has traced before by sizes, which are names here: that takes longer than tracing it again.
    try:
        with torch.no_grad(), torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
            yield
    finally:
        model.set_attn_implementation(attention)
        for part, training in modes:
            part.training = training
