"""What is saved loads where this package is unknown, appears whole or not at all, and reaches the Hub."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import PIL.Image
import pytest
import torch
from conftest import make_model, tiny_config
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from test_architecture import HUB_PACKAGES, HUB_RULES, PACKAGE
from test_sami_model import make_sami
from transformers import AutoModel
from transformers.dynamic_module_utils import get_imports, get_relative_imports

from efficientsam_hf import (
    EfficientSamBackbone,
    EfficientSamForImageClassification,
    EfficientSamModel,
    EfficientSamProcessor,
    EfficientSamVisionModel,
    hub,
    load_checkpoint,
)
from efficientsam_hf.hub import with_front_matter


def answers(folder: str, photo: str, names: str, trust_remote_code: bool) -> dict:
    """Numbers from all that can be loaded from a folder; runs here, and as text in a process without this package."""
    import PIL.Image
    import torch
    import transformers
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    picture, trust = PIL.Image.open(photo), {"trust_remote_code": trust_remote_code}
    config = transformers.AutoConfig.from_pretrained(folder, **trust)
    loaded = [config, AutoImageProcessor.from_pretrained(folder, **trust)]
    numbers = {"pixel_values": loaded[1](picture, return_tensors="pt")["pixel_values"]}
    inputs = dict(numbers)
    if config.model_type == "efficientsam":
        processor = transformers.AutoProcessor.from_pretrained(folder, **trust)
        prompts = {"input_points": [[[[24, 20], [70, 30]], [[5, 5]]]], "input_boxes": [[None, [50, 28, 74, 44]]]}
        inputs = processor(picture, **prompts)
        generator = transformers.pipeline("mask-generation", model=folder, **trust)
        found = generator(picture, points_per_crop=3, pred_iou_thresh=0.0, stability_score_thresh=0.0)
        masks = [torch.as_tensor(mask) for mask in found["masks"]]
        numbers |= {"scores": found["scores"], "masks": torch.stack(masks)}
        loaded += [processor, generator.model]
    if names == "AutoBackbone":
        # Whether the Hub has a repository of this name is what it asks first, of a folder, too.
        from unittest import mock

        mock.patch("transformers.models.auto.auto_factory.hf_api").start()
    for name in names.split(","):
        model = getattr(transformers, name).from_pretrained(folder, **trust)
        loaded.append(model)
        torch.manual_seed(0)  # pretraining hides patches by chance
        with torch.no_grad():
            outputs = model(**{key: value for key, value in inputs.items() if key != "original_sizes"})
        numbers |= {f"{name}.{key}": value for key, value in outputs.items() if torch.is_tensor(value)}
        numbers |= {f"{name}.map{n}": value for n, value in enumerate(outputs.get("feature_maps", ()))}
    own = all(type(thing).__module__.startswith("transformers_modules.") for thing in loaded)
    numbers["own code"] = torch.tensor(own)
    return {key: value.contiguous() for key, value in numbers.items()}


STRANGER = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "efficientsam_hf":
            raise ModuleNotFoundError("No module named " + repr(name), name=name)

sys.meta_path.insert(0, Absent())
try:
    import efficientsam_hf
except ModuleNotFoundError:
    pass
else:
    sys.exit("the package is there")

from safetensors.torch import save_file

{function}

photo, *jobs = sys.argv[1:]
for job in jobs:
    source, names, target = job.split("=")
    save_file(answers(source, photo, names, True), target)
"""

# How a folder was written, and which Auto classes find a model in it. A plain save_pretrained notes one of them only.
KINDS = {
    "save_for_hub": "AutoModel,AutoModelForMaskGeneration",
    "save_pretrained": "AutoModel,AutoModelForMaskGeneration",
    "vision": "AutoModel",
    "sami": "AutoModelForPreTraining",
    "backbone": "AutoBackbone",
    "classification": "AutoModelForImageClassification",
}
REPO = "someone/tiny"


@pytest.fixture(scope="module")
def parts() -> tuple[EfficientSamModel, EfficientSamProcessor]:
    model = make_model(tiny_config())
    return model, EfficientSamProcessor.from_model_config(model.config)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """One folder of each kind. What was saved for the Hub comes last: saving leaves its notes on the config."""
    room = tmp_path_factory.mktemp("saved")
    model = make_model(tiny_config())
    processor = EfficientSamProcessor.from_model_config(model.config)
    model.save_pretrained(room / "save_pretrained")
    processor.save_pretrained(room / "save_pretrained")
    vision = EfficientSamVisionModel.from_pretrained(room / "save_pretrained")
    hub.save_for_hub(vision, processor.image_processor, room / "vision", "# Tiny\n")
    hub.save_for_hub(make_sami(), processor.image_processor, room / "sami", "# Tiny\n")
    for head in (EfficientSamBackbone, EfficientSamForImageClassification):
        config = tiny_config().vision_config
        config.out_features = ["stage1", "neck", "stride8"]
        kind = "backbone" if head is EfficientSamBackbone else "classification"
        hub.save_for_hub(head(config), processor.image_processor, room / kind, "# Tiny\n")
    hub.save_for_hub(model, processor, room / "save_for_hub", "# Tiny\n\nFor tests.\n")
    return room


@pytest.fixture(scope="module")
def photo_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    noise = torch.randint(256, (48, 80, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    PIL.Image.fromarray(noise.numpy()).save(path)
    return path


def pretend_download(folder: Path, home: Path) -> None:
    """Put the folder where huggingface_hub keeps what it has downloaded of `REPO`."""
    repository, commit = home / "hub" / f"models--{REPO.replace('/', '--')}", "0123456789" * 4
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)


@pytest.fixture(scope="module")
def stranger(folders, photo_file, tmp_path_factory) -> dict[str, dict[str, torch.Tensor]]:
    """The answers of each folder, and of the Hub, in a process without this package and with caches of its own."""
    home = tmp_path_factory.mktemp("home")
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    paths = [path for path in paths if not (Path(path) / PACKAGE.name).is_dir()]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    environment["HF_MODULES_CACHE"] = str(home / "modules")
    pretend_download(folders / "save_for_hub", home)
    jobs = [f"{folders / kind}={names}={home / kind}.safetensors" for kind, names in KINDS.items()]
    jobs.append(f"{REPO}={KINDS['save_for_hub']}={home}/repo.safetensors")
    code = STRANGER.format(function=inspect.getsource(answers))
    done = subprocess.run(
        [sys.executable, "-c", code, str(photo_file), *jobs], cwd=home, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {kind: load_file(home / f"{kind}.safetensors") for kind in [*KINDS, "repo"]}


@pytest.mark.parametrize("kind", [*KINDS, "repo"])
def test_a_stranger_gets_our_numbers(kind, stranger, folders, photo_file):
    folder = "save_for_hub" if kind == "repo" else kind
    ours, theirs = answers(str(folders / folder), str(photo_file), KINDS[folder], False), dict(stranger[kind])
    assert theirs.pop("own code")
    assert not ours.pop("own code")
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert value.numel(), key
        torch.testing.assert_close(theirs[key], value, rtol=0, atol=1e-5, msg=key)


def test_every_auto_class_is_noted(folders):
    folder = folders / "save_for_hub"
    config = json.loads((folder / "config.json").read_text())
    processor = json.loads((folder / "processor_config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_efficientsam.EfficientSamConfig",
        "AutoModel": "modeling_efficientsam.EfficientSamModel",
        "AutoModelForMaskGeneration": "modeling_efficientsam.EfficientSamModel",
    }
    assert processor["auto_map"]["AutoProcessor"] == "processing_efficientsam.EfficientSamProcessor"
    named = processor["image_processor"]["auto_map"]["AutoImageProcessor"]
    assert named == "image_processing_efficientsam.EfficientSamImageProcessor"


@pytest.mark.parametrize("kind", KINDS)
def test_saved_code_stands_alone(kind, folders):
    folder = folders / kind
    files = sorted(folder.glob("*.py"))
    assert files
    assert not [path for path in folder.iterdir() if path.is_dir()]
    for path in files:
        source = path.read_text(encoding="utf-8")
        assert source == (PACKAGE / path.name).read_text(encoding="utf-8")
        assert [complaint for rule in HUB_RULES for complaint in rule(source, path.name)] == []
        # What transformers itself will look for when it loads the file:
        assert [name for name in get_relative_imports(path) if not (folder / f"{name}.py").is_file()] == []
        assert set(get_imports(path)) <= HUB_PACKAGES
    noted = (path.read_text() for path in folder.glob("*config.json"))
    modules = {module for text in noted for module in re.findall(r'"(\w+)\.EfficientSam\w+"', text)}
    assert modules
    assert modules <= {path.stem for path in files}


def test_a_fine_tuned_model_keeps_the_notes(folders, tmp_path):
    EfficientSamModel.from_pretrained(folders / "save_for_hub").save_pretrained(tmp_path)
    saved = [json.loads((folder / "config.json").read_text()) for folder in (folders / "save_for_hub", tmp_path)]
    assert saved[0]["auto_map"] == saved[1]["auto_map"]


def test_the_installed_code_goes_first(folders):
    model = AutoModel.from_pretrained(folders / "save_for_hub", trust_remote_code=True)
    assert type(model) is EfficientSamModel


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_this_machine_is_saved(kind, folders):
    texts = [path.read_text() for path in (folders / kind).glob("*config.json")]
    assert len(texts) == 2
    assert not any(str(folders) in text or str(PACKAGE) in text for text in texts)


# --------------------------------------------------------------------------------------------------------------------
# Whole or not at all


class BrokenProcessor:
    def save_pretrained(self, folder):
        (Path(folder) / "processor_config.json").write_text('{"half"')
        raise OSError("disk full")


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_failed_save_leaves_nothing(parts, tmp_path):
    with pytest.raises(OSError, match="disk full"):
        hub.save_for_hub(parts[0], BrokenProcessor(), tmp_path / "new" / "model")
    assert list((tmp_path / "new").iterdir()) == []


def test_a_failed_save_leaves_the_old_folder(parts, tmp_path):
    hub.save_for_hub(*parts, tmp_path / "model")
    before = listing(tmp_path)
    with pytest.raises(OSError, match="disk full"):
        hub.save_for_hub(parts[0], BrokenProcessor(), tmp_path / "model", overwrite=True)
    assert listing(tmp_path) == before


def test_an_interrupt_between_the_renames_leaves_the_old_folder(parts, tmp_path, monkeypatch):
    hub.save_for_hub(*parts, tmp_path / "model")
    before, rename = listing(tmp_path), Path.rename

    def interrupted(path, target):
        if path.name == "new":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hub.save_for_hub(*parts, tmp_path / "model", overwrite=True)
    assert listing(tmp_path) == before


def test_a_folder_with_content_is_not_touched(parts, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="wanted a new or an empty folder"):
        hub.save_for_hub(*parts, tmp_path)
    with pytest.raises(FileExistsError, match=r"thesis\.txt"):
        hub.save_for_hub(*parts, tmp_path / "thesis.txt", overwrite=True)
    assert listing(tmp_path) == {"thesis.txt": b"years of work"}


def test_overwriting_replaces_all(parts, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    hub.save_for_hub(*parts, folder)
    (folder / "model-00001-of-00002.safetensors").write_text("stale")
    assert hub.save_for_hub(*parts, folder, overwrite=True) == folder
    assert "model.safetensors" in listing(folder)
    assert not list(folder.glob("*-of-*"))
    assert list(tmp_path.iterdir()) == [folder]


def test_a_model_that_no_auto_class_knows_is_refused(parts, tmp_path):
    class Relative(EfficientSamModel):
        pass

    with pytest.raises(ValueError, match="found Relative"):
        hub.save_for_hub(Relative(tiny_config()), parts[1], tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_config_that_cannot_be_read_is_told_from_a_folder_that_is_not_there(tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    with pytest.raises(OSError, match="broken: its config cannot be read: "):
        hub.load_checkpoint(tmp_path / "broken", device="cpu")
    with pytest.raises(OSError, match="gone: no such model folder, and none from the Hub: "):
        hub.load_checkpoint(tmp_path / "gone", device="cpu")


# --------------------------------------------------------------------------------------------------------------------
# The card, the upload, the checkpoint in the package


def test_card_says_what_the_hub_asks(folders):
    card = ModelCard.load(folders / "save_for_hub" / "README.md")
    assert card.data.to_dict() == hub.CARD_DATA
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "mask-generation"
    assert card.text.strip() == "# Tiny\n\nFor tests."


@pytest.mark.parametrize("kind", ["vision", "sami", "backbone", "classification"])
def test_the_hub_files_a_model_by_what_it_is_for(kind, folders):
    task = "image-classification" if kind == "classification" else "image-feature-extraction"
    assert ModelCard.load(folders / kind / "README.md").data.pipeline_tag == task


def test_front_matter_that_is_no_yaml_is_named():
    with pytest.raises(ValueError, match=r"the front matter of the card \(README\.md\) is no YAML: mapping values"):
        with_front_matter("---\nlicense: mit: yes\n---\n# A model\n")


@pytest.mark.parametrize("device", ["meta", "nothing"])
def test_a_device_without_memory_is_named(device):
    with pytest.raises(ValueError, match=f"device {device}: no such device here"):
        load_checkpoint(device=device)


def test_card_keeps_its_own_front_matter():
    card = ModelCard(hub.with_front_matter("---\nlicense: mit\ndatasets:\n- mine\n---\n# Tiny\n"))
    assert card.data.license == "mit"
    assert card.data.datasets == ["mine"]
    assert card.data.pipeline_tag == "mask-generation"
    assert card.text.strip() == "# Tiny"


class FakeApi:
    """Remembers what it was asked, and which files lay in the folder at that moment."""

    def __init__(self, token=None):
        self.calls = [("token", token)]
        FakeApi.last = self

    def whoami(self):
        return {"name": "someone"}

    def repo_exists(self, repo_id, repo_type=None):
        return False

    def create_repo(self, repo_id, **kwargs):
        self.calls.append(("create_repo", repo_id, kwargs))
        return SimpleNamespace(repo_id=f"someone/{repo_id}")

    def create_branch(self, repo_id, **kwargs):
        self.calls.append(("create_branch", repo_id, kwargs))

    def upload_folder(self, *, repo_id, folder_path, **kwargs):
        self.calls.append(("upload_folder", repo_id, kwargs))
        self.files = listing(Path(folder_path))
        self.folder = Path(folder_path)
        pull = "https://hub/pr/1" if kwargs["create_pr"] else None
        return SimpleNamespace(commit_url="https://hub/commit/1", pr_url=pull)


def test_push_uploads_the_whole_folder(parts, folders, monkeypatch):
    monkeypatch.setattr(hub, "HfApi", FakeApi)
    url = hub.push_to_hub(*parts, "tiny", "# Tiny\n\nFor tests.\n", private=True, token="secret")
    assert url == "https://hub/commit/1"
    assert FakeApi.last.files == listing(folders / "save_for_hub")
    assert not FakeApi.last.folder.exists()
    assert [call[0] for call in FakeApi.last.calls] == ["token", "create_repo", "upload_folder"]
    assert FakeApi.last.calls[0] == ("token", "secret")
    assert FakeApi.last.calls[1] == ("create_repo", "tiny", {"private": True, "exist_ok": True})
    assert FakeApi.last.calls[2][1] == "someone/tiny"


def test_push_to_a_branch_by_pull_request(parts, monkeypatch):
    monkeypatch.setattr(hub, "HfApi", FakeApi)
    assert hub.push_to_hub(*parts, "tiny", revision="next", create_pr=True) == "https://hub/pr/1"
    assert ("create_branch", "someone/tiny", {"branch": "next", "exist_ok": True}) in FakeApi.last.calls
    assert FakeApi.last.calls[-1][2]["revision"] == "next"
    assert "README.md" not in FakeApi.last.files


def test_push_asks_nothing_of_the_real_api_that_it_lacks(parts, monkeypatch):
    """The fake takes any argument; the real one must take those that it was given."""
    real = hub.HfApi
    monkeypatch.setattr(hub, "HfApi", FakeApi)
    hub.push_to_hub(*parts, "tiny", revision="next", create_pr=True)
    for name, repo_id, kwargs in FakeApi.last.calls[1:]:
        given = {"folder_path": "."} if name == "upload_folder" else {}
        inspect.signature(getattr(real, name)).bind(None, repo_id=repo_id, **given, **kwargs)


def test_default_checkpoint(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "CHECKPOINTS", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no config\.json in .*efficientsam-nano-512"):
        hub.default_checkpoint()
    hub.save_for_hub(*parts, tmp_path / hub.DEFAULT_CHECKPOINT)
    assert EfficientSamModel.from_pretrained(hub.default_checkpoint()).config.vision_config.image_size == 64
    (tmp_path / hub.DEFAULT_CHECKPOINT / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        hub.default_checkpoint()
