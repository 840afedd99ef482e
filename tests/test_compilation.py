"""A compiled model answers as it did before, and goes on where compiling fails."""

import shutil
import warnings
from copy import deepcopy

import numpy as np
import pytest
import torch
from conftest import make_model, tiny_config

from efficientsam_hf import EfficientSamProcessor, segment_everything
from efficientsam_hf.compilation import Compiled, compile_model, in_powers_of_two, reason_of


@pytest.fixture
def compiler():
    """Torch's, which counts how often it has compiled a function in the process, and gives up at eight."""
    yield
    torch.compiler.reset()


def broken(*arguments, **options):
    def compiled(*arguments, **inputs):
        raise RuntimeError("no compiler\nand more")

    return compiled


def test_the_reason_is_the_compilers_last_error():
    quoted = "An exception occurred in a subprocess:\n\nTraceback (most recent call last):\n  File x.py, line 1\n"
    quoted += "triton.OutOfResources: shared memory\nRuntimeError: ptxas failed\n\nSet TORCHDYNAMO_VERBOSE=1 for more"
    assert reason_of(RuntimeError(quoted)) == "RuntimeError: ptxas failed"
    assert reason_of(RuntimeError("")) == "RuntimeError"


def test_failure_falls_back_with_one_warning(monkeypatch, model, pixels):
    monkeypatch.setattr(torch, "compile", broken)
    inputs = {"pixel_values": pixels, "input_points": torch.full((2, 3, 1, 2), 30.0)}
    with torch.inference_mode():
        wanted = model(**inputs)
        compile_model(model)
        with pytest.warns(UserWarning, match="torch.compile failed, going on without it: no compiler$") as caught:
            found = model(**inputs)
        assert len(caught) == 2  # one for the encoder, one for the decoder
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(model(**inputs).pred_masks, wanted.pred_masks)
    assert torch.equal(found.pred_masks, wanted.pred_masks)


def test_what_is_the_callers_fault_is_raised_and_no_reason_to_give_up(monkeypatch):
    def halve(number):
        if number % 2:
            raise ValueError(f"{number} is odd")
        return number // 2

    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    compiled = Compiled(halve)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="3 is odd"):
            compiled(3)
        assert compiled(4) == 2
    assert compiled.compiled is not None


def test_a_copy_answers_with_its_own_weights(monkeypatch, model, pixels):
    def compiled(function, **options):
        return lambda *arguments, **inputs: function(*arguments, **inputs)

    monkeypatch.setattr(torch, "compile", compiled)
    inputs = {"pixel_values": pixels, "input_points": torch.full((2, 3, 1, 2), 30.0)}
    with torch.inference_mode():
        copied = deepcopy(compile_model(deepcopy(model)))
        for parameter in (*copied.vision_encoder.parameters(), *copied.mask_decoder.parameters()):
            parameter.mul_(1.1)
        model.load_state_dict(copied.state_dict())
        assert torch.allclose(copied(**inputs).pred_masks, model(**inputs).pred_masks, rtol=1e-4, atol=1e-4)
    assert isinstance(copied.vision_encoder.forward, Compiled)


@pytest.mark.parametrize(("count", "seen"), [(1, 1), (2, 2), (3, 4), (5, 8), (8, 8)])
def test_prompts_are_filled_up_and_cut_off(model, pixels, count, seen):
    counts = []
    decoder = model.mask_decoder

    def watched(prepared, prompts, last_stands_for):
        counts.append(prompts.shape[1])
        return decoder.look(prepared, prompts, last_stands_for)

    with torch.inference_mode():
        embeddings = model.get_image_embeddings(pixels)
        prepared = decoder.prepare(**model.get_image_inputs(embeddings))
        inputs = model.get_prompt_inputs(embeddings, torch.rand(2, count, 1, 2) * 64)
        found, wanted = in_powers_of_two(watched, prepared, **inputs), decoder.look(prepared, **inputs)
        answers = [decoder.last_look(*looked, prepared, [0, 2, 3, 4]) for looked in (found, wanted)]
        images = (found[1], wanted[1])
        drawn = [
            decoder.draw_masks(tokens[:, :, 1:], image, prepared, slice(1, None))
            for tokens, image in zip(answers, images, strict=True)
        ]
    assert torch.allclose(found[0], wanted[0], atol=1e-5)
    assert torch.allclose(*answers, atol=1e-5)
    assert torch.allclose(*drawn, atol=1e-5)
    assert counts == [seen]


wants_compiler = pytest.mark.skipif(
    not shutil.which("gcc") and not shutil.which("g++"), reason="torch.compile wants a C++ compiler"
)


@pytest.mark.slow
@wants_compiler
def test_compiled_answers_are_the_same(model, pixels, compiler):
    inputs = {"pixel_values": pixels, "input_points": torch.full((2, 3, 1, 2), 30.0)}
    with torch.inference_mode():
        wanted = model(**inputs)
        compile_model(model)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="torch.compile failed")
            found = model(**inputs)
    assert torch.allclose(found.pred_masks, wanted.pred_masks, atol=1e-4)
    assert torch.allclose(found.iou_scores, wanted.iou_scores, atol=1e-4)


@pytest.mark.slow
@wants_compiler
def test_a_compiled_model_finds_everything_on_several_threads(set_threads, compiler):
    set_threads(2)
    model = make_model(tiny_config())
    processor = EfficientSamProcessor.from_model_config(model.config)
    photo = np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)
    options = {"points_per_side": 8, "points_per_batch": 4, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0}
    options |= {"box_nms_thresh": 1.0}
    wanted = segment_everything(model, processor, photo, **options)
    compile_model(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="torch.compile failed")
        found = segment_everything(model, processor, photo, **options)
    assert len(found) == len(wanted) > 1
    for one, other in zip(found, wanted, strict=True):
        assert one["predicted_iou"] == pytest.approx(other["predicted_iou"], abs=1e-4)
        assert one["point_coords"] == other["point_coords"]
