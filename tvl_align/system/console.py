"""What a person at the terminal sees: progress, and one-sentence errors."""

import errno
import logging
import os
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec

from tqdm import tqdm

P = ParamSpec("P")
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe")
FULL = "what was written before is untouched; free some space and give the same command again"
REMEDIES = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EFBIG: FULL,
    errno.EACCES: "give a folder that you may use",
    errno.EPERM: "give a folder that you may use",
    errno.EROFS: "give a folder that can be written to",
}


EXTRAS = {  # packages that only some commands need, and the extra of tvl-align that brings them
    **dict.fromkeys(("accelerate", "jinja2", "matplotlib", "rich", "sklearn", "tensorboard", "threadpoolctl"), "train"),
    **dict.fromkeys(("scipy", "taxim"), "demo"),
    "submitit": "slurm",
}


class UserError(Exception):
    """Bad input. The message names the value and the remedy in one sentence."""


def reports_errors(main: Callable[P, None]) -> Callable[P, None]:
    """Wrap an entry point: a `UserError`, or a file system that is full or forbids it, becomes one line on stderr and exit
    code 2; Ctrl-C one line and exit code 130; a reader of stdout that has gone (`| head`) exit code 141 without a word."""

    @wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            try:
                main(*args, **kwargs)
            finally:
                print(end="", flush=True)  # while what becomes of it can still be caught
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except ModuleNotFoundError as error:
            extra = EXTRAS.get((error.name or "").partition(".")[0])
            if extra is None:
                raise
            print(f"error: this needs {error.name}; install it with pip install 'tvl-align[{extra}]'.", file=sys.stderr)
            sys.exit(2)
        except RuntimeError as error:
            if not any(sign in str(error) for sign in LOST_PEER):
                raise
            me = os.environ.get("RANK", "0")
            why = f"process {me} lost another process ({' '.join(str(error).split())[:160]})"
            print(f"error: {why}; its own log says why, and the same command goes on.", file=sys.stderr)
            os._exit(2)  # an orderly end would wait for the process that is gone
        except BrokenPipeError:
            os._exit(141)  # an orderly end would try to write the rest
        except OSError as error:
            remedy = REMEDIES.get(error.errno or 0)
            if remedy is None:
                raise
            where = f" {error.filename}" if error.filename else ""
            print(f"error: cannot write or read{where}: {error.strerror}; {remedy}.", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("interrupted; train and encode go on when the same command is given.", file=sys.stderr, flush=True)
            os._exit(130)  # an orderly end would wait for batches that other threads have begun

    return wrapped


def progress(total: int, desc: str, unit: str, quiet: bool = False) -> "tqdm[Any]":
    """A bar with rate and time left; silent when `quiet` or when stderr is not a terminal."""
    return tqdm(total=total, desc=desc, unit=unit, disable=True if quiet else None, dynamic_ncols=True, mininterval=0.5)


def quiet_logs() -> None:
    """Warnings on stderr, without the one that is no news: encoders get their weights after they are made."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger().addFilter(lambda record: "No pretrained weights loaded" not in record.getMessage())
