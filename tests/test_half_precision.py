"""How far float16 and bfloat16 are from float32, part by part, and on photos."""

import copy

import pytest
import torch
from conftest import make_model, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from efficientsam_hf import EfficientSamProcessor, load_checkpoint, modeling_efficientsam, segment, segment_everything
from efficientsam_hf.data.sa1b import find_pairs
from efficientsam_hf.masks_efficientsam import decode_rle, masks_to_boxes
from efficientsam_hf.modeling_efficientsam import (
    EfficientSamImageTerms,
    EfficientSamPreparedImage,
    EfficientSamPromptedImage,
    EfficientSamSameConv2d,
)
from efficientsam_hf.training.finetuning import InteractiveSegmentation
from efficientsam_hf.training.recipes import PromptRecipe

# The relative step of each type: half a unit in the last place is the error of a single operation.
STEP = {torch.float16: 2**-10, torch.bfloat16: 2**-7}
HALVES = pytest.mark.parametrize("dtype", list(STEP), ids=str)


def relative_error(found, wanted):
    assert found.dtype != torch.float32
    return float((found.float() - wanted).norm() / wanted.norm())


@pytest.fixture
def exact():
    return make_model(tiny_config(negative_points=True, mask_prompts=True))


@HALVES
def test_each_part_errs_by_a_few_steps(exact, pixels, dtype):
    half = copy.deepcopy(exact).to(dtype)
    exact = copy.deepcopy(half).float()  # the same rounded weights
    pixels, masks = pixels.to(dtype), torch.randn(2, 3, 16, 16).to(dtype)
    points = torch.rand(2, 3, 2, 2) * 64
    with torch.inference_mode():
        read = half.vision_encoder.embeddings, exact.vision_encoder.embeddings
        assert relative_error(read[0](pixels)[0], read[1](pixels.float())[0]) < 3 * STEP[dtype]
        hidden = torch.randn(2, 4, 4, 24).to(dtype)
        for index, layer in enumerate(half.vision_encoder.layers):
            wanted = exact.vision_encoder.layers[index](hidden.float())
            assert relative_error(layer(hidden), wanted) < 4 * STEP[dtype]
        assert relative_error(half.vision_encoder.neck(hidden), exact.vision_encoder.neck(hidden.float())) < (
            4 * STEP[dtype]
        )
        embeddings = exact.get_image_embeddings(pixels.float()).to(dtype)
        found = half.get_decoder_inputs(embeddings, points, input_masks=masks)
        wanted = exact.get_decoder_inputs(embeddings.float(), points, input_masks=masks.float())
        for name in ("prompts", "image_positions", "dense"):
            assert relative_error(found[name], wanted[name]) < 4 * STEP[dtype], name
        image, prompts = half.get_image_inputs(embeddings), half.get_prompt_inputs(embeddings, points)
        prepared, exactly = half.mask_decoder.prepare(**image), exact.mask_decoder.prepare(**in_float32(image))
        tokens, seen = half.mask_decoder.look(prepared, **prompts)
        exact_tokens, exactly_seen = exact.mask_decoder.look(exactly, **in_float32(prompts))
        assert relative_error(tokens, exact_tokens) < 12 * STEP[dtype]
        halves = seen.written_out(prepared.upscaling), exactly_seen.written_out(exactly.upscaling)
        assert relative_error(*halves) < 12 * STEP[dtype]
        chosen, numbers = slice(1, None), [0, 2, 3, 4]
        tokens = half.mask_decoder.last_look(tokens, seen, prepared, numbers)
        exact_tokens = exact.mask_decoder.last_look(exact_tokens, exactly_seen, exactly, numbers)
        assert relative_error(tokens, exact_tokens) < 12 * STEP[dtype]
        scores = half.mask_decoder.predict_iou(tokens, chosen), exact.mask_decoder.predict_iou(tokens.float(), chosen)
        assert relative_error(*scores) < 8 * STEP[dtype]
        drawn = half.mask_decoder.draw_masks(tokens[:, :, 1:], seen, prepared, chosen)
        wanted = exact.mask_decoder.draw_masks(exact_tokens[:, :, 1:], exactly_seen, exactly, chosen)
        assert relative_error(drawn, wanted) < 16 * STEP[dtype]


def in_float32(inputs: dict) -> dict:
    return {name: value.float() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


@HALVES
def test_positions_stay_in_float32(exact, dtype):
    half = copy.deepcopy(exact).to(dtype)
    assert half.shared_image_embedding.gaussian_matrix.dtype == torch.float32
    coordinates = torch.rand(5, 2)
    assert torch.equal(half.shared_image_embedding(coordinates), exact.shared_image_embedding(coordinates))


def test_a_dilated_filter_learns_in_bfloat16_what_it_learns_in_float32():
    # torch's own gradient is noise, or infinite, for these sizes and channels last.
    torch.manual_seed(0)
    filters = EfficientSamSameConv2d(96, 96, 3, dilation=2, groups=96)
    pixels = torch.randn(4, 96, 32, 32).to(memory_format=torch.channels_last)
    gradients = []
    for dtype in (torch.bfloat16, torch.float32):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            answer = filters(pixels)
        assert answer.dtype == dtype
        (answer * pixels.roll(3, 0)).float().sum().backward()
        gradients.append(filters.weight.grad)
        filters.zero_grad()
    found, wanted = gradients
    assert (found - wanted).norm() < 0.01 * wanted.norm()


@HALVES
def test_the_norm_over_all_pixels_does_not_overflow(exact, dtype):
    """Over a whole picture's channels and pixels a sum of squares leaves float16's range."""
    half = copy.deepcopy(exact.mask_decoder).to(dtype)
    tokens, cells = torch.randn(1, 1, 3, 16).to(dtype), (torch.randn(1, 64 * 64, 4 * 8) * 8).to(dtype)

    def draw(decoder, cells, tokens):
        nothing = torch.zeros(1, 1, 4 * 8, dtype=cells.dtype)
        terms = EfficientSamImageTerms(cells, [nothing], nothing[0, 0])
        one = torch.ones(1, 1, 1, 64 * 64, dtype=cells.dtype)
        image = EfficientSamPromptedImage(one, one, [one[..., :1].unsqueeze(-1)])
        prepared = EfficientSamPreparedImage([], terms, terms.averaged(), (64, 64))
        return decoder.draw_masks(tokens, image, prepared, slice(1, None))

    with torch.inference_mode():
        found, wanted = draw(half, cells, tokens), draw(copy.deepcopy(half).float(), cells.float(), tokens.float())
    assert torch.isfinite(found).all()
    assert relative_error(found, wanted) < 8 * STEP[dtype]


@pytest.mark.slow
@HALVES
def test_masks_agree_on_photos(shared, dtype):
    """Two photos; all of them in benchmarks/agreement.py."""
    exact, processor = load_checkpoint(device="cpu")
    half = copy.deepcopy(exact).to(dtype)
    overlaps = []
    for pair in find_pairs(shared / "data" / "grabcut")[::30]:
        boxes = [masks_to_boxes(decode_rle(record["segmentation"])).tolist() for record in pair.read_annotations()]
        found, wanted = (segment(model, processor, pair.read_image(), boxes=boxes) for model in (half, exact))
        overlaps += [
            float((a & b).sum() / (a | b).sum()) for a, b in zip(found.masks[:, 0], wanted.masks[:, 0], strict=True)
        ]
    assert sum(overlaps) / len(overlaps) > 0.97


class WithoutFloat64(TorchDispatchMode):
    """Apple's GPUs have no float64: whatever makes some is refused."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        answer = function(*args, **(kwargs or {}))
        for part in tree_leaves(answer):
            if isinstance(part, torch.Tensor) and part.dtype == torch.float64:
                raise TypeError(f"{function} gives float64")
        return answer


def test_nothing_needs_float64(exact, photo, monkeypatch):
    monkeypatch.setattr(modeling_efficientsam, "may_reuse_memory", lambda tensor: False)  # as off a CPU
    exact.config.rank_by_stability = True
    processor = EfficientSamProcessor.from_model_config(exact.config)
    maps = torch.zeros(1, 48, 80, dtype=torch.uint8)
    maps[:, 10:30, 10:40] = 1
    with WithoutFloat64():
        segment(exact, processor, photo, points=[[24, 20]], zoom=2)
        segment_everything(exact, processor, photo, points_per_side=2, pred_iou_thresh=0, stability_score_thresh=0)
        inputs = processor(photo, input_boxes=[[[10, 8, 40, 30]]], segmentation_maps=[maps])
        assert exact(**inputs, multimask_output=False).loss.isfinite()
        task = InteractiveSegmentation(exact, PromptRecipe(rounds=3)).train()
        task(inputs["pixel_values"], inputs["labels"])["loss"].backward()
