"""A few figures of a model on pictures that were held out, while it is trained."""

from collections.abc import Sequence

from ..data.sa1b import LabelledPicture
from ..modeling_efficientsam import EfficientSamModel
from ..processing_efficientsam import EfficientSamProcessor
from .interactive import evaluate_interactive


def score_held_out(
    model: EfficientSamModel,
    processor: EfficientSamProcessor,
    pictures: Sequence[LabelledPicture],
    clicks: tuple[int, ...] = (1, 3),
    masks: int | None = None,
) -> dict[str, float]:
    """Mean IoU over masks by box and after clicks as SAM's authors click, best mask by predicted IoU.

    Args:
        model: In evaluation mode while this runs.
        processor: The model's.
        pictures: With masks.
        clicks: After how many it is told; those that the model has no slots for are left out.
        masks: Most masks of a picture; None for all.

    Returns:
        `box`, and `clicks_1` and so on.

    Raises:
        ValueError: if no picture has a mask.
    """
    # Of a single answer the oracle is no news, and costs two masks more.
    by_box = evaluate_interactive(model, processor, pictures, "box", masks=masks, oracle=False)["at"]["1"]
    if by_box["miou"] is None:
        raise ValueError(f"wanted pictures with masks to measure on, found none in {len(pictures)} pictures")
    by_clicks = evaluate_interactive(model, processor, pictures, "sam", clicks, masks=masks, oracle=False)["at"]
    scores = {f"clicks_{number}": figures["miou"] for number, figures in by_clicks.items() if figures}
    return {"box": by_box["miou"], **scores}
