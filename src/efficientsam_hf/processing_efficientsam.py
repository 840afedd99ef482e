"""Pictures, clicks, boxes and masks -> tensors for EfficientSAM; whatever a user can get wrong is refused here.

B pictures, Q objects a picture, P clicks an object. Users give coordinates in pixels of their own picture; tensors
hold them in pixels of the model's.
"""

from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.image_processing_utils import BatchFeature, get_size_dict
from transformers.processing_utils import ProcessorMixin
from transformers.utils import logging

from .image_processing_efficientsam import EfficientSamImageProcessor
from .loss_efficientsam import resize_labels
from .masks_efficientsam import mask_prompts
from .prompts_efficientsam import (
    BACKGROUND,
    BOX_SLOTS,
    NO_BOX,
    NO_POINT,
    OBJECT,
    Prompt,
    check_point,
    clip_box,
    gather_prompts,
    pad_prompts,
    plain_lists,
)

logger = logging.get_logger(__name__)


class EfficientSamBatch(BatchFeature):
    """What the processor gives; cast to another dtype, clicks and boxes stay as they are.

    In bfloat16 a coordinate of a 1024-pixel picture is off by two pixels, and the model wants them in float32 anyway.
    """

    def to(self, *args: Any, **kwargs: Any) -> "EfficientSamBatch":
        """As transformers' own: to a device, a dtype, or both."""
        places = {name: self.data.get(name) for name in ("input_points", "input_boxes")}
        super().to(*args, **kwargs)
        exact = {name: place.to(self.data[name].device) for name, place in places.items() if isinstance(place, Tensor)}
        self.data.update(exact)
        return self


def read_masks(given: Any, name: str) -> list[Tensor]:
    """Masks of each image, (objects, h, w) if they fit: arrays, tensors, Pillow's pictures, or lists of these.

    Integers become int64, but for uint8: torch cannot compare those that have no sign.

    Raises:
        ValueError: naming the image whose masks are none.
    """
    return [read_layers(masks, f"image {image}: {name}") for image, masks in enumerate(given)]


def read_layers(masks: Any, name: str) -> Tensor:
    """The masks of one image, see `read_masks`."""
    masks = [masks] if isinstance(masks, PIL.Image.Image) else masks
    try:
        if isinstance(masks, (list, tuple)) and any(isinstance(mask, Tensor) for mask in masks):
            masks = torch.stack(list(masks))
        elif not isinstance(masks, Tensor):
            # Torch reads no array that runs backwards, such as a flipped one.
            masks = torch.from_numpy(np.array(masks, order="C"))
    except (TypeError, ValueError, RuntimeError) as fault:
        raise ValueError(f"{name} wants arrays, tensors or pictures of one size, found others: {fault}") from fault
    is_integer = not (masks.is_floating_point() or masks.dtype in (torch.bool, torch.uint8))
    return masks.long() if is_integer else masks


def shrink_maps(maps: Any, sizes: Tensor, grid: tuple[int, int], objects: list[int] | None) -> Tensor:
    """True masks (Q, H, W) or (H, W) of each picture -> labels (B, Q, h, w) int64: 1 object, 0 not, -1 unknown."""
    maps = [maps] if isinstance(maps, PIL.Image.Image) else maps
    if len(maps) != len(sizes):
        raise ValueError(f"segmentation_maps wants maps for each of {len(sizes)} images, found {len(maps)}")
    rows = []
    for image, (layers, size) in enumerate(zip(read_masks(maps, "segmentation_maps"), sizes.tolist(), strict=True)):
        layers = layers[None] if layers.ndim == 2 else layers
        if layers.ndim != 3 or list(layers.shape[-2:]) != size:
            raise ValueError(f"image {image}: segmentation_maps wants (objects, *{size}), found {tuple(layers.shape)}")
        if objects and objects[image] != len(layers):
            raise ValueError(f"image {image}: found {len(layers)} segmentation_maps for {objects[image]} objects")
        (targets,), (known,) = resize_labels(layers[None], grid)
        if ((layers > 0).flatten(1).any(1) & ~known.bool().flatten(1).any(1)).any():
            logger.warning_once(
                f"objects too small or too thin for labels of {grid[0]} x {grid[1]} cells are unknown (said once)"
            )
        rows.append(torch.where(known > 0, targets, -1).long())
    return pad_sequence(rows, batch_first=True, padding_value=-1)


def read_sizes(sizes: Any) -> Tensor:
    """Heights and widths as given by the user -> (B, 2) int64."""
    table = torch.as_tensor(plain_lists(sizes, "original_sizes"))
    if table.ndim != 2 or table.shape[1] != 2 or (table < 1).any():
        raise ValueError(f"original_sizes wants a height and a width above 0 for each image, found {table.tolist()}")
    return table.long()


class EfficientSamProcessor(ProcessorMixin):
    """Turns pictures and prompts into the model's tensors, and the model's masks into the pictures' own.

    Args:
        max_prompt_points: Slots an object's prompt may fill; a click fills one, a box two.
        negative_points: Whether the weights learnt background clicks (label 0); without it they are refused.
        mask_prompts: Whether the weights learnt earlier masks as a prompt; without it they are refused.
    """

    def __init__(
        self,
        image_processor: EfficientSamImageProcessor,
        max_prompt_points: int = 6,
        negative_points: bool = False,
        mask_prompts: bool = False,
        **kwargs: Any,
    ):
        super().__init__(image_processor, **kwargs)
        self.max_prompt_points = max_prompt_points
        self.negative_points = negative_points
        self.mask_prompts = mask_prompts

    @classmethod
    def from_model_config(cls, config: Any) -> "EfficientSamProcessor":
        """The processor that fits a model's config: its picture size, and what its prompts were taught."""
        side, prompts = config.vision_config.image_size, config.prompt_encoder_config
        return cls(
            EfficientSamImageProcessor(size={"height": side, "width": side}),
            max_prompt_points=prompts.max_prompt_points,
            negative_points=prompts.negative_points,
            mask_prompts=prompts.mask_prompts,
        )

    def extended(self, config: Any) -> "EfficientSamProcessor":
        """This processor with what a model's config says of prompts; pictures are treated as before."""
        prompts = config.prompt_encoder_config
        names = ("max_prompt_points", "negative_points", "mask_prompts")
        return type(self)(self.image_processor, **{name: getattr(prompts, name) for name in names})

    def __call__(
        self,
        images: Any = None,
        original_sizes: Any = None,
        input_points: Any = None,
        input_labels: Any = None,
        input_boxes: Any = None,
        input_masks: Any = None,
        segmentation_maps: Any = None,
        return_tensors: str | None = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepare pictures, prompts, or both.

        Lists may be ragged at every level; an object without points, or without a box, has None or an empty list in
        its place. Boxes that reach over the picture's edge are clipped to it.

        Args:
            images: A picture or a list of them, of any kind that the image processor reads.
            original_sizes: (B, 2), height and width of each picture, instead of `images`: for a second click on image
                embeddings that were kept.
            input_points: x, y of clicks, nested image > object > point > xy.
            input_labels: 1 on the object, 0 on the background, -1 for no click; image > object > point. All 1 if None.
            input_boxes: x0, y0, x1, y1, nested image > box > xyxy; four times -1 is no box.
            input_masks: Logits (B, Q, h, w) of an earlier answer in floats; or masks (B, Q, H, W) of any size, such as
                the pictures', as booleans or integers, above 0 on the object.
            segmentation_maps: True masks for training, for each picture (Q, H, W): 1 object, 0 not, below 0 unknown.
                These and `input_masks` may be arrays, tensors, Pillow's pictures, or lists of them.
            return_tensors: "pt" or "np".
            kwargs: For the image processor, for this call; `size` must be given again for a second click.

        Returns:
            `pixel_values` (B, 3, height, width) if there are images, `original_sizes` (B, 2); `input_points`
            (B, Q, P, 2), `input_labels` (B, Q, P), `input_boxes` (B, Q, 4), `input_masks` as far as they were given;
            `labels` (B, Q, height / 4, width / 4) if there are maps.

        Raises:
            TypeError: for an argument that nothing knows, and without images for the image processor's but `size`.
            ValueError: for a prompt that cannot be meant, or that the weights never learnt.
        """
        kwargs = {**kwargs.pop("images_kwargs", {}), **kwargs}
        data = self.prepare_images(images, original_sizes, kwargs)
        sizes, (height, width) = data["original_sizes"], self.model_size(data, kwargs.get("size"))
        objects = None
        if any(argument is not None for argument in (input_points, input_labels, input_boxes)):
            prompts = gather_prompts(input_points, input_labels, input_boxes, len(sizes))
            prompts = self.check_prompts(prompts, sizes, input_masks is None)
            data |= pad_prompts(prompts, sizes, torch.tensor([width, height], dtype=torch.float32))
            objects = list(map(len, prompts))
        if input_masks is not None:
            data["input_masks"] = self.prepare_masks(input_masks, len(sizes), objects, (height // 4, width // 4))
        if segmentation_maps is not None:
            data["labels"] = shrink_maps(segmentation_maps, sizes, (height // 4, width // 4), objects)
        return EfficientSamBatch(data, tensor_type=return_tensors)

    def prepare_images(self, images: Any, original_sizes: Any, kwargs: dict) -> dict[str, Tensor]:
        """`pixel_values` and `original_sizes` of the images, or the sizes alone."""
        if images is None and original_sizes is None:
            raise ValueError("wanted images or original_sizes, found neither")
        if images is None and (useless := sorted(kwargs.keys() - {"size"})):
            raise TypeError(f"wanted no {', '.join(useless)} without images: found original_sizes and prompts")
        if images is None:
            return {"original_sizes": read_sizes(original_sizes)}
        data = dict(self.image_processor(images, **kwargs))
        if original_sizes is not None and not torch.equal(read_sizes(original_sizes), data["original_sizes"]):
            found, wanted = read_sizes(original_sizes).tolist(), data["original_sizes"].tolist()
            raise ValueError(f"found original_sizes {found} beside images of {wanted}: leave original_sizes out")
        return data

    def model_size(self, data: dict[str, Tensor], size: Any = None) -> tuple[int, int]:
        """Height and width of the picture that the model sees, whose pixels its prompts are in."""
        if "pixel_values" in data:
            _, _, height, width = data["pixel_values"].shape
            return height, width
        # Whoever sets the attribute may give a plain dictionary.
        size = self.image_processor.size if size is None else get_size_dict(size)
        return size["height"], size["width"]

    def check_prompts(self, prompts: list[list[Prompt]], sizes: Tensor, needed: bool) -> list[list[Prompt]]:
        """The prompts without padding and with clipped boxes; an object may be bare only if they are not `needed`."""
        if not any(prompts):
            raise ValueError("found no prompt for any image, wanted points or boxes")
        return [
            [self.check_prompt(prompt, height, width, needed) for prompt in row]
            for row, (height, width) in zip(prompts, sizes.tolist(), strict=True)
        ]

    def check_prompt(self, prompt: Prompt, height: int, width: int, needed: bool) -> Prompt:
        """One object's prompt without padding and with its box clipped, if the weights can follow it."""
        name = prompt.name
        if needed and not (prompt.points or prompt.box):
            raise ValueError(f"{name}: wanted points or a box, found neither")
        self.check_labels(name, prompt.labels)
        clicks = [click for click in zip(prompt.points, prompt.labels, strict=True) if click[1] != NO_POINT]
        for point, _ in clicks:
            check_point(name, point, height, width)
        box = None if prompt.box in (None, NO_BOX) else clip_box(name, prompt.box, height, width)
        slots = len(clicks) + (BOX_SLOTS if box else 0)
        if slots > self.max_prompt_points:
            raise ValueError(f"{name}: wanted at most {self.max_prompt_points} slots, found {slots} (a box fills two)")
        return Prompt(name, [point for point, _ in clicks], [label for _, label in clicks], box)

    def check_labels(self, name: str, labels: list[int]) -> None:
        """Refuse labels without a meaning, and background clicks for weights that never learnt them."""
        strange = [label for label in labels if label not in (OBJECT, BACKGROUND, NO_POINT)]
        if strange:
            raise ValueError(f"{name}: wanted labels 1 (object), 0 (background) or -1 (no point), found {strange[0]}")
        if BACKGROUND in labels and not self.negative_points:
            raise ValueError(
                f"{name}: found label 0, but these weights never learnt background clicks; "
                "wanted a checkpoint trained with negative_points=True"
            )

    def prepare_masks(self, masks: Any, images: int, objects: list[int] | None, grid: tuple[int, int]) -> Tensor:
        """Mask prompts (B, Q, h, w) as float32, for weights that learnt them; booleans and integers at this grid."""
        if not self.mask_prompts:
            raise ValueError(
                "found input_masks, but these weights never learnt mask prompts; "
                "wanted a checkpoint trained with mask_prompts=True"
            )
        given = read_masks(masks, "input_masks")
        shapes = [tuple(rows.shape) for rows in given]
        wanted = (images, max(objects) if objects else max((shape[0] for shape in shapes if shape), default=0))
        if any(len(shape) != 3 or shape[0] != wanted[1] for shape in shapes) or len(given) != images:
            raise ValueError(f"input_masks wants (images, objects, h, w) = {wanted}, found {shapes}")
        given = [rows if rows.is_floating_point() else mask_prompts(rows > 0, grid) for rows in given]
        if len({rows.shape for rows in given}) > 1:
            raise ValueError(f"input_masks wants logits of one size, found {shapes}")
        return torch.stack(given).float()

    def post_process_masks(
        self,
        masks: Tensor | list[Tensor],
        original_sizes: Tensor | list,
        mask_threshold: float = 0.0,
        binarize: bool = True,
        images: Any = None,
        **not_offered: Any,
    ) -> list[Tensor]:
        """Bring the model's masks to the pictures' own sizes, as `EfficientSamImageProcessor.post_process_masks`."""
        return self.image_processor.post_process_masks(
            masks, original_sizes, mask_threshold, binarize, images, **not_offered
        )


__all__ = ["EfficientSamProcessor"]
