"""Every object of a picture: a grid of clicks, filters, and the masks that are left as records.

H x W the picture, C crops, Q clicks, M masks a click, N masks found so far, h x w the embedding grid of the model.

Follows the mask generator of Kirillov et al., 2023 (appendix B), in another order: the predicted IoU is known
before a mask is drawn, and stability and overlap are judged on the decoder's own grid, so that only masks that stay
are drawn at full size. What is held at one time is bounded, whatever the size of the picture and the number of clicks.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .data.images import picture_suffixes
from .mask_search import Crop
from .mask_settings import MaskGenerationSettings
from .masks_efficientsam import corners_of, layered_crops, nms
from .modeling_efficientsam import EfficientSamModel
from .pictures_efficientsam import read_photo, read_picture
from .prediction import read_embeddings
from .processing_efficientsam import EfficientSamProcessor
from .visualization import draw_records
from .written_files import check_outputs, keep_settings, written_together


def segment_everything(
    model: EfficientSamModel,
    processor: EfficientSamProcessor,
    image: Any,
    image_embeddings: Any = None,
    return_embeddings: bool = False,
    **options: Any,
) -> Any:
    """Find the objects of a picture, or of each picture of a list.

    On the decoder's grid a stability or a box can come out otherwise than at full size: with the bundled checkpoint
    the filters decide otherwise for 1 of 1778 masks, 0.06 %, and an eighth of those that stay are others, usually
    doubles (docs/everything.md). `exact` is the way without.

    Args:
        model: On any device.
        processor: The model's.
        image: PIL picture, array, tensor, path or URL; or a list of them.
        image_embeddings: Of an earlier call with the same crops, (C, channels, h, w), or of the whole picture alone,
            as `segment` answers; or a list of that for a list of pictures. Saves the encoder's work.
        return_embeddings: Give the embeddings, too.
        **options: Fields of `MaskGenerationSettings`; what is left out is as the model's config says in
            `mask_generation`, or else segment-anything's default.

    Returns:
        A list of records, best predicted IoU first, each with `segmentation` (COCO run lengths), `bbox` (x, y, width,
        height), `area`, `predicted_iou`, `stability_score`, `point_coords` (the click, x and y in the picture's
        pixels) and `crop_box` (x, y, width, height). A list of such lists for a list of pictures; with
        `return_embeddings` a pair of the records and the embeddings.

    Raises:
        ValueError: for an unknown option or one out of its range, and for what is no picture.
    """
    settings = MaskGenerationSettings.read(**{**(model.config.mask_generation or {}), **options})
    if isinstance(image, list | tuple):
        embeddings = [None] * len(image) if image_embeddings is None else image_embeddings
        if len(embeddings) != len(image):
            raise ValueError(f"every picture wants its embeddings: got {len(embeddings)} for {len(image)} pictures")
        found = [
            find_objects(model, processor, one, known, settings) for one, known in zip(image, embeddings, strict=True)
        ]
        all_records = [records for records, _ in found]
        # Copies, as all answers are no inference tensors.
        return (all_records, [embedded.clone() for _, embedded in found]) if return_embeddings else all_records
    records, embeddings = find_objects(model, processor, image, image_embeddings, settings)
    return (records, embeddings.clone()) if return_embeddings else records


@torch.inference_mode()
def find_objects(
    model: EfficientSamModel,
    processor: EfficientSamProcessor,
    image: Any,
    image_embeddings: Tensor | None,
    settings: MaskGenerationSettings,
) -> tuple[list[dict[str, Any]], Tensor]:
    """The records of one picture, and the embeddings (C, channels, h, w) of its crops."""
    pixels = read_picture(image)
    height, width = pixels.shape[-2:]
    crops = layered_crops(height, width, settings.crop_n_layers, settings.crop_overlap_ratio)
    if image_embeddings is not None:
        image_embeddings = read_embeddings(model, processor, image_embeddings)
    known = 0 if image_embeddings is None else len(image_embeddings)
    if image_embeddings is not None and known not in (1, len(crops)):
        raise ValueError(f"wanted embeddings of the whole picture or of all {len(crops)} crops, got {known}")
    records, kept_embeddings = [], []
    for number, (layer, (left, top, right, bottom)) in enumerate(crops):
        part = pixels[:, top:bottom, left:right]
        if image_embeddings is None or number >= known:
            inputs = processor.image_processor(part, return_tensors="pt", device=model.device)
            embeddings = model.get_image_embeddings(inputs["pixel_values"])
        else:
            embeddings = image_embeddings[number : number + 1]
        crop = Crop(model, processor, embeddings, part, (left, top, right, bottom), (height, width), settings)
        side = max(1, int(settings.points_per_side / settings.crop_n_points_downscale_factor**layer))
        records += crop.records(crop.search(side))
        kept_embeddings.append(embeddings)
    if len(crops) > 1:
        records = drop_doubles(records, settings.crop_nms_thresh)
    return sorted(records, key=lambda record: -record["predicted_iou"]), torch.cat(kept_embeddings)


def drop_doubles(records: list[dict[str, Any]], threshold: float) -> list[dict[str, Any]]:
    """Of masks found in several crops the one of the smallest crop, which saw it largest."""
    boxes = corners_of([record["bbox"] for record in records])
    nearness = torch.tensor([1 / (record["crop_box"][2] * record["crop_box"][3]) for record in records])
    return [records[index] for index in nms(boxes, nearness, threshold).tolist()]


def coco_dataset(pictures: list[tuple[str, int, int, list[dict[str, Any]]]]) -> dict[str, Any]:
    """File name, width, height and records of each picture -> COCO's dataset, all objects of one category."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, (name, width, height, records) in enumerate(pictures, start=1):
        images.append({"id": image_id, "file_name": name, "width": width, "height": height})
        for record in records:
            ids = {"id": len(annotations) + 1, "image_id": image_id, "category_id": 1, "iscrowd": 0}
            annotations.append({**record, **ids})
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "object"}]}


def segment_file(
    model: EfficientSamModel,
    processor: EfficientSamProcessor,
    picture: str | Path,
    overlay: str | Path,
    coco: str | Path | None = None,
    **options: Any,
) -> int:
    """Find the objects of a picture file or URL, draw them, write them in COCO's format; all or nothing.

    Returns:
        How many there are.

    Raises:
        ValueError: for what is no picture, an option as in `segment_everything`, or a file that may not be written.
        OSError: if a file cannot be read or written.
    """
    paths = [Path(overlay), Path(coco)] if coco else [Path(overlay)]
    check_outputs(picture, *paths)
    photo = read_photo(picture)
    with written_together(paths) as (overlay_part, *coco_part):
        records = segment_everything(model, processor, photo, **options)
        draw_records(photo, records).save(overlay_part)
        for part in coco_part:
            dataset = coco_dataset([(Path(picture).name, photo.width, photo.height, records)])
            part.write_text(json.dumps(dataset))
    return len(records)


def segment_folder(
    model: EfficientSamModel,
    processor: EfficientSamProcessor,
    folder: str | Path,
    output: str | Path,
    progress: Callable[[list[Path]], Iterable[Path]] = iter,
    settings: dict[str, Any] | None = None,
    **options: Any,
) -> list[str]:
    """As `segment_file` for every picture in a folder: NAME.png and NAME.json in `output`, and coco.json of all.

    Pictures whose JSON file is there are not done again. `progress` gives the pictures one by one. `settings` are what
    the masks depend on beside pictures and options, as the model's name; everything.json keeps them with the options.

    Returns:
        A line for each picture that could not be read; the others are done nevertheless.

    Raises:
        FileExistsError: if somebody's files are where the masks are to be.
        ValueError: if the folder has no picture, or two whose files would have the same name, or one that would be
            written over; if `output` holds masks with other settings or options.
    """
    folder, output = Path(folder), Path(output)
    pictures = find_names(folder, output)
    files = [output / f"{name}{suffix}" for name in (*pictures, "coco") for suffix in (".json", ".png")]
    there = (path for path in files if path.exists())
    keep_settings(output / "everything.json", {**(settings or {}), "options": options}, there, "masks")
    # Somebody's file among them is found before the work, and not after it.
    done = {name: read_masks(output / f"{name}.json") for name in pictures if (output / f"{name}.json").exists()}

    def attempt(path: Path) -> str | None:
        try:
            segment_file(model, processor, path, output / f"{path.stem}.png", output / f"{path.stem}.json", **options)
            done[path.stem] = read_masks(output / f"{path.stem}.json")
        except (ValueError, OSError) as error:
            reason = str(error).strip() or f"{path}: {type(error).__name__}"
            return reason.splitlines()[0]
        return None

    to_do = [path for name, path in pictures.items() if name not in done]
    problems = [problem for path in progress(to_do) if (problem := attempt(path))]
    found = [(path.name, *done[name]) for name, path in pictures.items() if name in done]
    with written_together([output / "coco.json"]) as (part,):
        part.write_text(json.dumps(coco_dataset(found)))
    return problems


def find_names(folder: Path, output: Path) -> dict[str, Path]:
    """A folder's pictures by the names of their files in `output`, sorted. Raises ValueError if they have none."""
    if folder.resolve() == output.resolve():
        raise ValueError(f"the pictures of {folder} would be written over: choose another folder for the masks")
    suffixes = picture_suffixes()
    pictures = sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes)
    names = [path.stem for path in pictures]
    doubles = sorted({name for name in names if names.count(name) > 1})
    if not pictures or doubles:
        raise ValueError(f"two pictures are called {doubles[0]} in {folder}" if doubles else f"no picture in {folder}")
    for name, kept in (("coco", "the masks of all"), ("everything", "the settings")):
        if name in names:
            raise ValueError(f"{pictures[names.index(name)]}: {name}.json will hold {kept}, rename the picture")
    return dict(zip(names, pictures, strict=True))


def read_masks(path: Path) -> tuple[int, int, list[dict[str, Any]]]:
    """Width, height and records of one picture, as `segment_file` wrote them.

    Raises:
        FileExistsError: if it is another file.
    """
    try:
        dataset = json.loads(path.read_text())
        (image,) = dataset["images"]
        return image["width"], image["height"], dataset["annotations"]
    except (ValueError, KeyError, TypeError) as error:
        raise FileExistsError(f"{path} is not from this command: wanted another folder, or a new one") from error


__all__ = ["MaskGenerationSettings", "coco_dataset", "segment_everything", "segment_file", "segment_folder"]
