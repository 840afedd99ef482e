"""Results as Markdown, for terminals and pages."""

from collections.abc import Iterable, Sequence
from typing import Any


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Rows with the same keys as a table; numbers below 10 with three decimals, what is not there as a dash."""
    if not rows:
        return ""
    lines = [" | ".join(rows[0]), "|".join("---" for _ in rows[0])]
    lines += [" | ".join(map(cell, row.values())) for row in rows]
    return "\n".join(f"| {line} |" if "---" not in line else f"|{line}|" for line in lines)


def cell(value: Any) -> str:
    """One value as text."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def interactive_rows(results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each model, protocol and number of prompts."""
    rows = []
    for result in results:
        spent = result["ms_a_picture"]
        for found in result["protocols"]:
            for number, figures in found["at"].items():
                told = figures or {}
                row = {**who(result), "protocol": found["protocol"], "prompts": number, "masks": found["masks"]}
                row |= {"mIoU": told.get("miou"), "of pictures": told.get("miou_of_pictures")}
                row |= {"oracle": told.get("oracle_miou"), "boundary": told.get("boundary_iou")}
                row |= {size: told.get(size) for size in ("small", "medium", "large")}
                rows.append(row | {"encode ms": spent.get("encode"), "decode ms": spent.get("decode")})
    return without_empty(rows)


def noc_rows(results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each model and protocol that counts clicks."""
    rows = []
    for result in results:
        for found in result["protocols"]:
            if "noc" in found:
                row = {**who(result), "protocol": found["protocol"], "masks": found["masks"]}
                for wanted, count in found["noc"].items():
                    row |= {f"NoC@{wanted}": count["clicks"], f"never {wanted}": count["failures"]}
                rows.append(row)
    return rows


def figure_rows(results: Iterable[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """A row for each model that has figures of this kind: `ap` or `boundary_ap`."""
    return [{**who(result), **result[kind]} for result in results if kind in result]


def recall_rows(results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each model and number of masks that average recall was told for."""
    rows: dict[tuple[int, str], dict[str, Any]] = {}
    for number, result in enumerate(results):
        for title, value in result.get("ar", {}).items():
            name, most = title.split("@")
            told = {**who(result), "masks a picture": result["masks_a_picture"], "best": int(most)}
            rows.setdefault((number, most), told)[name] = value
    return list(rows.values())


def who(result: dict[str, Any]) -> dict[str, Any]:
    """The first columns."""
    return {"model": result["model"]["name"], "parameters": result["model"]["parameters"]}


def without_empty(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows without columns in which nothing stands."""
    full = [name for name in (rows[0] if rows else ()) if any(row[name] is not None for row in rows)]
    return [{name: row[name] for name in full} for row in rows]
