"""An exported folder as `segment` and `segment_everything` take a model.

B pictures, Q prompts a picture, P slots a prompt, M masks a prompt, h x w the embedding grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..configuration_efficientsam import EfficientSamConfig
from ..modeling_efficientsam import best_mask, check_prompts
from ..prompts_efficientsam import drop_padding, gather_slots
from .engines import start_engine
from .manifest import Manifest, read_manifest


@dataclass(frozen=True)
class ExportedOutput:
    """As far as `EfficientSamOutput` goes without training: see there."""

    iou_scores: Tensor
    pred_masks: Tensor
    image_embeddings: Tensor


class ExportedEfficientSam:
    """Runs a folder that `efficientsam export` wrote; no network is built in torch.

    Its tensors are float32 on the CPU, whatever the runtime computes in and wherever it runs.

    Args:
        folder: With a manifest.
        devices: Where the runtime computes: for ONNX its providers in order ("cpu", "cuda", "tensorrt", "coreml"),
            for OpenVINO "cpu", "gpu", "npu" or "auto". If None the CPU, but CUDA where onnxruntime has it.
        threads: Of onnxruntime or OpenVINO on a CPU; its own choice if None.

    Raises:
        ValueError: if a file is missing or was changed, or the runtime cannot run it (see `start_engine`).
    """

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(
        self, folder: str | Path, devices: Sequence[str] | str | None = None, threads: int | None = None
    ) -> None:
        self.folder = Path(folder)
        self.manifest: Manifest = read_manifest(folder)
        self.config = EfficientSamConfig.from_pretrained(self.folder)
        self.engine = start_engine(self.folder, self.manifest, devices, threads)
        self.mask_decoder = ExportedMaskDecoder(self)

    def run(self, graph: str, **inputs: Tensor) -> list[Tensor]:
        """Run a graph on tensors."""
        arrays = {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in inputs.items()}
        return [torch.from_numpy(array) for array in self.engine(graph, arrays)]

    def get_image_embeddings(self, pixel_values: Tensor) -> Tensor:
        """Pictures (B, 3, side, side) -> embeddings (B, C, h, w).

        Raises:
            ValueError: for pictures of another size than the folder was exported for.
        """
        side = self.manifest.image_size
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != (3, side, side):
            raise ValueError(f"pixel_values must be (B, 3, {side}, {side}), got {tuple(pixel_values.shape)}")
        if not len(pixel_values):  # which not every runtime can be asked
            cells = side // self.config.vision_config.patch_size
            return torch.zeros(0, self.config.vision_config.embedding_channels, cells, cells)
        return self.run("vision_encoder", pixel_values=pixel_values.float())[0]

    def __call__(
        self,
        pixel_values: Tensor | None = None,
        input_points: Tensor | None = None,
        input_labels: Tensor | None = None,
        input_boxes: Tensor | None = None,
        input_masks: Tensor | None = None,
        image_embeddings: Tensor | None = None,
        multimask_output: bool = True,
        original_sizes: Any = None,
    ) -> ExportedOutput:
        """As `EfficientSamModel.forward`; nothing depends on `original_sizes`.

        Raises:
            ValueError: for inputs that do not fit together, and for a single mask of a model whose mask token 0 learnt
                to give it, which the graph does not run.
        """
        single = not multimask_output
        if single and self.config.mask_decoder_config.single_mask_token:
            raise ValueError("exported graphs have no single mask token: found multimask_output=False, wanted True")
        embeddings = image_embeddings
        if pixel_values is not None and embeddings is None:
            embeddings = self.get_image_embeddings(pixel_values)
        elif pixel_values is not None or embeddings is None:
            found = "neither" if pixel_values is None else "both"
            raise ValueError(f"give either pixel_values or image_embeddings, got {found}")
        inputs = self.get_decoder_inputs(embeddings, input_points, input_labels, input_boxes, input_masks)
        scores, masks = self.decode(**inputs)
        if single:
            masks, scores = best_mask(masks, scores, self.config.rank_by_stability)
        return ExportedOutput(scores, masks, embeddings)

    def get_decoder_inputs(
        self,
        embeddings: Tensor,
        input_points: Tensor | None = None,
        input_labels: Tensor | None = None,
        input_boxes: Tensor | None = None,
        input_masks: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Embeddings and prompts as `EfficientSamModel.forward` takes them -> what the decoder's graph takes."""
        prompts = self.config.prompt_encoder_config
        check_prompts(self.config, embeddings, input_points, input_labels, input_boxes, input_masks)
        if input_points is None and input_boxes is None:
            input_boxes = embeddings.new_full((*input_masks.shape[:2], 4), -1.0)
        points, labels = gather_slots(input_points, input_labels, input_boxes)
        if points.shape[2] > prompts.max_prompt_points:
            points, labels = drop_padding(points, labels, prompts.max_prompt_points)
        inputs = {"image_embeddings": embeddings.float(), "input_points": points.float(), "input_labels": labels}
        return inputs if input_masks is None else {**inputs, "input_masks": input_masks.float()}

    def get_image_inputs(self, embeddings: Tensor) -> dict[str, Tensor]:
        """What the decoder's graph takes that all prompts share."""
        return {"image_embeddings": embeddings.float()}

    def get_prompt_inputs(self, embeddings: Tensor, input_points: Tensor) -> dict[str, Tensor]:
        """Embeddings and clicks (B, Q, P, 2) -> what the decoder's graph takes beside them."""
        inputs = self.get_decoder_inputs(embeddings, input_points)
        return {name: inputs[name] for name in ("input_points", "input_labels")}

    def decode(self, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        """What `get_decoder_inputs` gave -> predicted IoU (B, Q, M) and mask logits (B, Q, M, 4h, 4w)."""
        count, (height, width) = inputs["input_points"].shape[:2], inputs["image_embeddings"].shape[-2:]
        if 0 in count:  # which not every runtime can be asked
            several = self.config.mask_decoder_config.num_multimask_outputs
            return torch.zeros(*count, several), torch.zeros(*count, several, 4 * height, 4 * width)
        scores, masks = self.run("mask_refiner" if "input_masks" in inputs else "mask_decoder", **inputs)
        return scores, masks


class ExportedMaskDecoder:
    """What segment everything asks of a mask decoder, in several steps where the graph has one.

    `look` draws the masks of a picture, too, and what it hands over are the scores and masks themselves.
    """

    def __init__(self, model: ExportedEfficientSam):
        self.model = model

    def bytes_per_prompt(self, cells: int) -> int:
        """About what one prompt takes inside the graph, on an embedding grid of so many cells."""
        return 4 * cells * self.model.config.mask_decoder_config.values_per_cell

    def prepare(self, image_embeddings: Tensor) -> Tensor:
        """The embeddings (1, C, h, w) of a picture, as they are."""
        return image_embeddings

    def look(self, prepared: Tensor, **prompt_inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Decoder inputs -> predicted IoU (1, Q, M) and masks (Q, M, 4h, 4w)."""
        scores, masks = self.model.decode(image_embeddings=prepared, **prompt_inputs)
        return scores, masks[0]

    def numbers(self, chosen: Any) -> list[int]:
        """None: there are no tokens."""
        return []

    def last_look(self, tokens: Tensor, image: Tensor, prepared: Tensor, numbers: list[int]) -> Tensor:
        """The scores that `look` gave."""
        return tokens

    def predict_iou(self, tokens: Tensor, chosen: Any) -> Tensor:
        """The scores that `look` gave."""
        return tokens

    def draw_masks(self, tokens: Tensor, image: Tensor, prepared: Tensor, chosen: Any) -> Tensor:
        """The masks that `look` gave, (1, Q, M, 4h, 4w)."""
        return image[None]
