"""Work in several threads or processes of this machine."""

import multiprocessing
import multiprocessing.connection
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.context import SpawnProcess
from typing import Any, TypeVar

import torch

from tvl_align.system.console import UserError, reports_errors

MAX_LANES = 4  # pieces of work at once: what they hold in memory, they hold as often
T = TypeVar("T")


def run_in_threads(work: Iterable[Callable[[], T]], lanes: int | None = None) -> Iterator[T]:
    """The results of pieces of work, in order, several of them in threads at once on a share of this process's threads each.

    Small operations gain little from a second core; two of them side by side lose nothing. No more pieces are taken from
    `work` than threads need to go on. lanes: how many at once; default: 2 to 4.
    """
    threads = torch.get_num_threads()
    lanes = lanes or max(2, min(MAX_LANES, threads))  # two even on one core: one computes while the other writes
    pool = ThreadPoolExecutor(lanes, initializer=torch.set_num_threads, initargs=(max(1, threads // lanes),))
    begun: deque[Future[T]] = deque()
    try:
        for piece in work:
            begun.append(pool.submit(piece))
            if len(begun) > lanes:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # after an error, pieces that have begun end by themselves
        torch.set_num_threads(threads)


def run_in_processes(jobs: Mapping[str, tuple[Any, ...]], at_once: int, threads: int) -> None:
    """Run {name: (function, *arguments)}, each in a new process with `threads` torch threads, `at_once` of them at a time.

    Raises UserError as soon as one of them fails or is killed, after the others were ended.
    """
    context = multiprocessing.get_context("spawn")
    waiting, running = deque(jobs.items()), dict[str, SpawnProcess]()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                name, job = waiting.popleft()
                running[name] = context.Process(target=_job, args=(threads, *job))
                running[name].start()
            multiprocessing.connection.wait([process.sentinel for process in running.values()])
            for name in [name for name, process in running.items() if process.exitcode is not None]:
                code = running.pop(name).exitcode
                if code:
                    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
                    raise UserError(f"the process of {name} {how}; the others were ended, the same command goes on.")
    finally:
        for process in running.values():
            process.kill()
            process.join()


def _job(threads: int, function: Callable[..., None], *arguments: Any) -> None:
    torch.set_num_threads(threads)
    reports_errors(function)(*arguments)
