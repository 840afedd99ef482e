"""Metrics for Hugging Face's `evaluate`, a folder each, loaded from disk: `evaluate.load(metric_path("mask_iou"))`."""

from pathlib import Path

FOLDER = Path(__file__).parent


def metric_path(name: str) -> str:
    """The folder of "mask_iou", "boundary_iou" or "number_of_clicks".

    Raises:
        ValueError: for another name.
    """
    names = sorted(path.parent.name for path in FOLDER.glob("*/*.py"))
    if name not in names:
        raise ValueError(f"unknown metric {name!r}, wanted one of {', '.join(names)}")
    return str(FOLDER / name)
