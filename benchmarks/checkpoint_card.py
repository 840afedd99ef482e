"""The bundled checkpoint's model card, from figures that were measured on its weights.

    cd benchmarks
    python default_checkpoint.py GRABCUT BERKELEY --output checkpoint/evaluation.json
    python default_checkpoint.py GRABCUT BERKELEY --zoom 2 --output checkpoint/evaluation_closer.json
    HELD_OUT="SET ... --every 10 --limit 20 --masks 4"
    python default_checkpoint.py $HELD_OUT --output checkpoint/held_out.json
    python default_checkpoint.py $HELD_OUT --zoom 2 --output checkpoint/held_out_closer.json
    python checkpoint_card.py

The prose is checkpoint/card.md; history.json beside it has the earlier checkpoints' figures, [box, one click] of each
set. Figures of other weights than the bundled ones are refused.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from default_checkpoint import checksum, table

from efficientsam_hf import default_checkpoint

FIGURES = Path(__file__).parent / "checkpoint"


def card(folder: Path, figures: Path = FIGURES) -> str:
    """The text of the card of a checkpoint's folder.

    Raises:
        ValueError: if figures are not of the folder's weights.
    """
    weights, rows = checksum(folder), {}
    for name in ("evaluation", "evaluation_closer", "held_out", "held_out_closer"):
        measured = json.loads((figures / f"{name}.json").read_text())
        if measured["weights"] != weights:
            raise ValueError(f"{name}.json has figures of weights {measured['weights'][:8]}, wanted {weights[:8]}")
        rows[name] = measured["rows"]
    parts = {name: table(measured) for name, measured in rows.items()}
    parts |= {"history": history(figures, rows["evaluation"]), "weights": weights}
    text = (figures / "card.md").read_text()
    for name, part in parts.items():
        text = text.replace(f"{{{name}}}", part)
    return text


def history(figures: Path, rows: list[dict]) -> str:
    """The table of box and click of all checkpoints; the last is the one that was scored."""
    entries = json.loads((figures / "history.json").read_text())
    entries += [{"checkpoint": "this one", **{row["set"]: [row["box"], row["click"]] for row in rows}}]
    sets = [row["set"] for row in rows]
    lines = [f"| checkpoint | {' | '.join(f'{name} box / click' for name in sets)} |", f"|{'---|' * (1 + len(sets))}"]
    for entry in entries:
        scores = " | ".join(" / ".join(f"{figure:.3f}" for figure in entry[name]) for name in sets)
        lines.append(f"| {entry['checkpoint']} | {scores} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    (default_checkpoint() / "README.md").write_text(card(default_checkpoint()))


if __name__ == "__main__":
    main()
