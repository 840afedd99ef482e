"""Commands that turn photos into masks."""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from .arguments import Device, Model, file_name_of, hashes_of, parse_numbers, place_of, progress_bar


def predict(
    photo: Annotated[str, typer.Argument(help="picture file or URL")],
    point: Annotated[list[str] | None, typer.Option(help="X,Y[,LABEL] in pixels; all points are one object's")] = None,
    box: Annotated[list[str] | None, typer.Option(help="X0,Y0,X1,Y1 in pixels; each box is an object")] = None,
    model: Model = None,
    output: Annotated[Path | None, typer.Option(help="overlay picture; PHOTO_overlay.png here if left out")] = None,
    mask: Annotated[
        Path | None,
        typer.Option(help="PNG of the mask, white on black; of several objects, numbers from 1 on"),
    ] = None,
    cutout: Annotated[Path | None, typer.Option(help="PNG of the photo, transparent around the objects")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="masks as COCO run lengths, SA-1B's layout")] = None,
    zoom: Annotated[
        float | None, typer.Option(help="look closer at each object, in a crop so many times its size; 0: do not")
    ] = None,
    device: Device = None,
) -> None:
    """Segment what clicks and boxes point at, and draw it.

    LABEL is 1 on the object (if left out) and 0 on the background, for checkpoints that learnt background clicks.
    """
    start = time.monotonic()
    points, labels, boxes = read_prompts(point or [], box or [])
    output = output or Path(f"{file_name_of(photo).stem}_overlay.png")
    if other := [file for file in (mask, cutout) if file and file.suffix.lower() != ".png"]:
        raise ValueError(f"{other[0]}: masks and cut-outs are PNG files, wanted a name that ends with .png")

    from PIL import Image
    from transformers.utils import logging

    from efficientsam_hf import load_checkpoint, read_photo, segment
    from efficientsam_hf.visualization import cut_out, label_map
    from efficientsam_hf.written_files import check_outputs, written_together

    asked = {"overlay": output, "mask": mask, "cut-out": cutout, "masks": json_file}
    files = {kind: file for kind, file in asked.items() if file}
    check_outputs(photo, *files.values())
    picture = read_photo(photo)
    logging.disable_progress_bar()
    loaded, processor = load_checkpoint(model, device=place_of(device, model))
    if processor.negative_points and labels and not any(labels):
        raise ValueError("give at least one --point on the object, got background alone (a --box is another object)")
    prompts = as_objects(points, labels, boxes)
    answer = segment(loaded, processor, picture, **prompts, zoom=zoom)
    records, masks = answer.records(), answer.masks[:, 0].cpu().numpy()
    image = {"file_name": file_name_of(photo).name, "width": picture.width, "height": picture.height}
    with written_together([*files.values()]) as parts:
        for kind, part in zip(files, parts, strict=True):
            if kind == "masks":
                part.write_text(json.dumps({"image": image, "annotations": records}, indent=1) + "\n")
            elif kind == "overlay":
                answer.show(picture, **prompts).save(part)
            elif kind == "cut-out":
                cut_out(picture, masks.max(0)).save(part)
            else:
                (Image.fromarray(masks[0]) if len(masks) == 1 else label_map(records, picture.size)).save(part)
    for record in records:
        typer.echo(f"object {record['id']}: predicted IoU {record['predicted_iou']:.2f}, {record['area']} pixels")
    for kind, file in files.items():
        typer.echo(f"{kind + ':':8} {file}")
    typer.echo(f"time:    {time.monotonic() - start:.1f} s")


def read_prompts(point: list[str], box: list[str]) -> tuple[list, list, list]:
    """Points, their labels, and boxes, from how they are written on the command line."""
    clicks = [parse_numbers(text, "--point", (2, 3), "X,Y or X,Y,LABEL") for text in point]
    boxes = [parse_numbers(text, "--box", (4,), "X0,Y0,X1,Y1") for text in box]
    if not clicks and not boxes:
        raise ValueError("give at least one --point X,Y or --box X0,Y0,X1,Y1, got none")
    points, labels = [click[:2] for click in clicks], [click[2] if len(click) > 2 else 1 for click in clicks]
    if strange := set(labels) - {0, 1}:
        raise ValueError(f"--point: wanted labels 1 (object), 0 (background), found {strange.pop():g}")
    return points, labels, boxes


def as_objects(points: list, labels: list, boxes: list) -> dict[str, Any]:
    """All points for one object, then an object for each box, as `segment` takes them."""
    clicked, boxed = bool(points), len(boxes)
    return {
        "points": [points] + [None] * boxed if clicked else None,
        "labels": [labels] + [None] * boxed if clicked else None,
        "boxes": [None] * clicked + boxes if boxed else None,
    }


def everything(
    source: Annotated[str, typer.Argument(help="picture file or URL, or a folder of pictures")],
    model: Model = None,
    output: Annotated[
        Path | None, typer.Option(help="overlay picture; for a folder, the folder to write into")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="masks in COCO's format")] = None,
    points_per_side: Annotated[int | None, typer.Option(help="clicks along each side")] = None,
    pred_iou_thresh: Annotated[float | None, typer.Option(help="least predicted IoU, 0 to 1")] = None,
    stability_score_thresh: Annotated[float | None, typer.Option(help="least stability, 0 to 1")] = None,
    box_nms_thresh: Annotated[float | None, typer.Option(help="most overlap of two masks' boxes, 0 to 1")] = None,
    crop_n_layers: Annotated[int | None, typer.Option(help="layers of crops, each twice as close")] = None,
    min_mask_region_area: Annotated[int | None, typer.Option(help="fill holes, drop islands of fewer pixels")] = None,
    strategy: Annotated[str | None, typer.Option(help='"grid", or "adaptive": no click on what was found')] = None,
    device: Device = None,
) -> None:
    """Find every object of a picture, or of each picture of a folder, and draw them.

    What is left out is as the model's config says, or else as in segment-anything.

    A folder's pictures get a PNG and a JSON file each in OUTPUT (SOURCE_masks if left out), and together
    OUTPUT/coco.json. Started again, the command goes on where it stopped; OUTPUT/everything.json keeps model and
    options, and others are refused.
    """
    options = {
        "points_per_side": points_per_side,
        "pred_iou_thresh": pred_iou_thresh,
        "stability_score_thresh": stability_score_thresh,
        "box_nms_thresh": box_nms_thresh,
        "crop_n_layers": crop_n_layers,
        "min_mask_region_area": min_mask_region_area,
        "strategy": strategy,
    }
    options = {name: value for name, value in options.items() if value is not None}

    from transformers.utils import logging

    from efficientsam_hf import load_checkpoint
    from efficientsam_hf.mask_generation import MaskGenerationSettings, segment_file, segment_folder

    MaskGenerationSettings.read(**options)
    if Path(source).is_dir() and json_file:
        raise ValueError("--json is for one picture: a folder's masks go to coco.json in OUTPUT")
    logging.disable_progress_bar()
    loaded, processor = load_checkpoint(model, device=place_of(device, model))
    if not Path(source).is_dir():
        output = output or Path(f"{file_name_of(source).stem}_everything.png")
        count = segment_file(loaded, processor, source, output, json_file, **options)
        typer.echo(f"{count} masks: {output}" + (f", {json_file}" if json_file else ""))
        return
    output = output or Path(f"{Path(source).resolve().name}_masks")
    settings = {"model": model or "default", **hashes_of(loaded, processor)}
    problems = segment_folder(loaded, processor, source, output, progress_bar, settings, **options)
    for problem in problems:
        typer.echo(f"efficientsam: {problem}", err=True)
    typer.echo(f"masks of {Path(source)}: {output}")
    if problems:
        raise typer.Exit(2)
