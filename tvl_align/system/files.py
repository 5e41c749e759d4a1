"""Files that are written whole or not at all, and folders with one writer at a time."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from tvl_align.system.console import UserError


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path` when the block ends: a reader sees the old content or the new one,
    never half of one. After an error (a full disk) the old one is there as before and the half is removed."""
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
    """Text -> file, as `atomic_file`."""
    with atomic_file(path) as file:
        file.write(text.encode())


@contextmanager
def lock_folder(folder: Path, wait: bool, why: str) -> Iterator[None]:
    """Be the one who writes to a folder, which is made where it is missing. The system ends the hold with the process, so a
    killed one blocks nobody.

    wait: for another holder to end, after saying so; else raise UserError. why: what the other one does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if not wait:
                raise UserError(f"another process {why} {folder}; wait for it, or give another folder.") from error
            print(f"another process {why} {folder}; waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
