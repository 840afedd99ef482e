"""Predictors that know the answer, and data sets small enough to reckon with by hand."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from synthetic import make_scene

from efficientsam_hf.evaluation.predictor import Answer
from efficientsam_hf.masks_efficientsam import encode_rle, masks_to_boxes


class Oracle:
    """Answers each prompt with the true mask that it means, moved by `shift` pixels to the right.

    Its logits are full size. Of the three masks the one in the middle is right and has the highest score.
    """

    name, parameters, mask_prompts = "oracle", 0, True

    def __init__(self, masks_of: dict, shift: int = 0, background: bool = True, most_clicks: int | None = None):
        self.masks_of, self.shift, self.background_clicks, self.most_clicks = masks_of, shift, background, most_clicks
        self.encoded, self.calls, self.refined = 0, [], 0

    def embed(self, picture):
        self.encoded += 1
        return self.masks_of[picture.getpixel((0, 0))[0]]

    def decode(self, embedded, prompts):
        self.calls.append(len(prompts))
        self.refined += prompts.masks is not None
        masks = np.stack([self.meant(embedded, prompts, number) for number in range(len(prompts))])
        masks = torch.from_numpy(np.roll(masks, self.shift, axis=-1)).float() - 0.5
        nothing = torch.full_like(masks, -1.0)
        return Answer(torch.stack([nothing, masks, nothing], dim=1), torch.tensor([[0.1, 0.9, 0.2]] * len(masks)))

    def meant(self, masks, prompts, number):
        if prompts.boxes is not None:
            boxes = masks_to_boxes(torch.from_numpy(masks)).numpy()
            return masks[np.abs(boxes - prompts.boxes[number]).sum(1).argmin()]
        x, y = prompts.points[number, 0].astype(int)
        hit = [mask for mask in masks if mask[y, x]]
        return min(hit, key=np.count_nonzero)

    def at_size(self, embedded, logits):
        return (logits >= 0).numpy()

    def weights_hash(self):
        return "0" * 64


def scene(number: int) -> tuple[Image.Image, np.ndarray]:
    """A picture that says its number in its first pixel, and its masks: box, disc, pixel."""
    image, masks = make_scene(number)
    image[:3, :3] = (number, 0, 0)
    return Image.fromarray(image), masks[:3]


def write_coco(folder: Path, count: int, categories: int = 2, **extra) -> tuple[Path, dict]:
    """A COCO data set of `count` scenes: the JSON's path, and the true masks by number."""
    (folder / "images").mkdir(parents=True)
    images, annotations, masks_of = [], [], {}
    for number in range(count):
        picture, masks = scene(number)
        picture.save(folder / "images" / f"{number}.png")
        masks_of[number] = masks
        images.append({"id": number, "file_name": f"{number}.png", "width": 80, "height": 60})
        for place, mask in enumerate(masks):
            x0, y0, x1, y1 = masks_to_boxes(torch.from_numpy(mask)).tolist()
            annotations.append(
                {
                    "id": 10 * number + place + 1,
                    "image_id": number,
                    "category_id": place % categories + 1,
                    "segmentation": encode_rle(mask),
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                }
            )
    named = [{"id": number + 1, "name": f"kind {number}"} for number in range(categories)]
    path = folder / "instances.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": named, **extra}))
    return path, masks_of
