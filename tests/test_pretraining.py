"""Pretraining, launched as its docstring says, on a handful of drawn pictures."""

import io
import json
import re
import runpy
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState, GradientState
from conftest import REPOSITORY
from PIL import Image
from safetensors.torch import load_file
from test_examples import PLAIN, environment_of, launch, steps_in
from test_hub import FakeApi
from test_images import picture_file, spoil
from test_sami_model import sami_config
from test_teachers import small_sam
from transformers import AutoModelForPreTraining, HfArgumentParser

from efficientsam_hf import (
    EfficientSamForPreTraining,
    EfficientSamModel,
    EfficientSamSamiConfig,
    hub,
    modeling_efficientsam_sami,
)
from efficientsam_hf.training.progress import batches_per_step, sam_warmup, steps_of, warmup_steps
from efficientsam_hf.training.sami import training_flops

PRETRAIN = REPOSITORY / "examples" / "pretrain_sami.py"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, str]:
    """A student, a teacher and six pictures."""
    room = tmp_path_factory.mktemp("inputs")
    (room / "student.json").write_text(json.dumps(sami_config().to_dict()))
    small_sam().save_pretrained(room / "teacher")
    for number in range(6):
        path = room / "set" / f"class_{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture_file(number))
    return {"config": str(room / "student.json"), "teacher": str(room / "teacher"), "sources": str(room / "set")}


def options(inputs: dict, output: Path, *more: str) -> list[str]:
    given = ["--config", inputs["config"], "--sources", inputs["sources"], "--output_dir", str(output)]
    given += ["--total_batch", "4", "--batch_size", "1", "--base_rate", "0.1", "--log_every", "1"]
    return [*given, *([] if "--mae" in more else ["--teacher", inputs["teacher"]]), *more]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """`python examples/pretrain_sami.py ...` without the start of another Python; gives what it prints."""
    for name, value in PLAIN.items():
        monkeypatch.setenv(name, value)

    def run_here(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [str(PRETRAIN), *arguments])
        try:
            runpy.run_path(str(PRETRAIN), run_name="__main__")
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
        printed = capsys.readouterr()
        run_here.errors = printed.err
        return printed.out

    return run_here


def weights_of(output: Path, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(output / name / "model.safetensors")


def losses_in(printed: str) -> list[float]:
    return [float(re.search(r"loss (\S+)", line)[1]) for line in steps_in(printed)]


@pytest.mark.slow
def test_launched_by_accelerate(inputs, tmp_path):
    file = str(REPOSITORY / "examples" / "accelerate" / "cpu.yaml")
    given = options(inputs, tmp_path / "run", "--max_steps", "2", "--workers", "1")
    printed = launch("accelerate", "launch", "--config_file", file, str(PRETRAIN), *given)
    assert "1 process(es) of 4 batch(es) a step" in printed
    assert "2 of 2 steps done, models in" in printed
    assert len(losses_in(printed)) == 2
    trained = AutoModelForPreTraining.from_pretrained(tmp_path / "run" / "model")
    assert type(trained) is EfficientSamForPreTraining
    assert (tmp_path / "run" / "model" / "modeling_efficientsam_sami.py").is_file()
    whole = EfficientSamModel.from_pretrained(tmp_path / "run" / "efficientsam")
    for name, value in trained.vision_encoder.state_dict().items():
        assert torch.equal(value, whole.vision_encoder.state_dict()[name])
    (events,) = (tmp_path / "run" / "sami").glob("events.*")
    content = events.read_bytes()
    assert all(name in content for name in (b"loss", b"learning_rate", b"images_per_second", b"reconstruction"))


def test_stopped_after_4_of_8_and_resumed_is_8_straight_bit_for_bit(inputs, run, tmp_path):
    given = ["--max_steps", "8", "--ema", "0.9", "--save_every", "3", "--keep", "1"]
    straight = run(*options(inputs, tmp_path / "whole", *given))
    assert "0 of 0 steps done" in run(*options(inputs, tmp_path / "none", "--max_steps", "0"))
    assert "0 of 8 steps done, models" in run(*options(inputs, tmp_path / "parts", *given, "--stop_at", "0"))
    stopped = run(*options(inputs, tmp_path / "parts", *given, "--stop_at", "4"))
    early = weights_of(tmp_path / "parts")
    assert "4 of 8 steps done, models in" in stopped
    assert [path.name for path in (tmp_path / "parts").glob("step_*")] == ["step_4"]
    resumed = run(*options(inputs, tmp_path / "parts", *given))
    assert "4 of 8 steps done\n" in resumed
    assert steps_in(stopped) + steps_in(resumed) == steps_in(straight)
    whole, parts = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())
    assert not all(torch.equal(early[name], tensor) for name, tensor in whole.items())
    assert "8 of 8 steps done, models in" in run(*options(inputs, tmp_path / "parts", *given))


@pytest.mark.slow
def test_shared_out_weights_learn_the_same(inputs, run, tmp_path, monkeypatch):
    """By the launch file for FSDP, in bfloat16: what one process learns, by losses that nothing has rounded."""
    environment = environment_of(PRETRAIN.parent / "accelerate" / "gpu_x8_fsdp.yaml") | PLAIN
    given = ["--max_steps", "3", "--report_to", "none"]
    command = ["torchrun", "--nproc-per-node", "2", str(REPOSITORY / "tests" / "fsdp_on_cpu.py"), str(PRETRAIN)]
    together = launch(*command, *options(inputs, tmp_path / "parts", *given), **environment)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", environment["ACCELERATE_MIXED_PRECISION"])
    alone = run(*options(inputs, tmp_path / "one", *given))
    assert losses_in(together) == pytest.approx(losses_in(alone), abs=2e-4)
    one, shared = weights_of(tmp_path / "one"), weights_of(tmp_path / "parts")
    for name, tensor in one.items():
        torch.testing.assert_close(shared[name], tensor, rtol=1e-3, atol=1e-4)


KILLED = """
import os, runpy, sys
import torch, accelerate, efficientsam_hf, efficientsam_hf.training.teachers
sys.path.insert(0, sys.argv.pop(1))
from test_checkpoints import fork, kill_at
output, script = sys.argv.pop(1), sys.argv[1]

def work(moment):
    kill_at(moment, output)
    sys.argv = sys.argv[1:]
    runpy.run_path(script, run_name="__main__")
    sys.stdout.flush()

for moment in (3, 17, 24, 33, 38, 45, 10**9):
    print("status", fork(lambda: work(moment)), flush=True)
"""


@pytest.mark.slow
def test_killed_again_and_again_a_run_ends_as_if_never_stopped(inputs, run, tmp_path):
    """Each time after so many touches of its folder, so that it dies while training, saving, pruning and resuming."""
    given = ["--max_steps", "8", "--save_every", "1", "--keep", "1", "--report_to", "none"]
    run(*options(inputs, tmp_path / "whole", *given))
    killed = [str(Path(__file__).parent), str(tmp_path / "killed"), str(PRETRAIN)]
    printed = launch("python", "-c", KILLED, *killed, *options(inputs, tmp_path / "killed", *given))
    assert re.findall(r"status (\S+)", printed) == ["-9"] * 6 + ["0"]
    assert len(set(re.findall(r"(\d) of 8 steps done\n", printed))) > 3
    whole, parts = weights_of(tmp_path / "whole"), weights_of(tmp_path / "killed")
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_accumulation(inputs, run, tmp_path):
    given = ["--max_steps", "4", "--report_to", "none"]
    alone = run(*options(inputs, tmp_path / "one", *given))
    together = launch("torchrun", "--nproc-per-node", "2", str(PRETRAIN), *options(inputs, tmp_path / "two", *given))
    assert "1 process(es) of 4 batch(es) a step" in alone
    assert "2 process(es) of 2 batch(es) a step" in together
    assert losses_in(together) == pytest.approx(losses_in(alone), abs=1e-5)
    assert len(losses_in(alone)) == 4
    one, two = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    assert all((one[name] - two[name]).abs().max() < 1e-5 for name in one)


def test_mae_needs_no_teacher(inputs, run, tmp_path):
    printed = run(*options(inputs, tmp_path, "--mae", "--max_steps", "2", "--report_to", "none"))
    assert len(losses_in(printed)) == 2
    config = EfficientSamForPreTraining.from_pretrained(tmp_path / "model").config
    assert (config.target, config.decoder_config.attention, config.loss_on_visible) == ("pixels", "self", False)


def test_the_ablations_are_options(inputs, run, tmp_path):
    given = ["--loss", "cosine", "--mask_ratio", "0.5", "--decoder", "self", "--max_steps", "1", "--report_to", "none"]
    (loss,) = losses_in(run(*options(inputs, tmp_path, *given)))
    config = EfficientSamForPreTraining.from_pretrained(tmp_path / "model").config
    assert (config.loss, config.mask_ratio, config.decoder_config.attention) == ("cosine", 0.5, "self")
    assert config.target == "features"
    assert 0 < loss < 2


def test_bfloat16_is_close_to_float32(inputs, run, tmp_path, monkeypatch):
    given = ["--max_steps", "2", "--report_to", "none"]
    exact = losses_in(run(*options(inputs, tmp_path / "exact", *given)))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    rounded = losses_in(run(*options(inputs, tmp_path / "rounded", *given)))
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.02)
    assert {value.dtype for value in weights_of(tmp_path / "rounded").values()} == {torch.float32}


def test_the_bar_counts_from_where_the_run_goes_on(inputs, run, tmp_path):
    given = ["--max_steps", "4", "--report_to", "none"]
    run(*options(inputs, tmp_path, *given, "--stop_at", "3"))
    run(*options(inputs, tmp_path, *given))
    assert re.search(r"75%\|.*\| 3/4 .*100%\|.*\| 4/4 ", run.errors, re.DOTALL)


def test_pushed_to_the_hub_with_a_card(inputs, run, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "HfApi", FakeApi)
    printed = run(*options(inputs, tmp_path, "--max_steps", "1", "--report_to", "none", "--push_to_hub", "tiny-sami"))
    assert "https://hub/commit/1" in printed
    assert ("create_repo", "tiny-sami") in [call[:2] for call in FakeApi.last.calls]
    assert {"README.md", "config.json", "model.safetensors", "modeling_efficientsam_sami.py"} <= set(
        FakeApi.last.files
    )
    card = (tmp_path / "model" / "README.md").read_text()
    assert "# tiny-sami" in card
    assert f"guess the features of {inputs['teacher']}" in card


@pytest.mark.parametrize("tracker", ["trackio", "wandb"])
def test_trackers_get_numbers_and_pictures(tracker, inputs, run, tmp_path, monkeypatch):
    # Before the import, which is when trackio reads it.
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    pytest.importorskip(tracker)
    run(*options(inputs, tmp_path / "run", "--max_steps", "2", "--report_to", tracker))
    content = b"".join(
        path.read_bytes() for path in tmp_path.rglob("*") if path.suffix in (".db", ".wandb", ".db-wal")
    )
    assert all(name in content for name in (b"loss", b"learning_rate", b"images_per_second", b"reconstruction"))
    (picture,) = tmp_path.rglob("*.png")
    assert Image.open(picture).size == (4 * 64, 64)


def test_a_data_set_of_tars_is_streamed(inputs, run, tmp_path):
    """As the Hub holds it, in webdataset's form; the column is then the files' ending."""
    (tmp_path / "data").mkdir()
    for shard in range(2):
        with tarfile.open(tmp_path / "data" / f"{shard}.tar", "w") as tar:
            for number in range(3):
                content = picture_file(3 * shard + number)
                entry = tarfile.TarInfo(f"{shard}{number}.png")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    given = options(inputs, tmp_path / "run", "--dataset", str(tmp_path / "data"), "--column", "png")
    place = given.index("--sources")
    printed = run(*given[:place], *given[place + 2 :], "--max_steps", "2", "--report_to", "none")
    assert len(losses_in(printed)) == 2


def test_a_loss_that_is_no_number_stops_and_leaves_the_last_good_state(inputs, run, tmp_path, monkeypatch):
    count, loss = [0], modeling_efficientsam_sami.reconstruction_loss

    def spoilt(*args):
        count[0] += 1
        return loss(*args) * (float("nan") if count[0] > 10 else 1)

    monkeypatch.setattr(modeling_efficientsam_sami, "reconstruction_loss", spoilt)
    with pytest.raises(
        FloatingPointError, match=r"loss is nan at step 3: .*step_1; go on there, without step_2, with"
    ):
        run(*options(inputs, tmp_path, "--max_steps", "5", "--save_every", "1", "--report_to", "none"))
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_1", "step_2"]
    monkeypatch.setattr(modeling_efficientsam_sami, "reconstruction_loss", loss)
    assert "2 of 5 steps done" in run(*options(inputs, tmp_path, "--max_steps", "5", "--report_to", "none"))


def test_too_many_corrupt_pictures_stop(inputs, run, tmp_path):
    for number in range(6):
        path = tmp_path / "set" / f"class_{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture_file(number))
    spoil(tmp_path / "set")
    given = options({**inputs, "sources": str(tmp_path / "set")}, tmp_path, "--max_steps", "3", "--report_to", "none")
    with pytest.raises(ValueError, match=r"1 of 6 pictures are corrupt, wanted at most 1%: .*class_1/3\.png"):
        run(*given)


@pytest.mark.parametrize("attention", ["cross", "self"])
def test_flops_are_those_of_the_papers_figure(attention):
    """Multiply-adds of EfficientSAM-Ti by hand: 196 patches, 49 visible, 192 channels, 512 in the decoder."""
    embedding, link, head = 196 * 768 * 192, 49 * 192 * 512, 196 * 512 * 256
    encoder = 12 * (49 * 12 * 192**2 + 2 * 49 * 49 * 192)
    # Of a block's 12 squares of the width, 4 are attention's, half of them keys and values; 8 are the MLP's.
    queries = 147 if attention == "cross" else 196
    decoder = 8 * (queries * 10 * 512**2 + 196 * 2 * 512**2 + 2 * queries * 196 * 512)
    config = EfficientSamSamiConfig(decoder_config={"attention": attention})
    assert training_flops(config) == 3 * 2 * (embedding + encoder + link + decoder + head)


def test_epochs_and_batches_become_steps():
    assert steps_of(400, 1_281_167, 4096) == 125_113
    assert steps_of(1, 10, 4096) == 1
    assert steps_of(0, 10, 4) == 0
    assert batches_per_step(4096, 64, 8) == 8
    with pytest.raises(ValueError, match=r"batch_size \* processes = 100 \* 2, got 4096"):
        batches_per_step(4096, 100, 2)


def test_the_climb_is_as_long_as_was_said():
    assert warmup_steps(None, 40, None, 1_281_167, 4096) == 12_511
    assert warmup_steps(None, 40, 20, None, 4096) == 2
    assert warmup_steps(0, 40, 20, 100, 10) == 0
    assert [sam_warmup(None, steps) for steps in (100_000, 2500, 100, 9)] == [250, 250, 10, 0]
    assert [sam_warmup(given, 100) for given in (0, 250)] == [0, 250]
    assert warmup_steps(0.5, 40, 20, 100, 10) == 5
    with pytest.raises(ValueError, match=r"3 epochs of warmup of a stream, .*: give --pictures"):
        warmup_steps(3, 40, 20, None, 10)


def test_the_defaults_are_the_papers():
    arguments = runpy.run_path(str(PRETRAIN))["Arguments"](output_dir="run", sources=["set"])
    assert (arguments.total_batch, arguments.epochs) == (4096, 400)
    assert arguments.base_rate * arguments.total_batch / 256 == pytest.approx(2.4e-3)
    assert (arguments.weight_decay, arguments.beta2, arguments.ema) == (0.05, 0.95, 0.0)


def test_the_commands_of_the_docstring_are_understood():
    script = runpy.run_path(str(PRETRAIN))
    commands = re.findall(r"accelerate launch examples/pretrain_sami\.py (.+)", script["__doc__"])
    assert len(commands) == 2
    for command in commands:
        HfArgumentParser(script["Arguments"]).parse_args_into_dataclasses(command.split())


@pytest.mark.parametrize("path", sorted(PRETRAIN.parent.glob("accelerate/*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_the_launch_files(path):
    config = load_config_from_file(str(path))
    layers = (getattr(config, "fsdp_config", None) or {}).get("fsdp_transformer_layer_cls_to_wrap", "")
    assert {name for name in layers.split(",") if name} <= set(EfficientSamForPreTraining._no_split_modules)
    assert config.num_processes == (8 if "x8" in path.stem else 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give either --sources or --dataset, got neither"),
        ({"sources": ["a"], "dataset": "b"}, "give either --sources or --dataset, got both"),
        ({"dataset": "b"}, "give --pictures or --max_steps, got neither"),
        ({"sources": ["a"], "mae": True, "teacher": "sam"}, "give either --mae or --teacher, got both"),
        ({"sources": ["a"], "variant": "base", "config": "b"}, "give either --config or --variant, got both"),
        ({"sources": ["a"], "variant": "huge"}, "--variant must be one of tiny, small, base, got 'huge'"),
    ],
)
def test_bad_arguments_are_said(given, message):
    with pytest.raises(ValueError, match=message):
        runpy.run_path(str(PRETRAIN))["Arguments"](output_dir="run", **given)
