"""Pictures on their way into EfficientSAM, masks on their way out, and what `pipeline("mask-generation")` asks for.

B pictures of H x W pixels each, Q prompts a picture, M masks a prompt at h x w, C crops, N masks in a list.
"""

from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

from .edges_efficientsam import ColourGuide
from .masks_efficientsam import (
    cut_off_by_crop,
    decode_rle,
    encode_rle,
    layered_crops,
    masks_to_boxes,
    nms,
    point_grid,
    resize_masks,
    stability_score,
)
from .pictures_efficientsam import Picture, read_picture, rescale_pixels


class EfficientSamImageProcessorKwargs(TypedDict, total=False):
    """What `EfficientSamImageProcessor` takes when it is made, and again for a single call."""

    do_resize: bool
    size: Any
    antialias: bool
    do_rescale: bool
    rescale_factor: float
    do_normalize: bool
    image_mean: Any
    image_std: Any
    do_convert_rgb: bool
    mask_interpolation: str
    edge_radius: Any
    input_data_format: Any
    device: Any
    return_tensors: Any


class EfficientSamImageProcessor(BaseImageProcessor):
    """Stretches pictures to the model's square, and brings masks back to the pictures.

    One class for both backends of transformers, made of torch and Pillow alone. With the defaults its numbers are the
    official implementation's: float RGB in 0 to 1, bilinear without antialiasing, ImageNet's mean and deviation, masks
    brought back by bicubic interpolation.

    Args:
        size: `{"height": ..., "width": ...}` of the model's picture, or one number for a square.
        antialias: Smooth before shrinking; better for large photos, but not what the released weights have seen.
        do_rescale: Multiply uint8 by `rescale_factor`; floats must lie in 0 to 1 and are left alone.
        mask_interpolation: "bicubic" or "bilinear", for `post_process_masks`.
        edge_radius: Cells of the masks' grid around a cell in which `post_process_masks` fits a mask to the colours of
            its picture, so that edges follow those of the picture (`ColourGuide`); 0 only interpolates.
    """

    valid_kwargs = EfficientSamImageProcessorKwargs
    model_input_names = ["pixel_values"]

    do_resize = True
    size: Any = {"height": 1024, "width": 1024}
    antialias = False
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = (0.485, 0.456, 0.406)
    image_std = (0.229, 0.224, 0.225)
    do_convert_rgb = True
    mask_interpolation = "bicubic"
    edge_radius = 0

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self._set_attributes(**kwargs)

    def _standardize_kwargs(self, **kwargs: Any) -> dict:
        kwargs = super()._standardize_kwargs(default_to_square=True, **kwargs)
        size, mode, radius = kwargs["size"], kwargs["mask_interpolation"], kwargs["edge_radius"]
        if size is None or not (size.height and size.width):
            raise ValueError(f"size wants a height and a width, found {size and dict(size)}")
        if mode not in ("bicubic", "bilinear"):
            raise ValueError(f'mask_interpolation wants "bicubic" or "bilinear", found {mode!r}')
        if not isinstance(radius, int) or isinstance(radius, bool) or radius < 0:
            raise ValueError(f"edge_radius wants a whole number of cells, 0 or more, found {radius!r}")
        return kwargs

    def _validate_preprocess_kwargs(self, **kwargs: Any) -> None:
        """Nothing is left to check: transformers' own check wants a Pillow filter, which this class does not use."""

    def _preprocess_image_like_inputs(self, images: Any, **kwargs: Any) -> BatchFeature:
        """Turn one picture, a list of them, or a 4-dimensional array into `pixel_values` and `original_sizes`.

        Returns:
            `pixel_values` (B, 3, height, width) float32 and `original_sizes` (B, 2) int64, height before width.
        """
        pictures = as_list(images)
        if not pictures:
            raise ValueError("wanted at least one picture, found an empty list")
        sizes, inputs = [], []
        for index, picture in enumerate(pictures):
            name = f"image {index}"
            pixels = read_picture(picture, name, kwargs["do_convert_rgb"], kwargs["input_data_format"])
            sizes.append(pixels.shape[-2:])
            inputs.append(self.prepare(pixels.to(kwargs["device"] or pixels.device), name, **kwargs))
        if len({pixels.shape for pixels in inputs}) > 1:
            raise ValueError(f"do_resize=False wants pictures of one size, found {sorted(map(tuple, sizes))}")
        pixel_values = torch.stack(inputs) if len(inputs) > 1 else inputs[0][None]
        data = {"pixel_values": pixel_values, "original_sizes": torch.tensor(sizes)}
        return BatchFeature(data=data, tensor_type=kwargs["return_tensors"])

    def prepare(self, pixels: Tensor, name: str, **kwargs: Any) -> Tensor:
        """RGB (3, H, W) -> what the encoder sees, (3, height, width) float32."""
        pixels = rescale_pixels(pixels, kwargs["rescale_factor"], name) if kwargs["do_rescale"] else pixels.float()
        size = (kwargs["size"].height, kwargs["size"].width)
        if kwargs["do_resize"] and pixels.shape[-2:] != size:
            stretched = F.interpolate(
                pixels[None], size, mode="bilinear", align_corners=False, antialias=kwargs["antialias"]
            )
            pixels = stretched[0]
        if kwargs["do_normalize"]:
            mean, std = (torch.tensor(kwargs[key]).view(-1, 1, 1) for key in ("image_mean", "image_std"))
            mean, std = (part.to(pixels.device, non_blocking=True) for part in (mean, std))
            pixels = (pixels - mean).div_(std)
        return pixels

    def post_process_masks(
        self,
        masks: Tensor | list[Tensor],
        original_sizes: Tensor | list,
        mask_threshold: float = 0.0,
        binarize: bool = True,
        images: Any = None,
        **not_offered: Any,
    ) -> list[Tensor]:
        """Bring the model's masks to the pictures' own sizes.

        Args:
            masks: Logits (B, Q, M, h, w), or a list of B tensors or arrays (Q, M, h, w).
            original_sizes: (B, 2), height and width of each picture.
            mask_threshold: A pixel belongs to the mask from this logit on.
            binarize: Give booleans; without it the logits at full size, four times as large.
            images: The B pictures, as they were given to the processor, which edges follow if it has an `edge_radius`.
            not_offered: What other models' processors offer and the pipeline passes on; must be None.

        Returns:
            A tensor (Q, M, H, W) for each picture.
        """
        for name, value in not_offered.items():
            if value is not None:
                raise ValueError(f"{name} is not offered by EfficientSAM's processor: found {value!r}, wanted None")
        sizes = [(int(height), int(width)) for height, width in original_sizes]
        if len(masks) != len(sizes):
            raise ValueError(f"every picture wants masks and a size: found {len(masks)} masks and {len(sizes)} sizes")
        threshold = mask_threshold if binarize else None
        pictures = [None] * len(sizes) if images is None else as_list(images)
        if len(pictures) != len(sizes):
            raise ValueError(f"every size wants its picture: found {len(pictures)} pictures and {len(sizes)} sizes")
        return [
            resize_masks(self.refine(torch.as_tensor(logits), picture, size), size, self.mask_interpolation, threshold)
            for logits, picture, size in zip(masks, pictures, sizes, strict=True)
        ]

    def refine(self, logits: Tensor, picture: Picture | None, size: tuple[int, int]) -> Tensor:
        """Logits (Q, M, h, w) with the edges of their picture, if they are to follow them: see `ColourGuide`."""
        if picture is None or not self.edge_radius:
            return logits
        pixels = self.read(picture)
        if (found := tuple(pixels.shape[-2:])) != size:
            raise ValueError(f"masks of a picture of {size} want that picture, found one of {found}")
        guide = self.find_guide(pixels, (logits.shape[-2], logits.shape[-1]), logits.device)
        return guide.refine(logits.flatten(0, 1)).unflatten(0, logits.shape[:2]) if guide else logits

    def find_guide(self, pixels: Tensor, grid: tuple[int, int], device: torch.device) -> ColourGuide | None:
        """What leads masks of a grid along a picture's edges, if they are to follow them.

        Args:
            pixels: (3, H, W), as `read_picture` gives them; floats of another range than 0 to 1 are stretched to it.
            grid: h, w of the masks.
            device: Of the masks.
        """
        if not self.edge_radius:
            return None
        colours = pixels.to(device)
        if not colours.is_floating_point():
            colours = colours / 255
        elif not 0 <= colours.min() <= colours.max() <= 1:
            colours = colours - colours.min()
            colours /= colours.max().clamp(min=1e-6)
        return ColourGuide(colours, grid, self.edge_radius)

    def read(self, picture: Picture) -> Tensor:
        """A picture's pixels (3, H, W)."""
        return read_picture(picture, to_rgb=self.do_convert_rgb, input_data_format=self.input_data_format)

    def generate_crop_boxes(
        self,
        image: Picture,
        target_size: int,
        crop_n_layers: int = 0,
        overlap_ratio: float = 512 / 1500,
        points_per_crop: int = 32,
        crop_n_points_downscale_factor: int = 1,
    ) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
        """Cut a picture into crops, and lay a grid of clicks over each, for the mask-generation pipeline.

        Args:
            image: One picture.
            target_size: Height of the model's picture.
            crop_n_layers: Layers of crops behind the whole picture; layer i has 2**i crops a side.
            overlap_ratio: Overlap of the crops of layer 1 as a part of the short side.
            points_per_crop: Clicks a side of the whole picture.
            crop_n_points_downscale_factor: From layer to layer the clicks a side are divided by this.

        Returns:
            Crop boxes (C, 4) in the picture's pixels, clicks (1, points, C, 2) in the model's, crops (3, h, w), and
            labels (1, points, C), all 1.
        """
        pixels = self.read(image)
        _, height, width = pixels.shape
        crops = layered_crops(height, width, crop_n_layers, overlap_ratio)
        frame = torch.tensor([target_size * self.size["width"] / self.size["height"], target_size])
        sides = [max(1, int(points_per_crop / crop_n_points_downscale_factor**layer)) for layer, _ in crops]
        # Crops are stretched, so the same grid covers each. The pipeline wants one tensor: a smaller grid is repeated
        # until it is as long as the largest, and the masks found twice fall to non-maximum suppression.
        order = torch.arange(max(sides) ** 2)
        points = torch.stack([(point_grid(side) * frame)[order % side**2] for side in sides], dim=1)[None]
        images = [pixels[:, top:bottom, left:right] for _, (left, top, right, bottom) in crops]
        boxes = torch.tensor([box for _, box in crops], dtype=torch.float32)
        return boxes, points, images, torch.ones(points.shape[:-1], dtype=torch.int64)

    def filter_masks(
        self,
        masks: Tensor,
        iou_scores: Tensor,
        original_size: tuple[int, int],
        cropped_box_image: Tensor,
        pred_iou_thresh: float = 0.88,
        stability_score_thresh: float = 0.95,
        mask_threshold: float = 0.0,
        stability_score_offset: float = 1,
    ) -> tuple[list[dict], Tensor, Tensor]:
        """Keep the masks of one crop that the model trusts, that are stable, not empty, and not cut off by the crop.

        Args:
            masks: Logits (Q, M, H, W) at the crop's size.
            iou_scores: Predicted IoU (Q, M).
            original_size: Height and width of the whole picture.
            cropped_box_image: x0, y0, x1, y1 of the crop.
            pred_iou_thresh: Scores must be above; 0 lets all pass.
            stability_score_thresh: Stability must be above; 0 lets all pass.
            mask_threshold: A pixel belongs to the mask from this logit on.
            stability_score_offset: How far the threshold moves for the stability score.

        Returns:
            Of the whole picture: run lengths (lists of integers) of N masks, scores (N,), boxes (N, 4) int64.

        Raises:
            ValueError: for several pictures together. A pipeline with a `batch_size` above 1 comes here with the sizes
                of all, but with the masks of the first alone, so that the others' would be lost without a word.
        """
        if (pictures := torch.as_tensor(original_size).numel() // 2) != 1:
            raise ValueError(
                f"masks are filtered picture by picture, got {pictures} together: leave the pipeline's batch_size at "
                "1 (several pictures may come in one list) and choose points_per_batch instead"
            )
        masks, scores = masks.flatten(0, 1), iou_scores.flatten(0, 1).to(masks.device)
        rows = torch.arange(len(masks), device=masks.device)
        if pred_iou_thresh > 0:
            rows = rows[scores > pred_iou_thresh]
        if stability_score_thresh > 0:
            # One by one, for a copy of all that are left, at full size, would take longer than their scores.
            stability = [stability_score(masks[row], mask_threshold, stability_score_offset) for row in rows.tolist()]
            rows = rows[torch.tensor(stability, device=rows.device) > stability_score_thresh]
        masks, scores = masks.index_select(0, rows) >= mask_threshold, scores[rows]
        (height, width), (left, top, right, bottom) = original_size, map(int, cropped_box_image)
        boxes = masks_to_boxes(masks)
        has_pixels = boxes[:, 2] > 0
        boxes += torch.tensor([left, top, left, top], device=boxes.device)
        whole = has_pixels & ~cut_off_by_crop(boxes, [left, top, right, bottom], height, width)
        masks = F.pad(masks[whole], (left, width - right, top, height - bottom))
        return [encode_rle(mask, compressed=False) for mask in masks], scores[whole], boxes[whole]

    def post_process_for_mask_generation(
        self, all_masks: list[dict], all_scores: Tensor, all_boxes: Tensor, crops_nms_thresh: float = 0.7
    ) -> tuple[list[Tensor], Tensor, list[dict], Tensor]:
        """Drop masks found twice, by their boxes' overlap: run lengths of N masks, scores (N,), boxes (N, 4).

        Returns:
            Of the masks that stay, best first: booleans (H, W) in a list, scores, run lengths, boxes.
        """
        kept = nms(all_boxes, all_scores, crops_nms_thresh)
        run_lengths = [all_masks[index] for index in kept.tolist()]
        return [decode_rle(rle) for rle in run_lengths], all_scores[kept], run_lengths, all_boxes[kept]


def as_list(images: Any) -> list:
    """One picture, a list of them, or a 4-dimensional array of them, as a list."""
    is_batch = isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) == 4
    return list(images) if is_batch else [images]


__all__ = ["EfficientSamImageProcessor"]
