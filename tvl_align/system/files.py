"""Atomic file writes and folder locks."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from tvl_align.system.console import UserError


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
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, text: str) -> None:
    """Write text to a file atomically; see `atomic_file`."""
    with atomic_file(path) as file:
        file.write(text.encode())


@contextmanager
def lock_folder(folder: Path, wait: bool, why: str) -> Iterator[None]:
    """Hold an exclusive lock on a folder, which is created if missing.

    The operating system releases the lock when the process ends, even if it is killed.

    wait: if another process holds the lock, print a line and wait for it; False: raise UserError. why: verb phrase for the
    message, such as "trains in".
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if not wait:
                raise UserError(f"another process {why} {folder}; wait until it ends, or give another folder.") from error
            print(f"another process {why} {folder}; waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
