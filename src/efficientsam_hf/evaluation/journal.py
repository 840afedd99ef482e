"""Evaluations that survive being killed, divided among processes: a line a picture, written as soon as it is known."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed

Item = TypeVar("Item")
LONGEST_WAIT = timedelta(days=7)  # of the process that is done first for the others


@dataclass(frozen=True)
class Share:
    """Which part of the work is this process's, as torchrun says."""

    rank: int = 0
    processes: int = 1

    @classmethod
    def of_environment(cls) -> "Share":
        """What `RANK` and `WORLD_SIZE` say; everything without them."""
        return cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))

    @contextmanager
    def together(self) -> Iterator["Share"]:
        """A process group around the work, so that `wait` can wait; nothing for a single process."""
        if self.processes == 1:
            yield self
            return
        torch.distributed.init_process_group("gloo", timeout=LONGEST_WAIT)
        try:
            yield self
        finally:
            torch.distributed.destroy_process_group()

    def wait(self) -> None:
        """Until all processes are here."""
        if self.processes > 1:
            torch.distributed.barrier()


class Journal:
    """Records by the numbers of their pictures, a file a process, in a folder named after what was asked.

    Args:
        output: The result file, beside which the folder lies.
        question: Everything that the answers depend on; other questions have other folders.
        share: Whose lines are written.
    """

    def __init__(self, output: Path, question: str, share: Share):
        self.folder = output.with_name(f".{output.stem}.{question[:16]}")
        self.share = share

    def read(self) -> dict[int, dict[str, Any]]:
        """All records that any process has written; a line that a kill cut short is none."""
        found = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            for line in path.read_text().splitlines():
                try:
                    number, record = json.loads(line)
                except ValueError:
                    continue
                found[number] = record
        return found

    def write(self, number: int, record: dict[str, Any]) -> dict[str, Any]:
        """A line for picture `number`, on the disk when this returns; gives the record as it will be read."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{self.share.rank}.jsonl").open("a+") as file:
            # After a line cut short the next one begins on its own.
            file.seek(0, os.SEEK_END)
            begin = "\n" if file.tell() else ""
            line = json.dumps([number, record])
            file.write(begin + line)
            file.flush()
            os.fsync(file.fileno())
        return json.loads(line)[1]

    def forget(self) -> None:
        """Take the folder away, once the result is written."""
        shutil.rmtree(self.folder, ignore_errors=True)


def answer_all(
    items: Sequence[Item],
    work: Callable[[Item], dict[str, Any]],
    journal: Journal,
    progress: Callable[[list[int]], Iterable[int]] = iter,
) -> list[dict[str, Any]]:
    """The record of every item, in their order, in every process; what the journal knows is not done again.

    A process does every so many-th item, whatever the others do, so that no two do the same.
    """
    share = journal.share
    known = journal.read()
    mine = [number for number in range(share.rank, len(items), share.processes) if number not in known]
    for number in progress(mine):
        known[number] = journal.write(number, work(items[number]))
    share.wait()
    # The same command, started beside this one, may have been done first and have taken the journal away.
    records = {**journal.read(), **known}
    return [records[number] for number in range(len(items))]
