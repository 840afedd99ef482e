"""Draw pictures with masks, to try training and evaluation on before your own are at hand.

    python examples/draw_scenes.py scenes --count 20

`scenes/images` and `scenes/masks` are as your own pictures would be: a PNG for each object. `scenes/instances.json`
says the same in COCO's format. The same seed draws the same scenes.
"""

import json
from argparse import ArgumentParser
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from efficientsam_hf.masks_efficientsam import encode_rle

WIDTH, HEIGHT = 320, 240


def draw_object(generator: np.random.Generator, column: int) -> Image.Image:
    """A mask of a box, an ellipse or a triangle, in one third of the picture."""
    mask = Image.new("L", (WIDTH, HEIGHT))
    left, top = column * WIDTH // 3 + generator.integers(6, 20), generator.integers(20, 110)
    right, bottom = left + generator.integers(50, 80), top + generator.integers(50, 110)
    draw, corners = ImageDraw.Draw(mask), [int(value) for value in (left, top, right, bottom)]
    shape = generator.integers(3)
    if shape == 0:
        draw.rectangle(corners, fill=255)
    elif shape == 1:
        draw.ellipse(corners, fill=255)
    else:
        draw.polygon([((left + right) / 2, top), (right, bottom), (left, bottom)], fill=255)
    return mask


def draw_scene(generator: np.random.Generator) -> tuple[Image.Image, list[Image.Image]]:
    """Three objects of noisy colours on a noisy ground, and their masks."""
    ground, *colors = generator.integers(40, 220, (4, 3))
    picture = Image.new("RGB", (WIDTH, HEIGHT), tuple(map(int, ground)))
    masks = [draw_object(generator, column) for column in range(3)]
    for mask, color in zip(masks, colors, strict=True):
        picture.paste(tuple(map(int, color)), mask=mask)
    noise = generator.normal(0, 10, (HEIGHT, WIDTH, 3))
    pixels = np.asarray(picture.filter(ImageFilter.GaussianBlur(0.7))) + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), masks


def main(folder: Path, count: int, seed: int) -> None:
    """Write `count` scenes."""
    generator = np.random.default_rng(seed)
    images, annotations = [], []
    for number in range(1, count + 1):
        picture, masks = draw_scene(generator)
        name = f"scene_{number:03d}"
        (folder / "images").mkdir(parents=True, exist_ok=True)
        (folder / "masks" / name).mkdir(parents=True, exist_ok=True)
        picture.save(folder / "images" / f"{name}.png")
        images.append({"id": number, "file_name": f"{name}.png", "width": WIDTH, "height": HEIGHT})
        for index, mask in enumerate(masks):
            mask.save(folder / "masks" / name / f"{index}.png")
            inside = np.asarray(mask) > 0
            left, top, right, bottom = mask.getbbox()
            shape = {"segmentation": encode_rle(inside), "area": int(inside.sum())}
            shape["bbox"] = [left, top, right - left, bottom - top]
            ids = {"id": len(annotations) + 1, "image_id": number, "category_id": 1, "iscrowd": 0}
            annotations.append({**ids, **shape})
    categories = [{"id": 1, "name": "object"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(content))
    print(f"{count} scenes with {len(annotations)} objects: {folder}")


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
