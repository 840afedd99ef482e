"""Prompts as a user would give them, drawn from true masks: clicks, boxes, and clicks where an answer is wrong.

N masks, h x w the grid of the masks. Coordinates are in pixels of the model's square, whose side is `scale` times the
grid's; a cell's pixels are `scale * index` and the `scale - 1` after it, counted by their centres as the model does.
"""

import torch
from torch import Tensor

from ..masks_efficientsam import masks_to_boxes


def draw_cells(weights: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One cell a row with chances as `weights` (N, h, w); where all are 0, any cell. -> (N,) flat indices."""
    weights = weights.flatten(1).float()
    weights = weights + (weights.sum(1, keepdim=True) == 0)
    # One uniform number a row, not one a cell. In float32, the most that Apple's GPUs have, ones add up to 2^24.
    threshold = torch.rand(len(weights), 1, generator=generator, device=weights.device)
    cumulative = weights.cumsum(1)
    index = torch.searchsorted(cumulative, threshold * cumulative[:, -1:], right=True)[:, 0]
    return index.clamp(max=weights.shape[1] - 1)


def cell_points(cells: Tensor, width: int, scale: float, generator: torch.Generator | None = None) -> Tensor:
    """A random pixel inside each flat cell index (N,) -> (N, 2) x, y."""
    offsets = torch.rand(len(cells), 2, generator=generator, device=cells.device)
    corners = torch.stack([cells % width, cells // width], dim=1)
    return (corners + offsets) * scale - 0.5


def click_inside(masks: Tensor, scale: float, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Masks (N, h, w) -> points (N, 2) uniform inside them, labels (N,) of 1."""
    points = cell_points(draw_cells(masks, generator), masks.shape[-1], scale, generator)
    return points, torch.ones(len(masks), dtype=torch.long, device=masks.device)


def click_on_error(
    predicted: Tensor, masks: Tensor, scale: float, background: bool = True, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """One click a mask where the answer is wrong; a faultless one is clicked anywhere on the object.

    Args:
        predicted: (N, h, w) bool.
        masks: (N, h, w) bool.
        scale: Pixels a cell.
        background: Whether falsely covered cells may be clicked, with label 0; otherwise only missed ones.
        generator: Source of the random choices.

    Returns:
        Points (N, 2) and labels (N,): 1 on the object and for faultless answers, 0 off it.
    """
    wrong = predicted ^ masks if background else masks & ~predicted
    faultless = ~wrong.flatten(1).any(1)
    wrong = torch.where(faultless[:, None, None], masks, wrong)
    cells = draw_cells(wrong, generator)
    labels = (masks.flatten(1).gather(1, cells[:, None])[:, 0] | faultless).long()
    return cell_points(cells, masks.shape[-1], scale, generator), labels


def noisy_boxes(
    masks: Tensor,
    scale: float,
    noise: float = 0.1,
    most: float = 20.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The masks' boxes, each coordinate moved by a normal deviation (Kirillov et al., 2023, appendix A).

    Args:
        masks: (N, h, w).
        scale: Pixels a cell.
        noise: Standard deviation as a share of the box's side.
        most: Largest move in pixels.
        generator: Source of the random choices.

    Returns:
        (N, 4) x0, y0, x1, y1 inside the square, at least a pixel wide and high.
    """
    boxes = masks_to_boxes(masks).float() * scale
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    moves = torch.randn(boxes.shape, generator=generator, device=boxes.device) * noise * sides
    boxes = boxes + moves.clamp(-most, most)
    limits = torch.tensor([masks.shape[-1], masks.shape[-2]], device=boxes.device) * scale
    corners = boxes.view(-1, 2, 2).sort(dim=1).values
    low = torch.minimum(corners[:, 0].clamp(min=0), limits - 1)
    high = torch.minimum(torch.maximum(corners[:, 1], low + 1), limits)
    return torch.cat([low, high], dim=1)
