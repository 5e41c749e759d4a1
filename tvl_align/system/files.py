"""Atomic file writes and folder locks, also on file systems that lack an ability: one is done without, with a warning."""

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, BinaryIO

from tvl_align.system.console import UserError

UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})  # the file system lacks the operation
log = logging.getLogger(__name__)


@cache
def warn_once(line: str) -> None:
    """Log a warning, once per process however often it is given."""
    log.warning(line)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary binary file that replaces `path` when the block ends.

    A reader sees the old content or the new content, never a partial file. After an error, such as a full disk, `path` is
    unchanged and the temporary file is removed.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            _flush_to_disk(file)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, text: str) -> None:
    """Write text to a file atomically; see `atomic_file`."""
    with atomic_file(path) as file:
        file.write(text.encode())


def _flush_to_disk(file: BinaryIO) -> None:
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


@contextmanager
def lock_folder(folder: Path, wait: bool, why: str) -> Iterator[None]:
    """Hold an exclusive lock on a folder, which is created if missing.

    The operating system releases the lock when the process ends, even if it is killed. On a file system without locks, such
    as Lustre mounted without `flock`, a warning is logged and nothing is locked.

    wait: if another process holds the lock, print a line and wait for it; False: raise UserError. why: verb phrase for the
    message, such as "trains in".
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        if not _try_lock(file, folder):
            if not wait:
                raise UserError(f"another process {why} {folder}; wait until it ends, or give another folder.")
            print(f"another process {why} {folder}; waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _try_lock(file: IO[str], folder: Path) -> bool:
    """Lock a file. False if another process holds the lock; True, with a warning, if the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        if error.errno not in UNSUPPORTED | {errno.ENOLCK}:
            raise
        warn_once(f"{folder} is on a file system without locks ({error.strerror}): run only one command at a time in it")
    return True
