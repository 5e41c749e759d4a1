"""Atomic writes and folder locks, on file systems with and without the abilities they use."""

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tvl_align.system.console import UserError
from tvl_align.system.files import lock_folder, warn_once, write_atomically


def failing(number: int) -> Callable[..., Any]:
    def fails(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    return fails


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
@pytest.mark.parametrize("wait", [True, False])
def test_without_locks_work_goes_on_with_one_warning(
    wait: bool, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(number))
    warn_once.cache_clear()
    done = 0
    for _ in range(2):
        with lock_folder(tmp_path, wait, "trains in"):
            done += 1
    assert done == 2
    (record,) = caplog.records
    assert f"{tmp_path} is on a file system without locks" in record.getMessage()


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EACCES])
def test_a_lock_that_is_held_is_no_missing_ability(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(number))
    with pytest.raises(UserError, match=f"another process trains in {tmp_path}"), lock_folder(tmp_path, False, "trains in"):
        pass


def test_of_two_the_second_is_refused(tmp_path: Path) -> None:
    with (
        lock_folder(tmp_path, False, "trains in"),
        pytest.raises(UserError, match="another process trains in"),
        lock_folder(tmp_path, False, "trains in"),
    ):
        pass
    with lock_folder(tmp_path, False, "trains in"):
        pass


def test_an_error_of_the_disk_is_no_missing_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(errno.EIO))
    with pytest.raises(OSError, match="Input/output"), lock_folder(tmp_path, True, "trains in"):
        pass


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_files_are_written_where_fsync_is_not_supported(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", failing(number))
    write_atomically(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_at_fsync_leaves_the_old_file(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_atomically(tmp_path / "a", "old")
    monkeypatch.setattr(os, "fsync", failing(number))
    with pytest.raises(OSError, match=os.strerror(number)):
        write_atomically(tmp_path / "a", "new")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a": "old"}
