"""Commands that write a model for other runtimes."""

from pathlib import Path
from typing import Annotated

import typer


def export(
    source: Annotated[
        str | None, typer.Argument(help="model folder or Hub id; the bundled checkpoint if left out")
    ] = None,
    to: Annotated[str, typer.Option(help="onnx, openvino, torch-export, executorch; or osam")] = "onnx",
    output: Annotated[Path | None, typer.Option(help="folder to write; NAME-TO here if left out")] = None,
    quantize: Annotated[str | None, typer.Option(help="8-bit encoder: dynamic or static")] = None,
    dtype: Annotated[str, typer.Option(help="of the weights: float32, float16, bfloat16")] = "float32",
    calibration: Annotated[
        Path | None, typer.Option(help="folder of pictures that --quantize static looks at")
    ] = None,
    pictures: Annotated[int, typer.Option(min=1, help="so many of them, spread over the folder")] = 64,
    photo: Annotated[str | None, typer.Option(help="what the check looks at; a photo of the package's own")] = None,
    overwrite: Annotated[bool, typer.Option(help="take away what is in the output folder")] = False,
) -> None:
    """Write a model for another runtime, for --model of the other commands and for programs without this package.

    The folder appears only if its answers on a photo are the model's. `--to osam` writes the two files that osam,
    labelme and samexporter load in place of the official ONNX files.
    """
    from transformers.utils import logging

    from efficientsam_hf import default_checkpoint, load_checkpoint, read_photo
    from efficientsam_hf.data.images import find_pictures
    from efficientsam_hf.export.official import export_for_osam
    from efficientsam_hf.export.writing import PHOTO, export_model

    logging.disable_progress_bar()
    output = output or Path(f"{Path(source or default_checkpoint()).resolve().name}-{to}")
    if to == "osam" and (quantize or dtype != "float32"):
        raise ValueError("--to osam writes float32: leave --quantize and --dtype out")
    if calibration and quantize != "static":
        raise ValueError("--calibration is for --quantize static alone: add that, or leave it out")
    if photo:
        read_photo(photo)  # before the export, which takes minutes
    found = find_pictures([calibration]) if calibration else []
    chosen = [picture.read() for picture in found[:: max(1, len(found) // pictures)][:pictures]]
    model, processor = load_checkpoint(source, device="cpu", dtype="float32")
    if to == "osam":
        check = export_for_osam(model, processor, output, photo or PHOTO, overwrite)
    else:
        manifest = export_model(model, processor, output, to, quantize, dtype, chosen, photo or PHOTO, overwrite)
        check = manifest.check
    for name, value in check.items():
        typer.echo(f"{name}: " + (f"mean IoU {value:.4f}" if name == "mask_iou" else f"differs by {value:.1e}"))
    typer.echo(f"wrote {output}")
