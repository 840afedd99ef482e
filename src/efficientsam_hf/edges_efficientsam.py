"""Edges that follow the picture, by the guided filter (He et al., "Guided Image Filtering", 2013).

Around every cell of the masks' grid, the mask is fitted as a linear function of the picture's colours. These functions
change slowly from cell to cell, and can be enlarged where a mask cannot (He and Sun, "Fast Guided Filter", 2015):
applied to the colours of every pixel, they draw the edge where the picture has one, finer than the grid.

N masks of h x w cells, a picture of H x W pixels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

DRAWN_BYTES = 2**26  # float32 values at full size that exist at one time, beside the result
SMOOTHNESS = 1e-3  # variance of colours in 0 to 1; where they vary less, a mask is smoothed rather than led by them
NEARLY = 1e-4  # how far from 0 and 1 shares stay, which have no logits there


class ColourGuide:
    """A picture's colours around every cell of a grid, for any number of its masks.

    Args:
        picture: (3, H, W), floats in 0 to 1.
        grid: h, w of the masks.
        radius: In cells: a mask is compared with the colours of a square of 2 * radius + 1 of them.
    """

    def __init__(self, picture: Tensor, grid: tuple[int, int], radius: int):
        self.picture, self.radius = picture, radius
        self.cells = F.interpolate(picture[None], grid, mode="bilinear", align_corners=False, antialias=True)[0]
        self.means = window_means(self.cells, radius)
        products = window_means((self.cells[:, None] * self.cells).flatten(0, 1), radius).unflatten(0, (3, 3))
        covariance = products - self.means[:, None] * self.means
        covariance.diagonal(dim1=0, dim2=1).add_(SMOOTHNESS)
        # The inverse of a 3 x 3 matrix by its cofactors, many times faster than a solver called for each cell.
        red, green, blue = covariance
        pairs = ((green, blue), (blue, red), (red, green))
        cofactors = torch.stack([torch.linalg.cross(*pair, dim=0) for pair in pairs])
        self.inverse = cofactors / (red * cofactors[0]).sum(0)

    def fit(self, shares: Tensor, part: tuple[slice, slice] = (slice(None), slice(None))) -> Tensor:
        """Linear functions of colours that come closest to masks, by least squares in the square around each cell.

        Args:
            shares: How much of each cell is the object's, (N, h, w), 0 to 1; or of a part of the grid.
            part: Its rows and columns. What is nearer to its edge than 2 * radius cells is not that of the whole grid.

        Returns:
            Three slopes and an offset (N, 4, h, w), each the mean of those of the squares that the cell lies in.
        """
        shares, rows, columns = shares[:, None], *part
        cells, means, inverse = (maps[..., rows, columns] for maps in (self.cells, self.means, self.inverse))
        covered, together = window_means(torch.cat([shares, shares * cells], 1), self.radius).split([1, 3], 1)
        together = together - covered * means
        slopes = torch.stack([(row * together).sum(1) for row in inverse], dim=1)
        offsets = covered - (slopes * means).sum(1, keepdim=True)
        return window_means(torch.cat([slopes, offsets], 1), self.radius)

    def draw(self, logits: Tensor) -> Tensor:
        """Logits (N, h, w) -> how much of each of the picture's pixels is the object's (N, H, W), about 0 to 1."""
        *slopes, offset = self.fit(logits.float().sigmoid()).split(1, dim=1)
        shares = self.enlarge(offset)
        for slope, colour in zip(slopes, self.picture, strict=True):
            shares.addcmul_(self.enlarge(slope), colour)
        return shares

    def enlarge(self, maps: Tensor) -> Tensor:
        """Maps (N, 1, h, w) at the picture's size, (N, H, W)."""
        return F.interpolate(maps, self.picture.shape[-2:], mode="bilinear", align_corners=False)[:, 0]


def guided_masks(logits: Tensor, picture: Tensor, radius: int, threshold: float | None = None) -> Tensor:
    """Masks of a small grid at the picture's size, as `resize_masks` gives them, with edges that follow the picture.

    Args:
        logits: (..., h, w), of the whole picture.
        picture: (3, H, W), floats in 0 to 1, on the device of the logits.
        radius: As `ColourGuide` takes it.
        threshold: A pixel belongs to the mask from this logit on.

    Returns:
        Logits (..., H, W), float32; booleans if there is a threshold.
    """
    (*leading, height, width), (_, *size) = logits.shape, picture.shape
    guide, flat = ColourGuide(picture, (height, width), radius), logits.reshape(-1, height, width)
    drawn = flat.new_empty((len(flat), *size), dtype=torch.float32 if threshold is None else torch.bool)
    least = None if threshold is None else 1 / (1 + math.exp(-threshold))
    step = max(1, DRAWN_BYTES // (4 * math.prod(size)))
    for start in range(0, len(flat), step):
        shares = guide.draw(flat[start : start + step])
        chunk = shares.clamp(NEARLY, 1 - NEARLY).logit() if least is None else shares >= least
        drawn[start : start + step] = chunk
    return drawn.reshape(*leading, *size)


def window_means(maps: Tensor, radius: int) -> Tensor:
    """Means of maps (..., h, w) over squares of 2 * radius + 1 cells, as far as these lie on the grid."""
    return line_means(line_means(maps, radius, -2), radius, -1)


def line_means(maps: Tensor, radius: int, dim: int) -> Tensor:
    """Means over 2 * radius + 1 neighbours along a dimension; by sums of shifted maps, faster than torch's pooling."""
    length, sums = maps.shape[dim], maps.clone()
    for step in range(1, min(radius, length - 1) + 1):
        sums.narrow(dim, step, length - step).add_(maps.narrow(dim, 0, length - step))
        sums.narrow(dim, 0, length - step).add_(maps.narrow(dim, step, length - step))
    places = torch.arange(length, device=maps.device)
    counts = (places + radius).clamp(max=length - 1) - (places - radius).clamp(min=0) + 1
    return sums / counts.view(-1, *[1] * (-1 - dim))


__all__ = ["ColourGuide", "guided_masks"]
