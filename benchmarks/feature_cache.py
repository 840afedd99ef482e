"""What a feature cache costs on disk, and how far its features are from the online teacher's.

    python benchmarks/feature_cache.py FOLDER ... --teacher lite0.onnx --teacher_output feat16 --pictures 100

The online teacher looks at random crops at 224 pixels. Against its features are held those of a cache of the same
crops, and those cut out of caches of whole pictures, which the teacher saw at the sizes named: relative error (length
of the difference by length of the features), and the mean over cells of the cosine.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cosine_similarity

from efficientsam_hf.data.crops import SampleMaker
from efficientsam_hf.data.images import Picture, UnlabelledImages, find_pictures
from efficientsam_hf.training.feature_cache import CacheSettings, FeatureCache, write_cache
from efficientsam_hf.training.teachers import Teacher, load_teacher

GRID = 14


def load(args: argparse.Namespace, size: int) -> Teacher:
    return load_teacher(args.teacher, size, True, args.teacher_output, args.teacher_mean, args.teacher_std)


def compare(pictures: list[Picture], online: Teacher, cached: Teacher, settings: CacheSettings) -> str:
    """A row's kilobytes, relative error and cosine."""
    maker = SampleMaker(size=16 * GRID, patches=GRID**2, crops=1)
    with tempfile.TemporaryDirectory() as room:
        list(write_cache(room, pictures, cached, maker, settings))
        size = sum(path.stat().st_size for path in Path(room).iterdir()) / len(pictures)
        cache = FeatureCache(room, pictures, GRID, maker)
        samples = UnlabelledImages(pictures, len(pictures), maker, features=cache)
        found, wanted = [], []
        for number in range(len(pictures)):
            sample = samples[number]
            found.append(sample["features"])
            wanted.append(online(sample["pixels"][None] / 255, GRID)[0])
    one, other = torch.stack(found), torch.stack(wanted)
    error, cosine = (one - other).norm() / other.norm(), cosine_similarity(one, other).mean()
    return f"{size / 1e3:.0f} | {error:.1e} | {cosine:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--teacher_output")
    parser.add_argument("--teacher_mean", nargs=3, type=float)
    parser.add_argument("--teacher_std", nargs=3, type=float)
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--sizes", nargs="+", type=int, default=[224, 384, 512], help="of whole pictures")
    args = parser.parse_args()
    pictures = find_pictures(args.folders)
    chosen = np.random.default_rng(0).permutation(len(pictures))[: args.pictures]
    pictures = [pictures[number] for number in sorted(chosen)]
    online = load(args, 16 * GRID)
    print(f"{len(pictures)} pictures\n| cache | kB a picture | relative error | cosine |\n|---|---|---|---|")
    print(f"| a crop | {compare(pictures, online, online, CacheSettings(grid=GRID, crops=1))} |", flush=True)
    for size in args.sizes:
        row = compare(pictures, online, load(args, size), CacheSettings(grid=size // 16))
        print(f"| whole, {size} pixels | {row} |", flush=True)


if __name__ == "__main__":
    main()
