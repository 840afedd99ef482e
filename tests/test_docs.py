"""What README and docs print works as printed, or says why it cannot be run.

Tutorials are notebooks: `make docs` runs their cells. Every other Python block and every command is run here, on drawn
pictures and tiny models that stand in for what is too large. What still cannot be run stands under a comment
`<!-- not run: reason -->`, or is named with a reason in `NOT_RUN`; its options are checked nevertheless.
"""

import json
import re
import runpy
import shlex
import shutil
import sys
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages

import pytest
from conftest import REPOSITORY, make_model, tiny_config
from synthetic import make_folder, make_tar, scene_files
from test_sami_model import sami_config
from test_teachers import small_sam
from transformers import SamConfig, SamImageProcessorPil, SamModel, SamProcessor
from typer.main import get_command
from typer.testing import CliRunner

import efficientsam_hf
from efficientsam_cli import app
from efficientsam_hf import VARIANTS, EfficientSamConfig, EfficientSamModel, EfficientSamProcessor
from efficientsam_hf.conversion import save_official

DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", *sorted(DOCS.rglob("*.md"))]
PAGES = [page for page in PAGES if "_build" not in page.parts]

# Commands by how they begin, and why no test runs them.
NOT_RUN = {
    r"pip install ": "the environment that runs the tests is what it installs",
    r"make ": "the target that runs these tests is one of them",
    r"git clone ": "there is no network",
    r"torchrun ": "the tests of examples, pretraining and labelling start several processes, on tiny data",
    r"python examples/label_with_ray\.py ": "tests/test_labelling.py runs it where Ray is",
    r"efficientsam push (?!.*--dry-run)": "it uploads to the Hub",
    r"efficientsam evaluate ": "tests/test_evaluation_cli.py runs each on tiny data, a tutorial on drawn scenes",
    r"efficientsam probe ": "tests/test_frozen_features.py runs it on drawn classes",
    r"accelerate launch .*examples/finetune_(classification|detection|semantic)": "tests/test_recipes.py runs each "
    "script on drawn pictures; ImageNet, COCO and ADE20K are not here",
    r"efficientsam demo": "it serves until it is stopped",
}

# What makes a script's recipe a matter of a second: appended to its command, where the last word counts.
SMALL = {
    "examples/finetune_sa1b.py": "--max_steps 1 --batch_size 1 --total_batch 1 --masks_per_image 2 --rounds 1 "
    "--image_size 64 --workers 0 --report_to none",
    "examples/finetune_custom.py": "--max_steps 1 --model efficientsam-ti",
    "examples/pretrain_sami.py": "--max_steps 1 --batch_size 1 --total_batch 1 --config student.json --workers 0 "
    "--report_to none",
}


def name_of(page: Path) -> str:
    return page.relative_to(REPOSITORY).with_suffix("").as_posix()


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of the page's code in its order, without what a comment excuses."""
    found = re.finditer(
        r"^([^\n]*)\n+ *```(python|console)\n(.*?)^ *```", page.read_text(), flags=re.DOTALL | re.MULTILINE
    )
    return [(block[2], block[3]) for block in found if not block[1].startswith("<!-- not run: ")]


def commands(text: str) -> list[str]:
    """What stands after each `$ `, continued lines joined, remarks left out."""
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines()]
    return [re.split(r" {2,}#", line.removeprefix("$ "))[0].strip() for line in lines if line.startswith("$ ")]


def reason_against(command: str) -> str | None:
    return next((reason for start, reason in NOT_RUN.items() if re.match(start, command)), None)


@pytest.fixture(scope="module")
def furniture(tmp_path_factory) -> Path:
    """A folder with the examples where the pages expect them, and small things under the names that they use."""
    folder = tmp_path_factory.mktemp("room")
    shutil.copytree(REPOSITORY / "examples", folder / "examples")
    (folder / "sa1b").mkdir()
    for name in ("sa_000000.tar", "sa1b/sa_000000.tar", "held_out.tar"):
        make_tar(folder / name, scene_files(3))
    make_folder(folder / "imagenet" / "train" / "n01440764", scene_files(3))
    draw_scenes = runpy.run_path(str(REPOSITORY / "examples" / "draw_scenes.py"))
    draw_scenes["main"](folder / "mine", count=5, seed=0)
    (folder / "PHOTOS").mkdir()
    shutil.copy(folder / "examples" / "images" / "coffee.jpg", folder / "PHOTOS")
    official = EfficientSamModel(EfficientSamConfig(vision_config={**VARIANTS["tiny"], "num_hidden_layers": 1}))
    save_official(official, folder / "efficient_sam_vitt.pt")
    (folder / "EfficientSAM" / "weights").mkdir(parents=True)
    for name in ("efficient_sam_vitt.pt", "efficient_sam_vits.pt.zip"):
        (folder / "EfficientSAM" / "weights" / name).symlink_to(folder / "efficient_sam_vitt.pt")
    model = make_model(tiny_config())
    for name in ("efficientsam-ti", "runs/mine/model", "runs/cups/model", "runs/sami/efficientsam"):
        model.save_pretrained(folder / name)
        EfficientSamProcessor.from_model_config(model.config).save_pretrained(folder / name)
    (folder / "student.json").write_text(json.dumps(sami_config().to_dict()))
    small_sam().save_pretrained(folder / "facebook" / "sam-vit-huge")
    save_small_sam(folder / "facebook" / "sam-vit-base")
    return folder


def save_small_sam(folder: Path) -> None:
    """transformers' own model, at 64 pixels."""
    vision = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 64, "mlp_dim": 24}
    SamModel(SamConfig(vision_config=vision, prompt_encoder_config={"image_size": 64})).save_pretrained(folder)
    size = {"size": {"longest_edge": 64}, "pad_size": {"height": 64, "width": 64}}
    SamProcessor(SamImageProcessorPil(**size)).save_pretrained(folder)


@pytest.fixture
def room(furniture, tmp_path, monkeypatch) -> Path:
    """A place to write into, with the furniture in it."""
    for thing in furniture.iterdir():
        if thing.name == "runs":
            shutil.copytree(thing, tmp_path / "runs")
        else:
            (tmp_path / thing.name).symlink_to(thing)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_script(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A script as its launcher starts it, in this process."""
    from accelerate.state import AcceleratorState, GradientState

    script = next(word for word in words if word.endswith(".py"))
    arguments = words[words.index(script) + 1 :] + shlex.split(SMALL.get(script, ""))
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def run_command(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(command)
    if words[:2] == ["efficientsam", "convert"]:
        Path(words[-1]).unlink(missing_ok=True)  # a stand-in, in the place of what will be written
    if words[0] == "efficientsam":
        result = CliRunner().invoke(app, words[1:])
        assert result.exit_code == 0, f"{command}: {result.output}"
    elif words[0] in ("accelerate", "python"):
        run_script(words, monkeypatch)
    else:
        pytest.fail(f"nobody runs {command!r}: mark its block, or give a reason in NOT_RUN")


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name_of)
def test_code_runs_in_its_order(page, room, monkeypatch):
    names: dict = {}
    for language, text in blocks(page):
        if language == "python":
            exec(compile(text, str(page), "exec"), names)
            continue
        for command in commands(text):
            if not reason_against(command):
                run_command(command, monkeypatch)


def options_of(command: str) -> tuple[set[str], set[str]]:
    """The options in a command of ours, and those that there are."""
    words = shlex.split(command)
    found, rest = get_command(app), words[words.index("efficientsam") + 1 :]
    while hasattr(found, "commands"):
        found, rest = found.commands[rest[0]], rest[1:]
    known = {option for parameter in found.params for option in (*parameter.opts, *parameter.secondary_opts)}
    return {word for word in rest if word.startswith("--")}, known


def test_commands_that_are_not_run_have_options_that_exist():
    everything = [
        text for page in PAGES for text in re.findall(r"```console\n(.*?)^ *```", page.read_text(), re.S | re.M)
    ]
    unrun = [command for text in everything for command in commands(text) if re.search(r"(^| )efficientsam ", command)]
    assert len(unrun) > 10
    for command in unrun:
        used, known = options_of(command)
        assert used <= known, command


def test_blocks_are_of_kinds_that_are_run():
    """A language that nobody runs is data or output, never code."""
    for page in PAGES:
        kinds = set(re.findall(r"^ *```(\S+)", page.read_text(), flags=re.MULTILINE))
        inert = {"text", "json", "{toctree}", "{eval-rst}", "{raw}", "{literalinclude}"}
        assert kinds <= {"python", "console", "{code-cell}", *inert}, name_of(page)


def test_cells_stand_in_notebooks():
    """MyST runs the cells of a page only if it says at its top that it is a notebook."""
    for page in PAGES:
        text = page.read_text()
        assert ("```{code-cell}" in text) == text.startswith("---\nfile_format: mystnb\n"), name_of(page)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_local_links_lead_somewhere(page):
    prose = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", prose)
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("page", [page for page in PAGES if DOCS in page.parents], ids=name_of)
def test_pages_are_in_the_contents(page):
    listed = set()
    for other in PAGES:
        for contents in re.findall(r"```{toctree}\n(.*?)```", other.read_text(), flags=re.DOTALL):
            listed |= {(other.parent / line).resolve() for line in contents.splitlines() if line and line[0] != ":"}
    assert page == DOCS / "index.md" or page.with_suffix("") in listed


def test_every_public_name_is_in_the_reference():
    text = "".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    modules = set(re.findall(r"automodule:: (\S+)", text))
    rooms = {f"efficientsam_hf.{room}" for room in re.findall(r"<!-- every module of (\w+) -->", text)}
    described: set[str] = set()
    for found in walk_packages(efficientsam_hf.__path__, "efficientsam_hf."):
        names = getattr(import_module(found.name), "__all__", [])
        if found.name in modules or found.name.rpartition(".")[0] in rooms:
            described |= {name for name in names or vars(import_module(found.name)) if name[0] != "_"}
        else:
            assert not names, f"{found.name} is on no page of docs/reference"
    missing = {name for name in efficientsam_hf.__all__ if name[0] != "_"} - described
    assert not missing


@pytest.mark.parametrize("page", [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"], ids=name_of)
def test_make_targets_that_are_named_exist(page):
    named = set(re.findall(r"(?:`|\$ )make (\w+)", page.read_text()))
    targets = set(re.findall(r"^(\w+):", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE))
    assert named
    assert named <= targets
