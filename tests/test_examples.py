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
from PIL import Image
from safetensors.torch import load_file
from synthetic import make_folder, make_scene, make_tar, scene_files
from test_efficientnet import ROWS, random_weights
from transformers import HfArgumentParser

from efficientsam_hf import EfficientSamConfig, EfficientSamModel, EfficientSamProcessor
from efficientsam_hf.efficientnet import start_from_efficientnet

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
        "--total_batch",
        "4",
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


def with_sources(inputs: dict, *sources: str) -> dict:
    return {**inputs, "sources": list(sources)}


@pytest.mark.parametrize("kind", ["pairs", "shard", "stream", "coco", "masks"])
def test_every_kind_of_source_trains(kind: str, inputs, run, tmp_path: Path):
    pictures = {f"images/{name}": data for name, data in scene_files(3).items() if name.endswith(".jpg")}
    for name, data in pictures.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    square = [10, 5, 40, 5, 40, 25, 10, 25]
    images = [{"id": n, "file_name": f"sa_{n}.jpg", "width": 80, "height": 60} for n in range(3)]
    records = [{"id": n, "image_id": n, "category_id": 1, "segmentation": [square]} for n in range(3)]
    (tmp_path / "instances.json").write_text(json.dumps({"images": images, "annotations": records}))
    if kind == "masks":
        (tmp_path / "masks").mkdir()
        for number in range(3):
            Image.fromarray(make_scene(number)[1][:2].argmax(0).astype("uint8")).save(
                tmp_path / f"masks/sa_{number}.png"
            )
    source = {
        "pairs": inputs["sources"][0],
        "shard": inputs["sources"][1],
        "stream": inputs["sources"][1].replace("000000", "*"),
        "coco": f"{tmp_path / 'instances.json'}:{tmp_path / 'images'}",
        "masks": str(tmp_path),
    }[kind]
    printed = run(*options(with_sources(inputs, source), tmp_path / "run", "--max_steps", "2"))
    assert len(steps_in(printed)) == 2
    assert "2 of 2 steps done, model in" in printed


def test_a_stream_stops_and_goes_on_bit_for_bit(inputs, run, tmp_path: Path):
    """In the middle of a shard, with other workers, past a pair that cannot be read."""
    for number, count in enumerate((5, 4)):
        make_tar(tmp_path / f"sa_{number:06d}.tar", {**scene_files(count), "sa_1.jpg": b""})
    given = with_sources(inputs, str(tmp_path / "sa_*.tar"))
    stopped = run(
        *options(given, tmp_path / "parts", "--max_steps", "3", "--lanes", "2", "--max_minutes", "0", "--workers", "2")
    )
    assert "1 of 3 steps done, model in" in stopped
    resumed = run(*options(given, tmp_path / "parts", "--max_steps", "3", "--lanes", "2"))
    whole = run(*options(given, tmp_path / "whole", "--max_steps", "3", "--lanes", "2"))
    assert steps_in(resumed) == steps_in(whole)[1:] != []
    parts, unbroken = weights_of(tmp_path / "parts"), weights_of(tmp_path / "whole")
    assert all(torch.equal(parts[name], tensor) for name, tensor in unbroken.items())
    assert "skipped, such as: sa_1 in" in resumed
    with pytest.raises(ValueError, match="a stream of 2 lanes, found 1 now"):
        run(*options(given, tmp_path / "parts", "--max_steps", "4"))


@pytest.mark.slow
def test_a_stream_is_shared_by_two_processes(inputs, tmp_path: Path):
    given = with_sources(inputs, inputs["sources"][1].replace("000000", "*"))
    for steps in ("1", "2"):
        arguments = options(given, tmp_path / "run", "--max_steps", steps)
        printed = launch("torchrun", "--nproc-per-node", "2", str(FINETUNE), *arguments)
        assert printed.count(f"{steps} of {steps} steps done, model in") == 1
    state = torch.load(tmp_path / "run" / "step_2" / "custom_checkpoint_0.pkl")
    # Two steps of two batches of two samples: of its single pair each lane has begun the eighth epoch, or a later one.
    assert sorted(state["places"]) == [0, 1]
    assert min(epoch for epoch, *_ in state["places"].values()) >= 7


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


def test_a_stem_starts_from_weights_and_learns_at_its_own_rate(inputs, run, tmp_path: Path):
    config = tiny_config().to_dict()
    config["vision_config"].update(stem_stages=ROWS, stem_channels=5, patch_size=8)
    (tmp_path / "stem.json").write_text(json.dumps(config))
    torch.save(random_weights(), tmp_path / "lite.pth")
    arguments = ["--config", str(tmp_path / "stem.json"), *options(inputs, tmp_path / "run")[2:]]
    arguments += ["--stem", str(tmp_path / "lite.pth"), "--stem_rate", "0", "--weight_decay", "0"]
    run(*arguments, "--max_steps", "1", "--freeze", "vision_encoder.embeddings.patch_embedding.conv.*")
    trained = EfficientSamModel.from_pretrained(tmp_path / "run" / "model").vision_encoder.embeddings
    stem = EfficientSamModel(EfficientSamConfig(**config)).vision_encoder.embeddings.patch_embedding
    start_from_efficientnet(stem, tmp_path / "lite.pth")
    for name, value in stem.state_dict().items():
        same = torch.equal(value, trained.patch_embedding.state_dict()[name])
        assert same == (not name.startswith("projection."))


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
    with pytest.raises(ValueError, match="--stem starts a new model's stem: give it with --config"):
        run("--sources", "set", "--output_dir", str(tmp_path), "--model", "tiny", "--stem", "lite.pth")
    with pytest.raises(ValueError, match="--schedule must be linear or cosine, got 'steps'"):
        run(*options(inputs, tmp_path, "--schedule", "steps"))
    with pytest.raises(ValueError, match="rounds must be 1 to 4: a box takes two of 6 slots; got 5"):
        run(*options(inputs, tmp_path, "--rounds", "5"))
    with pytest.raises(FileNotFoundError, match=r"nothing at .*missing\.tar: wanted a folder or a tar"):
        run(*options(inputs, tmp_path, "--sources", str(tmp_path / "missing.tar")))
    with pytest.raises(ValueError, match=r"--sources must be all streamed \(patterns, addresses\) or none, got"):
        run(*options(inputs, tmp_path, "--sources", "set", "sa_*.tar"))
    stream = with_sources(inputs, inputs["sources"][1].replace("000000", "*"))
    with pytest.raises(ValueError, match="a stream has no second picture to paste from"):
        run(*options(stream, tmp_path, "--objects", "0.5"))
    with pytest.raises(ValueError, match="--epochs"):
        run(*options(inputs, tmp_path, "--epochs", "5"))
    with pytest.raises(SystemExit):
        run("--config", inputs["config"])
    assert "the following arguments are required: --sources, --output_dir" in capsys.readouterr().err
