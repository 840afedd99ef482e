"""A photo, a box, a mask: an exported folder without torch and without this package.

    efficientsam export --to onnx --output exported
    python examples/onnx_without_torch.py exported examples/images/coffee.jpg --box 75,15,480,385 --output mask.png

Needs onnxruntime, numpy and Pillow. For other languages: these are all the steps there are.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

BOX_TOP_LEFT, BOX_BOTTOM_RIGHT = 2, 3  # labels of a box's corners; 1 is a click on the object, -1 a free slot


def stretch(photo, side, antialias):
    """A picture -> (side, side, 3) in 0 to 1, bilinear between the centres of pixels, smoothed or not."""
    if antialias:
        return np.float32(photo.resize((side, side), Image.Resampling.BILINEAR)) / 255
    pixels = np.float32(photo) / 255
    for axis in (0, 1):
        length = pixels.shape[axis]
        places = np.clip((np.arange(side) + 0.5) * length / side - 0.5, 0, length - 1)
        before = places.astype(int)
        after = np.minimum(before + 1, length - 1)
        share = (places - before).astype(np.float32).reshape([-1, 1, 1] if axis == 0 else [1, -1, 1])
        pixels = pixels.take(before, axis) * (1 - share) + pixels.take(after, axis) * share
    return pixels


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("photo", type=Path)
    parser.add_argument("--box", required=True, help="X0,Y0,X1,Y1 in the photo's pixels")
    parser.add_argument("--output", type=Path, default=Path("mask.png"))
    args = parser.parse_args()
    settings = json.loads((args.folder / "processor_config.json").read_text())["image_processor"]
    side, mean, std = (settings[key] for key in ("size", "image_mean", "image_std"))
    side = side["height"]
    encoder = onnxruntime.InferenceSession(args.folder / "vision_encoder.onnx")
    decoder = onnxruntime.InferenceSession(args.folder / "mask_decoder.onnx")

    photo = Image.open(args.photo).convert("RGB")
    pixels = (stretch(photo, side, settings["antialias"]) - np.float32(mean)) / np.float32(std)
    # Once a photo; any number of prompts can follow.
    (embeddings,) = encoder.run(None, {"pixel_values": pixels.transpose(2, 0, 1)[None]})

    # One picture, one object, two slots. Points are in pixels of the stretched picture.
    corners = np.float32(args.box.split(",")).reshape(1, 1, 2, 2) * side / np.float32(photo.size)
    labels = np.int64([[[BOX_TOP_LEFT, BOX_BOTTOM_RIGHT]]])
    prompts = {"input_points": corners, "input_labels": labels}
    scores, masks = decoder.run(["iou_scores", "pred_masks"], {"image_embeddings": embeddings, **prompts})

    ranks = scores[0, 0]
    if json.loads((args.folder / "config.json").read_text()).get("rank_by_stability"):
        # How little each mask changes with its threshold.
        ranks = ranks * (masks[0, 0] > 1).sum((1, 2)) / np.maximum((masks[0, 0] > -1).sum((1, 2)), 1)
    best = ranks.argmax()
    logits = Image.fromarray(masks[0, 0, best]).resize(photo.size, Image.Resampling.BICUBIC)
    Image.fromarray(np.uint8(np.array(logits) >= 0) * 255).save(args.output)
    print(f"predicted IoU {scores[0, 0, best]:.2f}: {args.output}")


if __name__ == "__main__":
    main()
