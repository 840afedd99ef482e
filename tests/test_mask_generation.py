"""`segment_everything`: known scenes are found, and how the work is divided changes nothing."""

import os
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, make_model, tiny_config
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import pipeline

from efficientsam_hf import VARIANTS, EfficientSamConfig, EfficientSamProcessor, segment, segment_everything
from efficientsam_hf.mask_drawing import without_small_regions
from efficientsam_hf.mask_search import DECODER_BYTES, Crop
from efficientsam_hf.mask_settings import MaskGenerationSettings
from efficientsam_hf.masks_efficientsam import decode_rle

SIDE = 64  # of the models' picture
EVERYTHING = {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "box_nms_thresh": 1.0, "crop_nms_thresh": 1.0}
# What some of the masks of a model with random weights pass, whose logits are flat.
THRESHOLDS = {"pred_iou_thresh": 0.8, "stability_score_thresh": 0.5, "stability_score_offset": 0.02}


def make_photo(width: int = 120, height: int = 90, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def tiny():
    model = make_model(tiny_config())
    return model, EfficientSamProcessor.from_model_config(model.config)


class Discs:
    """A model whose answer is known: three discs around each click, of which only the first is trusted.

    The nearer to the picture's origin, the better. The click's distance to its disc's edge is `radius`.
    """

    device, dtype = torch.device("cpu"), torch.float32
    config = SimpleNamespace(vision_config=SimpleNamespace(patch_size=16), mask_generation=None)

    def __init__(self, radius: float):
        self.radius = radius
        self.mask_decoder = self
        self.asked = []

    def get_image_embeddings(self, pixel_values):
        return torch.zeros(1, 1, SIDE // 16, SIDE // 16)

    def get_image_inputs(self, embeddings):
        return {"embeddings": embeddings}

    def prepare(self, embeddings):
        return embeddings.shape[-2:]

    def get_prompt_inputs(self, embeddings, points):
        return {"points": points[:, :, 0]}

    def bytes_per_prompt(self, cells):
        return 1

    def look(self, prepared, points):
        self.asked.append(points[0])
        return points, points[0]

    def numbers(self, chosen):
        return list(range(1, 5)[chosen])

    def last_look(self, tokens, image, prepared, numbers):
        return tokens

    def predict_iou(self, tokens, chosen):
        trust = 0.99 - 0.0005 * tokens.sum(-1) / SIDE
        return torch.stack([trust, torch.full_like(trust, 0.5), torch.full_like(trust, 0.4)], dim=-1)

    def draw_masks(self, tokens, image, size, chosen):
        cells = (torch.arange(4 * size[0]) + 0.5) * 4
        x, y = torch.meshgrid(cells, cells, indexing="xy")
        distance = ((x - tokens[..., 0, None, None]) ** 2 + (y - tokens[..., 1, None, None]) ** 2).sqrt()
        return torch.stack([30 * (self.radius - distance)] * 3, dim=2)


def on_discs(radius: float, photo: Image.Image, **options):
    processor = EfficientSamProcessor.from_model_config(tiny_config())
    return segment_everything(Discs(radius), processor, photo, **options)


def centres(records) -> np.ndarray:
    return np.array([np.argwhere(decode_rle(r["segmentation"]).numpy()).mean(0)[::-1] + 0.5 for r in records])


# --------------------------------------------------------------------------------------------------------------------
# Known answers


def test_every_click_gives_its_disc_where_it_was_clicked():
    records = on_discs(7.0, make_photo(), points_per_side=4)
    clicks = np.array([record["point_coords"][0] for record in records])
    wanted = {(15 + 30 * column, 11.25 + 22.5 * row) for column in range(4) for row in range(4)}
    assert {tuple(click) for click in clicks.tolist()} == wanted
    assert np.abs(centres(records) - clicks).max() < 1.5
    scores = [record["predicted_iou"] for record in records]
    assert scores == sorted(scores, reverse=True)
    assert all(0.9 < score < 1 for score in scores)


def test_records_agree_with_their_masks():
    for record in on_discs(9.0, make_photo(160, 90), points_per_side=3):
        mask = decode_rle(record["segmentation"]).numpy()
        assert mask.shape == (90, 160)
        assert record["area"] == mask.sum()
        x, y, width, height = record["bbox"]
        assert mask[y : y + height, x : x + width].sum() == mask.sum()
        assert mask[y].any()
        assert mask[y + height - 1].any()
        assert mask[:, x].any()
        assert mask[:, x + width - 1].any()
        assert record["crop_box"] == [0, 0, 160, 90]
        assert 0.8 < record["stability_score"] <= 1


def test_what_overlaps_is_kept_once():
    many = on_discs(20.0, make_photo(), points_per_side=8, stability_score_thresh=0.5, box_nms_thresh=1.0)
    few = on_discs(20.0, make_photo(), points_per_side=8, stability_score_thresh=0.5, box_nms_thresh=0.3)
    assert len(many) == 64
    assert 4 <= len(few) < 32
    assert few[0] == many[0]


def test_untrusted_and_unstable_masks_are_dropped():
    photo = make_photo()
    assert len(on_discs(7.0, photo, points_per_side=2)) == 4
    assert on_discs(7.0, photo, points_per_side=2, pred_iou_thresh=0.995) == []
    assert on_discs(7.0, photo, points_per_side=2, stability_score_thresh=1.0) == []
    # One disc a click is trusted; asked for all, the three are alike.
    all_masks = on_discs(7.0, photo, points_per_side=2, **EVERYTHING)
    assert len(all_masks) == 12
    assert len(on_discs(7.0, photo, points_per_side=2, multimask=False, **EVERYTHING)) == 4


def test_where_nothing_is_trusted_nothing_is_found(tiny):
    """Not even in one of the batches."""
    model, processor = tiny
    asked = {"points_per_side": 2, "pred_iou_thresh": 1.0, "stability_score_thresh": 0.0, "points_per_batch": 1}
    last = model.mask_decoder.iou_head.layers[-1]
    kept = last.bias.detach().clone()
    with torch.no_grad():
        last.bias.fill_(-9.0)
        nothing = segment_everything(model, processor, make_photo(), **asked)
        last.bias.copy_(kept)
    assert nothing == []


@pytest.mark.parametrize("shape", [(20, 200), (60, 180), (64, 64), (31, 17), (180, 60), (200, 20)])
def test_clicks_cover_pictures_of_every_shape(shape):
    width, height = shape
    records = on_discs(
        3.0, make_photo(width, height), points_per_side=8, stability_score_thresh=0.0, box_nms_thresh=1.0
    )
    clicks = np.array([record["point_coords"][0] for record in records])
    assert len(records) == 64
    for axis, side in enumerate(shape):
        found = np.unique(clicks[:, axis].round(4))
        assert np.allclose(found, (np.arange(8) + 0.5) * side / 8, atol=1e-3)


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_crops_look_closer(factor):
    options = {"points_per_side": 6, "crop_n_layers": 1, "crop_n_points_downscale_factor": factor}
    records = on_discs(5.0, make_photo(240, 180), stability_score_thresh=0.0, **options)
    crops = {tuple(record["crop_box"]) for record in records}
    assert len(crops) == 5
    for record in records:
        left, top, width, height = record["crop_box"]
        x, y = record["point_coords"][0]
        assert left < x < left + width
        assert top < y < top + height
        assert record["bbox"][0] >= left
        assert record["bbox"][0] + record["bbox"][2] <= left + width
    inside = [record for record in records if record["crop_box"][2] < 240]
    # A disc in a crop is smaller than one in the whole picture.
    assert max(record["area"] for record in inside) < 0.6 * max(record["area"] for record in records)


def test_a_mask_cut_off_by_its_crop_is_dropped():
    """The discs fill a quarter of what they were found in: only crops at the picture's corner can hold them whole."""
    records = on_discs(40.0, make_photo(400, 400), points_per_side=1, crop_n_layers=1, stability_score_thresh=0.0)
    assert {tuple(record["crop_box"]) for record in records} == {(0, 0, 400, 400)}


def test_between_crops_the_smaller_one_wins():
    options = {"points_per_side": 2, "crop_n_layers": 1, "crop_n_points_downscale_factor": 2}
    options |= {"crop_nms_thresh": 0.3, "stability_score_thresh": 0.0}
    records = on_discs(24.0, make_photo(400, 400), **options)
    assert len(records) == 4
    assert all(record["crop_box"][2] < 400 for record in records)


@pytest.mark.parametrize("radius", [0.0, 100.0])
def test_empty_and_full_masks(radius):
    records = on_discs(radius, make_photo(), points_per_side=2, stability_score_thresh=0.0)
    if radius:
        assert [record["area"] for record in records] == [120 * 90]
    else:
        assert records == []


def test_a_tiny_picture():
    (record, *_) = on_discs(100.0, make_photo(1, 1), points_per_side=1)
    assert record["area"] == 1
    assert record["bbox"] == [0, 0, 1, 1]


# --------------------------------------------------------------------------------------------------------------------
# Dividing the work


def same_records(found, wanted):
    assert len(found) == len(wanted) > 0
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys()
        first, second = (decode_rle(record["segmentation"]) for record in (one, other))
        assert (first != second).float().mean() < 1e-3
        assert one["predicted_iou"] == pytest.approx(other["predicted_iou"], abs=1e-5)
        assert one["point_coords"] == other["point_coords"]


@pytest.mark.parametrize("batch", [1, 7, 64, 1024])
def test_the_size_of_batches_changes_nothing(tiny, batch):
    photo = make_photo()
    options = {"points_per_side": 6, **EVERYTHING, "box_nms_thresh": 0.7}
    same_records(
        segment_everything(*tiny, photo, points_per_batch=batch, **options),
        segment_everything(*tiny, photo, points_per_batch=36, **options),
    )


@pytest.mark.parametrize("threads", [1, 3])
def test_no_clicks_find_nothing(tiny, threads, set_threads):
    """As the adaptive strategy asks where everything lies on a mask."""
    model, processor = tiny
    set_threads(threads)
    with torch.inference_mode():
        embeddings = model.get_image_embeddings(torch.randn(1, 3, 64, 64))
        crop = Crop(model, processor, embeddings, torch.empty(0), (0, 0, 80, 48), (48, 80), MaskGenerationSettings())
        assert len(crop.ask(torch.empty(0, 2))) == 0


@pytest.mark.parametrize("strategy", ["grid", "adaptive"])
@pytest.mark.parametrize("batch", [None, 2, 5])
def test_the_number_of_threads_changes_nothing(tiny, batch, strategy):
    photo, threads = make_photo(), torch.get_num_threads()
    options = {"points_per_side": 6, **EVERYTHING, "strategy": strategy, "points_per_batch": batch}
    try:
        torch.set_num_threads(1)
        wanted = segment_everything(*tiny, photo, **options)
        torch.set_num_threads(3)
        same_records(segment_everything(*tiny, photo, **options), wanted)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("bytes_kept", [0, 5 * 4 * 16 * 16])
def test_masks_drawn_once_more_are_the_kept_ones(tiny, bytes_kept, monkeypatch):
    photo, options = make_photo(), {"points_per_side": 6, **EVERYTHING}
    wanted = segment_everything(*tiny, photo, **options)
    assert len(wanted) > 5
    monkeypatch.setattr("efficientsam_hf.mask_search.KEPT_BYTES", bytes_kept)
    same_records(segment_everything(*tiny, photo, **options), wanted)


def test_lists_are_singles(tiny):
    photos = [make_photo(120, 90, 0), make_photo(50, 70, 1)]
    options = {"points_per_side": 4, **EVERYTHING, "box_nms_thresh": 0.7}
    together = segment_everything(*tiny, photos, **options)
    assert together == [segment_everything(*tiny, photo, **options) for photo in photos]
    assert segment_everything(*tiny, [], **options) == []
    assert segment_everything(*tiny, [], return_embeddings=True, **options) == ([], [])


@pytest.mark.parametrize("layers", [0, 1])
def test_embeddings_go_out_and_in(tiny, layers, monkeypatch):
    model, processor = tiny
    photo, options = make_photo(), {"points_per_side": 4, "crop_n_layers": layers, **EVERYTHING}
    records, embeddings = segment_everything(model, processor, photo, return_embeddings=True, **options)
    assert embeddings.shape == (1 + 4 * layers, 16, 4, 4)
    monkeypatch.setattr(model, "get_image_embeddings", lambda pixel_values: pytest.fail("encoded again"))
    assert segment_everything(model, processor, photo, image_embeddings=embeddings, **options) == records
    both, again = segment_everything(
        model, processor, [photo], image_embeddings=[embeddings], return_embeddings=True, **options
    )
    assert both == [records]
    assert torch.equal(again[0], embeddings)


def test_the_config_says_what_suits_the_weights_and_the_caller_has_the_last_word(tiny, monkeypatch):
    model, processor = tiny
    photo, options = make_photo(), {"points_per_side": 4, **EVERYTHING}
    everything, fewer = (
        segment_everything(model, processor, photo, **{**options, "points_per_side": side}) for side in (4, 1)
    )
    monkeypatch.setattr(model.config, "mask_generation", options)
    assert segment_everything(model, processor, photo) == everything
    assert segment_everything(model, processor, photo, points_per_side=1) == fewer != everything


def test_the_pipeline_gives_the_same_masks(tiny):
    model, processor = tiny
    photo = make_photo()
    generator = pipeline("mask-generation", model=model, image_processor=processor.image_processor, device="cpu")
    found = generator(photo, points_per_crop=6, crops_nms_thresh=1.0, **THRESHOLDS)
    records = segment_everything(
        model, processor, photo, points_per_side=6, box_nms_thresh=1.0, exact=True, **THRESHOLDS
    )
    assert len(records) == len(found["masks"]) > 3
    for record, mask, score in zip(records, found["masks"], found["scores"], strict=True):
        assert record["predicted_iou"] == pytest.approx(float(score), abs=1e-5)
        assert (decode_rle(record["segmentation"]).numpy() != np.asarray(mask)).mean() < 1e-3


def test_exact_and_quick_decisions_mostly_agree(tiny):
    options = {"points_per_side": 6, **THRESHOLDS}
    quick = segment_everything(*tiny, make_photo(), **options)
    exact = segment_everything(*tiny, make_photo(), exact=True, **options)
    assert abs(len(quick) - len(exact)) <= 2
    assert quick[0]["segmentation"] == exact[0]["segmentation"]


def test_out_of_memory_halves_the_batch(tiny, monkeypatch):
    monkeypatch.setattr("efficientsam_hf.mask_search.MOST_THREADS", 1)
    model, processor = tiny
    options = {"points_per_side": 4, **EVERYTHING}
    wanted = segment_everything(model, processor, make_photo(), **options)
    look = type(model.mask_decoder).look

    def small_memory(self, prepared, prompts, **rest):
        if prompts.shape[1] > 3:
            raise torch.OutOfMemoryError("too much")
        return look(self, prepared, prompts, **rest)

    monkeypatch.setattr(type(model.mask_decoder), "look", small_memory)
    with pytest.warns(UserWarning, match="out of memory: trying 2 clicks at a time"):
        same_records(segment_everything(model, processor, make_photo(), points_per_batch=16, **options), wanted)


def test_one_click_that_does_not_fit_is_an_error(tiny, monkeypatch):
    monkeypatch.setattr("efficientsam_hf.mask_search.MOST_THREADS", 1)
    model, processor = tiny

    def no_memory(*_, **__):
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr(type(model.mask_decoder), "look", no_memory)
    with pytest.raises(torch.OutOfMemoryError), pytest.warns(UserWarning, match="out of memory"):
        segment_everything(model, processor, make_photo(), points_per_side=2)


# --------------------------------------------------------------------------------------------------------------------
# Adaptive


def test_adaptive_asks_all_where_nothing_is_found():
    model = Discs(0.0)
    processor = EfficientSamProcessor.from_model_config(tiny_config())
    assert segment_everything(model, processor, make_photo(), points_per_side=9, strategy="adaptive") == []
    asked = torch.cat(model.asked)
    assert len(asked) == len(asked.unique(dim=0)) == 81


def test_adaptive_saves_clicks_on_what_is_found():
    model, grid = Discs(14.0), Discs(14.0)
    processor = EfficientSamProcessor.from_model_config(tiny_config())
    options = {"points_per_side": 16, "stability_score_thresh": 0.5, "box_nms_thresh": 0.9}
    found = segment_everything(model, processor, make_photo(), strategy="adaptive", **options)
    asked = torch.cat(model.asked)
    assert len(found) >= 5
    assert len(asked) < 100, "of 256"
    masks = torch.stack([decode_rle(record["segmentation"]) for record in found]).any(0)
    everything = segment_everything(grid, processor, make_photo(), **options)
    whole = torch.stack([decode_rle(record["segmentation"]) for record in everything]).any(0)
    assert masks.float().mean() > 0.9 * whole.float().mean()


# --------------------------------------------------------------------------------------------------------------------
# Regions, and what is refused


def test_small_holes_and_islands_go():
    mask = torch.zeros(40, 40, dtype=torch.bool)
    mask[5:30, 5:30] = True
    clean = mask.clone()
    mask[10:12, 10:12] = False
    mask[35, 35] = True
    assert torch.equal(without_small_regions(mask, 5), clean)
    assert torch.equal(without_small_regions(mask, 2)[35, 35], torch.tensor(False))
    assert not without_small_regions(mask, 2)[10, 10]


def test_the_largest_island_stays_however_small():
    mask = torch.zeros(20, 20, dtype=torch.bool)
    mask[2:4, 2:4] = True
    mask[10, 10] = True
    cleaned = without_small_regions(mask, 100)
    assert cleaned.sum() == 4
    assert cleaned[2, 2]


@pytest.mark.parametrize("value", [False, True])
def test_uniform_masks_have_no_small_regions(value):
    mask = torch.full((9, 9), value)
    assert torch.equal(without_small_regions(mask, 10), mask)


def test_records_without_small_regions(tiny):
    options = {"points_per_side": 3, **EVERYTHING, "min_mask_region_area": 60}
    for record in segment_everything(*tiny, make_photo(), **options):
        mask = decode_rle(record["segmentation"])
        assert torch.equal(without_small_regions(mask, 60), mask)


def test_masks_that_become_alike_are_kept_once(monkeypatch):
    """Were every mask to become the whole picture, one would be left."""
    photo, options = make_photo(), {"points_per_side": 3, "box_nms_thresh": 0.9, "stability_score_thresh": 0.0}
    before = on_discs(12.0, photo, **options)
    monkeypatch.setattr(
        "efficientsam_hf.mask_search.without_small_regions",
        lambda mask, least: torch.ones_like(mask) if least else mask,
    )
    after = on_discs(12.0, photo, min_mask_region_area=5, **options)
    assert len(before) == 9
    assert [record["area"] for record in after] == [120 * 90]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pred_iou_thresh": 1.5}, r"pred_iou_thresh must be 0 to 1, got 1.5"),
        ({"stability_score_thresh": -0.1}, r"stability_score_thresh must be 0 to 1"),
        ({"box_nms_thresh": float("nan")}, r"box_nms_thresh must be 0 to 1, got nan"),
        ({"crop_nms_thresh": 2}, r"crop_nms_thresh must be 0 to 1"),
        ({"crop_overlap_ratio": -1}, r"crop_overlap_ratio"),
        ({"points_per_side": 8.5}, r"points_per_side must be a whole number, got 8.5"),
        ({"points_per_batch": True}, r"points_per_batch must be a whole number or None, got True"),
        ({"pred_iou_thresh": "0.5"}, r"pred_iou_thresh must be a number, got '0.5'"),
        ({"multimask": 1}, r"multimask must be True or False, got 1"),
        ({"strategy": None}, r"strategy must be a text, got None"),
        ({"points_per_side": 0}, r"points_per_side must be 1 or more, got 0"),
        ({"points_per_batch": 0}, r"points_per_batch must be 1 or more"),
        ({"crop_n_points_downscale_factor": 0}, r"crop_n_points_downscale_factor"),
        ({"min_mask_region_area": -1}, r"min_mask_region_area must be 0 to inf, got -1"),
        ({"crop_n_layers": -1}, r"crop_n_layers"),
        ({"strategy": "fast"}, r'strategy must be "grid" or "adaptive", got \'fast\''),
        ({"points_per_crop": 4}, r"unknown option 'points_per_crop', wanted one of points_per_side"),
    ],
)
def test_bad_options_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        MaskGenerationSettings.read(**options)


def test_crops_are_encoded_beside_the_known_whole(tiny):
    options = {**EVERYTHING, "points_per_side": 4, "crop_n_layers": 1}
    wanted, embeddings = segment_everything(*tiny, make_photo(), return_embeddings=True, **options)
    found, again = segment_everything(
        *tiny, make_photo(), image_embeddings=embeddings[:1], return_embeddings=True, **options
    )
    assert found == wanted
    assert torch.equal(again, embeddings)


def test_embeddings_can_be_trained_on(tiny):
    options = {**EVERYTHING, "points_per_side": 4, "return_embeddings": True}
    for photo in (make_photo(), [make_photo()]):
        _, embeddings = segment_everything(*tiny, photo, **options)
        (embedded,) = embeddings if isinstance(photo, list) else [embeddings]
        assert not embedded.is_inference()
        torch.nn.Linear(4, 1)(embedded).sum().backward()


def test_embeddings_of_another_precision(tiny):
    options = {**EVERYTHING, "points_per_side": 4}
    _, embeddings = segment_everything(*tiny, make_photo(), return_embeddings=True, **options)
    found = segment_everything(*tiny, make_photo(), image_embeddings=embeddings.half(), **options)
    assert found == segment_everything(*tiny, make_photo(), image_embeddings=embeddings.half().float(), **options)


def test_embeddings_of_other_crops_are_refused(tiny):
    embeddings = torch.zeros(1, 16, 4, 4)
    with pytest.raises(ValueError, match="wanted embeddings of the whole picture or of all 5 crops, got 2"):
        segment_everything(*tiny, make_photo(), image_embeddings=torch.cat([embeddings] * 2), crop_n_layers=1)
    with pytest.raises(ValueError, match="got 1 for 2 pictures"):
        segment_everything(*tiny, [make_photo()] * 2, image_embeddings=[embeddings])


MEASURE = """
from pathlib import Path
import numpy as np
from efficientsam_hf import load_checkpoint, segment_everything

def mebibytes(name):
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) / 1024

model, processor = load_checkpoint(device="cpu")
photo = np.random.default_rng(0).integers(0, 255, (3000, 4000, 3), dtype=np.uint8)
options = {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "points_per_side": 6}
Path("/proc/self/clear_refs").write_text("5")
before = mebibytes("VmRSS")
found = segment_everything(model, processor, photo, **options)
print(len(found), mebibytes("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_twelve_megapixels_take_no_more_than_a_bounded_memory():
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src")}
    done = subprocess.run([sys.executable, "-c", MEASURE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count, mebibytes = done.stdout.split()[-2:]
    assert int(count) > 0
    assert float(mebibytes) < 1536


class LiveBytes(TorchDispatchMode):
    """Counts what tensors hold at one time, on whatever device."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return output

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def test_a_prompt_takes_no_more_than_the_decoder_says(monkeypatch):
    """The official decoder, on a small grid, all masks drawn at one time as on an accelerator."""
    monkeypatch.setattr("efficientsam_hf.modeling_efficientsam.DRAWN_CELLS", 10**9)
    model = make_model(
        EfficientSamConfig(vision_config=tiny_config().vision_config.to_dict() | {"output_channels": 256})
    )
    decoder, embeddings, peaks = model.mask_decoder, torch.randn(1, 256, 16, 16), []
    with torch.no_grad():
        prepared = decoder.prepare(**model.get_image_inputs(embeddings))
        for count in (8, 24):
            points = torch.rand(1, count, 1, 2) * 256
            with LiveBytes() as memory:
                tokens, images = decoder.look(prepared, **model.get_prompt_inputs(embeddings, points))
                tokens = decoder.last_look(tokens, images, prepared, [2, 3, 4])
                decoder.draw_masks(tokens, images, prepared, slice(1, None))
            peaks.append(memory.peak)
    each = (peaks[1] - peaks[0]) / 16
    assert 0.3 * decoder.bytes_per_prompt(256) < each < decoder.bytes_per_prompt(256)


def test_preparing_images_copies_no_cells_for_each_head():
    """What two grids of 1024 cells take beyond what is kept, in copies of their cells in float32; heads are eight."""
    model = make_model(
        EfficientSamConfig(vision_config=tiny_config().vision_config.to_dict() | {"output_channels": 256})
    )
    with torch.no_grad():
        inputs = model.get_image_inputs(torch.randn(2, 256, 32, 32))
        with LiveBytes() as memory:
            kept = model.mask_decoder.prepare(**inputs)
            live = memory.live
    assert kept.size == (32, 32)
    assert memory.peak - live < 5 * 2 * 1024 * 256 * 4


@pytest.mark.slow
def test_twelve_megapixels_fit_an_accelerator_of_eight_gigabytes(monkeypatch):
    """All tensors there are at one time, of EfficientSAM-Ti and a budget as on an accelerator: below 4 GiB."""
    monkeypatch.setattr("efficientsam_hf.mask_search.CPU_DECODER_BYTES", DECODER_BYTES)
    monkeypatch.setattr("efficientsam_hf.mask_search.MOST_THREADS", 1)
    monkeypatch.setattr("efficientsam_hf.modeling_efficientsam.DRAWN_CELLS", 10**9)
    model = make_model(EfficientSamConfig(vision_config=VARIANTS["tiny"]))
    processor = EfficientSamProcessor.from_model_config(model.config)
    photo = np.random.default_rng(0).integers(0, 255, (3000, 4000, 3), dtype=np.uint8)
    weights = sum(parameter.numel() * 4 for parameter in model.parameters())
    with LiveBytes() as memory:
        segment_everything(model, processor, photo, points_per_side=5, pred_iou_thresh=0, stability_score_thresh=1)
    assert 2**28 < weights + memory.peak < 2**31


@pytest.mark.parametrize("least", [0, 5])
@pytest.mark.parametrize("layers", [0, 1])
def test_edges_are_those_of_the_crop_that_was_looked_at(tiny, layers, least, monkeypatch):
    monkeypatch.setattr("efficientsam_hf.masks_efficientsam.CROP_EDGE", -1)  # random masks reach over every edge
    model, processor = tiny[0], EfficientSamProcessor.from_model_config(tiny[0].config)
    processor.image_processor.edge_radius = 2
    photo, options = make_photo(), {**EVERYTHING, "points_per_side": 1, "crop_n_layers": layers}
    records = segment_everything(model, processor, photo, **options, min_mask_region_area=least)
    assert len(records) > 2 * 4**layers
    for record in records:
        x, y, width, height = record["crop_box"]
        mask = decode_rle(record["segmentation"])[y : y + height, x : x + width]
        part = photo.crop((x, y, x + width, y + height))
        answers = segment(model, processor, part, points=[[width / 2, height / 2]], zoom=0).masks[0]
        answers = torch.stack([without_small_regions(answer, least) for answer in answers]) if least else answers
        assert (answers != mask).float().mean((1, 2)).min() < 1e-3
