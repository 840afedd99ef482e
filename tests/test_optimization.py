"""Which parameters decay, the curve of the learning rate, and generators that depend on nothing but numbers."""

from itertools import pairwise

import pytest
import torch
from conftest import make_model, stem_config, tiny_config
from torch import nn

from efficientsam_hf.training.optimization import (
    encoder_shares,
    freeze,
    parameter_groups,
    seeded_generator,
    set_learning_rate,
    warmup_cosine,
    warmup_linear,
)


@pytest.fixture
def model():
    return make_model(tiny_config(negative_points=True, mask_prompts=True))


def names_of(model: nn.Module, group: dict) -> list[str]:
    wanted = {id(parameter) for parameter in group["params"]}
    return [name for name, parameter in model.named_parameters() if id(parameter) in wanted]


def test_every_parameter_is_in_one_group(model):
    grouped = [id(parameter) for group in parameter_groups(model, 0.1) for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())
    assert [group["weight_decay"] for group in parameter_groups(model, 0.1)] == [0.1, 0.0]


def test_matrices_decay_and_vectors_do_not(model):
    decaying, free = (names_of(model, group) for group in parameter_groups(model, 0.1))
    for name in ("vision_encoder.layers.0.attention.q_proj.weight", "vision_encoder.neck.conv2.weight"):
        assert name in decaying
    tables = ["vision_encoder.embeddings.position_embedding", "mask_decoder.mask_tokens"]
    for name in ("prompt_encoder.foreground", "prompt_encoder.no_mask", "mask_decoder.iou_token", *tables):
        assert name in free
    assert all(name in free for name, _ in model.named_parameters() if name.endswith(".bias"))
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm | nn.GroupNorm)]
    assert len(norms) > 10
    assert all(f"{name}.weight" in free for name in norms)


def test_tables_of_queries_do_not_decay():
    head = nn.ModuleDict({"queries": nn.Embedding(5, 4), "attention": nn.MultiheadAttention(4, 2)})
    decaying, free = (names_of(head, group) for group in parameter_groups(head, 0.1))
    assert decaying == ["attention.in_proj_weight", "attention.out_proj.weight"]
    assert "queries.weight" in free


def test_frozen_parameters_are_left_out(model):
    model.vision_encoder.requires_grad_(False)
    names = [name for group in parameter_groups(model, 0.1) for name in names_of(model, group)]
    assert names
    assert not any(name.startswith("vision_encoder") for name in names)


# --------------------------------------------------------------------------------------------------------------------
# The curve


@pytest.mark.parametrize("schedule", [warmup_linear, warmup_cosine])
def test_the_rate_climbs_to_its_peak_and_falls_to_nothing(schedule):
    rates = [schedule(step, peak=2.0, warmup=10, total=110) for step in range(111)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[9] == rates[10] == 2.0
    assert all(after < before for before, after in pairwise(rates[10:]))
    assert rates[60] == pytest.approx(1.0)
    assert rates[110] == pytest.approx(0.0)
    assert 0 < rates[109] < 0.03


def test_linear_is_straight_and_cosine_is_not():
    quarter = {s: s(35, peak=1.0, warmup=10, total=110) for s in (warmup_linear, warmup_cosine)}
    assert quarter[warmup_linear] == pytest.approx(0.75)
    assert quarter[warmup_cosine] == pytest.approx(0.5 + 0.5 * 0.5**0.5)


def test_cosine_ends_at_its_floor():
    assert warmup_cosine(110, peak=1.0, warmup=10, total=110, floor=0.1) == pytest.approx(0.1)
    assert warmup_cosine(60, peak=1.0, warmup=10, total=110, floor=0.1) == pytest.approx(0.55)


@pytest.mark.parametrize("schedule", [warmup_linear, warmup_cosine])
def test_odd_lengths_are_no_trouble(schedule):
    assert schedule(0, peak=1.0, warmup=0, total=4) == 1.0
    # A run shorter than its warm-up, one that is nothing but warm-up, and a step behind the end.
    assert schedule(1, peak=1.0, warmup=250, total=2) == pytest.approx(2 / 250)
    assert schedule(4, peak=1.0, warmup=4, total=4) in (0.0, 1.0)
    assert schedule(9, peak=1.0, warmup=2, total=4) == pytest.approx(0.0)


def test_all_groups_get_the_rate(model):
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1.0)
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_a_part_gets_its_share_of_the_rate(model):
    groups = parameter_groups(model, 0.1, {"vision_encoder.": 0.25})
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    set_learning_rate(optimizer, 0.8)
    for group in optimizer.param_groups:
        of_encoder = {name.startswith("vision_encoder.") for name in names_of(model, group)}
        assert of_encoder == {group["lr"] == pytest.approx(0.2)}
        assert group["lr"] == pytest.approx(0.2) or group["lr"] == pytest.approx(0.8)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0, 0.0]


# --------------------------------------------------------------------------------------------------------------------
# Generators


def draw(*numbers: int) -> torch.Tensor:
    return torch.rand(4, generator=seeded_generator(*numbers))


def test_the_same_numbers_draw_the_same():
    torch.manual_seed(1)
    first = draw(3, 5)
    torch.manual_seed(2)
    assert torch.equal(draw(3, 5), first)


def test_no_two_numbers_draw_the_same():
    draws = {tuple(draw(seed, number).tolist()) for seed in range(2) for number in range(2400)}
    assert len(draws) == 2 * 2400


def test_neighbours_have_nothing_in_common():
    table = torch.stack([draw(0, number)[:2] for number in range(2000)])
    seeds = torch.stack([draw(1, number)[:2] for number in range(2000)])
    assert table.mean().item() == pytest.approx(0.5, abs=0.03)
    for one, other in [(table[1:, 0], table[:-1, 0]), (table[:, 0], seeds[:, 0]), (table[:, 0], table[:, 1])]:
        assert torch.corrcoef(torch.stack([one, other]))[0, 1].abs() < 0.08


def test_frozen_parameters_are_those_that_fit():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    freeze(module, ["0.*", "1.bias"])
    assert [name for name, parameter in module.named_parameters() if parameter.requires_grad] == ["1.weight"]


def test_pattern_that_fits_nothing_is_refused():
    with pytest.raises(ValueError, match=r"no parameter is called 'encoder\.\*'"):
        freeze(nn.Linear(2, 2), ["encoder.*"])


def test_deeper_layers_of_the_encoder_learn_faster(model):
    shares = encoder_shares(2, encoder=0.5, stem=0.1, layer_decay=0.8)
    groups = parameter_groups(nn.ModuleDict({"model": model}), 0.1, shares)
    rates = {id(part): group["rate_share"] for group in groups for part in group["params"]}
    found = {name: rates[id(part)] for name, part in model.named_parameters()}
    encoder = model.vision_encoder
    assert found["vision_encoder.embeddings.position_embedding"] == pytest.approx(0.5 * 0.8**3)
    assert rates[id(encoder.layers[0].mlp.layers[0].weight)] == pytest.approx(0.5 * 0.8**2)
    assert rates[id(encoder.layers[1].mlp.layers[0].weight)] == pytest.approx(0.5 * 0.8)
    assert found["vision_encoder.neck.conv1.weight"] == 0.5
    assert found["mask_decoder.mask_tokens"] == 1
    # A stem's blocks have their own share; layer 1 does not speak for layer 10.
    names = list(encoder_shares(11, stem=0.1, layer_decay=0.5))
    assert names[0].endswith("patch_embedding.blocks.")
    assert all(name.endswith(".") for name in names)
    stem = make_model(stem_config())
    groups = parameter_groups(nn.ModuleDict({"model": stem}), 0.1, encoder_shares(2, encoder=0.5, layer_decay=0.8))
    rates = {id(part): group["rate_share"] for group in groups for part in group["params"]}
    blocks = stem.vision_encoder.embeddings.patch_embedding.blocks.parameters()
    assert {rates[id(part)] for part in blocks} == {0.5 * 0.8**3}, "as the embeddings they are part of"
