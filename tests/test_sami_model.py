"""SAMI's laws: what is hidden stays hidden, what is visible goes round the decoder, and every weight learns."""

import pytest
import torch
from conftest import detail_config, make_model, tiny_config
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForPreTraining, PreTrainedModel

from efficientsam_hf import (
    MAE_BASELINE,
    EfficientSamForPreTraining,
    EfficientSamModel,
    EfficientSamSamiConfig,
    EfficientSamVisionModel,
)
from efficientsam_hf.modeling_efficientsam_sami import (
    join_patches,
    patch_pixels,
    reconstruction_loss,
    sines_and_cosines,
)


def sami_config(**fields) -> EfficientSamSamiConfig:
    """64 pixels in patches of 16, two layers each; 5 channels to guess."""
    decoder = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, **fields.pop("decoder_config", {})}
    vision = {**tiny_config().vision_config.to_dict(), **fields.pop("vision_config", {})}
    return EfficientSamSamiConfig(
        **{"vision_config": vision, "decoder_config": decoder, "target_channels": 5, **fields}
    )


def make_sami(seed: int = 0, **fields) -> EfficientSamForPreTraining:
    """With weights large enough that every part shows in the output."""
    torch.manual_seed(seed)
    model = EfficientSamForPreTraining(sami_config(**fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "position" not in name:
                parameter.normal_(std=0.3)
    return model.eval()


@pytest.fixture
def features() -> Tensor:
    return torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def noise() -> Tensor:
    return torch.rand(2, 16, generator=torch.Generator().manual_seed(3))


MAE = {**MAE_BASELINE}
BOTH = pytest.mark.parametrize("fields", [{}, {"decoder_config": {"attention": "self"}}], ids=["cross", "self"])


@BOTH
def test_shapes_and_the_share_that_is_hidden(fields, pixels, features, noise):
    outputs = make_sami(**fields)(pixels, features, noise=noise)
    assert outputs.prediction.shape == (2, 4, 4, 5)
    assert outputs.mask.sum((1, 2)).tolist() == [12, 12]
    assert torch.equal(outputs.order.sort(dim=1).values, torch.arange(16).expand(2, 16))
    assert outputs.loss.shape == ()
    assert not torch.equal(*outputs.mask)


def test_the_smallest_noise_is_seen(pixels, noise):
    mask = make_sami()(pixels, noise=noise).mask.flatten(1)
    assert (noise[~mask].view(2, 4).max(1).values < noise[mask].view(2, 12).min(1).values).all()


def test_noise_comes_from_the_generator(pixels):
    model = make_sami()
    first, again, other = (model(pixels, generator=torch.Generator().manual_seed(seed)).order for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@BOTH
def test_hidden_pixels_change_nothing(fields, pixels, noise):
    model = make_sami(**fields)
    before = model(pixels, noise=noise)
    hidden = before.mask.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None]
    after = model(torch.where(hidden, pixels + 5, pixels), noise=noise)
    assert torch.equal(before.prediction, after.prediction)
    seen = model(torch.where(hidden, pixels, pixels + 5), noise=noise)
    assert not torch.allclose(before.prediction, seen.prediction)


def test_visible_patches_go_round_the_cross_attention_decoder(pixels, noise):
    """Without any layer of the decoder the visible patches' prediction is the same, and the hidden ones' is not."""
    model = make_sami()
    whole = model(pixels, noise=noise)
    model.decoder.layers = model.decoder.layers[:0]
    bare = model(pixels, noise=noise)
    assert torch.equal(whole.prediction[~whole.mask], bare.prediction[~whole.mask])
    assert not torch.allclose(whole.prediction[whole.mask], bare.prediction[whole.mask])


def test_what_goes_round_is_the_encoders_output_through_norms_and_linear_layers(pixels, noise):
    model = make_sami()
    outputs, decoder = model(pixels, noise=noise), model.decoder
    encoded = model.vision_encoder(pixels, outputs.order[:, :4]).last_hidden_state
    wanted = decoder.head(decoder.layer_norm(decoder.projection(decoder.encoder_norm(encoded))))
    places = outputs.order[:, :4, None]
    assert_close(outputs.prediction.flatten(1, 2).take_along_dim(places, dim=1), wanted)


@BOTH
def test_the_decoder_knows_where_the_visible_patches_are(fields, noise):
    decoder, order, encoded = make_sami(**fields).decoder, noise.argsort(dim=1), torch.randn(2, 4, 24)
    swapped = torch.cat([order[:, :4].flip(1), order[:, 4:]], dim=1)
    hidden = order[:, 4:, None]
    one, other = (decoder(encoded, places, (4, 4)).flatten(1, 2) for places in (order, swapped))
    assert not torch.allclose(one.take_along_dim(hidden, dim=1), other.take_along_dim(hidden, dim=1))


def test_the_plain_decoder_changes_visible_patches_too(pixels, noise):
    model = make_sami(decoder_config={"attention": "self"})
    whole = model(pixels, noise=noise)
    model.decoder.layers = model.decoder.layers[:0]
    bare = model(pixels, noise=noise)
    assert not torch.allclose(whole.prediction[~whole.mask], bare.prediction[~whole.mask])


def slow_cross_attention(layer, hidden: Tensor, visible: Tensor) -> Tensor:
    """One picture's hidden patches (M, D), one by one, head by head, as section 3.2 says."""
    attention, answers = layer.attention, []
    keys = torch.cat([visible, hidden])
    for patch in hidden:
        query = attention.q_proj(layer.layer_norm1(patch))
        heads = []
        for head in range(len(query) // attention.head_dim):
            part = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
            key = attention.k_proj(layer.layer_norm1(keys))[:, part]
            value = attention.v_proj(layer.layer_norm1(keys))[:, part]
            weights = torch.softmax(key @ query[part] / attention.head_dim**0.5, dim=0)
            heads.append(weights @ value)
        patch = patch + attention.out_proj(torch.cat(heads))
        answers.append(patch + layer.mlp(layer.layer_norm2(patch)))
    return torch.stack(answers)


def test_cross_attention_is_the_papers():
    layer = make_sami().decoder.layers[0]
    hidden, visible = torch.randn(2, 12, 16), torch.randn(2, 4, 16)
    wanted = torch.stack([slow_cross_attention(layer, *parts) for parts in zip(hidden, visible, strict=True)])
    assert_close(layer(hidden, visible), wanted, rtol=1e-4, atol=1e-4)


@BOTH
def test_the_whole_does_not_depend_on_the_order_of_equals(fields, pixels, noise):
    """Which of the visible patches has the smallest number is nothing; which are visible is all."""
    model = make_sami(**fields)
    rank = noise.argsort(dim=1).argsort(dim=1)
    shuffled = torch.where(rank < 4, 3 - rank, 19 - rank).float()
    before, after = model(pixels, noise=noise), model(pixels, noise=shuffled)
    assert not torch.equal(before.order, after.order)
    assert torch.equal(before.mask, after.mask)
    assert_close(before.prediction, after.prediction, rtol=1e-4, atol=1e-4)


def test_the_encoder_that_sees_everything_is_the_models_own(pixels):
    sami = make_sami()
    model = sami.to_efficientsam()
    everything = torch.arange(16).expand(2, 16)
    seen = sami.vision_encoder(pixels, everything).last_hidden_state.unflatten(1, (4, 4))
    wanted = model.vision_encoder(pixels, output_hidden_states=True).hidden_states[-1]
    assert_close(seen, wanted)


def test_to_efficientsam_gives_any_model_the_encoder(pixels):
    sami = make_sami()
    whole = sami.to_efficientsam()
    assert type(whole) is EfficientSamModel
    assert whole(pixels, input_boxes=torch.tensor([[[1.0, 2, 30, 40]]] * 2)).pred_masks.isfinite().all()
    vision = EfficientSamVisionModel(tiny_config().vision_config)
    neck = vision.vision_encoder.neck.conv1.weight.clone()
    assert sami.to_efficientsam(vision) is vision
    for name, value in sami.vision_encoder.state_dict().items():
        assert torch.equal(value, vision.vision_encoder.state_dict()[name])
    assert torch.equal(neck, vision.vision_encoder.neck.conv1.weight)


def test_to_efficientsam_refuses_another_encoder():
    config = tiny_config().vision_config
    config.num_hidden_layers = 3
    message = r"the encoders differ: layers\.2\.\S+ is None in the pretrained one, \(24,\) in the model"
    with pytest.raises(ValueError, match=message):
        make_sami().to_efficientsam(EfficientSamVisionModel(config))


def test_a_convolutional_stem_is_masked_after_it(pixels, noise):
    stem = {"stem_stages": [[3, 2, 1, 8, 1, 1], [3, 2, 2, 8, 1, 1], [3, 2, 2, 8, 1, 1]], "stem_channels": 4}
    sami = make_sami(vision_config=stem)
    assert sami(pixels, noise=noise).prediction.isfinite().all()
    assert sami.to_efficientsam().config.vision_config.stem_channels == 4


def test_windows_are_kept_for_later_and_not_used_now(pixels, noise):
    plain, windowed = make_sami(), make_sami(vision_config={"window_size": 2})
    assert torch.equal(plain(pixels, noise=noise).prediction, windowed(pixels, noise=noise).prediction)
    assert windowed.to_efficientsam().vision_encoder.layers[0].window_size == 2


# --------------------------------------------------------------------------------------------------------------------
# Loss


@pytest.mark.parametrize("kind", ["mse", "cosine"])
@pytest.mark.parametrize("on_visible", [True, False])
def test_loss_against_a_slow_one(kind, on_visible, pixels, features, noise):
    outputs = make_sami(loss=kind, loss_on_visible=on_visible)(pixels, features, noise=noise)
    errors = []
    for image, row, column in torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(4)).tolist():
        guess, wanted = outputs.prediction[image, row, column], features[image, :, row, column]
        if on_visible or outputs.mask[image, row, column]:
            cosine = guess @ wanted / (guess.norm() * wanted.norm())
            errors.append(1 - cosine if kind == "cosine" else ((guess - wanted) ** 2).mean())
    assert len(errors) == (32 if on_visible else 24)
    assert_close(outputs.loss, torch.stack(errors).mean())


def test_a_right_guess_costs_nothing():
    targets = torch.randn(1, 2, 2, 3)
    counted = torch.ones(1, 2, 2, dtype=torch.bool)
    assert reconstruction_loss(targets, targets, counted, "mse") == 0
    assert_close(reconstruction_loss(3 * targets, targets, counted, "cosine"), torch.tensor(0.0))


def test_mae_guesses_normalised_pixels_of_hidden_patches(pixels, noise):
    model = make_sami(**MAE)
    outputs = model(pixels, noise=noise)
    image, row, column = outputs.mask.nonzero()[5].tolist()
    patch = pixels[image, :, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16].permute(1, 2, 0).flatten()
    wanted = (patch - patch.mean()) / patch.std(correction=0)
    targets = model.get_targets(pixels, None, (4, 4))
    assert_close(targets[image, row, column], wanted, rtol=1e-4, atol=1e-4)
    assert_close(outputs.loss, (outputs.prediction - targets)[outputs.mask].square().mean())


def test_patches_come_back():
    pictures = torch.randn(2, 3, 32, 48)
    assert torch.equal(join_patches(patch_pixels(pictures, 16), 16), pictures)


def test_every_weight_learns(pixels, features, noise):
    for fields, target in (({}, features), (MAE, None)):
        model = make_sami(**fields).train()
        model(pixels, target, noise=noise).loss.backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_a_few_steps_overfit_one_batch(pixels, features, noise):
    torch.manual_seed(0)
    model = EfficientSamForPreTraining(sami_config()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(100):
        loss = model(pixels, features, noise=noise).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


# --------------------------------------------------------------------------------------------------------------------
# A transformers model like the others


def test_positions_start_as_sines_and_cosines():
    table = EfficientSamForPreTraining(sami_config()).vision_encoder.embeddings.position_embedding
    assert (table[:, 0] == 0).all()
    assert torch.equal(table[0, 1:].unflatten(0, (4, 4)), sines_and_cosines(4, 4, 24))
    grid = sines_and_cosines(3, 5, 8)
    assert torch.equal(grid[0, 2, :4], grid[1, 2, :4])
    assert torch.equal(grid[1, 0, 4:], grid[1, 4, 4:])
    column, row = torch.tensor([2.0, 0.02]), torch.tensor([1.0, 0.01])
    assert_close(grid[1, 2], torch.cat([column.sin(), column.cos(), row.sin(), row.cos()]))


def test_saved_loaded_and_found_by_the_auto_classes(tmp_path, pixels, features, noise):
    model = make_sami(mask_ratio=0.5)
    with torch.no_grad():
        model.vision_encoder.embeddings.position_embedding.add_(1)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "modeling_efficientsam_sami.py").is_file()
    assert type(AutoConfig.from_pretrained(tmp_path)) is EfficientSamSamiConfig
    loaded = AutoModelForPreTraining.from_pretrained(tmp_path)
    assert type(loaded) is EfficientSamForPreTraining
    assert loaded.config.mask_ratio == 0.5
    one, other = model(pixels, features, noise=noise), loaded(pixels, features, noise=noise)
    assert torch.equal(one.loss, other.loss)
    assert torch.equal(one.prediction, other.prediction)


@BOTH
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_and_checkpointing_change_nothing(fields, implementation, pixels, features, noise):
    model = make_sami(**fields).train()
    model.set_attn_implementation("eager")
    model(pixels, features, noise=noise).loss.backward()
    wanted = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.set_attn_implementation(implementation)
    used = {part.config._attn_implementation for part in (model.vision_encoder, model.decoder)}
    assert used == {implementation}
    model.gradient_checkpointing_enable()
    model.zero_grad()
    model(pixels, features, noise=noise).loss.backward()
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-5)


def test_captured_outputs_and_tuples(pixels, features, noise):
    model = make_sami()
    model.set_attn_implementation("eager")
    outputs = model(pixels, noise=noise, output_hidden_states=True, output_attentions=True)
    assert [tuple(state.shape) for state in outputs.hidden_states] == [(2, 1, 4, 24)] * 3
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(2, 2, 4, 4)] * 2
    assert outputs.loss is None
    loss, prediction, *_ = model(pixels, features, noise=noise, return_dict=False)
    assert torch.equal(prediction, outputs.prediction)
    assert loss.isfinite()


def test_half_precision_and_other_sizes(features, noise):
    model = make_sami().to(torch.bfloat16)
    outputs = model(torch.randn(2, 3, 64, 64), features, noise=noise)
    assert outputs.prediction.dtype == torch.bfloat16
    assert outputs.loss.dtype == torch.float32
    assert make_sami()(torch.randn(1, 3, 32, 96)).prediction.shape == (1, 2, 6, 5)


@pytest.mark.slow
def test_compiles_without_a_break(pixels, features, noise):
    model = make_sami()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert_close(compiled(pixels, features, noise=noise).loss, model(pixels, features, noise=noise).loss)


def test_trains_with_what_transformers_needs_to_know():
    model = make_sami()
    assert isinstance(model, PreTrainedModel)
    assert model.get_input_embeddings() is model.vision_encoder.embeddings.patch_embedding
    kinds = {type(module).__name__ for module in model.modules()}
    assert set(EfficientSamForPreTraining._no_split_modules) <= kinds
    # Of the parts' lists, too, only what is there: Accelerate's FSDP refuses the rest.
    assert model._no_split_modules == set(EfficientSamForPreTraining._no_split_modules)
    whole = make_model(tiny_config())
    assert whole._no_split_modules == {"EfficientSamVisionLayer", "EfficientSamMaskDecoder"}


# --------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("inputs", "fields", "message"),
    [
        ({"noise": torch.rand(2, 9)}, {}, r"noise must be \(2, 16\), a number a patch; got \(2, 9\)"),
        ({"target_features": torch.rand(2, 5, 2, 2)}, {}, r"must be \(2, 5, 4, 4\), got \(2, 5, 2, 2\)"),
        ({"target_features": torch.rand(2, 5, 4, 4)}, MAE, "got target_features for a model that guesses pixels"),
    ],
)
def test_bad_input_names_what_was_found_and_what_was_wanted(pixels, inputs, fields, message):
    with pytest.raises(ValueError, match=message):
        make_sami(**fields)(pixels, **inputs)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mask_ratio": 1.0}, "mask_ratio must be between 0 and 1, got 1.0"),
        ({"decoder_config": {"hidden_size": 18}}, r"decoder_config\.hidden_size must be a multiple of 4 .* got 18"),
        ({"loss": "l1"}, "l1"),
        ({"decoder_config": {"attention": "none"}}, "none"),
    ],
)
def test_bad_configs_are_refused(fields, message):
    with pytest.raises(Exception, match=message):
        sami_config(**fields)


def test_layers_are_skipped_as_the_config_says():
    model = make_sami(vision_config={"drop_path_rate": 0.5}).train()
    assert [layer.drop_path_rate for layer in model.vision_encoder.layers] == [0, 0.5]
    assert not any(layer.window_size for layer in model.vision_encoder.layers)


def test_no_weight_of_a_stem_with_details_waits_for_a_gradient():
    """Several processes that train together would wait for it."""
    vision = detail_config().vision_config.to_dict()
    model = make_sami(vision_config=vision)
    pictures = torch.randn(2, 3, 64, 64)
    model(pictures, torch.randn(2, 5, 4, 4)).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
