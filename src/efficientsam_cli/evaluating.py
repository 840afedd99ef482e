"""Commands that measure how good masks are: `efficientsam evaluate ...`."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .arguments import Device, place_of, progress_bar

Images = Annotated[Path, typer.Option(help="folder or tar of pictures")]
Annotations = Annotated[
    Path | None, typer.Option(help="COCO's or LVIS's JSON; left out where IMAGES holds the masks, too (as SA-1B's)")
]
Models = Annotated[
    list[str] | None,
    typer.Option(help="folder or Hub id (EfficientSAM, SAM, SAM-HQ, SAM 2, EdgeTAM), or ENCODER.onnx,DECODER.onnx; "
                 "several for a comparison; the bundled checkpoint if left out"),
]  # fmt: skip
OwnModels = Annotated[
    list[str] | None,
    typer.Option(help="folder or Hub id; several for a comparison; the bundled checkpoint if left out"),
]
Limit = Annotated[int | None, typer.Option(help="at most so many pictures")]
Masks = Annotated[int | None, typer.Option(help="at most so many masks of a picture, spread over its list")]
Crowds = Annotated[bool, typer.Option(help="ask for groups that are annotated as one, too")]
Boundary = Annotated[bool, typer.Option(help="score the masks' boundaries, too")]
Refine = Annotated[bool, typer.Option(help="show each answer to the model once more (SAM's own AP does)")]
ShowAnswer = Annotated[bool, typer.Option(help="show the last answer to the model with the next click")]
Zoom = Annotated[float, typer.Option(help="look closer at each object, as predict does; 0: do not")]
Strict = Annotated[bool, typer.Option(help="stop at what would be left out and counted")]
Output = Annotated[Path, typer.Option(help="result file; beside it NAME_masks.jsonl, a line a picture")]
Sheet = Annotated[Path | None, typer.Option(help="contact sheet of the worst cases; NAME_worst.png if left out")]


def points(
    images: Images,
    annotations: Annotations = None,
    protocol: Annotated[
        list[str] | None, typer.Option(help="paper, sam, ritm, centroid; sam if left out; several share encodings")
    ] = None,
    prompts: Annotated[str | None, typer.Option(help="clicks to report after, 1,3,5; the protocol's own")] = None,
    model: Models = None,
    limit: Limit = None,
    masks: Masks = None,
    zoom: Zoom = 0,
    show_answer: ShowAnswer = False,
    seed: Annotated[int, typer.Option(help="of random clicks")] = 0,
    crowds: Crowds = False,
    boundary: Boundary = False,
    strict: Strict = False,
    device: Device = None,
    output: Output = Path("results.json"),
    sheet: Sheet = None,
) -> None:
    """Mean IoU by clicks, as the protocols of the field give them, and the number of clicks needed.

    Started again after a kill, the command goes on where it stopped. Under torchrun the processes share the pictures.
    """
    from efficientsam_hf.evaluation.interactive import Settings

    settings = Settings(seed, crowds, boundary, show_answer=show_answer, masks=masks)
    told = tuple(numbers(prompts)) if prompts else None
    asked = [(name, told) for name in protocol or ["sam"]]
    interactive(images, annotations, (model, zoom), asked, settings, limit, strict, device, output, sheet)


def boxes(
    images: Images,
    annotations: Annotations = None,
    model: Models = None,
    limit: Limit = None,
    masks: Masks = None,
    zoom: Zoom = 0,
    refine: Refine = False,
    crowds: Crowds = False,
    boundary: Boundary = False,
    strict: Strict = False,
    device: Device = None,
    output: Output = Path("results.json"),
    sheet: Sheet = None,
) -> None:
    """Mean IoU by true boxes, and mask AP where the objects have categories (not of a part of them, `--masks`).

    Started again after a kill, the command goes on where it stopped. Under torchrun the processes share the pictures.
    """
    from efficientsam_hf.evaluation.interactive import Settings

    settings = Settings(crowds=crowds, boundary=boundary, refine=refine, masks=masks)
    interactive(images, annotations, (model, zoom), [("box", None)], settings, limit, strict, device, output, sheet)


def detections(
    images: Images,
    annotations: Annotated[Path, typer.Option(help="COCO's or LVIS's JSON")],
    detections: Annotated[Path, typer.Option(help="a detector's results: image_id, category_id, bbox, score")],
    model: Models = None,
    limit: Limit = None,
    refine: Refine = False,
    boundary: Boundary = False,
    strict: Strict = False,
    device: Device = None,
    output: Output = Path("results.json"),
) -> None:
    """Mask AP from a detector's boxes and scores; for LVIS of rare, common and frequent categories, too."""
    from efficientsam_hf.evaluation.campaign import Campaign, score_detections
    from efficientsam_hf.evaluation.journal import Share

    with Share.of_environment().together() as share:
        campaign = Campaign(images, annotations, output, limit, strict, True, share, progress_of(share.rank))
        for predictor, known in load_all(model, device):
            score_detections(campaign, predictor, known, detections, refine, boundary)
        campaign.finish()
    tell(campaign)


def everything(
    images: Images,
    annotations: Annotations = None,
    model: OwnModels = None,
    points_per_side: Annotated[int, typer.Option(help="clicks along each side; 64 in SAM's protocol")] = 64,
    own_settings: Annotated[
        bool, typer.Option(help="thresholds of the model's config instead of the protocol's")
    ] = False,
    limit: Limit = None,
    strict: Strict = False,
    device: Device = None,
    output: Output = Path("results.json"),
) -> None:
    """Average recall of segment everything: of the best 10, 100, 1000 masks, whatever their categories (SAM, D.3)."""
    from functools import partial

    from efficientsam_hf.evaluation.campaign import Campaign, score_proposals
    from efficientsam_hf.evaluation.journal import Share
    from efficientsam_hf.evaluation.predictor import EfficientSamPredictor
    from efficientsam_hf.evaluation.proposals import SAM_LVIS
    from efficientsam_hf.mask_generation import segment_everything

    settings: dict[str, Any] = {**({} if own_settings else SAM_LVIS), "points_per_side": points_per_side}
    with Share.of_environment().together() as share:
        campaign = Campaign(images, annotations, output, limit, strict, False, share, progress_of(share.rank))
        for predictor, known in load_all(model, device):
            if not isinstance(predictor, EfficientSamPredictor):
                raise ValueError(f"{known['source']}: everything is for this package's models, got another")
            find = partial(segment_everything, predictor.model, predictor.processor, **settings)
            score_proposals(campaign, find, known, settings)
        campaign.finish()
    tell(campaign)


def interactive(
    images: Path,
    annotations: Path | None,
    models: tuple[list[str] | None, float],
    asked: list[tuple[str, tuple[int, ...] | None]],
    settings: Any,
    limit: int | None,
    strict: bool,
    device: str | None,
    output: Path,
    sheet: Path | None,
) -> None:
    """Every model, with its zoom, by every protocol; the sheet is the first model's, by the first protocol."""
    from efficientsam_hf.evaluation.campaign import Campaign, find_protocol, score_interactive, worst_cases
    from efficientsam_hf.evaluation.journal import Share
    from efficientsam_hf.written_files import check_outputs, refuse_overwriting

    protocols = [find_protocol(name, prompts) for name, prompts in dict.fromkeys(asked)]
    sheet, drawn = sheet or output.with_name(f"{output.stem}_worst.png"), None
    check_outputs(images, sheet)
    with Share.of_environment().together() as share:
        campaign = Campaign(images, annotations, output, limit, strict, False, share, progress_of(share.rank))
        refuse_overwriting([sheet], campaign.inputs)
        for predictor, known in load_all(models[0], device, models[1]):
            records = score_interactive(campaign, predictor, known, protocols, settings)
            if drawn is None and share.rank == 0:
                drawn = worst_cases(campaign, predictor, records, protocols[0], settings)
        campaign.finish(drawn, sheet)
    tell(campaign)
    if share.rank == 0:
        typer.echo(f"worst cases: {sheet}")


def numbers(text: str) -> list[int]:
    """Comma-separated whole numbers."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--prompts must be numbers such as 1,3,5, got {text!r}") from error


def progress_of(rank: int) -> Callable:
    """A bar for the first process, nothing for the others."""
    return progress_bar if rank == 0 else iter


def load_all(sources: list[str] | None, device: str | None, zoom: float = 0) -> Any:
    """Predictors with what is to be told of them, loaded one after the other."""
    from transformers.utils import logging

    from efficientsam_hf.evaluation.campaign import describe_model

    from .predictors import load_predictor

    logging.disable_progress_bar()
    wanted: list[str | None] = [*sources] if sources else [None]
    for source in wanted:
        place = place_of(device, source)
        predictor = load_predictor(source, place, zoom)
        told = f"{source or 'bundled'}{f', zoom {zoom:g}' if zoom else ''}"
        yield predictor, describe_model(predictor, told, (place or "its own").split(":")[0])


def tell(campaign: Any) -> None:
    """The tables, what was left out, and where everything is; once."""
    from efficientsam_hf.evaluation.ground_truth import describe
    from efficientsam_hf.evaluation.skips import Skips
    from efficientsam_hf.evaluation.tables import figure_rows, interactive_rows, markdown, noc_rows, recall_rows

    if campaign.share.rank:
        return
    results = campaign.results
    scored = [result for result in results if "protocols" in result]
    tables = [("", interactive_rows(scored)), ("", noc_rows(scored)), ("mask AP", figure_rows(results, "ap"))]
    tables += [("boundary AP", figure_rows(results, "boundary_ap")), ("average recall", recall_rows(results))]
    for title, rows in tables:
        if rows:
            typer.echo(f"{title}\n" if title else "", nl=bool(title))
            typer.echo(markdown(rows) + "\n")
    if campaign.categories and any("ap" not in result for result in results if result["task"] == "boxes"):
        typer.echo("no AP: it is of all objects, and --masks asked for a part of them\n")
    skipped = describe(Skips.of(result["skipped"] for result in results[:1]))
    if skipped:
        typer.echo(f"left out: {skipped}", err=True)
    typer.echo(f"results: {campaign.output}")


COMMANDS: list[Callable[..., None]] = [points, boxes, detections, everything]
