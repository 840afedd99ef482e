"""Result files that say what they are results of."""

import hashlib
import json
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..written_files import written_together
from .predictor import Predictor

PACKAGES = (
    "efficientsam-hf",
    "torch",
    "transformers",
    "numpy",
    "pillow",
    "opencv-python-headless",
    "pycocotools",
    "faster-coco-eval",
    "onnxruntime",
)
ORIGIN = ("_name_or_path", "architectures", "auto_map", "processor_class", "transformers_version")


def describe_model(predictor: Predictor, source: str, device: str) -> dict[str, Any]:
    """What was evaluated: name, source, parameters, hashes of weights and settings, and where it ran."""
    return {
        "name": predictor.name,
        "source": source,
        "parameters": predictor.parameters,
        "weights_sha256": predictor.weights_hash(),
        "settings_sha256": question_of(**without_origin(predictor.settings())),
        "device": device,
    }


def without_origin(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of any depth without what saving and loading write into them, on which no answer depends."""
    return {
        name: without_origin(value) if isinstance(value, dict) else value
        for name, value in settings.items()
        if name not in ORIGIN
    }


def describe_data(
    images: str | Path, annotations: str | Path | None, records: list[dict[str, Any]], truth_hash: str
) -> dict[str, Any]:
    """What it was evaluated on; `pictures_sha256` is over the bytes of all pictures that were looked at."""
    digest = hashlib.sha256("".join(record.get("sha256", "") for record in records).encode())
    return {
        "images": str(images),
        "annotations": annotations and str(annotations),
        "annotations_sha256": truth_hash,
        "pictures": len(records),
        "pictures_sha256": digest.hexdigest(),
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that have a say in the figures."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def question_of(**parts: Any) -> str:
    """A hash of all that the answers depend on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def time_spent(records: list[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds a picture, by kind of work."""
    kinds = sorted({kind for record in records for kind in record["seconds"]})
    return {
        kind: round(1000 * sum(record["seconds"].get(kind, 0) for record in records) / max(len(records), 1), 2)
        for kind in kinds
    }


def write_results(path: Path, results: dict[str, Any], rows: list[dict[str, Any]] | None = None) -> None:
    """The results, and beside them `NAME_masks.jsonl`, a line a picture with what each of its masks scored."""
    paths = [path] if rows is None else [path, rows_path(path)]
    with written_together(paths) as (results_part, *rows_part):
        results_part.write_text(json.dumps(results, indent=1) + "\n")
        for part in rows_part:
            part.write_text("".join(json.dumps(row) + "\n" for row in rows or []))


def rows_path(path: Path) -> Path:
    """Where each picture's line lies, beside the results."""
    return path.with_name(f"{path.stem}_masks.jsonl")
