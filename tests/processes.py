"""Processes that tests start: each has a limit after which it, and all it started, is ended, and the test fails."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp

from tvl_align.cli.main import main

LIMIT = 900.0  # seconds, many times what the slowest command takes on two busy cores


def start(command: Sequence[str | Path], **options: Any) -> "subprocess.Popen[str]":
    """A command in a process group of its own. SIGINT has its usual meaning, also where the tests run in the background
    and ignore it; stdout is captured with stderr unless options say otherwise."""
    given: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} | options
    prepare = given.pop("preexec_fn", None)

    def in_child() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if prepare is not None:
            prepare()

    return subprocess.Popen(list(map(str, command)), text=True, preexec_fn=in_child, start_new_session=True, **given)


def finish(process: "subprocess.Popen[str]", limit: float = LIMIT) -> str:
    """Wait for a process that `start` made; returns what it said."""
    try:
        said, error = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        end(process)
        said, error = process.communicate()
        raise AssertionError(f"{process.args} did not end within {limit:.0f} s; it said: {said}{error or ''}") from None
    return (said or "") + (error or "")


def end(process: "subprocess.Popen[str]") -> None:
    """SIGKILL to a process and all it started."""
    os.killpg(process.pid, signal.SIGKILL)


def run(command: Sequence[str | Path], limit: float = LIMIT, **options: Any) -> tuple[int, str]:
    """Run a command to its end; returns its exit code and what it said."""
    process = start(command, **options)
    said = finish(process, limit)
    return process.returncode, said


def spawn(work: Callable[..., None], args: Sequence[Any], processes: int, limit: float = LIMIT) -> None:
    """Call work(index, *args) in several new processes. Raises what one of them raised."""
    context = mp.spawn(work, tuple(args), nprocs=processes, join=False)
    deadline = time.monotonic() + limit
    while not context.join(timeout=1.0):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            raise AssertionError(f"{work.__name__} on {processes} processes did not end within {limit:.0f} s")


def tvl_align(words: Sequence[str | Path], said: Path, limit: float = LIMIT) -> tuple[int, str]:
    """`tvl-align` with these words in a fork of this process, which has imported everything already: seconds less than a new
    process takes, for tests that are not about how commands start. said: a file for what it says. Returns as `run` does."""
    process = mp.get_context("fork").Process(target=_command, args=(list(map(str, words)), said))
    process.start()
    process.join(limit)
    if process.exitcode is None:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"tvl-align {words} did not end within {limit:.0f} s; it said: {said.read_text()}")
    return process.exitcode, said.read_text()


def _command(words: list[str], said: Path) -> None:
    os.setsid()
    out = said.open("w", buffering=1)  # stays open: a traceback is written after the end of this function
    for stream in (1, 2):
        os.dup2(out.fileno(), stream)
    sys.stdout = sys.stderr = out
    sys.argv = ["tvl-align", *words]
    main()


def quiet(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of commands in tests: one thread, no network, and what is given."""
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | dict(environment or {})
