"""The recipe for Ray, where Ray is installed; it is no dependency, not even of the tests."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, make_model, tiny_config
from synthetic import make_tar, scene_files

from efficientsam_hf import EfficientSamProcessor, save_for_hub

pytest.importorskip("ray", reason="the recipe needs Ray: pip install 'ray[data]'")


@pytest.mark.slow
def test_ray_labels_tars_and_goes_on_where_it_stopped(tmp_path):
    config = tiny_config()
    config.mask_generation = {"points_per_side": 2, "pred_iou_thresh": 0, "stability_score_thresh": 0}
    model = make_model(config)
    save_for_hub(model, EfficientSamProcessor.from_model_config(config), tmp_path / "tiny")
    for number in range(3):
        make_tar(tmp_path / f"sa_{number}.tar", {**scene_files(2), "broken.jpg": b"no picture"})
    script = str(REPOSITORY / "examples" / "label_with_ray.py")
    command = [
        sys.executable,
        script,
        str(tmp_path / "sa_*.tar"),
        str(tmp_path / "out"),
        "--model",
        str(tmp_path / "tiny"),
    ]
    path = os.pathsep.join([str(REPOSITORY / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "RAY_USAGE_STATS_ENABLED": "0", "CUDA_VISIBLE_DEVICES": ""}

    def run() -> str:
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    first = run()
    assert "6 pictures, " in first
    assert "3 skipped" in first
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.json*")}
    Path(tmp_path / "out" / "progress" / "sa_1.json").unlink()
    assert run() == first
    after = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.json*")}
    changed = {path.name for path in before if before[path] != after[path]}
    assert changed <= {"sa_1.json", "report.json"}  # seconds
    assert len(json.loads((tmp_path / "out" / "coco.json").read_text())["images"]) == 6

    other = make_model(config, seed=1)
    save_for_hub(other, EfficientSamProcessor.from_model_config(config), tmp_path / "tiny", overwrite=True)
    refused = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert refused.returncode
    assert "weights_sha256" in refused.stderr
