"""Records of pictures -> the figures of a protocol."""

from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import Any

from .metrics import number_of_clicks, size_class
from .protocols import Protocol
from .skips import Skips

SIZES = ("small", "medium", "large")


def summarize(records: Sequence[dict[str, Any]], protocol: Protocol, most_clicks: int | None = None) -> dict[str, Any]:
    """The means of a protocol over records as `evaluate_picture` gives them.

    Args:
        records: One a picture, in any order.
        protocol: Whose figures.
        most_clicks: Of the model; after more clicks than that there is no figure.

    Returns:
        `protocol`, `pictures` (with masks), `masks`, `skipped`, and `at`: for each number of prompts `miou` (over
        masks), `miou_of_pictures` (over pictures' means), `oracle_miou` and `boundary_iou` if asked for, and `small`,
        `medium`, `large` (`miou` of masks of that size) with their counts. For counted clicks also `noc`: for each
        wanted IoU `clicks` (mean, failures counting as `most`) and `failures`. None where there is no mask.
    """
    scored = [[row for row in record["masks"] if protocol.name in row] for record in records]
    scored = [rows for rows in scored if rows]
    everyone = [row for rows in scored for row in rows]
    result: dict[str, Any] = {
        "protocol": protocol.name,
        "pictures": len(scored),
        "masks": len(everyone),
        "skipped": Skips.of(record["skipped"] for record in records).record(),
        "at": {},
    }
    for number in protocol.prompts:
        possible = most_clicks is None or protocol.first is None or number <= most_clicks
        result["at"][str(number)] = figures(scored, protocol.name, number) if possible else None
    if protocol.wanted:
        result["noc"] = {
            f"{wanted:.0%}".rstrip("%"): clicks_needed(everyone, protocol, wanted) for wanted in protocol.wanted
        }
    return result


def figures(scored: Sequence[Sequence[dict]], name: str, number: int) -> dict[str, Any]:
    """The means after `number` prompts of the protocol `name`."""
    everyone = [row for rows in scored for row in rows]

    def after(row: dict, kind: str = "iou") -> float:
        # Who got no further click, for want of an error or of background clicks, keeps the answer.
        return row[name][kind][:number][-1]

    found: dict[str, Any] = {
        "miou": mean(after, everyone),
        "miou_of_pictures": mean(lambda rows: fmean(map(after, rows)), scored),
    }
    for kind, title in (("oracle", "oracle_miou"), ("boundary", "boundary_iou")):
        if everyone and kind in everyone[0][name]:
            found[title] = mean(lambda row: after(row, kind), everyone)  # noqa: B023 - called at once
    for size in SIZES:
        rows = [row for row in everyone if size_class(row["area"]) == size]
        found |= {size: mean(after, rows), f"{size}_masks": len(rows)}
    return found


def mean(value: Callable[[Any], float], items: Iterable[Any]) -> float | None:
    """The mean of a value over items, None of none."""
    values = [value(item) for item in items]
    return round(fmean(values), 6) if values else None


def clicks_needed(rows: Sequence[dict], protocol: Protocol, wanted: float) -> dict[str, Any]:
    """Clicks until an IoU, and how many masks never had it."""
    counts = [number_of_clicks(row[protocol.name]["iou"], wanted, protocol.most) for row in rows]
    never = sum(max(row[protocol.name]["iou"][: protocol.most]) < wanted for row in rows)
    return {"clicks": mean(float, counts), "failures": never}
