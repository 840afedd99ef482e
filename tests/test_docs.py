"""What README and docs print works as printed."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import REPOSITORY
from typer.testing import CliRunner

from efficientsam_cli import app

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def room(tmp_path, monkeypatch):
    """A folder to write into, with the examples where the pages expect them."""
    shutil.copytree(REPOSITORY / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem)
def test_python_blocks_run_in_their_order(page, room):
    names: dict = {}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), names)


def commands(page: Path) -> list[str]:
    lines = "".join(blocks(page, "console")).splitlines()
    return [
        line.removeprefix("$ ").split("    #")[0]
        for line in lines
        if re.match(r"\$ efficientsam (predict|everything|label) examples", line)
    ]


@pytest.mark.parametrize(
    "command", [command for page in PAGES for command in commands(page)], ids=lambda command: command[-40:]
)
def test_predict_commands_run(command, room):
    result = CliRunner().invoke(app, shlex.split(command)[1:])
    assert result.exit_code == 0, result.output
    written = Path(re.search(r"--output (\S+)", command)[1])
    files = [path for path in written.rglob("*") if path.is_file()] if written.is_dir() else [written]
    assert sum(path.stat().st_size for path in files) > 10_000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_local_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize(
    "page", [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"], ids=lambda page: page.stem
)
def test_make_targets_that_are_named_exist(page):
    named = set(re.findall(r"(?:`|\$ )make (\w+)", page.read_text()))
    targets = set(re.findall(r"^(\w+):", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE))
    assert named
    assert named <= targets
