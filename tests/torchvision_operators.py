"""Makes a torchvision usable whose compiled operators are for another build of torch, as PyPI's are beside a CPU's.

transformers cannot be imported beside such a one, so that this comes before everything else. Without torchvision, or
with one that fits, nothing happens.
"""

import importlib.util
import sys

import torch
import torch.nn.functional as F


def suppress_boxes(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    from efficientsam_hf.masks_efficientsam import nms

    return nms(boxes, scores, iou_threshold)


def align_regions(
    maps: torch.Tensor, regions: torch.Tensor, scale: float, rows: int, columns: int, ratio: int, aligned: bool
) -> torch.Tensor:
    """What torchvision's own `_roi_align` in Python gives, which compiles for longer than the tests take.

    Maps (B, C, H, W), regions (K, 5) with the map's number before x0, y0, x1, y1 -> (K, C, rows, columns).
    """
    numbers, shift = regions[:, 0].long().tolist(), 0.5 if aligned else 0.0
    corners, sides = regions[:, 1:3] * scale - shift, (regions[:, 3:] - regions[:, 1:3]) * scale
    found = [torch.zeros(0, maps.shape[1], rows, columns)]
    for number, corner, side in zip(numbers, corners, sides if aligned else sides.clamp(min=1), strict=True):
        axes, counts = [], []
        for start, length, cells, pixels in zip(corner, side, (columns, rows), maps.shape[:1:-1], strict=True):
            count = ratio if ratio > 0 else max(int((length / cells).ceil()), 1)
            places = start + length * (torch.arange(cells * count) + 0.5) / (cells * count)
            # Pixels are at -1, ..., 1 for grid_sample, the outer ones' middles at the ends.
            axes.append(places / max(pixels - 1, 1) * 2 - 1)
            counts.append(count)
        grid = torch.stack(torch.meshgrid(*axes, indexing="xy"), dim=-1)[None]
        taken = F.grid_sample(maps[number : number + 1].float(), grid, padding_mode="border", align_corners=True)
        found.append(F.avg_pool2d(taken, counts[::-1]))
    return torch.cat(found).to(maps.dtype)


def fill_in() -> torch.library.Library | None:
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        import torchvision
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.impl("nms", suppress_boxes, "CPU")
        import torchvision.extension

        torchvision.extension._has_ops = lambda: True
        # The function of this name hides its module.
        sys.modules["torchvision.ops.roi_align"]._roi_align = align_regions
        return library
    return None


# Kept, or the operators would vanish with it.
LIBRARY = fill_in()
