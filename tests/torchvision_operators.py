"""Makes a torchvision usable whose compiled operators are for another build of torch, as PyPI's are beside a CPU's.

transformers cannot be imported beside such a one, so that this comes before everything else. Without torchvision, or
with one that fits, nothing happens.
"""

import importlib.util

import torch


def suppress_boxes(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    from efficientsam_hf.masks_efficientsam import nms

    return nms(boxes, scores, iou_threshold)


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
        return library
    return None


# Kept, or the operators would vanish with it.
LIBRARY = fill_in()
