import re

import pytest
import torch
from conftest import detail_config, make_model, stem_config, tiny_config
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from efficientsam_hf import (
    EfficientSamForImageClassification,
    EfficientSamForPreTraining,
    EfficientSamModel,
    EfficientSamSamiConfig,
    EfficientSamVisionModel,
)
from efficientsam_hf.modeling_efficientsam import join_windows, partition_windows

POINTS = torch.tensor([[[[10.0, 20.0]], [[40.0, 50.0]]], [[[5.0, 60.0]], [[33.0, 7.0]]]])
BOXES = torch.tensor(
    [[[4.0, 8.0, 30.0, 40.0], [1.0, 2.0, 60.0, 50.0]], [[20.0, 8.0, 60.0, 61.0], [9.0, 9.0, 30.0, 31.0]]]
)


@pytest.fixture(params=[tiny_config, stem_config, detail_config], ids=["patches", "stem", "details"])
def model(request: pytest.FixtureRequest) -> EfficientSamModel:
    return make_model(request.param())


def same(left, right, **tolerance):
    assert_close(left.pred_masks, right.pred_masks, **tolerance)
    assert_close(left.iou_scores, right.iou_scores, **tolerance)


def test_shapes(model, pixels):
    outputs = model(pixels, input_points=POINTS)
    assert outputs.pred_masks.shape == (2, 2, 3, 16, 16)
    assert outputs.iou_scores.shape == (2, 2, 3)
    assert outputs.image_embeddings.shape == (2, model.config.vision_config.embedding_channels, 4, 4)
    assert outputs.loss is None


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("prompts", [{"input_boxes": torch.zeros(2, 0, 4)}, {"input_points": torch.zeros(2, 0, 1, 2)}])
def test_no_object_has_no_masks(model, pixels, prompts, multimask, gradients):
    """As where a detector found nothing."""
    with torch.set_grad_enabled(gradients):
        outputs = model(pixels, **prompts, multimask_output=multimask)
    assert outputs.pred_masks.shape == (2, 0, 3 if multimask else 1, 16, 16)
    assert outputs.iou_scores.shape == (2, 0, 3 if multimask else 1)


def test_embeddings_path_equals_pixels_path(model, pixels):
    embeddings = model.get_image_embeddings(pixels)
    same(model(image_embeddings=embeddings, input_points=POINTS), model(pixels, input_points=POINTS))


def test_a_prompt_does_not_feel_its_neighbours(model, pixels):
    among = model(pixels, input_points=POINTS)
    alone = model(pixels, input_points=POINTS[:, :1])
    assert_close(among.pred_masks[:, :1], alone.pred_masks)


def test_an_image_does_not_feel_its_neighbours(model, pixels):
    among = model(pixels, input_points=POINTS)
    alone = model(pixels[1:], input_points=POINTS[1:])
    assert_close(among.pred_masks[1:], alone.pred_masks)


def test_padding_is_exact(model, pixels):
    """Empty slots hold the trained "no point" token anyway, so that padding by hand changes nothing but rounding."""
    padded = torch.cat([POINTS, torch.full((2, 2, 3, 2), 17.0)], dim=2)
    labels = torch.tensor([1, -1, -1, -1]).expand(2, 2, 4)
    same(
        model(pixels, input_points=padded, input_labels=labels),
        model(pixels, input_points=POINTS),
        rtol=0,
        atol=1e-5,
    )


def test_a_box_is_its_two_corners(model, pixels):
    corners = BOXES.unflatten(-1, (2, 2))
    same(
        model(pixels, input_boxes=BOXES),
        model(pixels, input_points=corners, input_labels=torch.tensor([2, 3]).expand(2, 2, 2)),
    )


def test_a_padded_box_is_no_box(model, pixels):
    none = torch.full((2, 2, 4), -1.0)
    same(model(pixels, input_points=POINTS, input_boxes=none), model(pixels, input_points=POINTS))


def test_points_and_boxes_together_differ_from_either(model, pixels):
    both = model(pixels, input_points=POINTS, input_boxes=BOXES).pred_masks
    assert not torch.allclose(both, model(pixels, input_points=POINTS).pred_masks)
    assert not torch.allclose(both, model(pixels, input_boxes=BOXES).pred_masks)


def test_prompts_of_different_kinds_share_a_batch_though_together_they_would_not_fit(model, pixels):
    """Six clicks for one object and a box for the other: eight columns, but no prompt has more than six slots."""
    clicks = torch.rand(2, 1, 6, 2) * 64
    points = torch.cat([clicks, torch.full((2, 1, 6, 2), -1.0)], dim=1)
    labels = torch.cat([torch.ones(2, 1, 6), torch.full((2, 1, 6), -1)], dim=1)
    boxes = torch.cat([torch.full((2, 1, 4), -1.0), BOXES[:, 1:]], dim=1)
    both = model(pixels, input_points=points, input_labels=labels, input_boxes=boxes)
    assert_close(both.pred_masks[:, :1], model(pixels, input_points=clicks).pred_masks)
    assert_close(both.pred_masks[:, 1:], model(pixels, input_boxes=BOXES[:, 1:]).pred_masks)
    boxes[:, 0] = BOXES[:, 0]
    with pytest.raises(ValueError, match=r"a prompt has 6 slots .* got 8"):
        model(pixels, input_points=points, input_labels=labels, input_boxes=boxes)


def test_order_of_points_does_not_matter(model, pixels):
    two = torch.cat([POINTS, POINTS.flip(1)], dim=2)
    same(model(pixels, input_points=two), model(pixels, input_points=two.flip(2)), rtol=1e-4, atol=1e-4)


def test_background_points_need_a_config_that_learnt_them(pixels):
    background = torch.zeros(2, 2, 1, dtype=torch.long)
    silent = make_model(tiny_config())
    taught = make_model(tiny_config(negative_points=True))
    state = {name: tensor for name, tensor in taught.state_dict().items() if name != "prompt_encoder.background"}
    silent.load_state_dict(state)
    foreground = taught(pixels, input_points=POINTS)
    same(foreground, silent(pixels, input_points=POINTS))
    clicked_off = taught(pixels, input_points=POINTS, input_labels=background)
    untyped = silent(pixels, input_points=POINTS, input_labels=background)
    assert not torch.allclose(clicked_off.pred_masks, untyped.pred_masks)
    with torch.no_grad():
        taught.prompt_encoder.background.zero_()
    same(taught(pixels, input_points=POINTS, input_labels=background), untyped)


def test_mask_prompts_need_a_config_that_learnt_them(model, pixels):
    masks = torch.randn(2, 2, 16, 16)
    with pytest.raises(ValueError, match="never learnt mask prompts"):
        model(pixels, input_points=POINTS, input_masks=masks)
    taught = make_model(tiny_config(mask_prompts=True))
    without = taught(pixels, input_points=POINTS).pred_masks
    assert not torch.allclose(taught(pixels, input_points=POINTS, input_masks=masks).pred_masks, without)
    assert taught(pixels, input_masks=masks).pred_masks.shape == (2, 2, 3, 16, 16)


def test_single_mask_is_the_best_of_three_unless_token_0_was_trained(model, pixels):
    three = model(pixels, input_points=POINTS)
    single = model(pixels, input_points=POINTS, multimask_output=False)
    assert_close(single.iou_scores[..., 0], three.iou_scores.max(-1).values)
    best = three.iou_scores.argmax(-1)
    assert_close(single.pred_masks[1, 0, 0], three.pred_masks[1, 0, best[1, 0]])
    model.config.mask_decoder_config.single_mask_token = True
    token0 = model(pixels, input_points=POINTS, multimask_output=False)
    assert token0.pred_masks.shape == (2, 2, 1, 16, 16)
    assert not torch.allclose(token0.pred_masks, single.pred_masks)


@pytest.mark.parametrize("implementation", ["sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)])
def test_attention_implementations_agree(model, pixels, implementation):
    with torch.no_grad():
        model.set_attn_implementation("eager")
        eager = model(pixels, input_points=POINTS)
        model.set_attn_implementation(implementation)
        same(model(pixels, input_points=POINTS), eager, rtol=1e-4, atol=1e-4)


def test_captured_outputs(model, pixels):
    model.set_attn_implementation("eager")
    outputs = model(pixels, input_points=POINTS, output_hidden_states=True, output_attentions=True)
    assert [tuple(state.shape) for state in outputs.vision_hidden_states] == [(2, 4, 4, 24)] * 3
    assert [tuple(weights.shape) for weights in outputs.vision_attentions] == [(2, 2, 16, 16)] * 2
    assert [tuple(weights.shape) for weights in outputs.mask_decoder_attentions] == [(4, 2, 7, 16)] * 2
    assert_close(outputs.vision_attentions[0].sum(-1), torch.ones(2, 2, 16))
    assert model(pixels, input_points=POINTS).vision_hidden_states is None


def test_tuple_output(model, pixels):
    scores, masks, embeddings = model(pixels, input_points=POINTS, return_dict=False)
    same_outputs = model(pixels, input_points=POINTS)
    assert_close(scores, same_outputs.iou_scores)
    assert_close(masks, same_outputs.pred_masks)
    assert_close(embeddings, same_outputs.image_embeddings)


@torch.no_grad()
def test_float64_answers_as_float32_does_saved_and_loaded_too(pixels, tmp_path):
    model = make_model(detail_config(mask_prompts=True))
    for inputs in ({"input_points": POINTS}, {"input_boxes": BOXES, "input_masks": torch.ones(2, 2, 16, 16)}):
        wanted = model.float()(pixels, **inputs)
        precise = model.double()(pixels.double(), **inputs)
        assert precise.pred_masks.dtype == torch.float64
        assert_close(precise.pred_masks.float(), wanted.pred_masks, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    loaded = EfficientSamModel.from_pretrained(tmp_path, dtype="auto")
    assert_close(loaded(pixels.double(), **inputs).pred_masks, precise.pred_masks)


def test_labels_give_a_loss_that_reaches_every_part(model, pixels):
    model.train()
    loss = model(pixels, input_points=POINTS, labels=torch.ones(2, 2, 16, 16)).loss
    loss.backward()
    untouched = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    # Mask token 0 is not asked for, so its network stays out; and a softmax does not see what shifts all scores alike.
    unseen = ("mask_decoder.hypernetworks.0.", "token_to_image.k_proj.bias")
    assert all(any(part in name for part in unseen) for name in untouched)
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.get_input_embeddings().parameters())
    assert model.prompt_encoder.foreground.grad.abs().sum() > 0


@pytest.mark.parametrize("make_config", [tiny_config, stem_config, detail_config])
def test_inputs_may_require_gradients_as_adapters_under_checkpointing_ask(make_config, pixels):
    config = make_config()
    sami = EfficientSamSamiConfig(vision_config=config.vision_config.to_dict())
    models = [make_model(config), EfficientSamVisionModel(config.vision_config), EfficientSamForPreTraining(sami)]
    for model in [*models, EfficientSamForImageClassification(config.vision_config)]:
        read = []
        model.requires_grad_(False).enable_input_require_grads()
        layer = model.vision_encoder.layers[0]
        layer.register_forward_pre_hook(lambda _, inputs, read=read: read.append(inputs[0]))
        model(pixels, **({"input_points": POINTS} if model is models[0] else {}))
        assert read[0].requires_grad


@pytest.mark.parametrize("options", [{"use_reentrant": True}, {"preserve_rng_state": True}])
def test_checkpointing_that_would_crash_in_the_decoder_is_refused(options, config):
    model = EfficientSamModel(config)
    with pytest.raises(ValueError, match="must have use_reentrant=False, got"):
        model.gradient_checkpointing_enable(options)
    assert not model.mask_decoder.transformer.blocks[0].gradient_checkpointing


def test_gradient_checkpointing_changes_nothing(model, pixels):
    model.train()
    gradients = []
    for switch in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        switch()
        model.zero_grad()
        model(pixels, input_points=POINTS).pred_masks.square().mean().backward()
        gradients.append(model.vision_encoder.layers[0].mlp.layers[0].weight.grad.clone())
    assert model.is_gradient_checkpointing
    assert_close(*gradients)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(model, pixels, dtype, tmp_path):
    model.save_pretrained(tmp_path)
    exact = model.shared_image_embedding.gaussian_matrix.clone()
    wanted = model(pixels, input_points=POINTS).pred_masks
    for half in (EfficientSamModel.from_pretrained(tmp_path, dtype=dtype), model.to(dtype)):
        assert torch.equal(half.shared_image_embedding.gaussian_matrix, exact)
        masks = half(pixels, input_points=POINTS, input_boxes=BOXES).pred_masks
        assert masks.dtype == dtype
        assert masks.isfinite().all()
        masks = half(pixels, input_points=POINTS).pred_masks.float()
        assert (masks - wanted).abs().mean() < 0.1 * wanted.std()


def test_positional_encodings_stay_exact_in_bfloat16(model):
    coordinates = torch.rand(100, 2)
    exact = model.shared_image_embedding(coordinates)
    half = model.to(torch.bfloat16)
    assert torch.equal(half.shared_image_embedding(coordinates), exact)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(half.shared_image_embedding(coordinates), exact)


def test_saved_and_loaded_through_the_meta_device(model, pixels, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = EfficientSamModel.from_pretrained(tmp_path)
    same(loaded(pixels, input_points=POINTS), model(pixels, input_points=POINTS), rtol=0, atol=0)
    with torch.device("meta"):
        assert EfficientSamModel(tiny_config()).shared_image_embedding.gaussian_matrix.is_meta


def test_vision_model_loads_from_a_whole_checkpoint(model, pixels, tmp_path):
    model.save_pretrained(tmp_path)
    vision = EfficientSamVisionModel.from_pretrained(tmp_path)
    assert_close(vision(pixels).last_hidden_state, model.get_image_embeddings(pixels))


def test_fresh_weights_are_finite_and_seeded(pixels):
    torch.manual_seed(3)
    first = EfficientSamModel(tiny_config(negative_points=True, mask_prompts=True)).eval()
    torch.manual_seed(3)
    second = EfficientSamModel(tiny_config(negative_points=True, mask_prompts=True)).eval()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert first.prompt_encoder.background.std() > 0.5
    assert first(pixels, input_points=POINTS).pred_masks.isfinite().all()


@pytest.mark.parametrize("side", [32, 96])
def test_other_picture_sizes_by_interpolated_positions(model, side):
    pixels = torch.randn(1, 3, side, side)
    outputs = model(pixels, input_points=POINTS[:1])
    assert outputs.pred_masks.shape == (1, 2, 3, side // 4, side // 4)
    relative = model.shared_image_embedding((POINTS[:1] + 0.5) / 64)
    moved = (POINTS[:1] + 0.5) / 64 * side - 0.5
    prompts = model.get_prompt_embeddings(moved, None, None, torch.tensor([side, side]))
    assert_close(prompts[:, :, :1] - model.prompt_encoder.foreground, relative, rtol=1e-4, atol=1e-4)


def test_oblong_pictures(model):
    outputs = model(torch.randn(1, 3, 32, 96), input_points=POINTS[:1])
    assert outputs.image_embeddings.shape == (1, model.config.vision_config.embedding_channels, 2, 6)
    assert outputs.pred_masks.shape == (1, 2, 3, 8, 24)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 9), (3, 17)])
def test_windows_come_back_where_they_were(height, width):
    grid = torch.randn(2, height, width, 5)
    windows = partition_windows(grid, 4)
    assert windows.shape[2:] == (16, 5)
    assert torch.equal(join_windows(windows, 4, height, width), grid)


def test_windows_keep_far_patches_apart():
    config = tiny_config()
    config.vision_config.window_size = 2
    pixels = torch.randn(1, 3, 64, 64)
    changed = pixels.clone()
    changed[..., 48:, 48:] += 1
    windowed = make_model(config).vision_encoder
    before, after = (windowed(image, output_hidden_states=True).hidden_states[-1] for image in (pixels, changed))
    assert torch.equal(before[:, :2], after[:, :2])
    assert not torch.equal(before[:, 2:, 2:], after[:, 2:, 2:])
    config.vision_config.global_attention_layers = (1,)
    everywhere = make_model(config).vision_encoder
    before, after = (everywhere(image, output_hidden_states=True).hidden_states[-1] for image in (pixels, changed))
    assert not torch.equal(before[:, :2], after[:, :2])


@pytest.mark.slow
def test_compiles_without_a_break(model, pixels):
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        same(
            compiled(pixels, input_points=POINTS, input_boxes=BOXES),
            model(pixels, input_points=POINTS, input_boxes=BOXES),
        )
        single = compiled(pixels, input_points=POINTS, multimask_output=False)
    assert single.pred_masks.shape[2] == 1


@pytest.mark.slow
@torch.no_grad()
@torch._dynamo.config.patch(fake_tensor_cache_enabled=False)  # which takes longer than tracing where sizes are names
def test_compiled_once_it_takes_other_numbers_of_pictures_and_prompts():
    config = tiny_config()
    config.vision_config.num_hidden_layers = config.mask_decoder_config.num_hidden_layers = 1  # all are traced alike
    model = make_model(config)
    torch.compiler.reset()
    compiled = torch.compile(model, dynamic=True, fullgraph=True, backend="eager")
    for pictures, prompts, clicks in ((2, 3, 2), (2, 5, 2), (3, 4, 4)):
        pixels, points = torch.randn(pictures, 3, 64, 64), 64 * torch.rand(pictures, prompts, clicks, 2)
        same(compiled(pixels, input_points=points), model(pixels, input_points=points))
    with pytest.raises(RuntimeError, match=r"a prompt has 6 slots .* got more"):
        compiled(pixels, input_points=64 * torch.rand(3, 4, 7, 2))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "either pixel_values or image_embeddings, got neither"),
        ({"pixel_values": torch.zeros(1, 3, 64, 64), "image_embeddings": torch.zeros(1, 16, 4, 4)}, "got both"),
        ({"pixel_values": torch.zeros(1, 3, 60, 64)}, r"multiples of 16, got \(1, 3, 60, 64\)"),
        ({"pixel_values": torch.zeros(1, 3, 64, 64)}, "got no prompt"),
        (
            {"pixel_values": torch.zeros(1, 3, 64, 64), "input_points": torch.zeros(1, 1, 2)},
            r"input_points must be \(1, \*, \*, 2\), got \(1, 1, 2\)",
        ),
        (
            {"pixel_values": torch.zeros(1, 3, 64, 64), "input_points": torch.zeros(2, 1, 1, 2)},
            r"input_points must be \(1, \*, \*, 2\), got \(2, 1, 1, 2\)",
        ),
        (
            {"pixel_values": torch.zeros(1, 3, 64, 64), "input_boxes": torch.zeros(1, 4)},
            r"input_boxes must be \(1, \*, 4\), got \(1, 4\)",
        ),
        ({"pixel_values": torch.zeros(1, 3, 64, 64), "input_points": torch.zeros(1, 1, 7, 2)}, "6 slots .* got 7"),
        (
            {
                "pixel_values": torch.zeros(1, 3, 64, 64),
                "input_points": torch.zeros(1, 1, 2, 2),
                "input_labels": torch.ones(1, 1, 3),
            },
            "every point needs a label",
        ),
    ],
)
def test_bad_input_names_what_was_found_and_what_was_wanted(model, inputs, message):
    with pytest.raises(ValueError, match=message):
        model(**inputs)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_boxes": BOXES[:, :1]}, r"input_boxes must be \(2, 2, 4\), got \(2, 1, 4\)"),
        ({"input_masks": torch.zeros(2, 1, 16, 16)}, r"input_masks must be \(2, 2, 16, 16\), got \(2, 1, 16, 16\)"),
        ({"input_masks": torch.zeros(2, 3, 16, 16)}, r"input_masks must be \(2, 2, 16, 16\), got \(2, 3, 16, 16\)"),
        ({"labels": torch.ones(2, 1, 16, 16)}, r"labels must be \(2, 2, h, w\), got \(2, 1, 16, 16\)"),
        ({"labels": torch.ones(1, 2, 16, 16)}, r"labels must be \(2, 2, h, w\), got \(1, 2, 16, 16\)"),
        ({"labels": torch.ones(2, 16, 16)}, r"labels must be \(2, 2, h, w\), got \(2, 16, 16\)"),
        (
            {"image_embeddings": torch.zeros(2, 17, 4, 4), "pixel_values": None},
            r"image_embeddings must be \(\*, 16, \*, \*\), got \(2, 17, 4, 4\)",
        ),
        ({"pixel_values": torch.zeros(2, 4, 64, 64)}, r"must be \(B, 3, H, W\) .* got \(2, 4, 64, 64\)"),
    ],
)
def test_what_belongs_together_has_the_same_pictures_and_prompts(inputs, message, pixels):
    model = make_model(tiny_config(mask_prompts=True))
    with pytest.raises(ValueError, match=message):
        model(**{"pixel_values": pixels, "input_points": POINTS, **inputs})


def attend(attention, query, key, value):
    """The decoder's attention written out, everything projected: (N, T, C), (N, S, C), (N, S, C) -> (N, T, C)."""
    parts = ((attention.q_proj, query), (attention.k_proj, key), (attention.v_proj, value))
    query, key, value = (attention.split_heads(project(tokens)) for project, tokens in parts)
    weights = (query @ key.transpose(-2, -1) * attention.scaling).softmax(-1)
    return attention.out_proj(attention.join_heads(weights @ value))


@torch.no_grad()
def test_images_that_are_never_written_out_are_those_that_would_be(model):
    """Three prompts of each of two pictures, against each with an image of its own; every weight drawn large."""
    decoder, transformer = model.mask_decoder, model.mask_decoder.transformer
    for parameter in decoder.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())) / 3)
    generator = torch.Generator().manual_seed(1)
    image, positions = torch.randn(2, 16, 16, generator=generator), torch.randn(16, 16, generator=generator)
    first = tokens = positions_of_tokens = torch.randn(2, 3, 5, 16, generator=generator)
    prepared, terms = transformer.prepare(image, positions)
    found, images = transformer(tokens, torch.zeros(5), prepared)

    image, tokens, first = image.repeat_interleave(3, 0), tokens.flatten(0, 1), first.flatten(0, 1)
    for block in transformer.blocks:
        tokens = tokens if block.is_first else tokens + first
        tokens = block.layer_norm1(tokens + attend(block.self_attention, tokens, tokens, tokens))
        tokens = block.layer_norm2(tokens + attend(block.token_to_image, tokens + first, image + positions, image))
        tokens = block.layer_norm3(tokens + block.mlp(tokens))
        image = block.layer_norm4(image + attend(block.image_to_token, image + positions, tokens + first, tokens))
    last = attend(transformer.final_token_to_image, tokens + first, image + positions, image)
    assert_close(found.flatten(0, 1), tokens, rtol=0, atol=1e-5)
    last_seen = transformer.last_look(found[:, :, 1:3], positions_of_tokens[:, :, 1:3], images, prepared)
    wanted = transformer.final_layer_norm(tokens + last)[:, 1:3]
    assert_close(last_seen.flatten(0, 1), wanted, rtol=0, atol=1e-5)
    assert_close(images.written_out(terms), image, rtol=0, atol=1e-5)


# --------------------------------------------------------------------------------------------------------------------
# What others do with its layers


def test_what_a_checkpoint_lacks_begins_as_in_a_new_model(model, tmp_path):
    """Loading makes parameters of bare memory: all that is not in the file must be given its first value."""
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "position_embedding" in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, new = EfficientSamModel.from_pretrained(tmp_path), EfficientSamModel(model.config)
    for (name, found), wanted in zip(loaded.named_parameters(), new.parameters(), strict=True):
        if name in kept:
            continue
        assert found.isfinite().all(), name
        if wanted.std(correction=0) == 0:
            assert torch.equal(found, wanted), name
        else:
            assert 0.3 < found.std(correction=0) / wanted.std(correction=0) < 3, name


def test_adapters_of_peft_are_heard_before_and_after_merging(model, pixels):
    peft = pytest.importorskip("peft")
    asked = {"input_boxes": torch.tensor([[[4.0, 4, 40, 40]]] * 2)}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    apart = adapted(pixels, **asked)
    apart.pred_masks.sum().backward()
    silent = {name for name, parameter in adapted.named_parameters() if "lora_" in name and parameter.grad is None}
    assert not any(name for name in silent if re.search("attention|token_to_image|image_to_token", name))
    merged = adapted.merge_and_unload()(pixels, **asked)
    assert_close(merged.pred_masks, apart.pred_masks, rtol=1e-3, atol=1e-3)


def test_linear_layers_of_8_bits_answer_nearly_the_same(model, pixels):
    quantized = torch.ao.quantization.quantize_dynamic(model.eval(), {torch.nn.Linear}, dtype=torch.qint8)
    with torch.no_grad():
        found, wanted = (one(pixels, input_boxes=BOXES).pred_masks for one in (quantized, model))
    assert 0 < (found - wanted).abs().mean() / wanted.abs().mean() < 0.2


def test_an_argument_under_a_wrong_name_is_refused(model, pixels):
    boxes = torch.tensor([[[4.0, 4, 40, 40]]] * 2)
    for name in ("input_box", "boxes", "box", "points", "point_coords", "mask_input", "multimask_outputs"):
        with pytest.raises(TypeError, match=f"takes no '{name}', wanted some of input_points, "):
            model(pixels, input_points=POINTS, **{name: boxes})
    sizes = torch.tensor([[64, 64]] * 2)
    assert_close(
        model(pixels, input_boxes=boxes, original_sizes=sizes, use_cache=False).pred_masks,
        model(pixels, input_boxes=boxes).pred_masks,
    )


def test_prompts_that_cannot_be_meant_are_refused(model, pixels):
    boxes, labels = torch.tensor([[[2.0, 2, 20, 20]]]), torch.zeros(1, 1, 1)
    with pytest.raises(ValueError, match="got input_labels without the input_points that they are of"):
        model(pixels[:1], input_boxes=boxes, input_labels=labels)
    with pytest.raises(TypeError, match="EfficientSamModel takes no 'bboxes'"):
        model(pixels[:1], input_points=boxes[:, :, None, :2], bboxes=boxes)
