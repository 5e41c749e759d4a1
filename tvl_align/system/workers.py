"""Run tasks in parallel threads or processes on this machine."""

import multiprocessing
import multiprocessing.connection
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import count
from multiprocessing.context import SpawnProcess
from typing import Any, TypeVar

import torch

from tvl_align.system.console import UserError, reports_errors

MAX_LANES = 4  # tasks at a time; memory use grows with this number
T = TypeVar("T")


def run_in_threads(work: Iterable[Callable[[], T]], lanes: int | None = None) -> Iterator[T]:
    """Run tasks in parallel threads and yield their results in order. The torch threads are divided among the tasks.

    Small operations do not speed up with more torch threads, so running several at a time is faster. `work` is consumed
    lazily: at most `lanes` + 1 tasks are pending. lanes: tasks at a time; default: 2 to 4. Raises what a task raises.
    """
    threads = torch.get_num_threads()
    lanes = lanes or max(2, min(MAX_LANES, threads))  # 2 even on one core: one computes while the other writes
    pool = ThreadPoolExecutor(lanes, initializer=torch.set_num_threads, initargs=(max(1, threads // lanes),))
    pending: deque[Future[T]] = deque()
    try:
        for task in work:
            pending.append(pool.submit(task))
            if len(pending) > lanes:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # after an error, running tasks end on their own
        torch.set_num_threads(threads)


def run_together(work: Sequence[Callable[[], T]], device: torch.device) -> list[T]:
    """The results of tasks that each have many small operations, which gain little from more torch threads.

    On a CPU each task has a thread of its own, as many at a time as there are torch threads; modes that belong to a thread,
    such as autocast, must be entered by the task. On another device the tasks run here, one after the other.
    """
    if device.type != "cpu":
        return [task() for task in work]
    return list(run_in_threads(work, lanes=min(len(work), torch.get_num_threads())))


def read_ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items; the next two are made by a thread while the caller uses one. Raises what making an item raises."""
    source, end = iter(items), object()
    for item in run_in_threads((partial(next, source, end) for _ in count()), lanes=1):
        if item is end:
            return
        yield item  # type: ignore[misc]


def run_in_processes(jobs: Mapping[str, tuple[Any, ...]], at_once: int, threads: int) -> None:
    """Run {name: (function, *arguments)}, each in a new process with `threads` torch threads, `at_once` processes at a time.

    When a process fails or is killed, all others are killed and UserError is raised.
    """
    context = multiprocessing.get_context("spawn")
    waiting, running = deque(jobs.items()), dict[str, SpawnProcess]()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                name, job = waiting.popleft()
                process = context.Process(target=_job, args=(threads, *job))
                process.start()
                running[name] = process
            multiprocessing.connection.wait([process.sentinel for process in running.values()])
            for name in [name for name, process in running.items() if process.exitcode is not None]:
                code = running.pop(name).exitcode
                if code:
                    status = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
                    raise UserError(
                        f"the process of {name} {status} and the others were stopped; run the same command again to resume."
                    )
    finally:
        for process in running.values():
            process.kill()
            process.join()


def _job(threads: int, function: Callable[..., None], *arguments: Any) -> None:
    torch.set_num_threads(threads)
    reports_errors(function)(*arguments)
