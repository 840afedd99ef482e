"""The field's other models as predictors: transformers' SAM, SAM-HQ, SAM 2 and EdgeTAM.

None of them needs torchvision here. SAM and SAM-HQ read pictures by transformers' Pillow class; SAM 2's and EdgeTAM's
own class wants torchvision, and this package's does as it does: stretched to the square, smoothed, masks brought back
bilinearly. Of several masks the one with the highest predicted IoU counts, after one click and after many alike.
"""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..image_processing_efficientsam import EfficientSamImageProcessor
from .predictor import Answer, Embedded, Prompts, module_hash


class TransformersPredictor(ABC):
    """What SAM's descendants in transformers have in common: their decoder takes what SAM's takes.

    Args:
        model: On any device, in evaluation mode.
        name: For tables.
    """

    background_clicks = True
    most_clicks: int | None = None
    mask_prompts = True

    def __init__(self, model: Any, name: str):
        self.model = model
        self.name = name
        self.parameters = sum(parameter.numel() for parameter in model.parameters())

    @abstractmethod
    def read(self, picture: Image.Image) -> tuple[Tensor, np.ndarray]:
        """What the encoder sees, (1, 3, S, S), and the factors of x and y from the picture to it."""

    def encode(self, pixel_values: Tensor) -> dict[str, Any]:
        """The encoder's work, as the model's forward takes it."""
        return {"image_embeddings": self.model.get_image_embeddings(pixel_values)}

    @torch.inference_mode()
    def embed(self, picture: Image.Image) -> Embedded:
        """See `Predictor`."""
        pixels, factors = self.read(picture)
        features = self.encode(pixels.to(self.model.device, self.model.dtype))
        return Embedded((features, factors), (picture.height, picture.width))

    @torch.inference_mode()
    def decode(self, embedded: Embedded, prompts: Prompts) -> Answer:
        """See `Predictor`; one by one where masks are shown, of which these models take one a picture."""
        if prompts.masks is None:
            return self.decode_some(embedded, prompts)
        parts = [self.decode_some(embedded, prompts[at : at + 1]) for at in range(len(prompts))]
        return Answer.join(parts)

    def decode_some(self, embedded: Embedded, prompts: Prompts) -> Answer:
        """All prompts in one call."""
        features, factors = embedded.features
        given: dict[str, Tensor] = {}
        if prompts.points is not None:
            given["input_points"] = torch.from_numpy(prompts.points * factors).float()[None]
            given["input_labels"] = torch.from_numpy(prompts.labels)[None]
        if prompts.boxes is not None:
            given["input_boxes"] = torch.from_numpy(prompts.boxes * np.tile(factors, 2)).float()[None]
        if prompts.masks is not None:
            given["input_masks"] = prompts.masks[:, None].to(self.model.dtype)
        given = {name: tensor.to(self.model.device) for name, tensor in given.items()}
        outputs = self.model(**features, **given, multimask_output=True)
        return Answer(outputs.pred_masks[0], outputs.iou_scores[0].float())

    def weights_hash(self) -> str:
        """See `Predictor`."""
        return module_hash(self.model)

    def settings(self) -> dict[str, Any]:
        """See `Predictor`; this module's reading of pictures follows from the config."""
        return {"config": self.model.config.to_dict()}


class SamPredictor(TransformersPredictor):
    """SAM and SAM-HQ: the long side to the model's size, the rest padded."""

    def __init__(self, model: Any, name: str):
        from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

        super().__init__(model, name)
        side = model.config.vision_config.image_size
        self.side = side
        self.image_processor = SamImageProcessorPil(
            size={"longest_edge": side},
            pad_size={"height": side, "width": side},
            mask_size={"longest_edge": side // 4},
            mask_pad_size={"height": side // 4, "width": side // 4},
        )

    def read(self, picture: Image.Image) -> tuple[Tensor, np.ndarray]:
        """See `TransformersPredictor`."""
        inputs = self.image_processor(picture, return_tensors="pt")
        height, width = inputs["reshaped_input_sizes"][0].tolist()
        return inputs["pixel_values"], np.array([width / picture.width, height / picture.height])

    def encode(self, pixel_values: Tensor) -> dict[str, Any]:
        """See `TransformersPredictor`; SAM-HQ has the embeddings of earlier layers, too."""
        found = self.model.get_image_embeddings(pixel_values)
        if isinstance(found, tuple):
            return {"image_embeddings": found[0], "intermediate_embeddings": found[1]}
        return {"image_embeddings": found}

    @torch.inference_mode()
    def at_size(self, embedded: Embedded, logits: Tensor) -> np.ndarray:
        """See `Predictor`."""
        _, factors = embedded.features
        height, width = embedded.size
        read = [round(height * factors[1]), round(width * factors[0])]
        pad = {"height": self.side, "width": self.side}
        masks = self.image_processor.post_process_masks(
            [logits[:, None].float()], [[height, width]], [read], pad_size=pad
        )
        return masks[0][:, 0].cpu().numpy()


class Sam2Predictor(TransformersPredictor):
    """SAM 2's and EdgeTAM's image models: stretched to the square."""

    def __init__(self, model: Any, name: str):
        super().__init__(model, name)
        side = model.config.prompt_encoder_config.image_size
        size = {"height": side, "width": side}
        self.image_processor = EfficientSamImageProcessor(size=size, antialias=True, mask_interpolation="bilinear")
        self.side = side

    def read(self, picture: Image.Image) -> tuple[Tensor, np.ndarray]:
        """See `TransformersPredictor`."""
        pixels = self.image_processor(picture, return_tensors="pt")["pixel_values"]
        return pixels, np.array([self.side / picture.width, self.side / picture.height])

    @torch.inference_mode()
    def at_size(self, embedded: Embedded, logits: Tensor) -> np.ndarray:
        """See `Predictor`."""
        masks = self.image_processor.post_process_masks(logits[None, None], [list(embedded.size)])[0][0]
        return masks.cpu().numpy()


__all__ = ["Sam2Predictor", "SamPredictor", "TransformersPredictor"]
