"""Everything in a picture with torchvision there, as far as a stand-in in its place can show, and without."""

import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY

EVERYTHING = """
import importlib.abc, importlib.machinery, sys, types
from unittest.mock import MagicMock

class Anything(types.ModuleType):
    __path__ = []
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock()

class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        ours = name.split(".")[0] == "torchvision"
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if ours else None
    def create_module(self, spec):
        return Anything(spec.name)
    def exec_module(self, module):
        module.__version__ = "0.28.0"

if sys.argv[1] == "present":
    sys.meta_path.insert(0, Finder())
    from transformers.utils import is_torchvision_available
    assert is_torchvision_available(), "the stand-in is not seen"
import hashlib, json
import numpy as np
import torch
from PIL import Image
from transformers import pipeline
from efficientsam_hf import load_checkpoint, segment_everything

torch.set_num_threads(1)
model, processor = load_checkpoint(device="cpu")
pixels = np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8)
photo = Image.fromarray(pixels).resize((160, 120))
options = {"points_per_side": 3, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0}
records = segment_everything(model, processor, photo, **options)
generator = pipeline("mask-generation", model=model, image_processor=processor.image_processor, device="cpu")
found = generator(photo, points_per_crop=3, pred_iou_thresh=0.0, stability_score_thresh=0.0)
sums = [hashlib.sha1(np.asarray(mask).tobytes()).hexdigest() for mask in found["masks"]]
print(json.dumps([records, sums, found["scores"].tolist()]))
"""


@pytest.mark.slow
def test_torchvision_makes_no_difference():
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src")}
    results = []
    for state in ("present", "as it is"):
        command = [sys.executable, "-c", EVERYTHING, state]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        results.append(done.stdout.splitlines()[-1])
    assert results[0] == results[1]
    assert results[0].startswith('[[{"segmentation"')
