"""Traced graphs written as files, a function for each format."""

import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from ..exported.engines import wanted_package
from .graphs import Graph

# The lowest with every operator that the graphs use: the more runtimes read it.
OPSET = 20


def write_onnx(graph: Graph, path: Path) -> None:
    """An ONNX file for any runtime, that passes onnx's full check.

    Raises:
        ValueError: if onnx or onnxscript is missing.
        onnx.checker.ValidationError: if the file is no valid ONNX.
    """
    onnx = wanted_package("onnx", "export to ONNX")
    wanted_package("onnxscript", "export to ONNX")
    with quiet():
        program = torch.onnx.export(
            graph.program,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            opset_version=OPSET,
            dynamo=True,
            optimize=True,
        )
    program.save(path)
    onnx.checker.check_model(path, full_check=True)


@contextmanager
def quiet() -> Iterator[None]:
    """Without what torch prints of its steps, of torchvision, and of its own use of its own functions."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def write_openvino(graph: Graph, path: Path) -> None:
    """OpenVINO's XML, and its weights in a .bin file beside it.

    Raises:
        ValueError: if openvino is missing.
    """
    openvino = wanted_package("openvino", "export to OpenVINO")
    with quiet():
        model = openvino.convert_model(graph.program)
    for port, name in zip(model.inputs, graph.inputs, strict=True):
        port.get_tensor().set_names({name})
    for port, name in zip(model.outputs, graph.outputs, strict=True):
        port.get_tensor().set_names({name})
    openvino.save_model(model, path, compress_to_fp16=False)


def write_torch_export(graph: Graph, path: Path) -> None:
    """What `torch.export.load` reads."""
    torch.export.save(graph.program, path)


def write_executorch(graph: Graph, path: Path) -> None:
    """An ExecuTorch program for the CPU, through XNNPACK.

    Raises:
        ValueError: if executorch is missing, or cannot take the graph.
    """
    lowering: Any = wanted_package("executorch.exir", "export to ExecuTorch")
    partition: Any = wanted_package(
        "executorch.backends.xnnpack.partition.xnnpack_partitioner", "export to ExecuTorch"
    )
    try:
        lowered = lowering.to_edge_transform_and_lower(graph.program, partitioner=[partition.XnnpackPartitioner()])
        content = lowered.to_executorch().buffer
    except Exception as fault:  # its checks raise bare AssertionErrors and errors of its own
        found = " ".join([type(fault).__name__, *str(fault).split()])
        raise ValueError(f"this version of ExecuTorch cannot take {path.stem}: {found}") from fault
    path.write_bytes(content)


# For each format the end of a file's name, and who writes it.
FORMATS: dict[str, tuple[str, Callable[[Graph, Path], None]]] = {
    "onnx": (".onnx", write_onnx),
    "openvino": (".xml", write_openvino),
    "torch-export": (".pt2", write_torch_export),
    "executorch": (".pte", write_executorch),
}
