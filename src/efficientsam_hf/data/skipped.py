"""What could not be trained on: left out, named by the samples behind it, counted over all processes of a run."""

from typing import Any

import torch.distributed


class SkippedPictures:
    """What was skipped on the way, told by the batches that a run has taken.

    `accelerator.register_for_checkpointing` takes it; the state is that of all processes.
    """

    def __init__(self) -> None:
        self.skipped: set[str] = set()

    def advance(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Note that a batch has been taken; gives it without its `skipped`, which is reasons a line each."""
        self.skipped.update(line for lines in batch["skipped"] for line in lines.splitlines())
        return {name: value for name, value in batch.items() if name != "skipped"}

    def __str__(self) -> str:
        """How many there were, and some of them; nothing of none."""
        if not self.skipped:
            return ""
        return f"{len(self.skipped)} skipped, such as: {'; '.join(sorted(self.skipped)[:3])}"

    def state_dict(self) -> dict[str, Any]:
        """What was skipped, the same on every process: call it on all of them. This one then knows all of it, too."""
        self.skipped = set().union(*of_all_processes(self.skipped))
        return {"skipped": sorted(self.skipped)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.skipped = set(state["skipped"])


def of_all_processes(value: Any) -> list[Any]:
    """What each process gives, in their order."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
