"""Masks that follow the edges of their picture: `ColourGuide`, and who draws with it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from efficientsam_hf import EfficientSamImageProcessor, EfficientSamProcessor, SegmentationStream, edges_efficientsam
from efficientsam_hf.edges_efficientsam import FINER, SMOOTHNESS, ColourGuide
from efficientsam_hf.evaluation.predictor import EfficientSamPredictor, Prompts, ZoomingPredictor
from efficientsam_hf.prediction import segment
from efficientsam_hf.zooming import window_around


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def blobs(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    coarse = noise(1, count, height // 3 + 1, width // 3 + 1, seed=seed) * 12 - 6
    return F.interpolate(coarse, (height, width), mode="bicubic")[0]


def disc_and_picture(side: int) -> tuple[np.ndarray, torch.Tensor]:
    """A disc, and a photo of it: dark red on a green that grows lighter downwards, with some noise."""
    y, x = np.mgrid[:side, :side] / side
    disc = (x - 0.52) ** 2 + (y - 0.47) ** 2 < 0.3**2
    picture = np.where(disc, np.array([0.5, 0.1, 0.1])[:, None, None], np.stack([0.2 + 0 * x, 0.5 + 0.4 * y, 0.3 * x]))
    return disc, torch.from_numpy(picture).float() + 0.02 * noise(3, side, side)


def refine(logits: torch.Tensor, picture: torch.Tensor, radius: int) -> torch.Tensor:
    return ColourGuide(picture, tuple(logits.shape[-2:]), radius).refine(logits)


def test_least_squares_around_every_cell():
    """By the words of the paper: a ridge regression in each square, all means of those a cell lies in."""
    logits, picture, radius = blobs(2, 7, 9), noise(3, 7, 9), 2
    shares, colours = logits.sigmoid().double().numpy(), picture.double().numpy()
    near = [
        [(slice(max(0, y - radius), y + radius + 1), slice(max(0, x - radius), x + radius + 1)) for x in range(9)]
        for y in range(7)
    ]
    found = ColourGuide(picture, (7, 9), radius).fit(logits.sigmoid())
    for mask, answer in zip(shares, found, strict=True):
        fits = np.empty((7, 9, 4))
        for y, x in np.ndindex(7, 9):
            guide, target = colours[(slice(None), *near[y][x])].reshape(3, -1), mask[near[y][x]].ravel()
            centred = guide - guide.mean(1, keepdims=True)
            matrix = centred @ centred.T / len(target) + SMOOTHNESS * np.eye(3)
            slope = np.linalg.solve(matrix, centred @ (target - target.mean()) / len(target))
            fits[y, x] = [*slope, target.mean() - slope @ guide.mean(1)]
        wanted = [[fits[near[y][x]].reshape(-1, 4).mean(0) for x in range(9)] for y in range(7)]
        assert torch.allclose(answer, torch.tensor(np.array(wanted)).permute(2, 0, 1).float(), atol=1e-4)


def test_functions_of_colours_are_read_on_a_finer_grid():
    """A mask that is a function of colours everywhere is that function of the finer grid's colours."""
    side = 12
    picture = noise(3, FINER * side, FINER * side)
    shares = 0.2 + 0.6 * F.interpolate(picture[None], (side, side), mode="bilinear", antialias=True)[0, 0]
    found = refine(shares.logit()[None], picture, 2)[0].sigmoid()
    assert (found - (0.2 + 0.6 * picture[0])).abs().mean() < 0.02


def test_the_edge_is_the_pictures():
    disc, picture = disc_and_picture(160)
    covered = F.interpolate(torch.from_numpy(disc).float()[None, None], (20, 20), mode="area")[0]
    logits = (covered - 0.5) * 8 + noise(1, 20, 20) * 4 - 2
    errors = []
    for cells in (logits, refine(logits, picture, 2)):
        drawn = F.interpolate(cells[None], disc.shape, mode="bicubic")[0, 0].numpy() >= 0
        errors.append((drawn != disc).mean())
    assert errors[0] > 0.01
    assert errors[1] < 0.6 * errors[0]


def test_a_picture_of_one_colour_leads_nowhere():
    logits = blobs(1, 12, 12)
    smooth = logits.sigmoid()
    for _ in range(2):
        smooth = F.avg_pool2d(smooth, 3, 1, 1, count_include_pad=False)
    smooth = F.interpolate(smooth[None], FINER * 12, mode="bilinear")[0]
    assert torch.allclose(refine(logits, torch.full((3, 12, 12), 0.3), 1).sigmoid(), smooth, atol=1e-4)


@pytest.mark.parametrize("cells", [2, 3, 4])
def test_small_things_that_look_like_their_ground_stay(cells):
    """Their colours say nothing of them, and the means of squares would smooth them away."""
    logits = torch.full((2, 32, 32), -6.0)
    logits[0, 10 : 10 + cells, 12 : 12 + cells] = 6
    logits[1, 8:24, 8:24] = 6
    picture = 0.5 + 0.03 * noise(3, 128, 128)
    found = refine(logits, picture, 2)
    interpolated = F.interpolate(logits[None], FINER * 32, mode="bilinear")[0]
    assert torch.equal(found[0], interpolated[0])
    assert not torch.equal(found[1], interpolated[1])


@pytest.mark.parametrize("dims", [(-1,), (-2,), (-2, -1)])
def test_mirrored_pictures_have_mirrored_masks(dims):
    logits, picture = blobs(2, 8, 10), noise(3, 31, 44)
    mirrored = refine(logits.flip(dims), picture.flip(dims), 2).flip(dims)
    assert torch.allclose(mirrored.sigmoid(), refine(logits, picture, 2).sigmoid(), atol=1e-4)


def test_the_order_of_colours_does_not_matter():
    logits, picture = blobs(2, 8, 10), noise(3, 31, 44)
    turned = refine(logits, picture[[2, 0, 1]], 2)
    assert torch.allclose(turned.sigmoid(), refine(logits, picture, 2).sigmoid(), atol=1e-4)


def test_masks_do_not_depend_on_those_beside_them(monkeypatch):
    logits, picture = blobs(6, 9, 9), noise(3, 20, 30)
    together = refine(logits, picture, 2)
    monkeypatch.setattr(edges_efficientsam, "REFINED_BYTES", 2 * 32 * FINER**2 * 81)
    assert torch.allclose(refine(logits, picture, 2), together, atol=1e-4)
    assert torch.allclose(refine(logits[3:4], picture, 2)[0], together[3], atol=1e-4)
    assert refine(logits[:0], picture, 2).shape == (0, FINER * 9, FINER * 9)


@pytest.mark.parametrize(("size", "radius"), [((3, 2), 1), ((1, 1), 2), ((50, 7), 30), ((4, 90), 10**20)])
def test_small_pictures_and_wide_squares(size, radius):
    drawn = refine(blobs(1, 8, 8).bfloat16(), noise(3, *size), radius)
    assert drawn.shape == (1, FINER * 8, FINER * 8)
    assert drawn.dtype == torch.float32
    assert drawn.isfinite().all()


# --------------------------------------------------------------------------------------------------------------------
# The processor


@pytest.fixture
def picture() -> np.ndarray:
    return (noise(40, 56, 3, seed=3) * 255).byte().numpy()


def test_post_processing_follows_the_pictures(picture):
    processor = EfficientSamImageProcessor(size=64, edge_radius=2)
    plain = EfficientSamImageProcessor(size=64)
    logits, other = blobs(6, 16, 16).view(1, 2, 3, 16, 16), picture[:20]
    for options in ({}, {"binarize": False}, {"mask_threshold": 1.0}):
        found = processor.post_process_masks(
            torch.cat([logits, logits]), [(40, 56), (20, 56)], images=[picture, other], **options
        )
        for masks, pixels in zip(found, (picture, other), strict=True):
            colours = torch.from_numpy(pixels).permute(2, 0, 1) / 255
            finer = refine(logits[0].flatten(0, 1), colours, 2).view(1, 2, 3, FINER * 16, FINER * 16)
            assert torch.equal(masks, plain.post_process_masks(finer, [pixels.shape[:2]], **options)[0])
            interpolated = plain.post_process_masks(logits, [pixels.shape[:2]], **options)[0]
            assert not torch.equal(masks, interpolated)


@pytest.mark.parametrize(("radius", "given"), [(0, True), (2, False)])
def test_without_radius_or_picture_masks_are_interpolated(picture, radius, given):
    processor = EfficientSamImageProcessor(size=64, edge_radius=radius)
    logits = blobs(3, 16, 16)[None, None]
    found = processor.post_process_masks(logits, [(40, 56)], images=[picture] if given else None)[0]
    assert torch.equal(found, F.interpolate(logits[0], (40, 56), mode="bicubic") >= 0)


def test_pictures_of_any_kind_lead_alike(picture, tmp_path):
    processor = EfficientSamImageProcessor(size=64, edge_radius=2)
    logits = blobs(3, 16, 16)[None, None]
    Image.fromarray(picture).save(tmp_path / "picture.png")
    wanted = processor.post_process_masks(logits, [(40, 56)], images=[picture])[0]
    for kind in (Image.fromarray(picture), tmp_path / "picture.png", picture.astype(np.float32) / 255):
        assert torch.equal(processor.post_process_masks(logits, [(40, 56)], images=[kind])[0], wanted)
        assert torch.equal(processor.post_process_masks(logits, [(40, 56)], images=kind)[0], wanted)
    assert torch.equal(processor.post_process_masks(logits, [(40, 56)], images=picture[None])[0], wanted)


@pytest.mark.parametrize(("factor", "offset"), [(255, 0), (4, -2), (0, 7)])
def test_floats_of_any_range_are_stretched(picture, factor, offset):
    processor = EfficientSamImageProcessor(size=64, edge_radius=2, do_rescale=False)
    logits, scaled = blobs(3, 16, 16)[None, None], picture.astype(np.float32) / 255
    scaled = (scaled - scaled.min()) / (scaled.max() - scaled.min())
    found = processor.post_process_masks(logits, [(40, 56)], images=[factor * scaled + offset])[0]
    wanted = processor.post_process_masks(logits, [(40, 56)], images=[scaled if factor else 0 * scaled])[0]
    assert (found != wanted).float().mean() < 2e-3


def test_other_pictures_are_refused(picture):
    processor = EfficientSamImageProcessor(size=64, edge_radius=2)
    logits = blobs(3, 16, 16)[None, None]
    with pytest.raises(ValueError, match=r"masks of a picture of \(40, 50\) want that picture, found one of \(40, 56"):
        processor.post_process_masks(logits, [(40, 50)], images=[picture])
    with pytest.raises(ValueError, match="every size wants its picture: found 2 pictures and 1 sizes"):
        processor.post_process_masks(logits, [(40, 56)], images=[picture, picture])


# --------------------------------------------------------------------------------------------------------------------
# Who draws with it


@pytest.fixture
def leading(config):
    processor = EfficientSamProcessor.from_model_config(config)
    processor.image_processor.edge_radius = 2
    return processor


def wanted_masks(model, processor, photo, **prompts):
    inputs = processor(photo, **prompts)
    sizes = inputs.pop("original_sizes")
    with torch.no_grad():
        outputs = model(**inputs)
    masks = processor.post_process_masks(outputs.pred_masks, sizes, images=[photo])[0]
    return masks.take_along_dim(outputs.iou_scores[0].argsort(descending=True)[..., None, None], 1)


def test_segment_draws_so(model, leading, photo):
    answer = segment(model, leading, photo, points=[[24, 20]])
    assert torch.equal(answer.masks, wanted_masks(model, leading, photo, input_points=[[[[24, 20]]]]))
    leading.image_processor.edge_radius = 0
    assert not torch.equal(answer.masks, segment(model, leading, photo, points=[[24, 20]]).masks)


def test_a_closer_look_draws_so_in_its_window(model, leading, photo):
    box = [30, 14, 44, 26]
    left, top, right, bottom = window_around(box, photo.shape[:2], 2.0)
    inside = [box[0] - left, box[1] - top, box[2] - left, box[3] - top]
    answer = segment(model, leading, photo, boxes=box, zoom=2)
    wanted = wanted_masks(model, leading, photo[top:bottom, left:right], input_boxes=[[inside]])
    assert torch.equal(answer.masks[..., top:bottom, left:right], wanted)


@pytest.mark.parametrize("zoom", [0, 1.0])
def test_a_stream_draws_as_segment(model, leading, photo, zoom):
    requests = [(photo, {"boxes": [10, 8, 40, 30]}), (photo[8:], {"points": [[24, 20]]})]
    stream = SegmentationStream(model, leading, batch_size=2, zoom=zoom)
    for (picture, prompts), answer in zip(requests, stream(requests), strict=True):
        alone = segment(model, leading, picture, **prompts, zoom=zoom)
        assert (answer.masks != alone.masks).float().mean() < 1e-3


def test_what_is_evaluated_is_what_segment_draws(model, leading, photo):
    picture, points = Image.fromarray(photo), np.array([[[24.0, 20.0]]])
    prompts = Prompts(points=points, labels=np.ones((1, 1), dtype=int))
    wanted = segment(model, leading, photo, points=[[24, 20]], zoom=0).masks[0, 0].numpy()
    predictor = EfficientSamPredictor(model, leading)
    embedded = predictor.embed(picture)
    found = predictor.at_size(embedded, predictor.decode(embedded, prompts).best_logits())
    assert (found[0] != wanted).mean() < 1e-3
    zooming = ZoomingPredictor(model, leading, "zooming", 1.0)
    closer = zooming.at_size(zooming.embed(picture), zooming.decode(zooming.embed(picture), prompts).best_logits())
    assert np.array_equal(closer[0], segment(model, leading, photo, points=[[24, 20]], zoom=1.0).masks[0, 0].numpy())


def test_pictures_are_evaluated_as_they_are_stored(model, leading, photo, tmp_path):
    """Their masks were drawn on the pixels of the file, whatever its EXIF data says of the camera."""
    exif = Image.Exif()
    exif[0x0112] = 6  # lying on its side
    Image.fromarray(photo).save(tmp_path / "turned.png", exif=exif)
    predictor = EfficientSamPredictor(model, leading)
    prompts = Prompts(points=np.array([[[24.0, 20.0]]]), labels=np.ones((1, 1), dtype=int))
    answers = []
    for picture in (Image.open(tmp_path / "turned.png"), Image.fromarray(photo)):
        embedded = predictor.embed(picture)
        answers.append(predictor.at_size(embedded, predictor.decode(embedded, prompts).best_logits()))
    assert np.array_equal(*answers)
