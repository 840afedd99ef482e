"""Every object of a picture: a grid of clicks, filters, and the masks that are left as records.

H x W the picture, C crops, Q clicks, M masks a click, N masks found so far, h x w the embedding grid of the model.

Follows the mask generator of Kirillov et al., 2023 (appendix B), in another order: the predicted IoU is known
before a mask is drawn, and stability and overlap are judged on the decoder's own grid, so that only masks that stay
are drawn at full size. What is held at one time is bounded, whatever the size of the picture and the number of clicks.
"""

from typing import Any

import torch
from torch import Tensor

from .mask_search import Crop, MaskGenerationSettings
from .masks_efficientsam import layered_crops, nms
from .modeling_efficientsam import EfficientSamModel
from .pictures_efficientsam import read_picture
from .processing_efficientsam import EfficientSamProcessor


@torch.inference_mode()
def segment_everything(
    model: EfficientSamModel,
    processor: EfficientSamProcessor,
    image: Any,
    image_embeddings: Any = None,
    return_embeddings: bool = False,
    **options: Any,
) -> Any:
    """Find the objects of a picture, or of each picture of a list.

    On the decoder's grid a stability or a box can come out otherwise than at full size; see `docs/everything` for how
    often it does, and `exact` for the way without.

    Args:
        model: On any device.
        processor: The model's.
        image: PIL picture, array, tensor, path or URL; or a list of them.
        image_embeddings: Of an earlier call with the same crops, (C, channels, h, w), or a list of that for a list of
            pictures; saves the encoder's work.
        return_embeddings: Give the embeddings, too.
        **options: Fields of `MaskGenerationSettings`.

    Returns:
        A list of records, best predicted IoU first, each with `segmentation` (COCO run lengths), `bbox` (x, y, width,
        height), `area`, `predicted_iou`, `stability_score`, `point_coords` (the click, x and y in the picture's
        pixels) and `crop_box` (x, y, width, height). A list of such lists for a list of pictures; with
        `return_embeddings` a pair of the records and the embeddings.

    Raises:
        ValueError: for an unknown option or one out of its range, and for what is no picture.
    """
    settings = MaskGenerationSettings.read(**options)
    if isinstance(image, list | tuple):
        embeddings = [None] * len(image) if image_embeddings is None else image_embeddings
        if len(embeddings) != len(image):
            raise ValueError(f"every picture wants its embeddings: got {len(embeddings)} for {len(image)} pictures")
        found = [
            find_objects(model, processor, one, known, settings) for one, known in zip(image, embeddings, strict=True)
        ]
        return tuple(map(list, zip(*found, strict=True))) if return_embeddings else [records for records, _ in found]
    records, embeddings = find_objects(model, processor, image, image_embeddings, settings)
    return (records, embeddings) if return_embeddings else records


def find_objects(
    model: EfficientSamModel,
    processor: EfficientSamProcessor,
    image: Any,
    image_embeddings: Tensor | None,
    settings: MaskGenerationSettings,
) -> tuple[list[dict[str, Any]], Tensor]:
    """The records of one picture, and the embeddings (C, channels, h, w) of its crops."""
    pixels = read_picture(image)
    height, width = pixels.shape[-2:]
    crops = layered_crops(height, width, settings.crop_n_layers, settings.crop_overlap_ratio)
    if image_embeddings is not None and len(image_embeddings) != len(crops):
        raise ValueError(f"every crop wants its embeddings: got {len(image_embeddings)} for {len(crops)} crops")
    records, kept_embeddings = [], []
    for number, (layer, (left, top, right, bottom)) in enumerate(crops):
        if image_embeddings is None:
            inputs = processor.image_processor(pixels[:, top:bottom, left:right], return_tensors="pt")
            embeddings = model.get_image_embeddings(inputs["pixel_values"].to(model.device))
        else:
            embeddings = image_embeddings[number : number + 1].to(model.device)
        crop = Crop(model, processor, embeddings, (left, top, right, bottom), (height, width), settings)
        side = max(1, int(settings.points_per_side / settings.crop_n_points_downscale_factor**layer))
        records += crop.records(crop.search(side))
        kept_embeddings.append(embeddings)
    if len(crops) > 1:
        records = drop_doubles(records, settings.crop_nms_thresh)
    return sorted(records, key=lambda record: -record["predicted_iou"]), torch.cat(kept_embeddings)


def drop_doubles(records: list[dict[str, Any]], threshold: float) -> list[dict[str, Any]]:
    """Of masks found in several crops the one of the smallest crop, which saw it largest."""
    boxes = torch.tensor([record["bbox"] for record in records]).view(-1, 4)
    boxes = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)
    nearness = torch.tensor([1 / (record["crop_box"][2] * record["crop_box"][3]) for record in records])
    return [records[index] for index in nms(boxes, nearness, threshold).tolist()]


__all__ = ["MaskGenerationSettings", "segment_everything"]
