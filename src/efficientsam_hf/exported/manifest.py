"""The page that an exported folder carries, `export.json`: what is in it, and how to see that it is all there."""

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

NAME = "export.json"
LAYOUT = 1  # of the folder; one that is higher was written by a later version of this package


@dataclass(frozen=True)
class Manifest:
    """What an exported folder says of itself.

    Args:
        format: "onnx", "openvino", "torch-export" or "executorch".
        graphs: For each graph its `file`, and the names of its `inputs` and `outputs`, in order.
        files: The SHA-256 of each other file, by its name.
        image_size: Side in pixels of the pictures that the encoder takes.
        dtype: What the weights were when they were traced; inputs and outputs are float32.
        quantization: "dynamic", "static" or None.
        opset: Of ONNX, else None.
        versions: Of the packages that made it.
        check: What the answers were worth beside torch's, when the folder was written.
    """

    format: str
    graphs: dict[str, dict[str, Any]]
    files: dict[str, str]
    image_size: int
    dtype: str = "float32"
    quantization: str | None = None
    opset: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    check: dict[str, float] = field(default_factory=dict)
    layout: int = LAYOUT

    def write(self, folder: Path) -> None:
        """Write it into the folder."""
        (folder / NAME).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def is_exported(source: Any) -> bool:
    """Whether this is a folder with a manifest."""
    return source is not None and (Path(source) / NAME).is_file()


def read_manifest(folder: str | Path) -> Manifest:
    """What the folder says of itself, once all its files are found to be those that were written.

    Raises:
        ValueError: if it is no manifest, one of a later layout, or a file is missing or another.
    """
    folder = Path(folder)
    try:
        found = json.loads((folder / NAME).read_text(encoding="utf-8"))
        known = {item.name for item in fields(Manifest)}
        if found["layout"] > LAYOUT:
            raise ValueError(f"layout {found['layout']}, which a later efficientsam-hf wrote; wanted at most {LAYOUT}")
        manifest = Manifest(**{name: value for name, value in found.items() if name in known})
    except (ValueError, KeyError, TypeError) as fault:
        raise ValueError(f"{folder / NAME}: wanted the page of an exported folder, found {fault}") from fault
    for name, wanted in manifest.files.items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: wanted the file {name}, found none; export it again")
        if checksum(folder / name) != wanted:
            raise ValueError(f"{folder / name}: is not the file that was exported (another SHA-256); export it again")
    return manifest


def checksum(path: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            total.update(block)
    return total.hexdigest()
