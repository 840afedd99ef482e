"""SA-1B's pairs to training samples: this package's stream against a plain loop, pictures and masks a second and core.

    python benchmarks/sa1b_loader.py

A shard is drawn in SA-1B's measures: pictures of 1500 x 2250 with 100 masks, of which 32 are used. The plain loop is
what one writes first: Pillow, json, pycocotools for all masks, a resize for each that is used; `plain, drawn only`
decodes no other masks. All three take turns on each picture, in one thread. Times are the processor's, not the
clock's, so that whatever else the machine does counts little; they hold the page cache, but no disk and no network.
"""

import argparse
import io
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tarfile import TarFile, TarInfo

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from pycocotools import mask as coco_mask

from efficientsam_hf import EfficientSamImageProcessor
from efficientsam_hf.data.pair_reading import PairReader
from efficientsam_hf.data.sa1b import Pair
from efficientsam_hf.data.shards import read_shard

HEIGHT, WIDTH = 1500, 2250
PICTURES_OF_SA1B = 11_186_000  # about 1000 shards of 11,186
MEAN, DEVIATION = (np.array(values, np.float32) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def draw_picture(generator: np.random.Generator) -> bytes:
    """A JPEG of soft shapes under fine noise, about as large as a photo's."""
    coarse = generator.integers(0, 256, (40, 60, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)).astype(np.int16)
    noise = np.asarray(
        Image.fromarray(generator.integers(96, 160, (HEIGHT, WIDTH), dtype=np.uint8)).filter(ImageFilter.BLUR)
    )
    pixels = np.clip(pixels + noise[..., None].astype(np.int16) - 128, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


def draw_mask(generator: np.random.Generator) -> dict:
    """A record of SA-1B for a closed, wobbly outline; sizes small and large alike, by their ratio."""
    radius = np.exp(generator.uniform(np.log(15), np.log(600)))
    angles = np.linspace(0, 2 * np.pi, 120, endpoint=False)
    wave = sum(generator.uniform(0, 0.3 / n) * np.sin(n * angles + generator.uniform(0, 6.3)) for n in range(1, 20))
    x, y = (
        generator.uniform(0, side) + radius * (1 + wave) * turn(angles)
        for side, turn in ((WIDTH, np.cos), (HEIGHT, np.sin))
    )
    canvas = Image.new("1", (WIDTH, HEIGHT))
    ImageDraw.Draw(canvas).polygon(list(zip(x.tolist(), y.tolist(), strict=True)), fill=1)
    rle = coco_mask.encode(np.asfortranarray(np.asarray(canvas), dtype=np.uint8))
    record = {"area": int(coco_mask.area(rle)), "bbox": coco_mask.toBbox(rle).tolist(), "predicted_iou": 0.95}
    return {**record, "segmentation": {"size": [HEIGHT, WIDTH], "counts": rle["counts"].decode()}}


def draw_shard(path: Path, pictures: int, masks: int) -> int:
    """Write the shard; the mean size of its JPEGs in bytes."""
    sizes = []
    with TarFile(path, "w") as archive:
        for number in range(pictures):
            generator = np.random.default_rng(number)
            image = {"image_id": number, "width": WIDTH, "height": HEIGHT, "file_name": f"sa_{number}.jpg"}
            content = {"image": image, "annotations": [draw_mask(generator) for _ in range(masks)]}
            files = {".jpg": draw_picture(generator), ".json": json.dumps(content).encode()}
            sizes.append(len(files[".jpg"]))
            for kind, data in files.items():
                member = TarInfo(f"./sa_{number}{kind}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return sum(sizes) // len(sizes)


@dataclass
class Stages:
    """Processor seconds by stage, of one way to read."""

    seconds: Counter = field(default_factory=Counter)

    def __call__(self, stage: str, function: Callable, *arguments: object):
        start = time.process_time()
        result = function(*arguments)
        self.seconds[stage] += time.process_time() - start
        return result


def read_plainly(pair: Pair, side: int, count: int, stages: Stages, every: bool) -> dict[str, torch.Tensor]:
    """One sample by the plain loop, with all of its masks decoded or only the drawn ones."""
    generator = np.random.default_rng(0)
    image = stages("JPEG", lambda: Image.open(io.BytesIO(pair.image.read())).convert("RGB"))
    records = stages("JSON", lambda: json.loads(pair.annotations.read())["annotations"])
    records = [record for record in records if 0 < record["area"] <= 0.9 * HEIGHT * WIDTH]
    chosen = generator.permutation(len(records))[:count]
    if not every:
        records, chosen = [records[index] for index in chosen], np.arange(len(chosen))
    masks = stages("RLE", lambda: [coco_mask.decode(record["segmentation"]) for record in records])

    def resize() -> dict[str, torch.Tensor]:
        pixels = np.asarray(image.resize((side, side), Image.Resampling.BILINEAR), dtype=np.float32) / 255
        # On their side, as pycocotools' memory lies: upright, Pillow would copy them against the grain first.
        lying = [Image.fromarray(255 * masks[index].T) for index in chosen]
        small = [mask.resize((side // 4,) * 2, Image.Resampling.BOX) for mask in lying]
        labels = torch.from_numpy(np.stack([np.asarray(mask).T >= 128 for mask in small])).float()
        return {"pixel_values": torch.from_numpy((pixels - MEAN) / DEVIATION).permute(2, 0, 1), "labels": labels}

    return stages("resize", resize)


@dataclass(frozen=True)
class TimedReader(PairReader):
    """Ours, with each stage's time noted; run lengths and the resize of masks are one step."""

    stages: Stages = field(default_factory=Stages)

    def read_masks(self, *arguments):
        return self.stages("JSON", super().read_masks, *arguments)

    def decode(self, pair):
        return self.stages("JPEG", super().decode, pair)

    def resize(self, pixels):
        return self.stages("resize", super().resize, pixels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--masks", type=int, default=100)
    parser.add_argument("--used", type=int, default=32)
    parser.add_argument("--side", type=int, default=1024, help="of the model's picture")
    args = parser.parse_args()
    torch.set_num_threads(1)
    ways = {name: Stages() for name in ("plain loop", "plain, drawn only", "this package")}
    reader = TimedReader(
        EfficientSamImageProcessor(size=args.side), masks_per_image=args.used, stages=ways["this package"]
    )
    totals: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder) / "sa_000000.tar"
        size = draw_shard(shard, args.pictures, args.masks)
        for number, pair in enumerate(read_shard(str(shard))):
            runs = {
                "plain loop": lambda pair=pair: read_plainly(pair, args.side, args.used, ways["plain loop"], True),
                "plain, drawn only": lambda pair=pair: read_plainly(
                    pair, args.side, args.used, ways["plain, drawn only"], False
                ),
                "this package": lambda pair=pair: reader.read(pair, np.random.default_rng(0)),
            }
            for name, run in runs.items():
                start = time.process_time()
                run()
                totals[name].append(time.process_time() - start)
            if number == 0:  # the first picture warms up
                for name, stages in ways.items():
                    stages.seconds.clear(), totals[name].clear()
    report(args, size, ways, totals)


def report(args: argparse.Namespace, size: int, ways: dict[str, Stages], totals: dict[str, list[float]]) -> None:
    """The table, the ratios, and what they mean for a machine of eight GPUs."""
    print(
        f"{args.pictures - 1} pictures of {HEIGHT} x {WIDTH} ({size / 1e6:.1f} MB), {args.masks} masks each, "
        f"{args.used} used, side {args.side}, one thread, torch {torch.__version__}"
    )
    print("| ms of the processor a picture | JPEG | JSON | RLE | resize | all | pictures/s | used masks/s |")
    print("|---|---|---|---|---|---|---|---|")
    for name, stages in ways.items():
        count, total = len(totals[name]), sum(totals[name])
        if name == "this package":
            stages.seconds["RLE"] = total - sum(stages.seconds.values())
        parts = " | ".join(
            f"{1000 * stages.seconds[stage] / count:.1f}" for stage in ("JPEG", "JSON", "RLE", "resize")
        )
        rates = f"{count / total:.2f} | {args.used * count / total:.0f}"
        print(f"| {name} | {parts} | {1000 * total / count:.1f} | {rates} |")
    print("This package's RLE column is run lengths to cells and labels, the resize of masks in it.")
    for name in ("plain loop", "plain, drawn only"):
        ratios = [theirs / ours for theirs, ours in zip(totals[name], totals["this package"], strict=True)]
        spread = f"{min(ratios):.1f} to {max(ratios):.1f}"
        print(f"{name} / this package, by picture: median {statistics.median(ratios):.1f} ({spread})")
    rate = len(totals["this package"]) / sum(totals["this package"])
    print(
        f"With r = {rate:.1f} pictures a second and core, 16 cores a GPU give each 16 r = {16 * rate:.0f} a second,\n"
        f"and 8 GPUs 128 r = {128 * rate:.0f}: {PICTURES_OF_SA1B:,} pictures in "
        f"{PICTURES_OF_SA1B / (128 * rate) / 3600:.1f} h an epoch. A GPU that trains on more than {16 * rate:.0f}\n"
        f"pictures a second waits for its loader; one that trains on x keeps x / r = x / {rate:.1f} cores busy."
    )


if __name__ == "__main__":
    main()
