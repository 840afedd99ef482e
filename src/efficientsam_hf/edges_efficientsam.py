"""Edges that follow the picture, by the guided filter (He et al., "Guided Image Filtering", 2013).

Around every cell of the masks' grid, a mask is fitted as a linear function of the picture's colours. These functions
change slowly from cell to cell, and can be enlarged where a mask cannot (He and Sun, "Fast Guided Filter", 2015):
applied to the colours of a finer grid, they draw the edge where the picture has one.

N masks of h x w cells, a picture of H x W pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

FINER = 2  # cells of the finer grid along one of the masks'; more of them leave specks (docs/benchmarks.md)
SMOOTHNESS = 1e-3  # variance of colours in 0 to 1; where they vary less, a mask is smoothed rather than led by them
LEAST_AGREEMENT = 0.6  # IoU of a mask with its fit, on its own grid, from which colours are taken to tell the object
NEARLY = 1e-4  # how far from 0 and 1 shares stay, which have no logits there
REFINED_BYTES = 2**26  # float32 values of fits and finer masks that exist at one time, beside the result


class ColourGuide:
    """A picture's colours around every cell of a grid, for any number of its masks.

    Args:
        picture: (3, H, W), floats in 0 to 1.
        grid: h, w of the masks.
        radius: In cells, from 1 on: a mask is compared with the colours of a square of 2 * radius + 1 of them.
    """

    def __init__(self, picture: Tensor, grid: tuple[int, int], radius: int):
        self.radius = min(radius, max(grid))
        self.finer_grid = (FINER * grid[0], FINER * grid[1])
        self.cells, self.finer_cells = shrink(picture, grid), shrink(picture, self.finer_grid)
        self.means = window_means(self.cells, self.radius)
        products = window_means((self.cells[:, None] * self.cells).flatten(0, 1), self.radius).unflatten(0, (3, 3))
        covariance = products - self.means[:, None] * self.means
        covariance.diagonal(dim1=0, dim2=1).add_(SMOOTHNESS)
        # The inverse of a 3 x 3 matrix by its cofactors, many times faster than a solver called for each cell.
        red, green, blue = covariance
        pairs = ((green, blue), (blue, red), (red, green))
        cofactors = torch.stack([torch.linalg.cross(*pair, dim=0) for pair in pairs])
        self.inverse = cofactors / (red * cofactors[0]).sum(0)

    def refine(self, logits: Tensor) -> Tensor:
        """Masks on a finer grid, with the picture's edges.

        A mask that its colours say nothing of, such as one of few cells that looks like what is around it, is
        interpolated instead.

        Args:
            logits: (N, h, w).

        Returns:
            Logits (N, FINER * h, FINER * w), float32; those of shares lie within 9.2 of 0.
        """
        refined = logits.new_empty((len(logits), *self.finer_grid), dtype=torch.float32)
        step = max(1, REFINED_BYTES // (32 * self.finer_grid[0] * self.finer_grid[1]))
        for start in range(0, len(logits), step):
            some = logits[start : start + step].float()
            functions = self.fit(some.sigmoid())
            fitted, there = apply(functions, self.cells) >= 0.5, some >= 0
            agreement = (fitted & there).sum((1, 2)) / (fitted | there).sum((1, 2)).clamp(min=1)
            shares = apply(enlarge(functions, self.finer_grid), self.finer_cells).clamp(NEARLY, 1 - NEARLY)
            interpolated = enlarge(some[:, None], self.finer_grid)[:, 0]
            led = (agreement >= LEAST_AGREEMENT)[:, None, None]
            refined[start : start + step] = torch.where(led, shares.logit(), interpolated)
        return refined

    def fit(self, shares: Tensor) -> Tensor:
        """Linear functions of colours that come closest to masks, by least squares in the square around each cell.

        Args:
            shares: How much of each cell is the object's, (N, h, w), 0 to 1.

        Returns:
            Three slopes and an offset (N, 4, h, w), each the mean of those of the squares that the cell lies in.
        """
        shares = shares[:, None]
        covered, together = window_means(torch.cat([shares, shares * self.cells], 1), self.radius).split([1, 3], 1)
        together = together - covered * self.means
        slopes = torch.stack([(row * together).sum(1) for row in self.inverse], dim=1)
        offsets = covered - (slopes * self.means).sum(1, keepdim=True)
        return window_means(torch.cat([slopes, offsets], 1), self.radius)


def apply(functions: Tensor, colours: Tensor) -> Tensor:
    """What `ColourGuide.fit` gives (N, 4, h, w), at colours (3, h, w): shares (N, h, w), about 0 to 1."""
    return (functions[:, :3] * colours).sum(1) + functions[:, 3]


def enlarge(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Maps (N, C, h, w) on a finer grid."""
    return F.interpolate(maps, grid, mode="bilinear", align_corners=False)


def shrink(picture: Tensor, grid: tuple[int, int]) -> Tensor:
    """A picture (3, H, W) on a grid, (3, h, w)."""
    return F.interpolate(picture[None], grid, mode="bilinear", align_corners=False, antialias=True)[0]


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


__all__ = ["ColourGuide"]
