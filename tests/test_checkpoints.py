"""States of a run: what is resumed is what was saved, and nothing half-written is ever taken for whole."""

import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from safetensors import SafetensorError
from torch import nn

from efficientsam_hf.training.checkpoints import Checkpoints
from efficientsam_hf.training.optimization import seeded_generator


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Run:
    """A run, of which one process can have several here: nothing but the folder connects two of them."""

    def __init__(self, folder: Path, keep: int = 2):
        torch.manual_seed(id(self) % 1000)
        self.accelerator = Accelerator(cpu=True)
        model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 1))
        if not folder.exists():
            self.fill(model)
        self.model, self.optimizer = self.accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
        self.checkpoints = Checkpoints(self.accelerator, folder, keep)
        self.step = self.checkpoints.resume()

    @staticmethod
    def fill(model: nn.Module) -> None:
        for number, parameter in enumerate(model.parameters()):
            nn.init.normal_(parameter, generator=seeded_generator(0, number))

    def train(self, steps: int) -> list[torch.Tensor]:
        for _ in range(steps):
            inputs = torch.randn(16, 4, generator=seeded_generator(7, self.step))
            self.accelerator.backward((self.model(inputs) - inputs.prod(1, keepdim=True)).square().mean())
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
        return [parameter.detach().clone() for parameter in self.model.parameters()]


def test_two_and_two_steps_are_four_bit_for_bit(tmp_path: Path):
    whole = Run(tmp_path / "whole").train(4)
    first = Run(tmp_path / "parts")
    halfway = first.train(2)
    first.checkpoints.save(first.step)
    second = Run(tmp_path / "parts")
    assert second.step == 2
    parts = second.train(2)
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))
    assert not any(torch.equal(one, other) for one, other in zip(whole, halfway, strict=True))


def test_batches_of_another_size_go_on_from_whole_updates(tmp_path: Path):
    """Accelerate's own count of batches goes into the state; an update must not begin in the middle after it."""
    first = Run(tmp_path / "run")
    first.accelerator.step = 3
    first.train(1)
    first.checkpoints.save(1)
    second = Run(tmp_path / "run")
    second.accelerator.gradient_accumulation_steps = 2
    synchronized = []
    for _ in range(4):
        with second.accelerator.accumulate(second.model):
            synchronized.append(second.accelerator.sync_gradients)
    assert synchronized == [False, True, False, True]


def test_an_empty_or_missing_folder_starts_at_zero(tmp_path: Path):
    assert Run(tmp_path).step == 0
    assert Run(tmp_path / "missing").step == 0


def test_the_newest_states_are_kept(tmp_path: Path):
    run = Run(tmp_path / "run", keep=2)
    for step in (9, 10, 11):
        assert run.checkpoints.save(step) == tmp_path / "run" / f"step_{step}"
    assert [step for step, _ in run.checkpoints.found()] == [10, 11]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["step_10", "step_11"]
    # By number, not by name: 9 comes before 10.
    run.checkpoints.save(9)
    assert Run(tmp_path / "run").step == 11


def test_a_half_written_state_is_ignored(tmp_path: Path):
    run = Run(tmp_path / "run")
    run.train(1)
    run.checkpoints.save(1)
    for name in ("step_5.part", "step_x", "step_6_old"):
        (tmp_path / "run" / name).mkdir()
    assert Run(tmp_path / "run").step == 1


def test_a_save_that_breaks_off_leaves_the_last_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = Run(tmp_path / "run", keep=1)
    saved = run.train(1)
    run.checkpoints.save(1)

    def break_off(folder: str) -> None:
        Path(folder).mkdir(parents=True)
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(run.accelerator, "save_state", break_off)
        run.train(1)
        with pytest.raises(OSError, match="no space"):
            run.checkpoints.save(2)
    resumed = Run(tmp_path / "run")
    assert resumed.step == 1
    assert all(torch.equal(one, other) for one, other in zip(saved, resumed.model.parameters(), strict=True))
    # Nor does the wreck stand in the way of the next attempt.
    resumed.train(1)
    resumed.checkpoints.save(2)
    assert Run(tmp_path / "run").step == 2


def test_a_step_may_be_saved_again(tmp_path: Path):
    run = Run(tmp_path / "run")
    run.checkpoints.save(3)
    changed = run.train(1)
    run.checkpoints.save(3)
    resumed = Run(tmp_path / "run")
    assert all(torch.equal(one, other) for one, other in zip(changed, resumed.model.parameters(), strict=True))


def test_keeping_nothing_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"keep must be 1 or more.*got 0"):
        Run(tmp_path, keep=0)


# --------------------------------------------------------------------------------------------------------------------
# Bad luck


def fork(work: Callable[[], None]) -> int:
    """Signal or exit status, negative or not, of a process of its own that does this."""
    if (child := os.fork()) == 0:
        try:
            work()
        except BaseException:  # whatever it is, pytest must not go on in two processes
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at(moment: int, folder: Path) -> None:
    """Let this process die as by kill -9 when it touches this folder for the so many-th time."""
    left = [moment]

    def count(event: str, arguments: tuple) -> None:
        if event.startswith(("open", "os.", "shutil.")) and str(folder) in str(arguments[:2]):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def test_killed_at_any_moment_of_saving_a_run_goes_on_from_a_whole_state(tmp_path: Path):
    """Step 2 is saved over step 1 with room for one state; then once more, over itself."""
    run = Run(tmp_path / "good", keep=1)
    states = {1: run.train(1)}
    run.checkpoints.save(1)
    found, moment, status = set(), 0, -signal.SIGKILL
    states[2] = run.train(1)
    while status:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(tmp_path / "good", tmp_path / "run")
        run.checkpoints.folder = tmp_path / "run"

        def save_twice(moment: int = moment) -> None:
            kill_at(moment, tmp_path / "run")
            run.checkpoints.save(2)
            run.checkpoints.save(2)

        status = fork(save_twice)
        assert status in (0, -signal.SIGKILL)
        resumed = Run(tmp_path / "run", keep=1)
        assert all(
            torch.equal(one, other)
            for one, other in zip(states[resumed.step], resumed.model.parameters(), strict=True)
        )
        assert {path.name for path in (tmp_path / "run").iterdir()} <= {"step_1", "step_2"}
        found.add(resumed.step)
        moment += 1
    assert found == {1, 2}
    assert moment > 15


def test_a_full_disk_leaves_the_older_state(tmp_path: Path):
    """Full is a limit to the size of files, which the system sets; the error is its own."""
    run = Run(tmp_path / "run", keep=1)
    saved = run.train(1)
    run.checkpoints.save(1)
    run.train(1)

    def save_on_a_full_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        with pytest.raises((OSError, RuntimeError, SafetensorError), match=r"(?i)file too large|write"):
            run.checkpoints.save(2)

    assert fork(save_on_a_full_disk) == 0
    assert (tmp_path / "run" / "step_2.part").is_dir()
    resumed = Run(tmp_path / "run")
    assert resumed.step == 1
    assert all(torch.equal(one, other) for one, other in zip(saved, resumed.model.parameters(), strict=True))


def test_a_state_of_other_groups_of_parameters_is_named(tmp_path: Path):
    run = Run(tmp_path / "run")
    run.checkpoints.save(1)
    groups = [{"params": [weight]} for weight in run.model.parameters()]
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(run.model, torch.optim.AdamW(groups, lr=0.1))
    with pytest.raises(ValueError, match=r"step_1 cannot be gone on from; another output folder starts anew: .*group"):
        Checkpoints(accelerator, tmp_path / "run", 2).resume()


def test_a_state_of_another_model_is_named(tmp_path: Path):
    Run(tmp_path / "run").checkpoints.save(1)
    accelerator, other = Accelerator(cpu=True), torch.nn.Linear(9, 9)
    accelerator.prepare(other, torch.optim.AdamW(other.parameters(), lr=0.1))
    with pytest.raises(
        ValueError, match=r"step_1 cannot be gone on from; another output folder starts anew: (?s:.*)Missing key"
    ):
        Checkpoints(accelerator, tmp_path / "run", 2).resume()
