"""What labelling costs beyond finding the masks: `efficientsam label` against segment_everything on the same pictures.

    python benchmarks/labelling.py FOLDER --photos 12 --rounds 3

Both sides begin with files. The one keeps its masks in memory, the other writes them in each format, with notes and
all; the sides take turns.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from efficientsam_hf import load_checkpoint, segment_everything
from efficientsam_hf.data.images import picture_suffixes
from efficientsam_hf.labelling.formats import FORMATS
from efficientsam_hf.labelling.shards import LabelFolder
from efficientsam_hf.labelling.sources import find_label_shards


def seconds(call: Callable) -> tuple[float, float]:
    """By the clock, and of the processors, which other work on the machine does not lengthen."""
    clock, processors = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - clock, time.process_time() - processors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--photos", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", help="folder or Hub id; the bundled checkpoint if left out")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, processor = load_checkpoint(args.model, device="cpu")

    def find(name: str, pixels: torch.Tensor) -> list[dict]:
        return segment_everything(model, processor, pixels)

    with tempfile.TemporaryDirectory() as room:
        source = Path(room) / "source"
        source.mkdir()
        photos = sorted(path for path in args.folder.rglob("*") if path.suffix.lower() in picture_suffixes())
        found = photos[: args.photos]
        paths = [Path(shutil.copy(path, source / f"{number:05}{path.suffix}")) for number, path in enumerate(found)]

        def label(format: str, number: int) -> None:
            shards = find_label_shards(str(source), pictures_per_shard=max(1, len(paths) // 3))
            folder = LabelFolder(Path(room) / f"{format}{number}", format, shards, {})
            list(folder.label(find))
            folder.conclude()

        segment_everything(model, processor, paths[0])
        times: dict[str, list[tuple]] = {format: [] for format in args.formats}
        for number in range(args.rounds):
            for format in args.formats:
                alone = seconds(lambda: [segment_everything(model, processor, path) for path in paths])
                times[format].append((alone, seconds(lambda f=format, n=number: label(f, n))))
    print(f"{len(paths)} pictures, {args.threads} threads, torch {torch.__version__}, medians of {args.rounds} rounds")
    print("| format | segment_everything s | label s | overhead by clock | of processors |\n|---|---|---|---|---|")
    for format, rounds in times.items():
        medians = [statistics.median(pair[side][0] for pair in rounds) for side in (0, 1)]
        shares = [statistics.median(after[kind] / before[kind] - 1 for before, after in rounds) for kind in (0, 1)]
        print("| {} | {:.2f} | {:.2f} | {:+.1%} | {:+.1%} |".format(format, *medians, *shares))


if __name__ == "__main__":
    main()
