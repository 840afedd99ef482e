"""The two ONNX files that osam, labelme and samexporter load, with the official files' names of inputs and outputs.

B pictures, Q prompts a picture, P points a prompt, M masks a prompt, h x w the embedding grid.

Unlike the official files these keep the model's numbers: masks are brought to the picture's size as the processor does
it without an `edge_radius`, any number of prompts is taken, and free slots stay free. Masks come best first, because
osam and labelme show the first.
"""

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from ..exported.engines import wanted_package
from ..masks_efficientsam import rank_masks
from ..modeling_efficientsam import EfficientSamModel
from ..pictures_efficientsam import read_picture
from ..prediction import segment
from ..processing_efficientsam import EfficientSamProcessor
from ..prompts_efficientsam import NO_POINT
from ..written_files import written_beside
from .checking import LARGEST_DIFFERENCE, LEAST_AGREEMENT, PHOTO, agreement, difference
from .formats import write_onnx
from .graphs import MOST_PICTURES, MOST_PROMPTS, MaskDecoderGraph, plain_copy, trace_one, tracing

LARGEST_SIDE = 32768


class OfficialEncoder(nn.Module):
    """Pictures (B, 3, H, W) in 0 to 1, of any size -> embeddings (B, C, h, w)."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: EfficientSamModel, processor: EfficientSamProcessor):
        super().__init__()
        self.model = model
        settings = processor.image_processor
        self.size = (settings.size.height, settings.size.width)
        self.antialias = settings.antialias
        self.register_buffer("mean", torch.tensor(settings.image_mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(settings.image_std).view(-1, 1, 1))

    def forward(self, batched_images: Tensor) -> Tensor:
        """The whole graph."""
        pixels = F.interpolate(
            batched_images, self.size, mode="bilinear", align_corners=False, antialias=self.antialias
        )
        return self.model.get_image_embeddings((pixels - self.mean) / self.std)


class OfficialDecoder(nn.Module):
    """Embeddings and points -> masks (B, Q, M, H, W), predicted IoU (B, Q, M), logits (B * Q, M, 4h, 4w).

    Points (B, Q, P, 2) are in pixels of the picture, labels (B, Q, P) floats: 1 object, 0 background, -1 no point, 2
    and 3 a box's corners. Points that are more than the model's slots are left out, as there.
    """

    def __init__(self, model: EfficientSamModel, processor: EfficientSamProcessor):
        super().__init__()
        self.config = model.config
        self.decoder = MaskDecoderGraph(model)
        self.interpolation = processor.image_processor.mask_interpolation
        self.slots = model.config.prompt_encoder_config.max_prompt_points

    def forward(
        self,
        image_embeddings: Tensor,
        batched_point_coords: Tensor,
        batched_point_labels: Tensor,
        orig_im_size: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The whole graph."""
        height, width = orig_im_size.tolist()
        for side in (height, width):
            torch._check(side >= 1)
            torch._check(side <= LARGEST_SIDE)
        cells = torch.tensor([image_embeddings.shape[-1], image_embeddings.shape[-2]])
        scale = cells * self.config.vision_config.patch_size / orig_im_size.flip(0)
        # Filled up first and cut then, so that the number of slots is known when the graph is traced.
        points = F.pad(batched_point_coords * scale, (0, 0, 0, self.slots))[:, :, : self.slots]
        labels = F.pad(batched_point_labels, (0, self.slots), value=NO_POINT)[:, :, : self.slots]
        scores, found = self.decoder(image_embeddings, points, labels.round().long())
        ranks = rank_masks(found, scores, self.config.rank_by_stability)
        order = ranks.argsort(dim=-1, descending=True)
        # A permutation matrix instead of an index, which would make the trace take B and Q for constants.
        chosen = (order[..., None] == torch.arange(order.shape[-1])).to(scores.dtype)
        scores = (chosen @ scores[..., None])[..., 0]
        logits = (chosen @ found.flatten(3)).view_as(found).flatten(0, 1)
        masks = F.interpolate(logits, (height, width), mode=self.interpolation, align_corners=False)
        return masks.view(*scores.shape, height, width), scores, logits


def export_for_osam(
    model: EfficientSamModel,
    processor: EfficientSamProcessor,
    folder: str | Path,
    photo: Any = PHOTO,
    overwrite: bool = False,
) -> dict[str, float]:
    """Write `efficient_sam_encoder.onnx` and `efficient_sam_decoder.onnx`.

    Args:
        model: A copy in float32 on the CPU is exported of any other.
        processor: The model's.
        folder: Where to; new or empty.
        photo: What the check looks at.
        overwrite: Take away what is in the folder.

    Returns:
        Largest differences from torch's answers on the photo, in standard deviations, and the masks' mean IoU.

    Raises:
        ValueError: if the answers are too far from torch's, or a package is missing.
        FileExistsError: if there is something in the folder.
    """
    model = plain_copy(model)
    with written_beside(Path(folder).resolve(), overwrite) as beside:
        paths = [beside / "efficient_sam_encoder.onnx", beside / "efficient_sam_decoder.onnx"]
        for graph, path in zip(trace_official(model, processor), paths, strict=True):
            write_onnx(graph, path)
        check = compare_official(model, processor, paths, photo)
        worst = max(check["image_embeddings"], check["iou_scores"])
        if not worst <= LARGEST_DIFFERENCE:
            raise ValueError(
                f"not exported: the answers differ from torch's by up to {worst:.1e} standard deviations, "
                f"wanted at most {LARGEST_DIFFERENCE:.0e}"
            )
        if not check["mask_iou"] >= LEAST_AGREEMENT["float32"]:
            raise ValueError(
                f"not exported: masks agree with torch's by a mean IoU of {check['mask_iou']:.3f}, "
                f"wanted at least {LEAST_AGREEMENT['float32']}"
            )
    return check


def trace_official(model: EfficientSamModel, processor: EfficientSamProcessor) -> list:
    """The graphs of encoder and decoder."""
    vision = model.config.vision_config
    cells = vision.image_size // vision.patch_size
    batch, queries = Dim("batch", min=1, max=MOST_PICTURES), Dim("queries", min=1, max=MOST_PROMPTS)
    height, width = (Dim(name, min=1, max=LARGEST_SIDE) for name in ("height", "width"))
    points = Dim("points", min=1, max=MOST_PROMPTS)
    encoder = {"batched_images": (torch.zeros(2, 3, 37, 53), {0: batch, 2: height, 3: width})}
    decoder = {
        "image_embeddings": (torch.zeros(2, vision.embedding_channels, cells, cells), {0: batch}),
        "batched_point_coords": (torch.zeros(2, 3, 4, 2), {0: batch, 1: queries, 2: points}),
        "batched_point_labels": (torch.ones(2, 3, 4), {0: batch, 1: queries, 2: points}),
        "orig_im_size": (torch.tensor([37, 53]), {}),
    }
    answers = ("output_masks", "iou_predictions", "low_res_masks")
    with tracing(model):
        return [
            trace_one(OfficialEncoder(model, processor), encoder, ("image_embeddings",)),
            trace_one(OfficialDecoder(model, processor), decoder, answers),
        ]


def compare_official(
    model: EfficientSamModel, processor: EfficientSamProcessor, paths: list[Path], photo: Any
) -> dict[str, float]:
    """How far the two files' answers to a click and a box are from `segment`'s, whose edges follow no photo then."""
    onnxruntime = wanted_package("onnxruntime", "the check of an ONNX file")
    encoder, decoder = (onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]) for path in paths)
    pixels = read_picture(photo)
    height, width = pixels.shape[-2:]
    click, box = [width / 2, height / 2], [0.2 * width, 0.25 * height, 0.8 * width, 0.75 * height]
    plain = deepcopy(processor)
    plain.image_processor.edge_radius = 0
    wanted = segment(model, plain, pixels, points=[[click], None], boxes=[None, box], zoom=0)
    (embeddings,) = encoder.run(None, {"batched_images": pixels[None].numpy().astype(np.float32) / 255})
    prompts = {
        "batched_point_coords": np.array([[[click, [0, 0]], [box[:2], box[2:]]]], dtype=np.float32),
        "batched_point_labels": np.array([[[1, NO_POINT], [2, 3]]], dtype=np.float32),
    }
    size = np.array([height, width], dtype=np.int64)
    masks, scores, _ = decoder.run(None, {"image_embeddings": embeddings, **prompts, "orig_im_size": size})
    return {
        "image_embeddings": difference(torch.from_numpy(embeddings), wanted.image_embeddings),
        "iou_scores": difference(torch.from_numpy(scores[0]), wanted.scores),
        "mask_iou": agreement(torch.from_numpy(masks[0]), wanted.masks.float() - 0.5),
    }
