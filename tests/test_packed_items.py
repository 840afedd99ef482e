"""Objects packed into bytes are the objects, and cost a process that looks at them no memory of its own."""

import multiprocessing
import sys
from pathlib import Path

import pytest

from efficientsam_hf.data.packed_items import PackedItems


def test_items_come_back_by_number_and_in_slices():
    items = [{"name": f"{number}.jpg", "path": Path("set") / str(number)} for number in range(7)]
    packed = PackedItems(iter(items))
    assert list(packed) == items
    assert (len(packed), packed[-1], packed[2:5], packed[::-1]) == (7, items[-1], items[2:5], items[::-1])
    with pytest.raises(IndexError):
        packed[7]
    assert list(PackedItems([])) == []


def looked_at(items, results) -> None:
    """How many bytes of its own a process has after it has looked at all items."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    before = sum(int(line.split()[1]) for line in lines if line.startswith("Private"))
    for number in range(len(items)):
        items[number]
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    results.put(sum(int(line.split()[1]) for line in lines if line.startswith("Private")) - before)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_forked_process_shares_them():
    fork = multiprocessing.get_context("fork")
    items, grown = [(number, str(number)) for number in range(100_000)], {}
    for kind, sequence in (("list", items), ("packed", PackedItems(items))):
        results = fork.Queue()
        process = fork.Process(target=looked_at, args=(sequence, results))
        process.start()
        grown[kind] = results.get(timeout=60)
        process.join()
    assert grown["packed"] < 0.3 * grown["list"]
