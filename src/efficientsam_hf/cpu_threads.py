"""Whole pieces of work for each of a CPU's threads, in place of a share of every operation.

Operations on a few clicks are so short that threads which share one wait for each other longer than they work.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier, Lock
from typing import Any

import torch

TAKEN = Lock()  # more threads than cores would wait for each other again


@contextmanager
def map_on_threads(most: int) -> Iterator[Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]]:
    """Give a `map` that does up to `most` pieces at one time, results in order, without gradients.

    Torch's threads (`torch.get_num_threads`) are divided among the pieces. With one thread, and for a second caller at
    the same time, it is the plain `map`.
    """
    threads = torch.get_num_threads()
    workers = min(most, threads)
    if workers < 2 or not TAKEN.acquire(blocking=False):
        yield map
        return
    ready = Barrier(workers + 1)
    pool = ThreadPoolExecutor(workers, initializer=take_share, initargs=(threads // workers, ready))
    try:
        for _ in range(workers):
            pool.submit(int)  # nothing, but it starts a thread
        ready.wait()
        torch.set_num_threads(threads)  # of threads to come; that of these stays
        yield lambda work, pieces: in_order(pool, as_here(work), pieces, 2 * workers)
    finally:
        pool.shutdown(cancel_futures=True)
        TAKEN.release()


def take_share(threads: int, ready: Barrier) -> None:
    """How many threads operations of this one have."""
    torch.get_num_threads()  # a new thread takes over the process's number when it first needs it, and so not later
    torch.set_num_threads(threads)
    ready.wait()


def as_here(work: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The work in inference mode, and with the autocasting of the thread that asks; each thread has its own."""
    enabled, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def do(piece: Any) -> Any:
        with torch.inference_mode(), torch.autocast("cpu", dtype, enabled):
            return work(piece)

    return do


def in_order(pool: ThreadPoolExecutor, work: Callable[[Any], Any], items: Iterable[Any], ahead: int) -> Iterator[Any]:
    """The results of `work` on each item, in order, with so many items being worked on ahead.

    An error of the items themselves comes after the results of those before it.
    """
    pending: deque[Future[Any]] = deque()
    try:
        for future in submitted(pool, work, items):
            pending.append(future)
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


def submitted(pool: ThreadPoolExecutor, work: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Future[Any]]:
    """The result of `work` on each item to come; of items that end in an error, that error."""
    try:
        for item in items:
            yield pool.submit(work, item)
    except Exception as error:
        failed: Future[Any] = Future()
        failed.set_exception(error)
        yield failed
