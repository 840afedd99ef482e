"""What several commands do with their arguments."""

import sys
from collections.abc import Iterator

import typer


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
