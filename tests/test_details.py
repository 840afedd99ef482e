"""Details of a stem in the mask decoder: where they come from, where they land, and that they start as nothing."""

from itertools import product

import pytest
import torch
from conftest import detail_config, make_model, stem_config
from torch.testing import assert_close

from efficientsam_hf import EfficientSamConfig, EfficientSamModel, modeling_efficientsam
from efficientsam_hf.export.graphs import trace
from efficientsam_hf.training.extension import with_details

POINTS = torch.tensor([[[[20.0, 30.0]], [[50.0, 9.0]]]])


@pytest.fixture
def model() -> EfficientSamModel:
    return make_model(detail_config())


def test_a_model_that_gains_details_answers_as_before(tmp_path, pixels):
    before = make_model(stem_config())
    before.save_pretrained(tmp_path)
    config = with_details(before.config)
    assert config.vision_config.detail_channels == detail_config().vision_config.detail_channels
    assert not before.config.vision_config.detail_channels, "what is given stays as it is"
    after = EfficientSamModel.from_pretrained(tmp_path, config=config)
    points = POINTS.expand(2, -1, -1, -1)
    assert_close(after(pixels, input_points=points).pred_masks, before(pixels, input_points=points).pred_masks)


def test_they_are_the_stems_features_at_strides_8_and_4(model, pixels):
    stem, features = model.vision_encoder.embeddings.patch_embedding, {}
    for number, block in enumerate(stem.blocks):
        block.register_forward_hook(lambda _, __, output, number=number: features.update({number: output}))
    embeddings = model.get_image_embeddings(pixels)
    assert embeddings.shape == (2, model.config.vision_config.embedding_channels, 4, 4)
    coarse, fine = embeddings[:, 16:].split([4 * 8, 16 * 4], dim=1)
    coarse, fine = coarse.unflatten(1, (2, 2, 8)), fine.unflatten(1, (2, 2, 2, 2, 4))
    wanted = stem.details.coarse(features[2])
    for y, x in product(range(2), repeat=2):
        assert_close(coarse[:, y, x], wanted[:, :, y::2, x::2])
    wanted = stem.details.fine(features[0])
    for y, x, lower, right in product(range(2), repeat=4):
        assert_close(fine[:, y, x, lower, right], wanted[:, :, 2 * y + lower :: 4, 2 * x + right :: 4])


def test_the_decoder_adds_them_as_sam_2_does(model, pixels, monkeypatch):
    """Against the upscaling written out over whole pictures, each prompt's by itself."""
    stem, decoder, features = model.vision_encoder.embeddings.patch_embedding, model.mask_decoder, {}
    for name in ("coarse", "fine"):
        getattr(stem.details, name).register_forward_hook(lambda _, __, out, name=name: features.update({name: out}))
    inputs = model.get_decoder_inputs(model.get_image_embeddings(pixels), POINTS.expand(2, -1, -1, -1))
    prepared = decoder.prepare(inputs["image_embeddings"], inputs["image_positions"], inputs["dense"])
    tokens, image = decoder.look(prepared, inputs["prompts"], inputs["last_stands_for"])
    tokens = decoder.last_look(tokens, image, prepared, [2, 3, 4])
    drawn = decoder.draw_masks(tokens, image, prepared, slice(1, None))
    # Details come channel by channel; cells in that layout made the enlargements several times slower.
    with torch.no_grad():
        assert image.written_out(prepared.upscaling).is_contiguous()
    last_terms = decoder.transformer.prepare(
        inputs["image_embeddings"][:, :16].flatten(2).transpose(1, 2)
        + (0 if inputs["dense"] is None else inputs["dense"]),
        inputs["image_positions"],
    )[1]
    pictures = image.written_out(last_terms).transpose(1, 2).unflatten(2, (4, 4))
    coarse, fine = (features[name].repeat_interleave(2, dim=0) for name in ("coarse", "fine"))
    halves = decoder.activation(decoder.upscale_norm(decoder.upscale_conv1(pictures) + coarse))
    quarters = decoder.activation(decoder.upscale_conv2(halves) + fine)
    filters = decoder.mask_weights(tokens, slice(1, None)).flatten(0, 1)
    wanted = torch.einsum("nmc,nchw->nmhw", filters, quarters).unflatten(0, (2, 2))
    assert_close(drawn / wanted.std(), wanted / wanted.std(), rtol=1e-5, atol=1e-5)
    # A few cells at a time, as a CPU draws them without gradients.
    monkeypatch.setattr(modeling_efficientsam, "DRAWN_CELLS", 3)
    with torch.no_grad():
        assert_close(decoder.draw_masks(tokens, image, prepared, slice(1, None)), drawn)


@pytest.mark.parametrize("mask_prompts", [False, True])
def test_prompts_and_pictures_stay_apart(mask_prompts, pixels):
    model = make_model(detail_config(mask_prompts=mask_prompts))
    prompts = {"input_points": torch.cat([POINTS, POINTS.flip(1)])}
    if mask_prompts:
        prompts["input_masks"] = torch.randn(2, 2, 16, 16)
    together = model(pixels, **prompts).pred_masks
    for picture, prompt in product(range(2), repeat=2):
        one = {name: part[picture, prompt][None, None] for name, part in prompts.items()}
        alone = model(pixels[picture][None], **one).pred_masks
        assert_close(together[picture, prompt][None, None], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_exported_graphs_take_them_along(model, pixels):
    graphs = trace(model)
    embeddings = graphs["vision_encoder"].program.module()(pixels)
    answer = model(pixels, input_points=POINTS.expand(2, -1, -1, -1))
    labels = torch.ones(2, 2, 1, dtype=torch.int64)
    found = graphs["mask_decoder"].program.module()(embeddings, POINTS.expand(2, -1, -1, -1), labels)
    assert_close(embeddings, answer.image_embeddings, rtol=1e-4, atol=1e-5)
    assert_close(found[1], answer.pred_masks, rtol=1e-4, atol=1e-4)


def test_a_model_of_patches_has_no_details_to_give():
    with pytest.raises(Exception, match="got \\[32, 16\\] for a stem of strides \\[\\]"):
        with_details(EfficientSamConfig(mask_decoder_config={"upscaling_channels": [32, 16]}))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"detail_channels": [8, 4]}, "got \\[8, 4\\] for a stem of strides \\[\\]"),
        (
            {"patch_size": 8, "stem_stages": [[3, 2, 1, 4, 1, 1], [3, 2, 1, 4, 1, 1]], "detail_channels": [8, 4]},
            "strides \\[4, 8\\]",
        ),
        ({"stem_stages": [[3, 4, 1, 4, 1, 1], [3, 2, 1, 4, 1, 1]], "detail_channels": [8, 4]}, "strides \\[8, 16\\]"),
    ],
    ids=["no stem", "no stride 16", "no stride 4"],
)
def test_details_want_a_stem_that_has_them(fields, words):
    with pytest.raises(Exception, match=words):
        EfficientSamConfig(vision_config=fields)


def test_they_have_the_decoders_widths():
    fields = stem_config().to_dict()
    fields["vision_config"]["detail_channels"] = [8, 8]
    with pytest.raises(ValueError, match=r"upscaling_channels \[8, 4\], got \[8, 8\]"):
        EfficientSamConfig(**fields)
