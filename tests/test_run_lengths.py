"""Masks shrunk from their run lengths are the masks that painting and averaging gives, cell by cell."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from efficientsam_hf.data.run_lengths import shrink_run_lengths
from efficientsam_hf.masks_efficientsam import decode_rle, encode_rle


def painted_and_averaged(rle: dict, size: tuple[int, int]) -> np.ndarray:
    # The rounding of float32 would move cells that are covered by exactly half.
    return (F.adaptive_avg_pool2d(decode_rle(rle)[None].double(), size)[0] > 0.5 - 1e-9).numpy()


def blob(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    noise = torch.from_numpy(generator.random((1, 1, 4, 5)))
    return F.interpolate(noise, (height, width), mode="bicubic")[0, 0].numpy() > generator.uniform(0.3, 0.8)


@pytest.mark.parametrize("picture", [(64, 96), (60, 80), (61, 83), (16, 24), (7, 5), (1, 40)])
@pytest.mark.parametrize("size", [(16, 16), (16, 24), (5, 7)])
def test_shrinking_runs_is_painting_and_averaging(picture: tuple[int, int], size: tuple[int, int]):
    generator = np.random.default_rng(0)
    for number in range(30):
        mask = blob(generator, *picture) if number % 3 else generator.random(picture) < generator.random()
        for compressed in (True, False):
            rle = encode_rle(torch.from_numpy(mask), compressed=compressed)
            assert np.array_equal(shrink_run_lengths(rle, size), painted_and_averaged(rle, size))


@pytest.mark.parametrize("value", [False, True])
def test_nothing_and_everything(value: bool):
    rle = encode_rle(torch.full((33, 47), value))
    assert (shrink_run_lengths(rle, (8, 8)) == value).all()


def test_half_a_cell_is_enough():
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:2, :4] = True
    assert shrink_run_lengths(encode_rle(mask), (2, 2)).tolist() == [[True, False], [False, False]]
    mask[0, 0] = False
    assert not shrink_run_lengths(encode_rle(mask), (2, 2)).any()


def test_counts_of_another_size_are_refused():
    rle = {**encode_rle(torch.ones(8, 8, dtype=torch.bool)), "size": [8, 9]}
    with pytest.raises(ValueError, match="run lengths of a 8 x 9 mask want to add up to 72"):
        shrink_run_lengths(rle, (2, 2))
