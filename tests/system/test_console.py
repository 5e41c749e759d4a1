"""Progress on stderr that is not a terminal, and errors in one line."""

import errno
import io
import sys

import pytest

from tvl_align.system import console
from tvl_align.system.console import UserError, progress, reports_errors


class Clock:
    """Seconds that pass only when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of tqdm, stopped."""
    clock = Clock()
    monkeypatch.setattr("tqdm.std.time", clock)
    return clock


def test_a_long_job_prints_a_line_a_minute(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress(500, "epoch 3", "step", initial=20) as bar:
        for second in range(1, 151):
            clock.now = float(second)
            bar.set_postfix(loss=f"{3 - second / 100:.3f}", refresh=False)
            bar.update(2)
    assert capsys.readouterr().err.splitlines() == [
        "epoch 3: step 140/500, 2.0 step/s, 3 min left, loss=2.400",
        "epoch 3: step 260/500, 2.0 step/s, 2 min left, loss=1.800",
    ]


def test_slow_units_are_counted_in_seconds(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress(3, "bench", "part") as bar:
        clock.now = 90.0
        bar.update()
    assert capsys.readouterr().err == "bench: part 1/3, 90.0 s/part, 3 min left\n"


def test_a_job_of_unknown_length_prints_what_is_done(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress(None, "encode", "sample") as bar:
        clock.now = 60.0
        bar.update(300)
    assert capsys.readouterr().err == "encode: sample 300, 5.0 sample/s\n"


@pytest.mark.parametrize(("seconds", "quiet"), [(59.0, False), (600.0, True)])
def test_short_jobs_and_quiet_jobs_print_nothing(
    seconds: float, quiet: bool, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress(10, "validate", "batch", quiet=quiet) as bar:
        clock.now = seconds
        bar.update(10)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress(10, "validate", "batch") as bar:
        clock.now = 1.0
        bar.update(5)
    assert "validate:  50%" in terminal.getvalue()
    assert "5/10" in terminal.getvalue()


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("give --lr."), "error: give --lr.\n"),
        (
            ModuleNotFoundError("", name="accelerate.utils"),
            "error: accelerate.utils is not installed; run pip install 'tvl-align[train]'.\n",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device", "c.pth"),
            "error: cannot read or write c.pth: No space left on device; existing files are unchanged; free some space and "
            "run the same command again.\n",
        ),
    ],
)
def test_expected_errors_are_one_line_and_exit_code_2(
    error: Exception, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    @reports_errors
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == line


def test_other_errors_keep_their_traceback() -> None:
    @reports_errors
    def main() -> None:
        raise OSError(errno.ENOENT, "No such file")

    with pytest.raises(OSError, match="No such file"):
        main()


def test_a_postfix_prints_no_line_of_its_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(console, "LINE_INTERVAL", 3600.0)
    with console.progress(9, "pretrain", "step") as bar:
        for i in range(9):
            bar.update()
            bar.set_postfix(loss=f"{i}")
            bar.set_postfix_str(f"{i}")
    assert capsys.readouterr().err == ""
