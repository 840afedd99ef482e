"""`pipeline("mask-generation")` over a saved folder: prompts cover the photo, masks land where they belong."""

import inspect
import math

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import make_model, tiny_config
from transformers import MaskGenerationPipeline, pipeline

from efficientsam_hf import EfficientSamProcessor

SHAPES = {"1:1": (90, 90), "4:3": (120, 90), "16:9": (160, 90), "9:16": (90, 160)}  # width, height
SIDE = 64  # of the tiny model's picture
EVERYTHING = {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "crops_nms_thresh": 1.0}

# transformers 5.17 gives the model the embeddings of all crops with the prompts of one picture, which no SAM accepts.
CROPS_AT_ONCE = "full_image_size" not in inspect.getsource(MaskGenerationPipeline)
needs_crops = pytest.mark.skipif(CROPS_AT_ONCE, reason="this transformers cannot generate masks on crops")


def make_photo(width: int, height: int) -> PIL.Image.Image:
    """A disc and a box on noise."""
    pixels = np.random.default_rng(width).integers(90, 130, (height, width, 3), dtype=np.uint8)
    y, x = np.mgrid[:height, :width]
    pixels[(y - height / 3) ** 2 + (x - width / 3) ** 2 < (height / 6) ** 2] = (220, 40, 30)
    pixels[height // 2 : height - 8, width // 2 : width - 12] = (30, 200, 60)
    return PIL.Image.fromarray(pixels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    model = make_model(tiny_config())
    model.save_pretrained(path)
    EfficientSamProcessor.from_model_config(model.config).save_pretrained(path)
    return path


@pytest.fixture
def generator(folder) -> MaskGenerationPipeline:
    return pipeline("mask-generation", model=folder, device="cpu")


@pytest.fixture
def seen(generator) -> list[torch.Tensor]:
    """The points (k, 2) of each of the model's calls, in the order of the calls."""
    points, forward = [], generator.model.forward

    def listening(**inputs):
        points.append(inputs["input_points"].flatten(0, 2))
        return forward(**inputs)

    generator.model.forward = listening
    return points


def draw_discs(radius: float):
    """A model whose answer is known: for each point three discs around it, of which only the first is trusted."""

    def forward(input_points, input_labels, image_embeddings):
        assert input_labels.shape == input_points.shape[:-1] == (1, input_points.shape[1], 1)
        assert image_embeddings.shape[0] == 1
        cells = torch.arange(SIDE) + 0.5
        x, y = torch.meshgrid(cells, cells, indexing="xy")
        point = input_points[0, :, 0, :, None, None]
        logits = 30 * (radius - ((x - point[:, 0]) ** 2 + (y - point[:, 1]) ** 2).sqrt())
        # The nearer to the picture's origin, the better.
        trust = 0.99 - 0.001 * input_points[0].sum((-2, -1)) / SIDE
        masks = torch.stack([logits, logits - 1, logits + 1], dim=1)
        scores = torch.stack([trust, torch.full_like(trust, 0.5), torch.full_like(trust, 0.5)], dim=1)
        return {"pred_masks": masks[None], "iou_scores": scores[None]}

    return forward


def find_red(model: torch.nn.Module) -> None:
    """Make it a model that sees red: its answer to a click on red is all that is red in the picture."""

    def forward(input_points, input_labels, image_embeddings):
        redness = 50 * (image_embeddings[0, 0] - image_embeddings[0, 1] - 1.5)
        x, y = input_points.flatten(0, 2).long().unbind(-1)
        scores = torch.where(redness[y, x] > 0, 0.95, 0.1)
        return {"pred_masks": redness.expand(1, len(scores), 1, -1, -1), "iou_scores": scores[None, :, None]}

    model.get_image_embeddings = lambda pixel_values: pixel_values
    model.forward = forward


def centres(masks: list[torch.Tensor]) -> np.ndarray:
    """The centre of each mask's pixels, (N, 2) as x, y."""
    found = [np.argwhere(np.asarray(mask)) for mask in masks]
    return np.array([pixels.mean(0)[::-1] + 0.5 for pixels in found]).reshape(-1, 2)


def grid(side: int, left: float, top: float, right: float, bottom: float) -> np.ndarray:
    """Centres of side x side equal cells of a box."""
    steps = (np.arange(side) + 0.5) / side
    return np.array([(left + (right - left) * x, top + (bottom - top) * y) for y in steps for x in steps])


def distances(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    """From each point to the nearest of the others."""
    return np.linalg.norm(points[:, None] - others[None], axis=-1).min(1)


# --------------------------------------------------------------------------------------------------------------------
# Prompts


@pytest.mark.parametrize("shape", SHAPES)
def test_masks_are_the_photos(shape, generator):
    width, height = SHAPES[shape]
    found = generator(make_photo(width, height), points_per_crop=4, **EVERYTHING)
    assert len(found["masks"]) == len(found["scores"]) > 0
    for mask in found["masks"]:
        mask = torch.as_tensor(mask)
        assert mask.dtype == torch.bool
        assert mask.shape == (height, width)
        assert mask.any()


@pytest.mark.parametrize("shape", SHAPES)
def test_prompts_cover_the_photo(shape, generator, seen):
    size, side = np.array(SHAPES[shape]), 8
    generator(make_photo(*size), points_per_crop=side)
    points = torch.cat(seen).numpy() * size / SIDE  # in the photo's pixels
    cell = size / side
    assert (points.min(0) > 0).all()
    assert (points.min(0) < cell).all()
    assert (points.max(0) > size - cell).all()
    assert (points.max(0) < size).all()
    cells = {tuple(index) for index in np.floor(points / cell).astype(int)}
    assert len(points) == len(cells) == side**2  # one in each cell


def test_batches_of_points_change_nothing(generator, seen):
    photo = make_photo(120, 90)
    whole = generator(photo, points_per_crop=5, **EVERYTHING)
    assert [len(points) for points in seen] == [25]
    seen.clear()
    parts = generator(photo, points_per_crop=5, points_per_batch=4, **EVERYTHING)
    assert [len(points) for points in seen] == [4] * 6 + [1]
    torch.testing.assert_close(parts["scores"], whole["scores"], rtol=0, atol=1e-5)
    assert len(parts["masks"]) == len(whole["masks"]) > 0
    for part, all_at_once in zip(parts["masks"], whole["masks"], strict=True):
        assert (torch.as_tensor(part) != torch.as_tensor(all_at_once)).float().mean() < 1e-3


def test_one_prompt_is_what_the_model_says(generator, folder):
    """The pipeline's answer at the centre of the photo is the answer of processor, model and post-processing."""
    photo = make_photo(120, 90)
    found = generator(photo, points_per_crop=1, **EVERYTHING)
    processor = EfficientSamProcessor.from_pretrained(folder)
    inputs = processor(photo, input_points=[[[[60, 45]]]])
    with torch.no_grad():
        outputs = generator.model(**{name: inputs[name] for name in ("pixel_values", "input_points", "input_labels")})
    masks = processor.post_process_masks(outputs.pred_masks, inputs["original_sizes"])[0][0]
    order = [index for index in outputs.iou_scores[0, 0].argsort(descending=True).tolist() if masks[index].any()]
    assert len(found["masks"]) == len(order) > 0
    torch.testing.assert_close(found["scores"], outputs.iou_scores[0, 0, order], rtol=0, atol=1e-5)
    for mask, index in zip(found["masks"], order, strict=True):
        assert (torch.as_tensor(mask) != masks[index]).float().mean() < 1e-3


def test_several_photos(generator):
    shapes = [SHAPES["16:9"], SHAPES["9:16"]]
    together = generator([make_photo(*shape) for shape in shapes], points_per_crop=3, **EVERYTHING)
    for shape, found in zip(shapes, together, strict=True):
        alone = generator(make_photo(*shape), points_per_crop=3, **EVERYTHING)
        torch.testing.assert_close(found["scores"], alone["scores"], rtol=0, atol=1e-5)
        assert all(torch.as_tensor(mask).shape == shape[::-1] for mask in found["masks"])


def test_batches_of_photos_are_refused_rather_than_mixed_up(generator):
    photos = [make_photo(*SHAPES["16:9"]), make_photo(*SHAPES["9:16"])]
    with pytest.raises(ValueError, match="picture by picture, got 2 together: leave the pipeline's batch_size at 1"):
        generator(photos, points_per_crop=3, batch_size=2, **EVERYTHING)


def test_half_precision(folder):
    generator = pipeline("mask-generation", model=folder, device="cpu", dtype=torch.bfloat16)
    assert generator.model.dtype == torch.bfloat16
    found = generator(make_photo(120, 90), points_per_crop=3, **EVERYTHING)
    assert len(found["masks"]) == len(found["scores"]) > 0


# --------------------------------------------------------------------------------------------------------------------
# Masks


@pytest.mark.parametrize("shape", SHAPES)
def test_masks_lie_where_their_points_were(shape, generator):
    width, height = SHAPES[shape]
    generator.model.forward = draw_discs(radius=6.0)
    found = generator(make_photo(width, height), points_per_crop=4, points_per_batch=5)
    wanted = grid(4, 0, 0, width, height)
    assert len(found["masks"]) == len(wanted)
    assert distances(wanted, centres(found["masks"])).max() < 0.5
    area = math.pi * 6**2 * width * height / SIDE**2
    sizes = [torch.as_tensor(mask).sum().item() for mask in found["masks"]]
    assert np.array(sizes) == pytest.approx(area, rel=0.05)


def test_best_first(generator):
    generator.model.forward = draw_discs(radius=6.0)
    found = generator(make_photo(120, 90), points_per_crop=4)
    assert found["scores"].tolist() == sorted(found["scores"].tolist(), reverse=True)
    assert len(found["scores"]) == 16
    assert centres(found["masks"][:1])[0] == pytest.approx([15, 11.25], abs=0.5)


def test_the_same_mask_is_given_once(generator):
    """With a disc as large as the photo all points see the same."""
    generator.model.forward = draw_discs(radius=200.0)
    assert len(generator(make_photo(120, 90), points_per_crop=4)["masks"]) == 1


def test_run_lengths_and_boxes_are_the_masks(generator):
    generator.model.forward = draw_discs(radius=6.0)
    asked = {"output_rle_mask": True, "output_bboxes_mask": True}
    found = generator(make_photo(160, 90), points_per_crop=3, **asked)
    assert len(found["masks"]) == len(found["rle_mask"]) == len(found["bounding_boxes"]) == 9
    for mask, rle, box in zip(found["masks"], found["rle_mask"], found["bounding_boxes"].tolist(), strict=True):
        mask = np.asarray(mask)
        assert rle["size"] == [90, 160]
        values = np.repeat(np.arange(len(rle["counts"])) % 2, rle["counts"])
        assert (mask == values.reshape(160, 90).T).all()
        (top, left), (bottom, right) = np.argwhere(mask).min(0), np.argwhere(mask).max(0) + 1
        assert box == [left, top, right, bottom]


@pytest.mark.parametrize("refused", [{"pred_iou_thresh": 2.0}, {"stability_score_thresh": 2.0}], ids=str)
def test_nothing_survives(refused, generator):
    found = generator(make_photo(120, 90), points_per_crop=3, output_rle_mask=True, output_bboxes_mask=True, **refused)
    assert len(found["masks"]) == len(found["rle_mask"]) == 0
    assert found["scores"].shape == (0,)
    assert found["bounding_boxes"].shape == (0, 4)


# --------------------------------------------------------------------------------------------------------------------
# Crops of a photo of 400 x 300: the four of layer 1 are 251 x 201 and overlap by 102 pixels

WIDTH, HEIGHT = 400, 300
CROPS = [(0, 0, 251, 201), (149, 0, 400, 201), (0, 99, 251, 300), (149, 99, 400, 300)]


@needs_crops
def test_masks_of_crops_lie_where_their_points_were(generator):
    generator.model.forward = draw_discs(radius=4.0)
    found = generator(make_photo(WIDTH, HEIGHT), points_per_crop=2, crops_n_layers=1, crops_nms_thresh=1.0)
    wanted = np.concatenate([grid(2, *box) for box in [(0, 0, WIDTH, HEIGHT), *CROPS]])
    assert len(found["masks"]) == len(wanted) == 20
    assert all(torch.as_tensor(mask).shape == (HEIGHT, WIDTH) for mask in found["masks"])
    assert distances(wanted, centres(found["masks"])).max() < 0.5
    assert distances(centres(found["masks"]), wanted).max() < 0.5
    # A disc of a crop is smaller on the photo than one of the whole.
    sizes = sorted(torch.as_tensor(mask).sum().item() for mask in found["masks"])
    small, large = math.pi * 4**2 * 251 * 201 / SIDE**2, math.pi * 4**2 * WIDTH * HEIGHT / SIDE**2
    assert np.array(sizes[:16]) == pytest.approx(small, rel=0.05)
    assert np.array(sizes[16:]) == pytest.approx(large, rel=0.05)


@needs_crops
def test_a_crop_finds_what_the_whole_photo_misses(generator):
    """A red box between the clicks of the whole photo, under one click of the upper right crop."""
    pixels = np.full((HEIGHT, WIDTH, 3), 110, dtype=np.uint8)
    pixels[26:76, 318:362] = (220, 40, 30)
    find_red(generator.model)
    asked = {"points_per_crop": 2, "output_bboxes_mask": True}
    assert generator(PIL.Image.fromarray(pixels), **asked)["masks"] == []
    found = generator(PIL.Image.fromarray(pixels), crops_n_layers=1, **asked)
    assert len(found["masks"]) == 1
    mask, box = np.asarray(found["masks"][0]), pixels[:, :, 0] > 200
    assert (mask & box).sum() / (mask | box).sum() > 0.9
    assert found["bounding_boxes"][0].tolist() == pytest.approx([318, 26, 362, 76], abs=3)


@needs_crops
def test_crops_may_have_fewer_points(generator):
    generator.model.forward = draw_discs(radius=4.0)
    asked = {"points_per_crop": 4, "crops_n_layers": 1, "crop_n_points_downscale_factor": 2}
    found = generator(make_photo(WIDTH, HEIGHT), points_per_batch=7, **asked)
    # Where crops overlap, two rows of discs lie one and a half pixels apart: the second is found twice and dropped.
    wanted = np.concatenate([grid(4, 0, 0, WIDTH, HEIGHT), *[grid(2, *box) for box in CROPS]])
    assert len(found["masks"]) == 16 + 12
    assert distances(centres(found["masks"]), wanted).max() < 0.5
    assert distances(wanted, centres(found["masks"])).max() < 2


@needs_crops
def test_masks_cut_off_by_their_crop_are_dropped(generator):
    """With discs that reach over the inner edges only the whole photo's remain."""
    generator.model.forward = draw_discs(radius=12.0)
    asked = {"points_per_crop": 2, "crops_nms_thresh": 1.0}
    whole = generator(make_photo(WIDTH, HEIGHT), **asked)
    crops = generator(make_photo(WIDTH, HEIGHT), crops_n_layers=1, **asked)
    assert len(whole["masks"]) == 4
    # Of a crop's four discs the one in the photo's corner is far from the inner edges.
    assert len(crops["masks"]) == 4 + 4


@needs_crops
@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_crops_of_every_shape(shape, factor, generator):
    width, height = SHAPES[shape]
    asked = {"crops_n_layers": 1, "crop_n_points_downscale_factor": factor, "points_per_batch": 7}
    found = generator(make_photo(width, height), points_per_crop=4, **asked, **EVERYTHING)
    assert len(found["masks"]) == len(found["scores"]) > 0
    assert all(torch.as_tensor(mask).shape == (height, width) for mask in found["masks"])


@pytest.mark.skipif(not CROPS_AT_ONCE, reason="this transformers generates masks on crops")
def test_old_transformers_refuses_crops_rather_than_mixing_them_up(generator):
    with pytest.raises(ValueError, match="input_points must be"):
        generator(make_photo(120, 90), points_per_crop=2, crops_n_layers=1)
