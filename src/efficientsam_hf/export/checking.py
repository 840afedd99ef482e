"""Is an exported folder the model it was made of? Both answer the same prompts on a real photo."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..exported.model import ExportedEfficientSam
from ..modeling_efficientsam import EfficientSamModel
from ..pictures_efficientsam import read_picture
from ..processing_efficientsam import EfficientSamProcessor

# A cup of coffee, by Rachel Michetti (CC0), the photo of the examples in a third of its size.
PHOTO = Path(__file__).with_name("coffee.jpg")

# The largest difference that float32 may have, in standard deviations of torch's answer.
LARGEST_DIFFERENCE = 1e-3
# The least mean IoU of masks with torch's float32 masks, where the numbers themselves must differ or are not told.
LEAST_AGREEMENT = {"float32": 0.99, "half": 0.95, "int8": 0.9}


@torch.inference_mode()
def compare(
    model: EfficientSamModel, processor: EfficientSamProcessor, exported: ExportedEfficientSam, photo: Any = PHOTO
) -> dict[str, float]:
    """How far an exported model's answers are from torch's, in float32 on the CPU.

    Asked of a photo and its mirror image: a click, a box, both, and a prompt that fills every slot; and if the model
    takes masks, the first two of these with torch's answers.

    Returns:
        Largest differences of `image_embeddings`, `iou_scores` and `pred_masks`, in standard deviations of torch's,
        and `mask_iou`, the mean IoU of the masks with torch's.
    """
    inputs = example_inputs(processor, photo)
    wanted = model(**inputs)
    answers = [(exported(**inputs), wanted)]
    if model.config.prompt_encoder_config.mask_prompts:
        again: dict[str, Any] = {name: value[:, :2] for name, value in inputs.items() if name != "pixel_values"}
        again |= {"image_embeddings": wanted.image_embeddings, "input_masks": wanted.pred_masks[:, :2, 0]}
        answers.append((exported(**again), model(**again)))
    names = ("image_embeddings", "iou_scores", "pred_masks")
    differences = {
        name: max(difference(getattr(found, name), getattr(wanted, name)) for found, wanted in answers)
        for name in names
    }
    return {
        **differences,
        "mask_iou": min(agreement(found.pred_masks, wanted.pred_masks) for found, wanted in answers),
    }


def example_inputs(processor: EfficientSamProcessor, photo: Any) -> dict[str, Any]:
    """A photo, its mirror image, and prompts of every kind, as the model takes them."""
    pixels = read_picture(photo)
    height, width = pixels.shape[-2:]
    corner, middle = [0.2 * width, 0.25 * height], [0.5 * width, 0.5 * height]
    box = [*corner, 0.8 * width, 0.75 * height]
    around = [[middle[0] + 3 * step, middle[1] - 2 * step] for step in range(processor.max_prompt_points - 2)]
    prompts = {"input_points": [[middle], [], [corner], around], "input_boxes": [None, box, box, box]}
    inputs = processor(
        [pixels, pixels.flip(-1)], **{name: [value, value] for name, value in prompts.items()}, return_tensors="pt"
    )
    return {name: value for name, value in inputs.items() if name != "original_sizes"}


def difference(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, in standard deviations of what was wanted; infinite if something is no number."""
    share = (found.float() - wanted.float()).abs().max() / wanted.float().std().clamp(min=1e-6)
    return float(share) if torch.isfinite(share) else float("inf")


def agreement(found: Tensor, wanted: Tensor) -> float:
    """Mean IoU of the masks of two sets of logits of one shape; two empty masks agree."""
    masks, others = (found >= 0).flatten(-2), (wanted >= 0).flatten(-2)
    union = (masks | others).sum(-1)
    return float(torch.where(union > 0, (masks & others).sum(-1) / union.clamp(min=1), 1.0).mean())


def verdict(check: dict[str, float], dtype: str, quantization: str | None) -> str | None:
    """Why an export with these differences is refused, or None."""
    if quantization is None and dtype == "float32":
        for name in ("image_embeddings", "iou_scores", "pred_masks"):
            if not check[name] <= LARGEST_DIFFERENCE:
                return (
                    f"{name} differ from torch's by up to {check[name]:.1e} standard deviations, "
                    f"wanted at most {LARGEST_DIFFERENCE:.0e}"
                )
        return None
    least = LEAST_AGREEMENT["int8" if quantization else "half"]
    if not check["mask_iou"] >= least:
        return f"masks agree with torch's float32 by a mean IoU of {check['mask_iou']:.3f}, wanted at least {least}"
    return None
