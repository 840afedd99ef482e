"""`efficientsam push`, against a stand-in of the Hub that speaks its HTTP API on this machine."""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
import transformers.utils.hub
from conftest import REPOSITORY, make_model, tiny_config
from huggingface_hub import ModelCard, constants, snapshot_download
from safetensors.torch import load_file
from test_hub import listing
from typer.testing import CliRunner

from efficientsam_cli import app
from efficientsam_hf import EfficientSamProcessor, EfficientSamVisionModel, load_checkpoint, push_to_hub, save_for_hub
from efficientsam_hf.publishing import CARD, prepare_folder

COMMIT = "0123456789" * 4


@dataclass
class Repository:
    kind: str
    private: bool = False
    config: dict = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as a push and a download ask for; `repositories` and `asked` are the server's."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, content: dict | bytes, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def serve(self) -> None:
        path, body = urlsplit(self.path).path, self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append(f"{self.command} {path}")
        if self.headers.get("Authorization") not in (None, "Bearer hf_good"):
            return self.answer({"error": "Invalid credentials"}, 401)
        if path == "/api/whoami-v2":
            return self.answer({"type": "user", "name": "someone", "auth": {"accessToken": {"role": "write"}}})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if found := re.fullmatch(r"/api/(model|dataset|space)s/([^/]+/[^/]+)(/.*)?", path):
            repository = self.server.repositories.get(found[2])
            if repository is None or repository.kind != found[1]:
                return self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            return self.about(found[2], repository, found[3] or "", body)
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            content = self.server.repositories[found[1]].files.get(found[2])
            if content is None:
                return self.answer({}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            tag = f'"{hashlib.sha1(content).hexdigest()}"'
            return self.answer(content, X_Repo_Commit=COMMIT, ETag=tag)
        return self.answer({"error": f"the stand-in knows no {path}"}, 501)

    do_GET = do_POST = do_HEAD = serve  # noqa: N815 - the names that http.server looks for

    def create(self, wanted: dict) -> None:
        name = f"{wanted.get('organization') or 'someone'}/{wanted['name']}"
        status = 409 if name in self.server.repositories else 200
        private = wanted.get("visibility") == "private" or wanted.get("private", False)
        self.server.repositories.setdefault(name, Repository("model", private))
        self.answer({"url": f"{self.server.address}/{name}"}, status)

    def about(self, name: str, repository: Repository, rest: str, body: bytes) -> None:
        if rest.startswith("/preupload/"):
            files = [
                {"path": item["path"], "uploadMode": "regular", "shouldIgnore": False}
                for item in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif rest.startswith("/commit/"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    repository.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"{self.server.address}/{name}/commit/{COMMIT}"
            self.answer({"success": True, "commitOid": COMMIT, "commitUrl": url})
        elif rest == "" or rest.startswith("/revision/"):
            siblings = [{"rfilename": path} for path in repository.files]
            self.answer(
                {
                    "id": name,
                    "sha": COMMIT,
                    "private": repository.private,
                    "siblings": siblings,
                    "config": repository.config,
                }
            )
        elif rest.startswith("/tree/"):
            entries = [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in repository.files.items()
            ]
            self.answer(json.dumps(entries).encode())
        else:
            self.answer({"error": f"the stand-in knows no {rest}"}, 501)


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.repositories = {
        "someone/a-set": Repository("dataset"),
        "someone/a-space": Repository("space"),
        "someone/a-vit": Repository("model", config={"model_type": "vit"}),
    }
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    # transformers keeps what knows the first address that it was asked for.
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
    template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """As fine-tuning leaves it: weights and configs, no code, no card."""
    folder = tmp_path_factory.mktemp("run") / "model"
    model = make_model(tiny_config()).half()
    model.save_pretrained(folder)
    EfficientSamProcessor.from_model_config(model.config).save_pretrained(folder)
    for path in folder.glob("*.py"):
        path.unlink()
    return folder


def push(*arguments):
    return CliRunner().invoke(app, ["push", *map(str, arguments)])


def wrote(server) -> bool:
    return any("/commit/" in line or "repos/create" in line or "preupload" in line for line in server.asked)


def test_a_push_arrives_whole_and_loads(stand_in, folder, tmp_path):
    (tmp_path / "scores.json").write_text(
        '{"GrabCut": {"mean IoU, box": 0.814}, "Berkeley": {"mean IoU, box": 0.773}}'
    )
    result = push(
        folder, "tiny", "--private", "--license", "mit", "--dataset", "someone/a-set", "--dataset", "other/set",
        "--base-model", "someone/base", "--metrics", tmp_path / "scores.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert f"{stand_in.address}/someone/tiny/commit/{COMMIT}" in result.output
    repository = stand_in.repositories["someone/tiny"]
    assert repository.private
    names = set(repository.files)
    assert {"config.json", "model.safetensors", "processor_config.json", "README.md"} <= names
    assert {"modeling_efficientsam.py", "processing_efficientsam.py", "configuration_efficientsam.py"} <= names

    downloaded = snapshot_download("someone/tiny", cache_dir=tmp_path / "cache")
    assert listing(Path(downloaded)) == repository.files
    ours, theirs = load_file(folder / "model.safetensors"), load_file(Path(downloaded) / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert ours.keys() == theirs.keys()
    dtypes = {name: tensor.dtype for name, tensor in theirs.items()}
    assert dtypes == {name: tensor.dtype for name, tensor in ours.items()}
    assert torch.float16 in dtypes.values()
    load_checkpoint(downloaded, device="cpu")

    card = ModelCard(repository.files["README.md"].decode())
    data = card.data.to_dict()
    assert data["license"] == "mit"
    assert data["datasets"] == ["someone/a-set", "other/set"]
    assert data["base_model"] == "someone/base"
    assert (data["pipeline_tag"], data["library_name"]) == ("mask-generation", "transformers")
    assert data["tags"] == ["efficientsam", "segment-anything"]
    (entry,) = data["model-index"]
    found = {row["dataset"]["name"]: row["metrics"][0]["value"] for row in entry["results"]}
    assert found == {"GrabCut": 0.814, "Berkeley": 0.773}
    assert "| GrabCut | mean IoU, box | 0.814 |" in card.text
    assert 'load_checkpoint("tiny")' in card.text


def test_a_second_push_goes_to_the_same_place(stand_in, folder):
    for _ in range(2):
        assert push(folder, "someone/tiny").exit_code == 0
    assert not stand_in.repositories["someone/tiny"].private


def test_a_dry_run_shows_what_a_push_uploads_and_asks_nobody(stand_in, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    result = push(folder, "tiny", "--dry-run")
    assert result.exit_code == 0, result.output
    assert not stand_in.asked
    shown = dict(re.findall(r"^ *([\d,]+) (\S+\.\S+)$", result.output, flags=re.MULTILINE))
    shown = {name: int(size.replace(",", "")) for size, name in shown.items()}
    assert "pipeline_tag: mask-generation" in result.output
    assert "license" not in result.output  # which is the author's to choose
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    push(folder, "tiny")
    assert shown == {name: len(content) for name, content in stand_in.repositories["someone/tiny"].files.items()}


def test_the_folder_s_own_card_stays(stand_in, folder, tmp_path):
    own = "---\nlicense: cc-by-4.0\ndatasets:\n- mine\n---\n\n# My own words\n"
    save_for_hub(*load_checkpoint(folder, device="cpu"), tmp_path / "model", own)
    assert push(tmp_path / "model", "tiny", "--base-model", "someone/base").exit_code == 0
    card = ModelCard(stand_in.repositories["someone/tiny"].files["README.md"].decode())
    assert card.text.strip() == "# My own words"
    assert (card.data.license, card.data.datasets, card.data.base_model) == ("cc-by-4.0", ["mine"], "someone/base")


@pytest.mark.parametrize(
    ("repository", "message"),
    [
        ("someone/a-set", "someone/a-set is a dataset, wanted a model repository or a name that is free"),
        ("a-space", "someone/a-space is a space"),
        ("someone/a-vit", "someone/a-vit holds a model of type 'vit'"),
        ("datasets/someone/tiny", "wanted `name` or `owner/name` of a model repository"),
        ("https://huggingface.co/someone/tiny", "wanted `name` or `owner/name`"),
    ],
)
def test_another_kind_of_repository_is_named_before_anything_is_uploaded(stand_in, folder, repository, message):
    result = push(folder, repository)
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert not wrote(stand_in)
    with pytest.raises(ValueError, match=re.escape(message)):
        push_to_hub(*load_checkpoint(folder, device="cpu"), repository)
    assert not wrote(stand_in)


@pytest.mark.parametrize(
    ("token", "message"), [(None, "no token of the Hub"), ("hf_bad", "the Hub does not know this token")]
)
def test_without_a_token_nothing_is_uploaded(stand_in, folder, token, message, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    result = push(folder, "tiny", *(["--token", token] if token else []))
    assert result.exit_code == 2
    assert message in result.output
    assert not wrote(stand_in)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", "lacks the model's config: wanted config.json in it"),
        ("model.safetensors", "lacks weights: wanted model.safetensors in it"),
        ("processor_config.json", "lacks the processor's config: wanted processor_config.json in it"),
        ("", "no folder at"),
    ],
)
def test_a_folder_that_lacks_a_part_is_named_before_anyone_is_asked(stand_in, folder, tmp_path, missing, message):
    for path in folder.iterdir():
        if missing and path.name != missing:
            (tmp_path / "model").mkdir(exist_ok=True)
            (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    result = push(tmp_path / "model", "tiny")
    assert result.exit_code == 2
    assert message in result.output
    assert not stand_in.asked


def test_weights_that_are_cut_short_are_one_line(stand_in, folder, tmp_path):
    (tmp_path / "cut").mkdir()
    for path in folder.iterdir():
        whole = path.read_bytes()
        (tmp_path / "cut" / path.name).write_bytes(whole[:5000] if path.suffix == ".safetensors" else whole)
    result = push(tmp_path / "cut", "tiny")
    assert result.exit_code == 2, result.output
    assert f"efficientsam: {tmp_path / 'cut'}: its weights cannot be read" in result.output
    assert not stand_in.asked


def test_other_models_and_half_of_the_weights_are_refused(stand_in, folder, tmp_path):
    model, processor = load_checkpoint(folder, device="cpu")
    vision = EfficientSamVisionModel(model.config.vision_config)
    vision.save_pretrained(tmp_path / "vision")
    processor.save_pretrained(tmp_path / "vision")
    with pytest.raises(ValueError, match="holds EfficientSamVisionModel, wanted EfficientSamModel"):
        prepare_folder(tmp_path / "vision", tmp_path / "out", "tiny")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] += 1
    (tmp_path / "half").mkdir()
    for path in folder.iterdir():
        (tmp_path / "half" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "half" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="lacks weights: found none for"):
        prepare_folder(tmp_path / "half", tmp_path / "out", "tiny")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["[1, 2]", '{"set": 0.5}', '{"set": {"iou": "high"}}', "no json"])
def test_strange_scores_are_refused(stand_in, folder, tmp_path, text):
    (tmp_path / "scores.json").write_text(text)
    result = push(folder, "tiny", "--metrics", tmp_path / "scores.json")
    assert result.exit_code == 2
    assert 'wants {"data set": {"metric": number}}' in result.output
    assert not stand_in.asked


def test_the_code_of_the_card_runs(folder, tmp_path, photo, monkeypatch):
    from PIL import Image

    Image.fromarray(photo).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    card = ModelCard(
        (lambda files: (tmp_path / "model" / "README.md").read_text())(
            prepare_folder(folder, tmp_path / "model", str(folder))
        )
    )
    first, second = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    exec(first.replace("[[250, 150]]", "[[20, 15]]"), {})
    exec(second.replace(str(folder), str(tmp_path / "model")), {})
    assert CARD.count("```python") == 2


def test_the_commands_of_the_page_run(stand_in, folder, tmp_path):
    page = (REPOSITORY / "docs" / "hub.md").read_text()
    (tmp_path / "scores.json").write_text(re.search(r"```json\n(.*?)```", page, flags=re.DOTALL)[1])
    commands = re.findall(r"^\$ efficientsam push runs/cups/model (.*)$", page, flags=re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        result = push(folder, *command.split(), "--metrics", tmp_path / "scores.json")
        assert result.exit_code == 0, result.output
    assert "My cups" in stand_in.repositories["someone/efficientsam-cups"].files["README.md"].decode()
