"""Arguments that several commands have, and what they do with them."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

Model = Annotated[
    str | None, typer.Option(help="folder (exported ones, too) or Hub id; the bundled checkpoint if left out")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; the fastest there is if left out")]


def place_of(device: str | None, model: str | None = None) -> str | None:
    """The device's name, under torchrun this process's own.

    An exported folder's runtime has its own names for devices, and its own choice; they stay as they are.

    Raises:
        ValueError: if there is no such device.
    """
    from efficientsam_hf.exported.manifest import is_exported
    from efficientsam_hf.hub import fastest_device, find_device

    if is_exported(model):
        return device
    place = device or str(fastest_device())
    # Its number at once, for whoever asks for "cuda" alone starts up the first GPU.
    return str(find_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if place == "cuda" else place))


def hashes_of(model: Any, processor: Any) -> dict[str, str]:
    """What tells models of one name apart: hashes of the weights, and of config and processor."""
    from efficientsam_hf.evaluation.predictor import EfficientSamPredictor
    from efficientsam_hf.evaluation.results import describe_model

    known = describe_model(EfficientSamPredictor(model, processor), "", "")
    return {name: known[name] for name in ("weights_sha256", "settings_sha256")}


def file_name_of(picture: str) -> Path:
    """What a path or a URL calls its picture."""
    address = urlsplit(picture)
    return Path(Path(address.path).name or address.netloc) if "://" in picture else Path(Path(picture).name)


def parse_numbers(text: str, name: str, counts: tuple[int, ...], form: str) -> list[float]:
    """Comma-separated numbers, of one of the wanted counts."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in counts:
        raise ValueError(f"{name} must be {form}, got {text!r}")
    return numbers


def progress_bar(items: list) -> Iterator:
    """The items, with a bar on the terminal that says how many are done."""
    with typer.progressbar(items, label="pictures", file=sys.stderr) as bar:
        yield from bar
