"""The metrics as Hugging Face's `evaluate` loads them: from a folder, without a network."""

import os
import sys

import numpy as np
import pytest

from efficientsam_hf.evaluation.evaluate_modules import metric_path
from efficientsam_hf.evaluation.metrics import boundary_iou, iou


def forget_copies() -> None:
    """Of metrics that the process has imported, from whatever folder `evaluate` had copied them into."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "evaluate_modules"]:
        del sys.modules[name]


@pytest.fixture
def load(tmp_path, monkeypatch):
    evaluate = pytest.importorskip("evaluate")
    modules = tmp_path / "modules"
    modules.mkdir()
    monkeypatch.setattr("evaluate.config.HF_MODULES_CACHE", str(modules))
    monkeypatch.syspath_prepend(modules)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    forget_copies()
    yield lambda name: evaluate.load(metric_path(name), cache_dir=str(tmp_path))
    forget_copies()


@pytest.fixture
def masks():
    generator = np.random.default_rng(0)
    truth = [np.pad(generator.random((6, 9)) > 0.3, 5), np.pad(generator.random((4, 3)) > 0.2, 7)]
    return [np.roll(mask, 1, axis=1) for mask in truth], truth


def test_each_alone_and_all_together(load, masks):
    import evaluate

    answers, truth = masks
    wanted = {
        "mask_iou": np.mean([iou(answer, mask) for answer, mask in zip(answers, truth, strict=True)]),
        "boundary_iou": np.mean([boundary_iou(answer, mask) for answer, mask in zip(answers, truth, strict=True)]),
    }
    given = {"predictions": [mask.astype(int) for mask in answers], "references": [mask.astype(int) for mask in truth]}
    for name, value in wanted.items():
        assert load(name).compute(**given) == {name: pytest.approx(value)}
    clicks = [[0.5, 0.86, 0.95], [0.2, 0.3]]
    expected = {"noc_85": 11.0, "never_85": 1, "noc_90": 11.5, "never_90": 1}
    assert load("number_of_clicks").compute(ious=clicks) == expected
    together = evaluate.combine([load(name) for name in (*wanted, "number_of_clicks")])
    assert together.compute(**given, ious=clicks) == {
        **{name: pytest.approx(v) for name, v in wanted.items()},
        **expected,
    }


def test_pixels_below_zero_count_for_nothing(load):
    truth = np.zeros((6, 8), int)
    truth[1:4, 2:6], truth[:, 5:7] = 1, -1
    answer = (truth != 0).astype(int)
    answer[1:4, 2:6] = 1
    assert load("mask_iou").compute(predictions=[answer], references=[truth]) == {"mask_iou": 1.0}


def test_unknown_names_are_refused():
    with pytest.raises(
        ValueError, match="unknown metric 'iou', wanted one of boundary_iou, mask_iou, number_of_clicks"
    ):
        metric_path("iou")
