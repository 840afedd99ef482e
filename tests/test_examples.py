"""The examples, launched as their docstrings say, on a handful of drawn pictures."""

import json
import os
import re
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils.launch import prepare_multi_gpu_env
from conftest import REPOSITORY, stem_config, tiny_config
from PIL import Image
from safetensors.torch import load_file
from synthetic import make_folder, make_scene, make_tar, scene_files
from test_efficientnet import ROWS, random_weights
from transformers import HfArgumentParser

from efficientsam_hf import EfficientSamConfig, EfficientSamModel, EfficientSamProcessor
from efficientsam_hf.efficientnet import start_from_efficientnet

FINETUNE = REPOSITORY / "examples" / "finetune_sa1b.py"
CUSTOM = REPOSITORY / "examples" / "finetune_custom.py"
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


def launch(launcher: str, *arguments: str, **more: str) -> str:
    """What the command prints; the launcher is the one beside this Python. `more` goes into its environment."""
    environment = {**os.environ, **PLAIN, "PYTHONPATH": str(REPOSITORY / "src"), **more}
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

    def run_here(*arguments: str, script: Path = FINETUNE) -> str:
        monkeypatch.setattr(sys, "argv", [str(script), *arguments])
        try:
            runpy.run_path(str(script), run_name="__main__")
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
        return capsys.readouterr().out

    yield run_here
    torch.set_num_threads(threads)


@pytest.fixture
def run_custom(run):
    return partial(run, script=CUSTOM)


def steps_in(printed: str) -> list[str]:
    """The lines that tell the losses, without the times."""
    return [line.split(" (")[0] for line in printed.splitlines() if line.startswith("step ")]


def measured_in(printed: str) -> list[str]:
    """The lines that tell how good the model is on pictures held out."""
    return [line for line in printed.splitlines() if line.startswith("evaluation after ")]


def weights_of(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model" / "model.safetensors")


# --------------------------------------------------------------------------------------------------------------------
# Fine-tuning


WITH_ALL = ["--ema", "0.5", "--gradient_checkpointing", "--layer_decay", "0.8", "--smallest_scale", "0.5"]
WITH_ALL += ["--hold_out", "3", "--eval_every", "2", "--eval_pictures", "2", "--lora", "2", "--mask_prompts"]


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], WITH_ALL], ids=["plain", "with all"])
def test_finetuning_stops_and_goes_on_bit_for_bit(more, inputs, run, tmp_path: Path):
    config = json.loads(Path(inputs["config"]).read_text())
    config["vision_config"]["drop_path_rate"] = 0.5
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    inputs = {**inputs, "config": str(tmp_path / "tiny.json")}
    given = options(inputs, tmp_path / "parts", "--max_steps", "3", *more)
    stopped = launch("accelerate", "launch", str(FINETUNE), *given, "--max_minutes", "0")
    assert "1 process(es) of 2 batch(es) a step, 0 of 3 steps done" in stopped
    assert "1 of 3 steps done, model in" in stopped
    first = weights_of(tmp_path / "parts")

    resumed = run(*given)
    assert "1 process(es) of 2 batch(es) a step, 1 of 3 steps done" in resumed
    assert "3 of 3 steps done, model in" in resumed
    whole = run(*options(inputs, tmp_path / "whole", "--max_steps", "3", *more))
    assert steps_in(resumed) == steps_in(whole)[1:] != []
    assert measured_in(resumed) == measured_in(whole)
    assert len(measured_in(whole)) == (2 if more else 0)
    parts, whole = weights_of(tmp_path / "parts"), weights_of(tmp_path / "whole")
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())
    assert not all(torch.equal(first[name], tensor) for name, tensor in whole.items())


@pytest.mark.slow
def test_finetuning_in_two_processes_stops_in_company(inputs, tmp_path: Path):
    given = options(inputs, tmp_path / "run", "--max_steps", "5", "--max_minutes", "0")
    printed = launch("torchrun", "--nproc-per-node", "2", str(FINETUNE), *given)
    assert printed.count("2 process(es) of 1 batch(es) a step, 0 of 5 steps done") == 1
    assert printed.count("1 of 5 steps done, model in") == 1
    states = {path.name for path in (tmp_path / "run" / "step_1").iterdir()}
    assert {"random_states_0.pkl", "random_states_1.pkl", "model.safetensors"} <= states
    EfficientSamModel.from_pretrained(tmp_path / "run" / "model")


@pytest.mark.slow
def test_two_processes_learn_what_one_does_with_accumulation(inputs, run, tmp_path: Path):
    more = ["--max_steps", "3", "--hold_out", "3", "--eval_every", "3"]
    alone = run(*options(inputs, tmp_path / "one", *more))
    arguments = options(inputs, tmp_path / "two", *more)
    together = launch("torchrun", "--nproc-per-node", "2", str(FINETUNE), *arguments)
    assert "1 process(es) of 2 batch(es) a step" in alone
    assert "2 process(es) of 1 batch(es) a step" in together
    assert len(measured_in(together)) == 1
    losses = [[float(line.split()[3]) for line in steps_in(printed)] for printed in (alone, together)]
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)
    one, two = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4)


def environment_of(launch_file: Path) -> dict[str, str]:
    """What `accelerate launch` tells the processes that it starts by this file."""
    given = launch_command_parser().parse_args(["--config_file", str(launch_file), "script.py"])
    told = prepare_multi_gpu_env(_validate_launch_command(given)[0])
    return {name: value for name, value in told.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


@pytest.mark.slow
def test_shared_out_weights_learn_the_same_and_go_on(inputs, run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By the launch file for FSDP, in bfloat16: what one process learns, whole in the end, past a stop."""
    environment = environment_of(FINETUNE.parent / "accelerate" / "gpu_x8_fsdp.yaml") | PLAIN
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    more = ["--max_steps", "3", "--hold_out", "3", "--eval_every", "3", "--eval_pictures", "1"]
    more += ["--mask_prompts", "--answer_chance", "0.5"]
    together, parts = "", options(inputs, tmp_path / "parts", *more)
    command = ["torchrun", "--nproc-per-node", "2", str(REPOSITORY / "tests" / "fsdp_on_cpu.py"), str(FINETUNE)]
    for stop in (["--max_minutes", "0"], []):
        together += launch(*command, *parts, *stop, **environment)
    assert "2 process(es) of 1 batch(es) a step, 1 of 3 steps done" in together
    assert (tmp_path / "parts" / "step_3" / "pytorch_model_fsdp.bin").exists()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", environment["ACCELERATE_MIXED_PRECISION"])
    alone = run(*options(inputs, tmp_path / "one", *more))
    losses = [[float(line.split()[3]) for line in steps_in(printed)] for printed in (alone, together)]
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)
    assert len(measured_in(together)) == 1
    one, shared = weights_of(tmp_path / "one"), weights_of(tmp_path / "parts")
    assert one.keys() == shared.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(shared[name], tensor, rtol=1e-3, atol=1e-4)


def test_nothing_is_measured_on_no_pictures(inputs, run, tmp_path: Path):
    more = ["--hold_out", "3", "--eval_every", "1", "--eval_pictures", "0", "--max_steps", "1"]
    printed = run(*options(inputs, tmp_path, *more))
    assert "0 pictures to measure on" in printed
    assert not measured_in(printed)


def test_holding_all_out_leaves_nothing_to_train_on(inputs, run, tmp_path: Path):
    with pytest.raises(ValueError, match=r"--hold_out 1 leaves nothing of .* to train on: found \d+"):
        run(*options(inputs, tmp_path, "--hold_out", "1", "--max_steps", "1"))


def test_a_loss_that_explodes_names_the_last_good_state(inputs, run, tmp_path: Path):
    given = options(inputs, tmp_path, "--save_every", "1")
    run(*given, "--max_steps", "1")
    with pytest.raises(
        FloatingPointError, match=r"(loss|focal|dice|iou) is .* at step \d+: the last good state is .*step_1; go on"
    ):
        run(*given, "--max_steps", "9", "--learning_rate", "1e9", "--max_grad_norm", "1e9", "--warmup", "0")
    good = list(tmp_path.glob("step_1"))
    assert all(
        torch.isfinite(value).all() for path in good for value in load_file(path / "model.safetensors").values()
    )


def test_the_best_model_is_kept_and_a_hopeless_run_ends(inputs, run, tmp_path: Path):
    more = ["--max_steps", "9", "--eval_every", "1", "--hold_out", "3", "--patience", "2", "--learning_rate", "0"]
    printed = run(*options(inputs, tmp_path, *more))
    assert len(measured_in(printed)) == 3
    assert "3 of 9 steps done" in printed
    EfficientSamModel.from_pretrained(tmp_path / "best")
    assert "box" in measured_in(printed)[0]
    events = b"".join(path.read_bytes() for path in (tmp_path / "log").glob("events.*"))
    assert b"held_out_box" in events
    assert b"truth_and_answer" in events
    # Started again it has nothing left to do.
    before = weights_of(tmp_path)
    again = run(*options(inputs, tmp_path, *more))
    assert "3 of 9 steps done, model in" in again
    assert not steps_in(again)
    assert all(torch.equal(before[name], tensor) for name, tensor in weights_of(tmp_path).items())


def test_a_model_that_never_had_them_learns_all_kinds_of_prompts(inputs, run, tmp_path: Path):
    start = EfficientSamModel(tiny_config())
    start.save_pretrained(tmp_path / "start")
    EfficientSamProcessor.from_model_config(start.config).save_pretrained(tmp_path / "start")
    given = ["--model", str(tmp_path / "start"), *options(inputs, tmp_path / "run", "--max_steps", "2")[2:]]
    given[given.index("--rounds") : given.index("--rounds") + 2] = ["--recipe", "sam", "--single_mask"]
    printed = run(*given, "--negative_points", "--mask_prompts", "--max_prompt_points", "12")
    assert len(steps_in(printed)) == 2
    trained = EfficientSamModel.from_pretrained(tmp_path / "run" / "model")
    processor = EfficientSamProcessor.from_pretrained(tmp_path / "run" / "model")
    assert trained.config.mask_decoder_config.single_mask_token
    assert (processor.max_prompt_points, processor.negative_points, processor.mask_prompts) == (12, True, True)
    assert trained.config.prompt_encoder_config.padded_prompt_points == 6
    assert trained.prompt_encoder.background.any()


def test_a_run_is_pushed_to_the_hub_on_request(inputs, run, tmp_path: Path, monkeypatch):
    pushed = []
    monkeypatch.setattr("efficientsam_hf.push_to_hub", lambda *given: pushed.append(given) or "https://hub/tiny")
    printed = run(*options(inputs, tmp_path, "--max_steps", "1", "--push_to_hub", "me/tiny", "--lora", "2"))
    assert "https://hub/tiny" in printed
    model, _, name, card = pushed[0]
    assert (name, "# me/tiny" in card) == ("me/tiny", True)
    assert not any("lora" in name for name in model.state_dict())


@pytest.mark.parametrize("train", ["decoder", "lora", "all"])
def test_ones_own_pictures_are_learnt(train, inputs, run_custom, tmp_path: Path):
    start = EfficientSamModel(tiny_config())
    start.save_pretrained(tmp_path / "start")
    EfficientSamProcessor.from_model_config(start.config).save_pretrained(tmp_path / "start")
    given = [
        "--sources",
        inputs["sources"][0],
        "--output_dir",
        str(tmp_path / "run"),
        "--model",
        str(tmp_path / "start"),
    ]
    given += [
        "--train",
        train,
        "--max_steps",
        "4",
        "--eval_every",
        "2",
        "--hold_out",
        "2",
        "--learning_rate",
        "1e-3",
    ]
    printed = run_custom(*given)
    assert "1 pictures to train on, 2 to choose by" in printed
    assert printed.count("mean IoU box") == 3
    trained = EfficientSamModel.from_pretrained(tmp_path / "run" / "model")
    same = torch.equal(trained.vision_encoder.neck.conv1.weight, start.vision_encoder.neck.conv1.weight)
    assert same or (train == "all" and "best after step 0" not in printed)
    # Two rows, each the truth, before and after.
    assert Image.open(tmp_path / "run" / "before_after.png").size == (3 * 324, 2 * 244)


def test_ones_own_pictures_are_the_work_of_one_process(run_custom, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("accelerate.Accelerator.num_processes", 2)
    with pytest.raises(ValueError, match=r"one process's work, found 2: examples/finetune_sa1b\.py takes more"):
        run_custom("--sources", "x", "--output_dir", str(tmp_path))


def test_ones_own_pictures_want_some_to_choose_by(inputs, run_custom, tmp_path: Path):
    with pytest.raises(ValueError, match="--train must be decoder, lora or all, got 'encoder'"):
        run_custom("--sources", "x", "--output_dir", str(tmp_path), "--train", "encoder")
    with pytest.raises(ValueError, match="--hold_out must be 2 or more, or nothing is trained on; got 1"):
        run_custom("--sources", "x", "--output_dir", str(tmp_path), "--hold_out", "1")
    make_folder(tmp_path / "one", scene_files(1))
    with pytest.raises(ValueError, match=r"wanted two pictures with masks or more in .*one, found 1"):
        run_custom("--sources", str(tmp_path / "one"), "--output_dir", str(tmp_path))


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


def test_a_numbered_picture_that_cannot_be_read_is_skipped_and_named(inputs, run, run_custom, tmp_path: Path):
    """Also after the run has gone on, and where it is one of those to measure on."""
    files = {**scene_files(7), "sa_0.jpg": b"", "sa_5.jpg": b"", "sa_6.json": b""}
    folder = str(make_folder(tmp_path / "set", files))
    given = options(with_sources(inputs, folder), tmp_path / "run", "--hold_out", "4", "--eval_every", "2")
    assert "2 skipped, such as: sa_5 in" in run(*given, "--max_steps", "4")
    printed = run(*given, "--max_steps", "5")
    assert "2 skipped, such as: sa_5 in" in printed
    assert len(measured_in(printed)) == 1
    start = str(tmp_path / "run" / "model")
    given = ["--sources", folder, "--model", start, "--output_dir", str(tmp_path / "custom"), "--max_steps", "4"]
    assert "2 skipped, such as: sa_5 in" in run_custom(*given, "--eval_every", "4")


@pytest.mark.slow
def test_a_stream_is_shared_by_two_processes(inputs, tmp_path: Path):
    given = with_sources(inputs, inputs["sources"][1].replace("000000", "*"))
    for steps in ("1", "2"):
        arguments = options(given, tmp_path / "run", "--max_steps", steps)
        printed = launch("torchrun", "--nproc-per-node", "2", str(FINETUNE), *arguments)
        assert printed.count(f"{steps} of {steps} steps done, model in") == 1
    state = torch.load(tmp_path / "run" / "step_2" / "custom_checkpoint_0.pkl")
    # Two steps of two samples a process: of its single pair each lane has begun the fourth epoch, or a later one.
    assert sorted(state["places"]) == [0, 1]
    assert min(epoch for epoch, *_ in state["places"].values()) >= 3


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


def test_a_model_with_a_stem_learns_to_hand_on_details(inputs, run, tmp_path: Path):
    start = EfficientSamModel(stem_config())
    start.save_pretrained(tmp_path / "start")
    EfficientSamProcessor.from_model_config(start.config).save_pretrained(tmp_path / "start")
    given = ["--model", str(tmp_path / "start"), *options(inputs, tmp_path / "run", "--max_steps", "1")[2:]]
    run(*given, "--details", "--copy_paste", "1")
    details = EfficientSamModel.from_pretrained(
        tmp_path / "run" / "model"
    ).vision_encoder.embeddings.patch_embedding.details
    assert details.coarse.weight.any()
    assert details.fine.weight.any()


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


def test_details_are_for_new_models_too(tmp_path: Path):
    (tmp_path / "stem.json").write_text(json.dumps(stem_config().to_dict()))
    script = runpy.run_path(str(FINETUNE))
    given = {"sources": ["x"], "output_dir": "x", "config": str(tmp_path / "stem.json")}
    found = [script["build"](script["Arguments"](**given, details=wanted))[0].config for wanted in (False, True)]
    assert [bool(config.vision_config.detail_channels) for config in found] == [False, True]


def test_bad_arguments_are_said(inputs, run, tmp_path: Path, capsys):
    with pytest.raises(ValueError, match="give either --model or --config, got neither"):
        run("--sources", "set", "--output_dir", str(tmp_path))
    with pytest.raises(ValueError, match="give either --model or --config, got both"):
        run(*options(inputs, tmp_path, "--model", "tiny"))
    with pytest.raises(ValueError, match="--stem starts a new model's stem: give it with --config"):
        run("--sources", "set", "--output_dir", str(tmp_path), "--model", "tiny", "--stem", "lite.pth")
    with pytest.raises(ValueError, match="--schedule must be linear or cosine, got 'steps'"):
        run(*options(inputs, tmp_path, "--schedule", "steps"))
    with pytest.raises(ValueError, match="rounds must be 1 to 5: a box takes two of 6 slots; got 6"):
        run(*options(inputs, tmp_path, "--rounds", "6"))
    with pytest.raises(ValueError, match="--recipe must be one of paper, sam, sam2, got 'sam3'"):
        run(*options(inputs, tmp_path, "--recipe", "sam3"))
    with pytest.raises(
        ValueError, match=r"the total batch must be a multiple of batch_size \* processes = 2 \* 1, got 3"
    ):
        run(*options(inputs, tmp_path, "--total_batch", "3"))
    with pytest.raises(FileNotFoundError, match=r"nothing at .*missing\.tar: wanted a folder or a tar"):
        run(*options(inputs, tmp_path, "--sources", str(tmp_path / "missing.tar")))
    with pytest.raises(ValueError, match=r"--sources must be all streamed \(patterns, addresses\) or none, got"):
        run(*options(inputs, tmp_path, "--sources", "set", "sa_*.tar"))
    with pytest.raises(ValueError, match="--patience 2 wants pictures to measure on, found none: give --eval_sources"):
        run(*options(inputs, tmp_path, "--patience", "2"))
    stream = with_sources(inputs, inputs["sources"][1].replace("000000", "*"))
    with pytest.raises(ValueError, match="a stream has no second picture to paste from"):
        run(*options(stream, tmp_path, "--objects", "0.5", "--max_steps", "1"))
    with pytest.raises(ValueError, match="a stream does not say how long it is: give --pictures or --max_steps"):
        run(*options(stream, tmp_path))
    with pytest.raises(ValueError, match="--accumulate"):
        run(*options(inputs, tmp_path, "--accumulate", "5"))
    with pytest.raises(SystemExit):
        run("--config", inputs["config"])
    assert "the following arguments are required: --output_dir/--output-dir, --sources" in capsys.readouterr().err


def test_a_run_stops_at_a_step_and_goes_on(inputs, tmp_path, run):
    given = options(inputs, tmp_path / "parts", "--max_steps", "3", "--log_every", "1")
    assert "1 of 3 steps done, model in" in (stopped := run(*given, "--stop_at", "1"))
    resumed, whole = run(*given), run(*options(inputs, tmp_path / "whole", "--max_steps", "3", "--log_every", "1"))
    assert steps_in(stopped) + steps_in(resumed) == steps_in(whole)
    assert len(steps_in(whole)) == 3
