"""Numbered states of a training run: written whole or not at all, pruned, found again."""

import re
import shutil
from pathlib import Path

from accelerate import Accelerator


class Checkpoints:
    """States of a run in `folder/step_N`.

    Args:
        accelerator: Holds what was prepared for training; it writes and reads the states.
        folder: Where the states live.
        keep: How many of the newest to keep.
    """

    def __init__(self, accelerator: Accelerator, folder: str | Path, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep must be 1 or more, or the run could not be resumed; got {keep}")
        self.accelerator = accelerator
        self.folder = Path(folder)
        self.keep = keep

    def found(self) -> list[tuple[int, Path]]:
        """Step and folder of each complete state, oldest first."""
        names = {path: re.fullmatch(r"step_(\d+)", path.name) for path in self.folder.glob("step_*")}
        return sorted((int(name[1]), path) for path, name in names.items() if name)

    def resume(self) -> int:
        """Load the newest state, if any; the number of steps already done.

        Raises:
            ValueError: if it is of another model, or of a version that trained other groups of parameters.
        """
        if self.accelerator.is_main_process:
            self.clear_wrecks()
        self.accelerator.wait_for_everyone()
        if not (found := self.found()):
            return 0
        step, path = found[-1]
        try:
            self.accelerator.load_state(str(path))
        except (ValueError, RuntimeError) as error:
            # Torch's error for weights of other names or shapes is a RuntimeError, but so is a full memory's.
            if isinstance(error, RuntimeError) and "state_dict" not in str(error):
                raise
            raise ValueError(f"{path} cannot be gone on from; another output folder starts anew: {error}") from error
        # Accelerate counts batches, and loads that count: of another size or number of processes there were others.
        self.accelerator.step = 0
        return step

    def clear_wrecks(self) -> None:
        """Take away what a kill left: half a state, or one that was making room for its successor."""
        for old in self.folder.glob("step_*.old"):
            if old.with_suffix("").exists():
                shutil.rmtree(old)
            else:
                old.rename(old.with_suffix(""))
        for partial in self.folder.glob("step_*.part"):
            shutil.rmtree(partial)

    def save(self, step: int) -> Path:
        """Write the state after `step` steps and drop the oldest ones."""
        path = self.folder / f"step_{step}"
        # A state that was cut off while being written never gets a name that `found` takes.
        partial, old = path.with_name(path.name + ".part"), path.with_name(path.name + ".old")
        self.accelerator.save_state(str(partial))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            if path.exists():
                path.rename(old)
            partial.rename(path)
            shutil.rmtree(old, ignore_errors=True)
            for _, oldest in self.found()[: -self.keep]:
                # Under another name first: a state half taken away must not be found.
                wreck = oldest.with_name(oldest.name + ".part")
                shutil.rmtree(wreck, ignore_errors=True)
                oldest.rename(wreck)
                shutil.rmtree(wreck)
        self.accelerator.wait_for_everyone()
        return path
