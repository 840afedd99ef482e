"""How segment everything looks, and what it keeps."""

from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

# By the type of an option's default; None stands where a number may be left to us.
KINDS: dict[type, tuple[type, str]] = {
    bool: (bool, "True or False"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: (str, "a text"),
    type(None): (Integral, "a whole number or None"),
}


@dataclass(frozen=True)
class MaskGenerationSettings:
    """How closely to look and what to keep; names as in segment-anything's generator.

    Args:
        points_per_side: Clicks along each side of the picture.
        points_per_batch: Clicks decoded at one time, halved when the accelerator's memory does not suffice; None takes
            as many as a gigabyte of an accelerator holds, or on a CPU 192 megabytes for each of up to four threads.
        pred_iou_thresh: Masks whose predicted IoU is not above are dropped, 0 to 1; 0 keeps all.
        stability_score_thresh: Masks whose stability is not above are dropped, 0 to 1; 0 keeps all.
        stability_score_offset: How far the threshold of the logits moves for the stability score.
        box_nms_thresh: Of masks of one crop whose boxes overlap by more, the one with the best predicted IoU stays.
        crop_n_layers: Layers of crops behind the picture itself; layer i has 2**i x 2**i.
        crop_nms_thresh: As `box_nms_thresh`, between crops; there the mask of the smaller crop stays.
        crop_overlap_ratio: Overlap of the crops of layer 1 as a part of the picture's short side.
        crop_n_points_downscale_factor: Clicks along a side are divided by this from layer to layer.
        min_mask_region_area: Holes and islands of fewer pixels are filled and removed; 0 leaves them. Needs scipy.
        multimask: All three masks of a click go through the filters, or only the one with the best predicted IoU.
        strategy: "grid" asks every click; "adaptive" goes from coarse to fine and asks none that lies on a mask found
            already, the smallest of its click.
        exact: Judge stability and overlap at full size, as segment-anything does, which takes much longer.
    """

    points_per_side: int = 32
    points_per_batch: int | None = None
    pred_iou_thresh: float = 0.88
    stability_score_thresh: float = 0.95
    stability_score_offset: float = 1.0
    box_nms_thresh: float = 0.7
    crop_n_layers: int = 0
    crop_nms_thresh: float = 0.7
    crop_overlap_ratio: float = 512 / 1500
    crop_n_points_downscale_factor: int = 1
    min_mask_region_area: int = 0
    multimask: bool = True
    strategy: str = "grid"
    exact: bool = False

    @classmethod
    def read(cls, **options: Any) -> "MaskGenerationSettings":
        """Settings of these options; an unknown one is refused by its name."""
        names = [item.name for item in fields(cls)]
        for name in options:
            if name not in names:
                raise ValueError(f"unknown option {name!r}, wanted one of {', '.join(names)}")
        return cls(**options)

    def __post_init__(self) -> None:
        for item in fields(self):
            value, (kind, wanted) = getattr(self, item.name), KINDS[type(item.default)]
            fits = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)  # True is an int to Python
            if value is not item.default and not fits:
                raise ValueError(f"{item.name} must be {wanted}, got {value!r}")
        ranges: dict[str, float] = {
            "pred_iou_thresh": 1,
            "stability_score_thresh": 1,
            "box_nms_thresh": 1,
            "crop_nms_thresh": 1,
        }
        ranges |= {"crop_overlap_ratio": 1, "stability_score_offset": float("inf")}
        ranges |= {"min_mask_region_area": float("inf"), "crop_n_layers": float("inf")}
        for name, most in ranges.items():
            if not 0 <= (value := getattr(self, name)) <= most:
                raise ValueError(f"{name} must be 0 to {most}, got {value}")
        for name in ("points_per_side", "points_per_batch", "crop_n_points_downscale_factor"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        if self.strategy not in ("grid", "adaptive"):
            raise ValueError(f'strategy must be "grid" or "adaptive", got {self.strategy!r}')
