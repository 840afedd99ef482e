"""Makers of small data sets with masks, for the tests that read files."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from efficientsam_hf.masks_efficientsam import encode_rle


def make_scene(number: int, height: int = 60, width: int = 80) -> tuple[np.ndarray, np.ndarray]:
    """The picture (H, W, 3) of this number and its masks (4, H, W): a box, a disc, a pixel, nearly everything."""
    generator = np.random.default_rng(number)
    y, x = np.mgrid[:height, :width]
    top, left = generator.integers(4, 14, 2)
    box = (y >= top) & (y < top + 24) & (x >= left) & (x < left + 20)
    disc = (y - height // 2) ** 2 + (x - 3 * width // 4) ** 2 < generator.integers(8, 16) ** 2
    pixel = (y == height - 3) & (x == 2)
    image = np.full((height, width, 3), (30, 40, 90), dtype=np.uint8)
    image[box], image[disc] = generator.integers(100, 255, (2, 3))
    return image, np.stack([box, disc, pixel, y < height - 1])


def encode_scene(number: int, image: np.ndarray, masks: np.ndarray) -> tuple[bytes, bytes]:
    """A JPEG and a JSON as in SA-1B."""
    picture, (height, width) = io.BytesIO(), image.shape[:2]
    Image.fromarray(image).save(picture, "JPEG", quality=95)
    annotations = [
        {"id": index, "area": int(mask.sum()), "segmentation": encode_rle(mask)} for index, mask in enumerate(masks)
    ]
    name = {"image_id": number, "width": width, "height": height, "file_name": f"sa_{number}.jpg"}
    return picture.getvalue(), json.dumps({"image": name, "annotations": annotations}).encode()


def scene_files(count: int, **size: int) -> dict[str, bytes]:
    """`count` scenes as files of one shard: `sa_N.jpg` and `sa_N.json`."""
    files = {}
    for number in range(count):
        files[f"sa_{number}.jpg"], files[f"sa_{number}.json"] = encode_scene(number, *make_scene(number, **size))
    return files


def make_folder(folder: Path, files: dict[str, bytes], parts: bool = False) -> Path:
    """The files side by side, or in `images/` and `annotations/`."""
    for name, content in files.items():
        part = {".jpg": "images", ".json": "annotations"}[Path(name).suffix] if parts else "."
        path = folder / part / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def make_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    """A shard; the members' names begin with `./`, as in SA-1B's."""
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path
