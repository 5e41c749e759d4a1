"""Signals that ask a process to stop."""

import os
import signal
import threading
from typing import Any, NoReturn

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # termination, and the pre-emption warnings of schedulers
SUBMITIT = "SUBMITIT_EXECUTOR"  # environment variable that submitit sets in its tasks
STOPPED = 143  # exit code of a process ended by SIGTERM


class StopSignals:
    """Context manager that defers stop signals: a signal only sets `received`, so that the caller can save its state first.

    Handlers are installed only in the main thread.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            # submitit ignores SIGTERM on purpose: Slurm sends it with the signal on which submitit requeues the job.
            handled = STOP_SIGNALS[1:] if SUBMITIT in os.environ else STOP_SIGNALS
            self._previous = {number: signal.signal(number, self._record) for number in handled}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _record(self, number: int, _: object) -> None:
        self.received = number

    def end(self) -> NoReturn:
        """Pass the signal to the previous handler (submitit requeues the job), then exit with code 143.

        Call this after the state is saved.
        """
        self.__exit__()
        if self.received is not None and callable(self._previous.get(self.received)):
            signal.raise_signal(self.received)
        raise SystemExit(STOPPED)
