"""Endless training samples out of tar shards, in an order that does not depend on who reads them.

L lanes divide the shards of every epoch among them. Batch g of a run, counted over all processes, is read from lane
g mod L; process r of R and its worker w of W read the lanes for which L gives them the batches they are asked for. So
the batches of a run are the same for every R and W whose product divides L.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from .sa1b import Pair
from .shards import read_shard
from .skipped import SkippedPictures, of_all_processes

logger = logging.getLogger(__name__)

# Of a lane: the epoch it is in, the place in the lane's list of shards, how many pairs of that shard are done.
Place = tuple[int, int, int]
START: Place = (0, 0, 0)
# Of a small shard that many lanes divide a lane may get nothing for some epochs, but not for so many.
FRUITLESS = 100


class StreamPosition(SkippedPictures):
    """Where a run stands in its stream, told by the batches it has taken; what was skipped on the way.

    Every sample carries its own place, so that batches that workers have read ahead count only once they are taken.

    Args:
        lanes: Lanes of the stream.
    """

    def __init__(self, lanes: int):
        super().__init__()
        self.lanes = lanes
        self.places: dict[int, Place] = dict.fromkeys(range(lanes), START)

    def advance(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Note that a batch has been taken; gives it without what only this class wants to know."""
        for lane, *place in batch["place"].tolist():
            self.places[lane] = (place[0], place[1], place[2])
        return {name: value for name, value in super().advance(batch).items() if name != "place"}

    def state_dict(self) -> dict[str, Any]:
        """Places of all lanes and what was skipped, the same on every process: call it on all of them.

        From then on `places` and `skipped` of this process are those of all.
        """
        states = of_all_processes(self.places)
        self.places = {lane: max(places[lane] for places in states) for lane in range(self.lanes)}
        return {"places": dict(self.places), **super().state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Raises:
            ValueError: if it is that of another number of lanes.
        """
        if len(state["places"]) != self.lanes:
            count = len(state["places"])
            raise ValueError(
                f"the state is that of a stream of {count} lanes, found {self.lanes} now: give --lanes {count}, "
                "and processes times workers that divide it"
            )
        super().load_state_dict(state)
        self.places = {int(lane): (place[0], place[1], place[2]) for lane, place in state["places"].items()}


class ShardStream(IterableDataset):
    """Samples of one process, for a `DataLoader` of the same batch size that nobody shuffles or divides further.

    In every epoch each pair comes once, from one of the lanes; the shards are dealt out anew by seed and epoch. Where
    shards are fewer than lanes, each is divided: its pairs go to several lanes in turn. Lanes do not wait for each
    other, so that one may begin an epoch while another still ends the last.

    What cannot be used is left out, named in the log, and named in `skipped` of the next sample.

    Args:
        shards: Paths and addresses, as `find_shards` gives them.
        read: Makes a sample of a pair; a ValueError says why the pair cannot be used (`PairReader.read`).
        position: Where to begin.
        batch_size: Samples that a lane gives before the next lane's turn.
        first_batch: Batches already taken, by all processes together.
        rank: This process.
        ranks: How many there are.
        seed: Start of all random choices.
        epochs: How many; None never ends.
        hold_out: Every so many-th pair of a shard is left out, the first among them; 0 leaves out none.

    Raises:
        ValueError: if the lanes cannot be divided among the processes, or there is no shard.
    """

    def __init__(
        self,
        shards: Sequence[str],
        read: Callable[[Pair, np.random.Generator], dict[str, torch.Tensor]],
        position: StreamPosition,
        batch_size: int,
        first_batch: int = 0,
        rank: int = 0,
        ranks: int = 1,
        seed: int = 0,
        epochs: int | None = None,
        hold_out: int = 0,
    ):
        check_lanes(position.lanes, ranks, 1)
        if not shards:
            raise ValueError("wanted at least one shard, found none")
        parts = -(-position.lanes // len(shards))
        self.shards = list(shards)
        self.units = [(shard, part) for shard in range(len(shards)) for part in range(parts)]
        self.parts = parts
        self.read = read
        self.lanes = position.lanes
        self.places = dict(position.places)
        self.batch_size = batch_size
        self.first_batch = first_batch
        self.rank = rank
        self.ranks = ranks
        self.seed = seed
        self.epochs = epochs
        self.hold_out = hold_out

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Samples of this worker: the reader's, with `place` (4,) int64 and `skipped`, reasons a line each."""
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        check_lanes(self.lanes, self.ranks, workers)
        turns = range(number, self.lanes // self.ranks, workers)
        order = [(self.first_batch + turn * self.ranks + self.rank) % self.lanes for turn in turns]
        streams = {lane: self.lane_samples(lane) for lane in order}
        while streams:
            for lane, stream in list(streams.items()):
                batch = list(islice(stream, self.batch_size))
                yield from batch
                if len(batch) < self.batch_size:
                    del streams[lane]

    def lane_samples(self, lane: int) -> Iterator[dict[str, Any]]:
        """Samples of a lane from its place on."""
        skipped: list[str] = []
        fruitless = 0

        def skip(reason: str) -> None:
            logger.warning("skipped: %s", reason)
            skipped.append(reason.replace("\n", " "))

        for place, pair in self.lane_pairs(lane, skip):
            if pair is None:
                fruitless += 1
                if fruitless == FRUITLESS:
                    raise ValueError(f"nothing to train on in {FRUITLESS} epochs of lane {lane}: {skipped[:3]}")
                continue
            epoch, unit, done = place
            shard, part = self.epoch_units(epoch, lane)[unit]
            try:
                sample = self.read(pair, np.random.default_rng((self.seed, epoch, shard, part, done)))
            except ValueError as error:
                skip(str(error))
                continue
            fruitless = 0
            yield {**sample, "place": torch.tensor((lane, *place)), "skipped": "\n".join(skipped)}
            skipped.clear()

    def lane_pairs(self, lane: int, report: Callable[[str], None]) -> Iterator[tuple[Place, Pair | None]]:
        """Pairs of a lane, each with the place behind it; None when an epoch ends."""
        epoch, first_unit, done = self.places[lane]
        while self.epochs is None or epoch < self.epochs:
            for unit, (shard, part) in enumerate(self.epoch_units(epoch, lane)):
                if unit < first_unit:
                    continue
                pairs = read_shard(self.shards[shard], partial(self.is_wanted, part=part), report)
                for count, pair in enumerate(islice(pairs, done, None), start=done + 1):
                    yield (epoch, unit, count), pair
                done = 0
            epoch, first_unit, done = epoch + 1, 0, 0
            yield (epoch, 0, 0), None

    def epoch_units(self, epoch: int, lane: int) -> list[tuple[int, int]]:
        """Shards, and which part of each, that a lane reads in an epoch."""
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.units))
        return [self.units[number] for number in order[lane :: self.lanes]]

    def is_wanted(self, number: int, part: int) -> bool:
        """Whether a pair of a shard belongs to a part of it, and is trained on."""
        if self.hold_out:
            # Numbered anew without those held out, or they might be the whole of a part.
            number, place = divmod(number, self.hold_out)
            number = number * (self.hold_out - 1) + place - 1
            return place > 0 and number % self.parts == part
        return number % self.parts == part


def check_lanes(lanes: int, ranks: int, workers: int) -> None:
    """Whether processes and their workers can share the lanes out evenly."""
    if lanes % (ranks * workers):
        raise ValueError(
            f"lanes must be a multiple of processes x workers, or the order would depend on them: "
            f"found {lanes} lanes for {ranks} x {workers}"
        )
