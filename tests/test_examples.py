"""The examples, launched as their docstrings say, on a handful of drawn pictures."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from conftest import REPOSITORY, tiny_config
from safetensors.torch import load_file
from synthetic import make_folder, make_tar, scene_files
from transformers import HfArgumentParser

from efficientsam_hf import EfficientSamConfig, EfficientSamModel, EfficientSamProcessor

FINETUNE = REPOSITORY / "examples" / "finetune_sa1b.py"
SCRIPTS = Path(sys.executable).parent
# Nothing of the machine's own shall matter: not its accelerators, nor its number of cores.
PLAIN = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A config, a folder and a shard of pictures."""
    folder = tmp_path_factory.mktemp("inputs")
    config = tiny_config(negative_points=True).to_dict()
    (folder / "tiny.json").write_text(json.dumps(config))
    make_folder(folder / "set", scene_files(3), parts=True)
    make_tar(folder / "sa_000000.tar", scene_files(2))
    return {"config": str(folder / "tiny.json"), "sources": [str(folder / "set"), str(folder / "sa_000000.tar")]}


def options(inputs: dict, output: Path, *more: str) -> list[str]:
    given = ["--config", inputs["config"], "--sources", *inputs["sources"], "--output_dir", str(output)]
    given += [
        "--masks_per_image",
        "3",
        "--rounds",
        "2",
        "--flip",
        "0.5",
        "--smallest_crop",
        "0.7",
        "--accumulate",
        "2",
    ]
    return [*given, "--batch_size", "2", "--warmup", "1", "--learning_rate", "1e-3", "--log_every", "1", *more]


def launch(launcher: str, *arguments: str) -> str:
    """What the command prints; the launcher is the one beside this Python."""
    environment = {**os.environ, **PLAIN, "PYTHONPATH": str(REPOSITORY / "src")}
    command = [str(SCRIPTS / launcher), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """`python examples/finetune_sa1b.py ...` without the start of another Python; gives what it prints."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, value in PLAIN.items():
        monkeypatch.setenv(name, value)

    def run_here(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [str(FINETUNE), *arguments])
        try:
            runpy.run_path(str(FINETUNE), run_name="__main__")
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
        return capsys.readouterr().out

    yield run_here
    torch.set_num_threads(threads)


def steps_in(printed: str) -> list[str]:
    """The lines that tell the losses, without the times."""
    return [line.split(" (")[0] for line in printed.splitlines() if line.startswith("step ")]


def weights_of(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model" / "model.safetensors")


# --------------------------------------------------------------------------------------------------------------------
# Fine-tuning


@pytest.mark.slow
def test_finetuning_stops_and_goes_on_bit_for_bit(inputs, run, tmp_path: Path):
    given = options(inputs, tmp_path / "parts", "--max_steps", "3")
    stopped = launch("accelerate", "launch", str(FINETUNE), *given, "--max_minutes", "0")
    assert "1 process(es), 0 of 3 steps done" in stopped
    assert "1 of 3 steps done, model in" in stopped
    first = weights_of(tmp_path / "parts")

    resumed = run(*given)
    assert "1 process(es), 1 of 3 steps done" in resumed
    assert "3 of 3 steps done, model in" in resumed
    whole = run(*options(inputs, tmp_path / "whole", "--max_steps", "3"))
    assert steps_in(resumed) == steps_in(whole)[1:] != []
    parts, whole = weights_of(tmp_path / "parts"), weights_of(tmp_path / "whole")
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())
    assert not all(torch.equal(first[name], tensor) for name, tensor in whole.items())


@pytest.mark.slow
def test_finetuning_in_two_processes_stops_in_company(inputs, tmp_path: Path):
    given = options(inputs, tmp_path / "run", "--max_steps", "5", "--max_minutes", "0")
    printed = launch("torchrun", "--nproc-per-node", "2", str(FINETUNE), *given)
    assert printed.count("2 process(es), 0 of 5 steps done") == 1
    assert printed.count("1 of 5 steps done, model in") == 1
    states = {path.name for path in (tmp_path / "run" / "step_1").iterdir()}
    assert {"random_states_0.pkl", "random_states_1.pkl", "model.safetensors"} <= states
    EfficientSamModel.from_pretrained(tmp_path / "run" / "model")


def test_finetuning_from_a_model_at_another_size(inputs, run, tmp_path: Path):
    start = EfficientSamModel(tiny_config())
    start.save_pretrained(tmp_path / "start")
    EfficientSamProcessor.from_model_config(start.config).save_pretrained(tmp_path / "start")
    arguments = ["--model", str(tmp_path / "start"), *options(inputs, tmp_path / "run")[2:]]
    run(
        *arguments,
        "--image_size",
        "32",
        "--max_steps",
        "2",
        "--save_every",
        "1",
        "--keep",
        "1",
        "--schedule",
        "cosine",
    )
    trained = EfficientSamModel.from_pretrained(tmp_path / "run" / "model")
    assert not torch.equal(trained.mask_decoder.mask_tokens, start.mask_decoder.mask_tokens)
    assert trained.config.vision_config.image_size == 64
    assert EfficientSamProcessor.from_pretrained(tmp_path / "run" / "model").image_processor.size.height == 64
    assert [path.name for path in (tmp_path / "run").glob("step_*")] == ["step_2"]
    assert list((tmp_path / "run" / "log").glob("events.*"))


def test_a_finished_run_has_nothing_left_to_do(inputs, run, tmp_path: Path):
    run(*options(inputs, tmp_path, "--max_steps", "1"))
    before = weights_of(tmp_path)
    for steps in ("1", "0"):
        assert f"1 of {steps} steps done, model in" in run(*options(inputs, tmp_path, "--max_steps", steps))
    assert all(torch.equal(before[name], tensor) for name, tensor in weights_of(tmp_path).items())


def test_help_shows_every_option(run, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("--help")
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for option in ("--sources", "--output_dir", "--model", "--config", "--max_minutes", "--rounds"):
        assert option in shown


def test_the_commands_of_the_docstring_are_understood():
    script = runpy.run_path(str(FINETUNE))
    commands = re.findall(r"accelerate launch examples/finetune_sa1b\.py (.+)", script["__doc__"])
    assert len(commands) == 2
    for command in commands:
        arguments = HfArgumentParser(script["Arguments"]).parse_args_into_dataclasses(command.split())[0]
        assert arguments.sources


@pytest.mark.parametrize("path", sorted(FINETUNE.parent.glob("configs/*.json")), ids=lambda path: path.stem)
def test_the_configs_are_models(path: Path):
    config = EfficientSamConfig(**json.loads(path.read_text()))
    # On the meta device a model has its shapes but takes neither time nor memory.
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in EfficientSamModel(config).parameters()) > 1e6
    assert EfficientSamProcessor.from_model_config(config).image_processor.size.height % 16 == 0


def test_bad_arguments_are_said(inputs, run, tmp_path: Path, capsys):
    with pytest.raises(ValueError, match="give either --model or --config, got neither"):
        run("--sources", "set", "--output_dir", str(tmp_path))
    with pytest.raises(ValueError, match="give either --model or --config, got both"):
        run(*options(inputs, tmp_path, "--model", "tiny"))
    with pytest.raises(ValueError, match="--schedule must be linear or cosine, got 'steps'"):
        run(*options(inputs, tmp_path, "--schedule", "steps"))
    with pytest.raises(ValueError, match="rounds must be 1 to 4: a box takes two of 6 slots; got 5"):
        run(*options(inputs, tmp_path, "--rounds", "5"))
    with pytest.raises(FileNotFoundError, match=r"nothing at .*missing\.tar: wanted a folder or a tar"):
        run(*options(inputs, tmp_path, "--sources", str(tmp_path / "missing.tar")))
    with pytest.raises(ValueError, match="--epochs"):
        run(*options(inputs, tmp_path, "--epochs", "5"))
    with pytest.raises(SystemExit):
        run("--config", inputs["config"])
    assert "the following arguments are required: --sources, --output_dir" in capsys.readouterr().err
