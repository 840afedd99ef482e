"""Nearest neighbours and probes against slow obvious versions, and the labels they take."""

import math

import numpy as np
import pytest
import torch
from test_classification import make_classifier
from test_recipes import room  # noqa: F401  # the fixture
from typer.testing import CliRunner

from efficientsam_cli import app
from efficientsam_hf.evaluation.classification import (
    collect_features,
    fold_numbers,
    neighbour_scores,
    probe_scores,
    top_accuracy,
)


def clusters(count: int, spread: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures of three classes around three directions."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    features = torch.eye(3, 5)[labels] + spread * torch.randn(count, 5, generator=generator)
    return features, labels


def test_neighbours_vote_as_an_obvious_version_says():
    known, labels = clusters(12, 1.0, 0)
    asked, _ = clusters(4, 1.0, 1)
    scores = neighbour_scores(known, labels, asked, classes=3, k=5, temperature=0.1)
    for row, picture in zip(scores, asked, strict=True):
        cosines = [torch.cosine_similarity(picture, other, dim=0).item() for other in known]
        votes = [0.0, 0.0, 0.0]
        for place in sorted(range(12), key=lambda place: -cosines[place])[:5]:
            votes[labels[place]] += math.exp(cosines[place] / 0.1)
        assert row.tolist() == pytest.approx(votes, rel=1e-4)


def test_length_of_a_feature_says_nothing_to_neighbours():
    known, labels = clusters(12, 0.5, 0)
    stretched = known * torch.rand(12, 1).add(0.1)
    first, second = (neighbour_scores(features, labels, known, 3, k=3) for features in (known, stretched))
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


def test_probe_finds_what_a_linear_layer_can_find():
    known, labels = clusters(60, 0.1, 0)
    asked, wanted = clusters(30, 0.1, 1)
    assert top_accuracy(probe_scores(known, labels, asked, 3), wanted)["accuracy"] == 1
    noise = torch.randn(60, 5, generator=torch.Generator().manual_seed(2))
    assert top_accuracy(probe_scores(noise, labels, torch.randn_like(asked), 3), wanted)["accuracy"] < 0.8


def test_probe_is_at_its_minimum_and_knows_no_units():
    known, labels = clusters(40, 0.8, 0)
    scores = probe_scores(known, labels, known, 3, penalty=0.05)
    scaled = known * torch.tensor([1, 10, 100, 0.1, 3.0]) + 7
    torch.testing.assert_close(probe_scores(scaled, labels, scaled, 3, penalty=0.05), scores, rtol=0, atol=2e-2)
    standard = (known - known.mean(0)) / known.std(0, correction=0)
    weight = torch.linalg.lstsq(torch.cat([standard, torch.ones(40, 1)], 1), scores).solution
    residual = standard.T @ (scores.softmax(-1) - torch.nn.functional.one_hot(labels, 3)) / 40 + 0.05 * weight[:-1]
    assert residual.abs().max() < 2e-3


def test_accuracy_counts_the_first_and_the_first_five():
    scores = torch.tensor([[9.0, 8, 7, 6, 5, 4], [1.0, 2, 3, 4, 5, 6]])
    assert top_accuracy(scores, torch.tensor([0, 1])) == {"accuracy": 0.5, "top5_accuracy": 1.0}
    assert top_accuracy(scores, torch.tensor([5, 0])) == {"accuracy": 0.0, "top5_accuracy": 0.0}
    assert top_accuracy(scores[:, :2], torch.tensor([1, 0])) == {"accuracy": 0.0, "top5_accuracy": 1.0}


def test_folds_share_every_class_evenly():
    labels = [0] * 10 + [1] * 7 + [2] * 3
    folds = fold_numbers(labels, 5, seed=1)
    for label, count in ((0, 10), (1, 7), (2, 3)):
        sizes = torch.bincount(folds[torch.tensor(labels) == label], minlength=5)
        assert sizes.sum() == count
        assert sizes.max() - sizes.min() <= 1
    assert torch.bincount(folds, minlength=5).tolist() == [4] * 5
    assert not torch.equal(folds, fold_numbers(labels, 5, seed=2))


def test_what_is_out_of_range_is_named():
    known, labels = clusters(6, 1.0, 0)
    with pytest.raises(ValueError, match="labels must be from 0 to 1, got from 0 to 2"):
        probe_scores(known, labels, known, classes=2)
    with pytest.raises(ValueError, match="labels must be from 0 to 2, got from -1 to 1"):
        neighbour_scores(known, labels - 1, known, classes=3, k=2)
    with pytest.raises(ValueError, match="k must be from 1 to 6, the number of known pictures, got 7"):
        neighbour_scores(known, labels, known, classes=3, k=7)
    with pytest.raises(ValueError, match="found none"):
        collect_features(make_classifier(), [], dict)


def test_features_come_in_order_whatever_the_batch():
    model, generator = make_classifier(), np.random.default_rng(0)
    items = [(generator.normal(size=(3, 32, 32)).astype(np.float32), number % 3) for number in range(5)]

    def prepare(images):
        return {"pixel_values": torch.from_numpy(np.stack(images))}

    features, labels = collect_features(model, items, prepare, batch_size=2)
    single, _ = collect_features(model, items[3:4], prepare)
    assert labels.tolist() == [0, 1, 2, 0, 1]
    assert features.shape == (5, 24)
    torch.testing.assert_close(features[3], single[0])


def test_command_tells_colours_apart(room):  # noqa: F811
    folders = [str(room / "classes" / split) for split in ("train", "validation")]
    given = ["probe", *folders, "--model", str(room / "model"), "--image-size", "64", "--k", "2"]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, result.output
    assert "6 pictures known, 6 asked, 3 classes" in result.output
    assert "k-NN (k = 2): accuracy 1.0000" in result.output
    assert "linear probe: accuracy 1.0000" in result.output
    result = CliRunner().invoke(app, [*given[:-1], "7"])
    assert result.exit_code == 2
    assert "k must be from 1 to 6, the number of known pictures, got 7" in result.output
