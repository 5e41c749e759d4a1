"""Signals that ask a process to end."""

import os
import signal
import threading
from typing import Any, NoReturn

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # the end, and what schedulers send before they pre-empt
SUBMITIT = "SUBMITIT_EXECUTOR"  # in the environment of a task that submitit started
STOPPED = 143  # exit code of a process that SIGTERM ended


class StopSignals:
    """Inside, signals that ask this process to end are only noted in `received`, so that it ends where nothing is lost."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            # submitit ignores SIGTERM on purpose: Slurm sends it along with the signal on which submitit queues a job again.
            taken = STOP_SIGNALS[1:] if SUBMITIT in os.environ else STOP_SIGNALS
            self._previous = {number: signal.signal(number, self._note) for number in taken}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        self.received = number

    def end(self) -> NoReturn:
        """After the state is saved: let whoever handled the signal before have it (a launcher queues the job again), then
        exit with 143."""
        self.__exit__()
        if self.received is not None and callable(self._previous.get(self.received)):
            signal.raise_signal(self.received)
        raise SystemExit(STOPPED)
