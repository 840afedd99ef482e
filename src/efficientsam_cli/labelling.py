"""The command that labels many pictures."""

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from .arguments import Device, Model, hashes_of, place_of


def label(
    source: Annotated[str, typer.Argument(help="folder, tars, parquet files, or OWNER/NAME of a data set of the Hub")],
    output: Annotated[Path, typer.Option(help="folder of the labels")],
    format: Annotated[str, typer.Option(help="coco, sa1b, labelme, yolo, png or parquet")] = "coco",
    boxes: Annotated[
        Path | None, typer.Option(help="COCO's JSON: a mask for each box; without it, everything")
    ] = None,
    model: Model = None,
    split: Annotated[str, typer.Option(help="of a data set of the Hub")] = "train",
    column: Annotated[str, typer.Option(help="of a data set, where its pictures are")] = "image",
    pictures_per_shard: Annotated[int, typer.Option(min=1, help="of a folder that a process does at one go")] = 100,
    points_per_side: Annotated[int | None, typer.Option(help="clicks along each side")] = None,
    pred_iou_thresh: Annotated[float | None, typer.Option(help="least predicted IoU, 0 to 1")] = None,
    stability_score_thresh: Annotated[float | None, typer.Option(help="least stability, 0 to 1")] = None,
    box_nms_thresh: Annotated[float | None, typer.Option(help="most overlap of two masks' boxes, 0 to 1")] = None,
    min_mask_region_area: Annotated[int | None, typer.Option(help="fill holes, drop islands of fewer pixels")] = None,
    strategy: Annotated[str | None, typer.Option(help='"grid", or "adaptive": no click on what was found')] = None,
    device: Device = None,
) -> None:
    """Masks for a folder, for shards or for a data set of pictures, in the files that other tools read.

    Started again, the command goes on where it stopped, even after a kill. Under torchrun the processes share the
    work. Pictures that cannot be read are skipped, counted and named.
    """
    options = {
        "points_per_side": points_per_side,
        "pred_iou_thresh": pred_iou_thresh,
        "stability_score_thresh": stability_score_thresh,
        "box_nms_thresh": box_nms_thresh,
        "min_mask_region_area": min_mask_region_area,
        "strategy": strategy,
    }
    options = {name: value for name, value in options.items() if value is not None}
    if boxes and options:
        raise ValueError(f"--boxes and --{next(iter(options)).replace('_', '-')}: the latter is for everything")
    if Path(source).is_dir() and output.resolve().is_relative_to(Path(source).resolve()):
        raise ValueError(f"--output {output} lies in {source}, where labels would be taken for pictures")

    from transformers.utils import logging

    from efficientsam_hf import load_checkpoint
    from efficientsam_hf.evaluation.journal import Share
    from efficientsam_hf.exported.manifest import checksum
    from efficientsam_hf.labelling.boxes import BoxPrompts
    from efficientsam_hf.labelling.shards import LabelFolder
    from efficientsam_hf.labelling.sources import find_label_shards
    from efficientsam_hf.mask_generation import MaskGenerationSettings

    MaskGenerationSettings.read(**options)
    shards = find_label_shards(source, pictures_per_shard, split, column)
    prompts = BoxPrompts(boxes, shards) if boxes else None
    share = Share.of_environment()
    logging.disable_progress_bar()
    loaded, processor = load_checkpoint(model, device=place_of(device, model))
    settings: dict[str, Any] = {"model": model or "default", **hashes_of(loaded, processor), "options": options}
    settings |= {"boxes": str(boxes) if boxes else None, "boxes_sha256": checksum(boxes) if boxes else None}
    folder = LabelFolder(output, format, shards, settings, prompts.categories if prompts else None)
    work = labeller(loaded, processor, prompts, options)
    with bar_of(folder, share.rank, share.processes) as progress:
        done = list(folder.label(work, share.rank, share.processes, progress))
    tell(folder, output, spoken=bool(done) or share.rank == 0)


def labeller(model: Any, processor: Any, prompts: Any, options: dict[str, Any]) -> Callable:
    """The work on one picture: its boxes, or everything."""
    from efficientsam_hf import segment_everything
    from efficientsam_hf.labelling.boxes import segment_boxes

    def label_boxes(name: str, pixels: Any) -> list | None:
        asked = prompts.of(name)
        return None if asked is None else segment_boxes(model, processor, pixels, asked)

    def label_everything(name: str, pixels: Any) -> list:
        return segment_everything(model, processor, pixels, **options)

    return label_boxes if prompts else label_everything


@contextmanager
def bar_of(folder: Any, rank: int, processes: int) -> Any:
    """A bar for the pictures of this process, shown by the first one alone; without an end where none is known."""
    from tqdm import tqdm

    to_do = [shard for shard in folder.shards[rank::processes] if not folder.note_of(shard).is_file()]
    counts = [shard.count for shard in to_do]
    total = None if None in counts else sum(counts)
    with tqdm(total=total, unit="picture", disable=rank > 0 or not to_do) as bar:
        yield bar.update


def tell(folder: Any, output: Path, spoken: bool) -> None:
    """The final report, by a process that finds nothing missing."""
    total, missing = folder.report()
    if missing:
        done = len(folder.shards) - len(missing)
        typer.echo(f"{done} of {len(folder.shards)} shards done; the others are other processes' part", err=True)
        return
    files = folder.conclude()
    if not spoken:
        return
    for line in total.skipped:
        typer.echo(f"efficientsam: skipped {line}", err=True)
    left_out = f", {total.left_out} without boxes in the JSON left out" if total.left_out else ""
    per_picture = f" ({total.masks / total.pictures:.1f} a picture)" if total.pictures else ""
    typer.echo(f"{total.pictures} pictures, {total.masks} masks{per_picture}{left_out}, {len(total.skipped)} skipped")
    typer.echo(f"{len(folder.shards)} shards, {total.seconds:.1f} s of work: {', '.join(map(str, files)) or output}")
    if not total.pictures:
        raise ValueError(f"no picture of {len(total.skipped) + total.left_out} could be labelled: see report.json")
