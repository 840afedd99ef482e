"""The tables of docs/expected_numbers.md that were measured here: all of its commands one after the other.

    python benchmarks/expected_numbers.py SETS --page docs/expected_numbers.md
    python benchmarks/expected_numbers.py SETS --model MODEL --folder OUT

SETS holds `grabcut` and `berkeley` in SA-1B's layout, `coco_train` (photos of COCO train2017 with a part of its
annotations) and `lvis_val_sub` (photos of LVIS v0.5 val). Result files and contact sheets lie in OUT; what is there is
not done again. With `--page` the part of the page between its two marks is written anew.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from efficientsam_hf.evaluation.tables import markdown

CLICKS = ["--protocol", "sam", "--protocol", "ritm", "--protocol", "paper", "--protocol", "centroid"]
SETS = {
    "grabcut": ["--images", "grabcut"],
    "berkeley": ["--images", "berkeley"],
    "coco": ["--images", "coco_train/images", "--annotations", "coco_train/instances_train2017_subset.json"],
    "lvis": ["--images", "lvis_val_sub/images", "--annotations", "lvis_val_sub/lvis_v0.5_val_subset.json"],
}
RUNS = {
    "grabcut_boxes": ["boxes", "--boundary"],
    "grabcut_points": ["points", *CLICKS],
    "berkeley_boxes": ["boxes", "--boundary"],
    "berkeley_points": ["points", *CLICKS],
    "coco_boxes": ["boxes", "--boundary", "--limit", "48"],
    "coco_points": ["points", *CLICKS, "--limit", "24"],
    "coco_everything": ["everything", "--limit", "2"],
    "lvis_boxes": ["boxes", "--boundary"],
    "lvis_points": ["points", *CLICKS],
    "lvis_everything": ["everything", "--limit", "4"],
}
NAMES = {"coco": "COCO train2017, a part", "lvis": "LVIS v0.5 val, a part"}
MARKS = ("<!-- measured by benchmarks/expected_numbers.py -->\n", "<!-- until here -->\n")
Figures = dict[str, dict]  # of RUNS


def evaluate(name: str, args: argparse.Namespace) -> dict:
    """The result of a command, which is run unless its file is there."""
    path = args.folder / f"{name}.json"
    if not path.is_file():
        task, *options = RUNS[name]
        data = [word if word.startswith("--") else str(args.sets / word) for word in SETS[name.split("_")[0]]]
        options += ["--model", args.model] if args.model else []
        command = [sys.executable, "-m", "efficientsam_cli", "evaluate", task, *data, *options, "--device", "cpu"]
        subprocess.run([*command, "--output", str(path)], check=True, stdout=sys.stderr)
    return json.loads(path.read_text())["results"][0]


def means(found: Figures, sets: tuple[str, ...]) -> str:
    """Mean IoU of every protocol."""
    rows = []
    for name in sets:
        for result in (found[f"{name}_boxes"], found[f"{name}_points"]):
            for one in result["protocols"]:
                rows += [row_of(name, result, one, number, told) for number, told in one["at"].items() if told]
    return markdown(rows)


def row_of(name: str, result: dict, one: dict, number: str, told: dict) -> dict:
    after = "box" if one["protocol"] == "box" else f"{number} click" + "s" * (number != "1")
    row = {"set": NAMES.get(name, name), "photos": result["data"]["pictures"], "masks": one["masks"]}
    row |= {"protocol": f"`{one['protocol']}`", "after": after, "mean IoU": told["miou"]}
    row |= {"oracle": told["oracle_miou"], "boundary IoU": told.get("boundary_iou")}
    return row | ({size: told[size] for size in ("small", "medium", "large")} if name in NAMES else {})


def clicks(found: Figures, sets: tuple[str, ...]) -> str:
    """Numbers of clicks."""
    rows = []
    for name in sets:
        one = next(one for one in found[f"{name}_points"]["protocols"] if "noc" in one)
        row = {"set": NAMES.get(name, name), "masks": one["masks"]}
        for wanted, count in one["noc"].items():
            row |= {f"NoC@{wanted}": f"{count['clicks']:.2f}", f"never {wanted}": count["failures"]}
        rows.append(row)
    return markdown(rows)


def precisions(found: Figures) -> str:
    """AP by true boxes."""
    rows = []
    for name, title in NAMES.items():
        result = found[f"{name}_boxes"]
        for kind, told in (("masks", result["ap"]), ("boundaries", result["boundary_ap"])):
            told = {**dict.fromkeys(("APr", "APc", "APf")), **told}
            head = {"sample": title, "photos": result["data"]["pictures"], "masks": result["protocols"][0]["masks"]}
            rows.append({**head, "of": kind, **{figure: told[figure] for figure in sorted(told, key=order)}})
    return markdown(rows)


def order(figure: str) -> int:
    return ["AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf"].index(figure)


def recalls(found: Figures) -> str:
    """AR of segment everything."""
    rows = []
    for name, title in NAMES.items():
        result = found[f"{name}_everything"]
        for most in (10, 100, 1000):
            row = {"sample": title, "photos": result["data"]["pictures"], "masks a photo": result["masks_a_picture"]}
            told = {f"AR{group}": result["ar"].get(f"AR{group}@{most}") for group in ("", *"smlrcf")}
            rows.append({**row, "best": str(most), **told})
    return markdown(rows)


def page_part(found: Figures) -> str:
    """What stands between the page's marks."""
    first = [one["at"]["1"]["miou"] for one in found["grabcut_points"]["protocols"]]
    model = found["grabcut_boxes"]["model"]
    return f"""
{means(found, ("grabcut", "berkeley"))}

Read it across: one click scores between {min(first):.3f} and {max(first):.3f} on grabcut by who asks, with the same
weights (`{model["name"]}`, {model["parameters"]:,} parameters, SHA-256
of their values {model["weights_sha256"][:16]}..., not of the file, which the card has). The card's "one click" goes by
OpenCV's quick distances.

{clicks(found, ("grabcut", "berkeley"))}

### Smoke tests on COCO's and LVIS's format

That the whole way runs, on samples too small to quote: photos of a part of COCO's train2017, **on which the checkpoint
was trained**, and photos of LVIS v0.5's val, on which it was not. The truth fed back has AP 1.000 on both (tested in
`tests/test_evaluation_coco.py`). Of the LVIS sample's 209 objects 205 are of frequent categories, 3 of common and 1 of
rare ones.

```console
$ efficientsam evaluate boxes --images COCO/images --annotations instances_train2017_subset.json --boundary --limit 48
$ efficientsam evaluate points --images COCO/images --annotations instances_train2017_subset.json --limit 24 \\
    --protocol sam --protocol ritm --protocol paper --protocol centroid
$ efficientsam evaluate boxes --images LVIS/images --annotations lvis_v0.5_val_subset.json --boundary
$ efficientsam evaluate points --images LVIS/images --annotations lvis_v0.5_val_subset.json \\
    --protocol sam --protocol ritm --protocol paper --protocol centroid
```

{means(found, ("coco", "lvis"))}

{clicks(found, ("coco", "lvis"))}

{precisions(found)}

AP is that of masks by true boxes with the predicted IoU for a score; `boundaries` counts the lesser of mask IoU and
boundary IoU.

```console
$ efficientsam evaluate everything --images COCO/images --annotations instances_train2017_subset.json --limit 2
$ efficientsam evaluate everything --images LVIS/images --annotations lvis_v0.5_val_subset.json --limit 4
```

{recalls(found)}

AR of the best 10, 100 and 1000 masks of a photo by SAM's protocol (64 clicks along a side, no thresholds), of all
objects, of small, medium and large ones, and of those of rare, common and frequent categories.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", type=Path)
    parser.add_argument("--model", help="folder or Hub id; the bundled checkpoint if left out")
    parser.add_argument("--folder", type=Path, default=Path("expected_numbers"), help="for the result files")
    parser.add_argument("--page", type=Path, help="page whose marked part is written anew")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    part = page_part({name: evaluate(name, args) for name in RUNS})
    print(part)
    if args.page:
        head, _, rest = args.page.read_text().partition(MARKS[0])
        args.page.write_text(head + MARKS[0] + part + MARKS[1] + rest.partition(MARKS[1])[2])


if __name__ == "__main__":
    main()
