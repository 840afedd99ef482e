"""A few figures of a model on pictures that were held out, while it is trained."""

from collections.abc import Callable, Sequence
from typing import Any

from ..data.sa1b import LabelledPicture
from ..modeling_efficientsam import EfficientSamModel
from ..processing_efficientsam import EfficientSamProcessor
from .interactive import Settings, evaluate_picture
from .predictor import EfficientSamPredictor
from .protocols import find_protocol
from .summary import summarize


def score_held_out(
    model: EfficientSamModel,
    processor: EfficientSamProcessor,
    pictures: Sequence[LabelledPicture],
    clicks: tuple[int, ...] = (1, 3),
    masks: int | None = None,
    gather: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] = list,
) -> dict[str, float]:
    """Mean IoU over masks by box and after clicks as SAM's authors click, best mask by predicted IoU.

    Args:
        model: In evaluation mode while this runs.
        processor: The model's.
        pictures: With masks; of several processes, this one's share.
        clicks: After how many it is told; those that the model has no slots for are left out.
        masks: Most masks of a picture; None for all.
        gather: This process's records of pictures -> those of all of them, such as `accelerate`'s `gather_object`.

    Returns:
        `box`, and `clicks_1` and so on.

    Raises:
        ValueError: if no picture has a mask.
    """
    box, sam = protocols = [find_protocol("box"), find_protocol("sam", clicks)]
    # Of a single answer the oracle is no news, and costs two masks more.
    settings = Settings(masks=masks, oracle=False)
    training = model.training
    model.eval()
    try:
        predictor = EfficientSamPredictor(model, processor)
        records = gather([evaluate_picture(predictor, picture, protocols, settings) for picture in pictures])
    finally:
        model.train(training)
    by_box, by_clicks = (summarize(records, asked, predictor.most_clicks)["at"] for asked in (box, sam))
    if by_box["1"]["miou"] is None:
        raise ValueError(f"wanted pictures with masks to measure on, found none in {len(records)} pictures")
    scores = {f"clicks_{number}": figures["miou"] for number, figures in by_clicks.items() if figures}
    return {"box": by_box["1"]["miou"], **scores}
