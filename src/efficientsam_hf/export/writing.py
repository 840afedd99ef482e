"""`efficientsam export`: a folder for another runtime, which appears once its answers are found to be the model's."""

import copy
from collections.abc import Sequence
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

import torch

from ..exported.manifest import Manifest, checksum
from ..exported.model import ExportedEfficientSam
from ..modeling_efficientsam import EfficientSamModel
from ..processing_efficientsam import EfficientSamProcessor
from ..written_files import written_beside
from .checking import PHOTO, compare, verdict
from .formats import FORMATS, OPSET
from .graphs import plain_copy, trace
from .quantization import check_quantization, quantize_encoder

PACKAGES = ("efficientsam-hf", "torch", "transformers", "onnx", "onnxscript", "onnxruntime", "openvino", "nncf")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def export_model(
    model: EfficientSamModel,
    processor: EfficientSamProcessor,
    folder: str | Path,
    to: str = "onnx",
    quantize: str | None = None,
    dtype: str = "float32",
    calibration: Sequence[Any] = (),
    photo: Any = PHOTO,
    overwrite: bool = False,
) -> Manifest:
    """Write a model for another runtime: its graphs, processor and config, and a manifest with checksums.

    Args:
        model: A copy in float32 on the CPU is exported of any other.
        processor: The model's.
        folder: Where to; new or empty.
        to: "onnx", "openvino", "torch-export" or "executorch".
        quantize: 8-bit weights in the encoder: "dynamic", or "static" with 8-bit activations, too (ONNX, OpenVINO).
        dtype: Of the weights: "float32", "float16" or "bfloat16" (not in ONNX); inputs and outputs stay float32.
        calibration: Pictures of any kind that "static" looks at, 50 or more of the kind that will come.
        photo: What the check looks at.
        overwrite: Take away what is in the folder.

    Returns:
        The manifest, its `check` telling how near the answers are to torch's.

    Raises:
        ValueError: if the answers are too far from torch's, a package is missing, or the arguments do not fit.
        FileExistsError: if there is something in the folder.
    """
    check_arguments(to, dtype)
    check_quantization(to, quantize, calibration)
    model = plain_copy(model)
    with written_beside(Path(folder).resolve(), overwrite) as beside:
        manifest = write_folder(model, processor, beside, to, quantize, dtype, calibration)
        check = compare(model, processor, ExportedEfficientSam(beside), photo)
        if reason := verdict(check, dtype, quantize):
            raise ValueError(f"not exported: {reason}")
        manifest = Manifest(**{**vars(manifest), "check": check})
        manifest.write(beside)
    return manifest


def check_arguments(to: str, dtype: str) -> None:
    """Refuse what is not offered, before the work begins."""
    if to not in FORMATS:
        raise ValueError(f"found format {to!r}, wanted one of {', '.join(FORMATS)}")
    if dtype not in DTYPES:
        raise ValueError(f"found dtype {dtype!r}, wanted one of {', '.join(DTYPES)}")
    if to == "onnx" and dtype == "bfloat16":
        raise ValueError("onnxruntime does not compute in bfloat16 on a CPU: wanted float32 or float16 for ONNX")


def write_folder(
    model: EfficientSamModel,
    processor: EfficientSamProcessor,
    folder: Path,
    to: str,
    quantize: str | None,
    dtype: str,
    calibration: Sequence[Any],
) -> Manifest:
    """The graphs, the processor, the config and a manifest without a check."""
    suffix, write = FORMATS[to]
    # OpenVINO casts by itself, when it loads: its graph stays as it is.
    traced = model if to == "openvino" or dtype == "float32" else copy.deepcopy(model).to(DTYPES[dtype])
    graphs = trace(traced)
    for name, graph in graphs.items():
        write(graph, folder / f"{name}{suffix}")
    if quantize:
        quantize_encoder(to, folder / f"vision_encoder{suffix}", quantize, processor, calibration)
    processor.save_pretrained(folder)
    model.config.save_pretrained(folder)
    files = {path.name: checksum(path) for path in sorted(folder.iterdir())}
    manifest = Manifest(
        format=to,
        graphs={
            name: {"file": f"{name}{suffix}", "inputs": list(graph.inputs), "outputs": list(graph.outputs)}
            for name, graph in graphs.items()
        },
        files=files,
        image_size=model.config.vision_config.image_size,
        dtype=dtype,
        quantization=quantize,
        opset=OPSET if to == "onnx" else None,
        versions=installed_versions(),
    )
    manifest.write(folder)
    return manifest


def installed_versions() -> dict[str, str]:
    """Of the packages that have a part in an export, as far as they are installed."""
    installed = {found.name for found in distributions()}
    return {package: version(package) for package in PACKAGES if package in installed}
