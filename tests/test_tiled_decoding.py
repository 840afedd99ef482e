"""The decoder with each prompt's image written out answers, and teaches, what the model's own way does."""

from copy import deepcopy

import pytest
import torch
from conftest import detail_config, make_model, tiny_config
from test_extension import prompts
from test_finetuning import generator
from torch import Tensor
from torch.testing import assert_close

from efficientsam_hf import EfficientSamModel, compile_model
from efficientsam_hf.compilation import few_in_powers_of_two
from efficientsam_hf.modeling_efficientsam import FEW_PROMPTS, EfficientSamMaskDecoderOutput
from efficientsam_hf.tiled_decoding_efficientsam import decode_tiled
from efficientsam_hf.training.finetuning import ALL, ONE, THREE, InteractiveSegmentation
from efficientsam_hf.training.recipes import RECIPES

MASKS = {"mask_prompts": True, "mask_input_channels": 4}
# Trained with six slots, so that in longer prompts a token stands for a share of one.
LONG = {"max_prompt_points": 12, "padded_prompt_points": 6, "negative_points": True}


@pytest.fixture(scope="module")
def wide() -> Tensor:
    """Pictures whose height is not their width, (2, 3, 48, 64)."""
    return torch.randn(2, 3, 48, 64, generator=generator(), dtype=torch.float64)


def results(model: EfficientSamModel, decode, pixels: Tensor, asked: dict[str, Tensor], chosen: slice) -> list[Tensor]:
    """Masks, predicted IoU, and the gradients of all parameters."""
    model.zero_grad()
    inputs = model.get_decoder_inputs(model.get_image_embeddings(pixels), **asked)
    decoded = decode(**inputs, chosen=chosen)
    if isinstance(decoded, tuple):
        decoded = EfficientSamMaskDecoderOutput(*decoded)
    (decoded.pred_masks.square().mean() + decoded.iou_scores.square().mean()).backward()
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
        # To the model's own way this bias says nothing; to the other one it does, and then is nothing but rounding.
        if not name.endswith("token_to_image.k_proj.bias")
    }
    return [decoded.pred_masks, decoded.iou_scores, *gradients.values()]


@pytest.mark.parametrize("chosen", [ONE, THREE, ALL], ids=["one", "three", "all"])
@pytest.mark.parametrize(
    ("config", "points", "masks"),
    [
        (tiny_config(), 2, False),
        (tiny_config(), 6, False),
        (tiny_config(**MASKS), 2, False),
        (tiny_config(**MASKS), 2, True),
        (tiny_config(**LONG), 9, False),
        (tiny_config(**LONG, **MASKS), 9, True),
        (detail_config(), 2, False),
        (detail_config(**MASKS), 2, True),
    ],
    ids=["plain", "full", "no mask", "mask", "long", "long, mask", "details", "details, mask"],
)
def test_answers_and_gradients_are_the_models_own(config, points, masks, chosen, wide):
    model = make_model(config).double()
    asked = prompts(points, generator(1))
    if config.prompt_encoder_config.max_prompt_points == 12:
        asked["input_labels"][:, 0, 3:], asked["input_points"][:, 0, 3:] = -1, -1
    if masks:
        asked["input_masks"] = torch.randn(2, 3, 12, 16, generator=generator(2), dtype=torch.float64)
    own = results(model, model.mask_decoder, wide, asked, chosen)
    tiled = results(model, lambda **inputs: decode_tiled(model.mask_decoder, **inputs), wide, asked, chosen)
    assert tiled[0].shape == (2, 3, len(range(4)[chosen]), 12, 16)
    # The model's own way has its softmax and its norms in float32.
    assert_close(tiled, own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_loses_as_much_either_way(recipe, wide):
    abilities = {"negative_points": True, **MASKS, "max_prompt_points": 12} if recipe != "paper" else {}
    model, losses = make_model(tiny_config(**abilities)).double(), []
    if recipe == "sam":
        model.config.mask_decoder_config.single_mask_token = True
    labels = torch.zeros(2, 3, 12, 16)
    labels[:, 0, 2:7, 3:9] = labels[:, 1, 5:, 8:] = labels[:, 2, :3] = 1
    for tiles in (True, False):
        task = InteractiveSegmentation(model, RECIPES[recipe])
        task.tiles = lambda *_, tiles=tiles: tiles
        losses.append(task(wide, labels, generator()))
    assert_close(*losses)


def test_images_are_written_out_where_arithmetic_is_cheap_or_each_prompt_has_its_own(model):
    task, embeddings = InteractiveSegmentation(model), torch.zeros(1, 16, 4, 4)
    assert not task.tiles(embeddings, {"input_points": torch.zeros(1, 1, 1, 2)})
    assert task.tiles(embeddings, {"input_masks": torch.zeros(1, 1, 16, 16)})
    assert task.tiles(embeddings.to("meta"), {"input_points": torch.zeros(1, 1, 1, 2)})


@pytest.mark.parametrize("abilities", [{}, LONG, {**LONG, **MASKS}], ids=["plain", "long", "long, mask"])
def test_mixed_precision_changes_little(abilities, pixels):
    model = make_model(tiny_config(**abilities))
    asked = prompts(9 if abilities else 2, generator(1))
    if "mask_prompts" in abilities:
        asked["input_masks"] = torch.randn(2, 3, 16, 16, generator=generator(2))
    answers = []
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            inputs = model.get_decoder_inputs(model.get_image_embeddings(pixels), **asked)
            answers.append(decode_tiled(model.mask_decoder, **inputs, chosen=THREE)[1].float())
    assert (answers[0] - answers[1]).norm() < 0.1 * answers[1].norm()


def test_attention_is_dropped_while_learning_alone(wide):
    config = tiny_config()
    config.mask_decoder_config.attention_dropout = 0.5
    model = make_model(config).double()
    inputs = model.get_decoder_inputs(model.get_image_embeddings(wide), **prompts(2, generator(1)))
    one, again = (decode_tiled(model.mask_decoder, **inputs, chosen=THREE)[1] for _ in range(2))
    assert torch.equal(one, again)
    model.train()
    one, again = (decode_tiled(model.mask_decoder, **inputs, chosen=THREE)[1] for _ in range(2))
    assert not torch.allclose(one, again)


def test_the_model_writes_images_out_on_a_gpu_for_few_prompts(model):
    decoder = model.mask_decoder
    with torch.no_grad():
        few, many = (torch.zeros(1, count, 2, 16, device="meta") for count in (FEW_PROMPTS, FEW_PROMPTS + 1))
        assert decoder.writes_images_out(few)
        assert not decoder.writes_images_out(many)
        assert not decoder.writes_images_out(few[:, :0])
        assert not decoder.writes_images_out(few.new_zeros(few.shape, device="cpu"))
    # Whoever learns chooses for himself: this way knows no gradient checkpointing of blocks.
    assert not decoder.writes_images_out(few)


@pytest.mark.parametrize(
    "config", [tiny_config(), tiny_config(**MASKS), detail_config()], ids=["plain", "mask", "details"]
)
def test_the_models_answers_are_the_same_either_way(config, wide, monkeypatch):
    model, asked = make_model(config).double(), prompts(2, generator(1))
    answers = []
    for written_out in (True, False):
        monkeypatch.setattr(type(model.mask_decoder), "writes_images_out", lambda *_, way=written_out: way)
        with torch.no_grad():
            answers.append(model(wide, **asked))
    assert_close(answers[0].pred_masks, answers[1].pred_masks, rtol=1e-4, atol=1e-5)
    assert_close(answers[0].iou_scores, answers[1].iou_scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("by_config", [False, True])
def test_attentions_come_from_the_models_own_way(by_config, wide, monkeypatch):
    model, asked = make_model(tiny_config()).double(), prompts(2, generator(1))
    monkeypatch.setattr(type(model.mask_decoder), "writes_images_out", lambda *_: True)
    wanted = {} if by_config else {"output_attentions": True}
    model.set_attn_implementation("eager")
    model.config.mask_decoder_config.output_attentions = by_config
    with torch.no_grad():
        assert len(model(wide, **asked, **wanted).mask_decoder_attentions) == 2


def test_a_compiled_model_answers_by_what_was_compiled(model, pixels, monkeypatch):
    asked, called = prompts(2, generator(1)), []

    def compiler(eager, **options):
        def compiled(*arguments, **inputs):
            called.append(eager.__name__)
            return eager(*arguments, **inputs)

        return compiled

    monkeypatch.setattr("efficientsam_hf.compilation.torch.compile", compiler)
    compiled = compile_model(deepcopy(model))
    for written_out, names in ((True, ["forward", "write_out"]), (False, ["forward", "look"])):
        monkeypatch.setattr(type(model.mask_decoder), "writes_images_out", lambda *_, way=written_out: way)
        called.clear()
        with torch.no_grad():
            assert_close(compiled(pixels, **asked).pred_masks, model(pixels, **asked).pred_masks)
        assert called == names


@pytest.mark.parametrize(("count", "seen"), [(1, 1), (2, 2), (3, 4), (4, 4)])
@pytest.mark.parametrize("abilities", [{}, {**LONG, **MASKS}], ids=["plain", "long, mask"])
def test_few_prompts_are_filled_up_and_cut_off(abilities, count, seen, wide):
    model, counts = make_model(tiny_config(**abilities)).double(), []
    asked = prompts(9 if abilities else 2, generator(1))
    asked = {name: value[:, :1].expand(-1, count, *value.shape[2:]).clone() for name, value in asked.items()}
    if abilities:
        asked["input_masks"] = torch.randn(2, count, 12, 16, generator=generator(2), dtype=torch.float64)
    with torch.no_grad():
        inputs = {**model.get_decoder_inputs(model.get_image_embeddings(wide), **asked), "chosen": THREE}
        wanted = model.mask_decoder.write_out(**inputs)

        def watched(**given):
            counts.append(given["prompts"].shape[1])
            return model.mask_decoder.write_out(**given)

        found = few_in_powers_of_two(watched, **inputs)
    assert counts == [seen]
    assert_close(found, wanted)
