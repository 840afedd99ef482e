"""What twenty pictures teach the bundled checkpoint: a thing that it was taught to see otherwise, before and after.

    python benchmarks/twenty_pictures.py WHITE_CELLS --folder RUN [options of finetune_custom.py]

WHITE_CELLS is the set of white blood cells in SA-1B's layout, a mask for the cell and one for its nucleus: both are
objects that the checkpoint was taught. Asked for here is what lies between them, the cytoplasm, which has the cell's
box. 27 pictures go to examples/finetune_custom.py, every fourth of them to choose by; it is measured on every tenth of
the set, which neither the checkpoint nor this training ever saw.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from efficientsam_hf import EfficientSamModel, EfficientSamProcessor, default_checkpoint
from efficientsam_hf.data.sa1b import LabelledPicture
from efficientsam_hf.data.sources import find_labelled_pictures, split_pictures
from efficientsam_hf.evaluation.held_out import score_held_out
from efficientsam_hf.masks_efficientsam import decode_rle

CUSTOM = Path(__file__).parents[1] / "examples" / "finetune_custom.py"
HOLD_OUT = 10  # as in the bundled checkpoint's training
PICTURES = 27  # 20 to train on, 7 to choose by


def write_cytoplasm(pictures: list[LabelledPicture], folder: Path) -> list[LabelledPicture]:
    """The pictures in a folder of `images/` and `masks/`: the largest mask of each without the others."""
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        records = sorted(picture.read_annotations(), key=lambda record: -record["area"])
        cell, *inside = (decode_rle(record["segmentation"]).numpy() for record in records)
        cytoplasm = cell & ~np.logical_or.reduce([np.zeros_like(cell), *inside])
        (folder / "images" / f"{picture.name}.jpg").write_bytes(picture.image.read())
        Image.fromarray(255 * cytoplasm.astype(np.uint8)).save(folder / "masks" / f"{picture.name}.png")
    return find_labelled_pictures(str(folder))


def measure(name: str, folder: str | Path, pictures: list[LabelledPicture]) -> str:
    """A row of the table."""
    model, processor = EfficientSamModel.from_pretrained(folder), EfficientSamProcessor.from_pretrained(folder)
    scores = score_held_out(model.float().eval(), processor, pictures)
    return f"| {name} | " + " | ".join(f"{value:.3f}" for value in scores.values()) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", help="the set of white blood cells")
    parser.add_argument("--folder", type=Path, required=True, help="where pictures and models lie")
    args, options = parser.parse_known_args()
    pictures, held = split_pictures(find_labelled_pictures(args.cells), HOLD_OUT)
    write_cytoplasm(pictures[:: len(pictures) // PICTURES][:PICTURES], args.folder / "mine")
    measured, run = write_cytoplasm(held, args.folder / "measured"), args.folder / "run"
    command = [sys.executable, str(CUSTOM), "--sources", str(args.folder / "mine"), "--output_dir", str(run)]
    subprocess.run([*command, *options], check=True)
    print(f"mean IoU over the cytoplasm of {len(measured)} pictures that no training saw")
    print("| model | box | one click | three clicks |\n|---|---|---|---|")
    print(measure("bundled", default_checkpoint(), measured))
    print(measure("after 20 pictures", run / "model", measured), flush=True)


if __name__ == "__main__":
    main()
