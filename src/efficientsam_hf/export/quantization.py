"""8-bit encoders: their linear layers, which are most of a transformer.

The decoder, a small part of the work, keeps its numbers, and so do convolutions: with activations in 8 bits a
convolutional stem loses its masks.
"""

from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from ..exported.engines import openvino_core, wanted_package
from ..processing_efficientsam import EfficientSamProcessor

KINDS = ("dynamic", "static")
LINEAR = ["MatMul", "Gemm"]
QUANTIZED = ("onnx", "openvino")


def check_quantization(to: str, quantize: str | None, calibration: Sequence[Any]) -> None:
    """Refuse what is not offered."""
    if quantize is None:
        return
    if quantize not in KINDS:
        raise ValueError(f"found quantization {quantize!r}, wanted {' or '.join(KINDS)}")
    if to not in QUANTIZED:
        raise ValueError(f"quantization is offered for {' and '.join(QUANTIZED)}, found {to}")
    if quantize == "static" and not len(calibration):
        raise ValueError("static quantization wants pictures to look at (--calibration FOLDER), found none")


def quantize_encoder(
    to: str, path: Path, quantize: str, processor: EfficientSamProcessor, calibration: Sequence[Any]
) -> None:
    """Replace a written encoder by its 8-bit form.

    Raises:
        ValueError: if the package that quantises is missing.
    """
    feeds = Feeds(processor, calibration)
    {"onnx": quantize_onnx, "openvino": quantize_openvino}[to](path, quantize, feeds)


class Feeds:
    """The encoder's inputs for each picture, one at a time, as often as somebody asks."""

    def __init__(self, processor: EfficientSamProcessor, pictures: Sequence[Any]):
        self.processor = processor
        self.pictures = pictures

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for picture in self.pictures:
            yield {"pixel_values": self.processor.image_processor(picture)["pixel_values"].numpy()}


def quantize_onnx(path: Path, quantize: str, feeds: Feeds) -> None:
    """By onnxruntime: "dynamic" measures activations as they come, "static" once, on the pictures."""
    tools: Any = wanted_package("onnxruntime.quantization", "8-bit ONNX")
    shape_inference = wanted_package("onnxruntime.quantization.shape_inference", "8-bit ONNX")
    # Weights of 7 bits, since processors without VNNI add products of 8 bits in 16, which are then cut off.
    options = {"op_types_to_quantize": LINEAR, "per_channel": True, "reduce_range": True}
    options["weight_type"] = tools.QuantType.QInt8
    whole = path.with_name(f"float_{path.name}")
    shape_inference.quant_pre_process(path, whole, skip_symbolic_shape=True)
    if quantize == "dynamic":
        tools.quantize_dynamic(whole, path, **options)
    else:
        remaining = iter(feeds)
        one_by_one = type("OneByOne", (tools.CalibrationDataReader,), {"get_next": lambda self: next(remaining, None)})
        tools.quantize_static(
            whole,
            path,
            one_by_one(),
            quant_format=tools.QuantFormat.QDQ,
            activation_type=tools.QuantType.QUInt8,
            **options,
        )
    whole.unlink()


def quantize_openvino(path: Path, quantize: str, feeds: Feeds) -> None:
    """By nncf: "dynamic" makes the weights 8-bit and leaves activations to the runtime; "static" measures both."""
    core = openvino_core("8-bit OpenVINO")
    openvino, nncf = import_module("openvino"), wanted_package("nncf", "8-bit OpenVINO")
    model = core.read_model(path)
    if quantize == "dynamic":
        quantized = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
    else:
        pictures = nncf.Dataset([feed["pixel_values"] for feed in feeds])
        quantized = nncf.quantize(
            model,
            pictures,
            subset_size=len(feeds.pictures),
            model_type=nncf.ModelType.TRANSFORMER,
            ignored_scope=nncf.IgnoredScope(types=["Convolution", "GroupConvolution"], validate=False),
        )
    beside = path.with_name(f"int8_{path.name}")
    openvino.save_model(quantized, beside, compress_to_fp16=False)
    del model, quantized
    for name in (".xml", ".bin"):
        beside.with_suffix(name).replace(path.with_suffix(name))
