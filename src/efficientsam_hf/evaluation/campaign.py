"""One question put to one model after the other, over the same pictures: from a data set to a result file."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from ..data.coco import read_dataset
from ..masks_efficientsam import decode_rle
from ..written_files import refuse_overwriting, written_together
from .coco_ap import average_precision, true_dataset
from .contact_sheet import Case, draw_sheet
from .detections import read_detections, segment_detections
from .ground_truth import TruePicture, dataset_hash, files_hash, find_true_pictures, true_objects
from .interactive import Settings, evaluate_picture
from .journal import Journal, Share, answer_all
from .predictor import Predictor
from .proposals import average_recall, propose
from .protocols import Protocol, find_protocol
from .results import describe_data, describe_model, question_of, rows_path, time_spent, versions, write_results
from .skips import Skips
from .summary import summarize

WORST = 12  # cases on a contact sheet


@dataclass
class Campaign:
    """Pictures with their truth, a result file to be, and the results so far.

    Args:
        images: As `find_true_pictures` says.
        annotations: As `find_true_pictures` says.
        output: The result file.
        limit: Most pictures, the first of the list.
        strict: Stop at what would be left out.
        unlabelled: Keep pictures without annotations.
        share: Which part is this process's.
        progress: Gives numbers of pictures one by one.

    Raises:
        FileNotFoundError: if there is nothing to evaluate on.
        ValueError: if it cannot be read, or would be written over; in strict mode for what would be left out.
    """

    images: Path
    annotations: Path | None
    output: Path
    limit: int | None = None
    strict: bool = False
    unlabelled: bool = False
    share: Share = field(default_factory=Share)
    progress: Callable[[list[int]], Iterable[int]] = iter

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be 1 or more, got {self.limit}")
        if self.output.is_dir():
            raise IsADirectoryError(f"{self.output} is a folder, wanted a file to write")
        self.skips = Skips(self.strict)
        pictures = find_true_pictures(self.images, self.annotations, self.skips, self.unlabelled)
        self.inputs = {blob.path for picture in pictures for blob in (picture.image, *picture.label_blobs())}
        self.inputs |= {self.annotations} if self.annotations else set()
        refuse_overwriting([self.output, rows_path(self.output)], self.inputs)
        self.pictures = pictures[: self.limit]
        beyond = pictures[self.limit :] if self.limit else []
        self.beyond = {picture.entry["id"] for picture in beyond if isinstance(picture, TruePicture)}
        self.categories = read_dataset(self.annotations).get("categories") or [] if self.annotations else []
        self.truth_hash = dataset_hash(self.pictures)
        self.journals: list[Journal] = []
        self.results: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []

    def ask(self, model: dict[str, Any], work: Callable[[int], dict[str, Any]], **question: Any) -> list[dict]:
        """The records of all pictures, resumed where the same question to the same model was left."""
        who = {key: value for key, value in model.items() if key != "source"}
        what = {"truth": self.truth_hash, "files": files_hash(self.pictures), "strict": self.strict}
        journal = Journal(self.output, question_of(model=who, **what, **question), self.share)
        self.journals.append(journal)
        return answer_all(range(len(self.pictures)), work, journal, self.progress)

    def truth_of(self, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What is true of the pictures, in COCO's format."""
        sizes = [record["size"] and tuple(record["size"]) for record in records]
        return true_dataset(self.pictures, sizes, self.categories)

    def add(
        self, task: str, model: dict[str, Any], records: list[dict[str, Any]], skips: Skips | None = None, **found: Any
    ) -> None:
        """Keep a model's results, and what they are results of; `skips` are of what was asked of it alone."""
        data = describe_data(self.images, self.annotations, records, self.truth_hash)
        noted = [self.skips.record(), (skips or Skips()).record()]
        skipped = Skips.of([*noted, *(record.get("skipped", {}) for record in records)]).record()
        known = {"task": task, "model": model, "data": data, "skipped": skipped, **found}
        self.results.append({**known, "ms_a_picture": time_spent(records)})
        self.rows += [{"model": model["name"], **record} for record in records]

    def finish(self, sheet: Image.Image | None = None, sheet_path: Path | None = None) -> None:
        """Write everything, in one process, and forget what was noted on the way."""
        if self.share.rank == 0:
            write_results(self.output, {"results": self.results, "versions": versions()}, self.rows)
            if sheet is not None and sheet_path is not None:
                with written_together([sheet_path]) as (beside,):
                    sheet.save(beside)
        self.share.wait()
        if self.share.rank == 0:
            for journal in self.journals:
                journal.forget()


def score_interactive(
    campaign: Campaign, predictor: Predictor, model: dict[str, Any], protocols: Sequence[Protocol], settings: Settings
) -> list[dict[str, Any]]:
    """A model by several protocols; by true boxes also with AP, where objects have categories. -> its records."""
    asked = [(protocol.name, protocol.prompts) for protocol in protocols]
    boxes = any(protocol.first is None for protocol in protocols)
    boxed = boxes and bool(campaign.categories)
    settings = replace(settings, keep=settings.keep or boxed)
    records = campaign.ask(
        model,
        lambda number: evaluate_picture(
            predictor, campaign.pictures[number], protocols, settings, Skips(campaign.strict)
        ),
        task="interactive",
        protocols=asked,
        settings=settings,
    )
    found: dict[str, Any] = {"settings": vars(settings)}
    found["protocols"] = [summarize(records, protocol, predictor.most_clicks) for protocol in protocols]
    for result in found["protocols"]:
        del result["skipped"]  # stands beside them, with the pictures that were not even read
    if boxed and campaign.share.rank == 0 and settings.masks is None:
        found |= box_precision(campaign, records, settings.boundary)
    campaign.add("boxes" if boxes else "points", model, records, **found)
    return records


def box_precision(campaign: Campaign, records: Sequence[dict[str, Any]], boundary: bool) -> dict[str, Any]:
    """AP of the answers to true boxes, the predicted IoU being their score."""
    answers = [
        {
            "image_id": number,
            "category_id": row["category"],
            "score": row["box"]["trust"],
            "segmentation": row["box"]["answer"],
        }
        for number, record in enumerate(records)
        for row in record["masks"]
    ]
    return precision(campaign.truth_of(records), answers, boundary)


def precision(truth: dict[str, Any], answers: Sequence[dict[str, Any]], boundary: bool) -> dict[str, Any]:
    """`ap`, and if wanted `boundary_ap`."""
    found = {"ap": average_precision(truth, answers)}
    return found | ({"boundary_ap": average_precision(truth, answers, "boundary")} if boundary else {})


def placed(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The masks of all records as COCO's results, pictures numbered by their places."""
    return [{"image_id": number, **row} for number, record in enumerate(records) for row in record["masks"]]


def score_detections(
    campaign: Campaign,
    predictor: Predictor,
    model: dict[str, Any],
    detections: Path,
    refine: bool = False,
    boundary: bool = False,
) -> None:
    """A detector's boxes to masks, with the detector's scores, and their AP."""
    if not campaign.categories:
        raise ValueError("detections want --annotations with categories, COCO's or LVIS's")
    refuse_overwriting([campaign.output, rows_path(campaign.output)], [detections])
    skips = Skips(campaign.strict)
    boxes = read_detections(detections, campaign.pictures, campaign.categories, skips, campaign.beyond)
    records = campaign.ask(
        model,
        lambda number: segment_detections(
            predictor, campaign.pictures[number], boxes[number], refine, Skips(campaign.strict)
        ),
        task="detections",
        boxes=boxes,
        refine=refine,
    )
    found: dict[str, Any] = {"detections": str(detections), "boxes": sum(map(len, boxes)), "refine": refine}
    if campaign.share.rank == 0:
        found |= precision(campaign.truth_of(records), placed(records), boundary)
    campaign.add("detections", model, records, skips, **found)


def score_proposals(
    campaign: Campaign,
    find: Callable[[Image.Image], list[dict[str, Any]]],
    model: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    """Segment everything by what it finds, categories apart."""
    records = campaign.ask(
        model,
        lambda number: propose(find, campaign.pictures[number], Skips(campaign.strict)),
        task="everything",
        settings=settings,
    )
    masks = sum(len(record["masks"]) for record in records)
    found: dict[str, Any] = {"settings": settings, "masks_a_picture": round(masks / len(records), 2)}
    if campaign.share.rank == 0:
        found["ar"] = average_recall(campaign.truth_of(records), placed(records))
    campaign.add("everything", model, records, **found)


def worst_cases(
    campaign: Campaign, predictor: Predictor, records: Sequence[dict[str, Any]], protocol: Protocol, settings: Settings
) -> Image.Image:
    """The worst mask of each of the worst pictures, answered once more and drawn."""
    asked = replace(protocol, prompts=protocol.prompts[:1], wanted=(), most=0)
    clicked = asked.prompts[0]

    def reached(row: dict[str, Any]) -> float:
        """The IoU after these clicks; of an object that wanted no more of them, its last."""
        return row[asked.name]["iou"][:clicked][-1]

    scored = [(min(map(reached, record["masks"])), number) for number, record in enumerate(records) if record["masks"]]
    cases = []
    for _, number in sorted(scored)[:WORST]:
        picture = campaign.pictures[number]
        again = evaluate_picture(predictor, picture, [asked], replace(settings, keep=True))
        row = min(again["masks"], key=reached)
        photo, answer = picture.read_image(), row[asked.name]
        objects = true_objects(picture, (photo.height, photo.width), Skips(), settings.crowds)
        (target,) = [item for item in objects if item.id == row["id"]][:1]
        cases.append(
            Case(
                photo,
                target.mask,
                decode_rle(answer["answer"]).numpy(),
                f"IoU {reached(row):.2f}, predicted {answer['trust']:.2f}",
                f"{picture.name}, object {row['id']}",
                answer["points"],
                answer["labels"],
                target.box if asked.first is None else None,
            )
        )
    clicks = "" if asked.first is None else f", {clicked} click" + "s" * (clicked > 1)
    heading = f"Worst {len(cases)} of {len(scored)} pictures: {predictor.name}, protocol {asked.name}{clicks}"
    return draw_sheet(cases, heading)


__all__ = [
    "Campaign",
    "describe_model",
    "find_protocol",
    "score_detections",
    "score_interactive",
    "score_proposals",
    "worst_cases",
]
