"""Terminal output: progress bars and one-line error messages."""

import errno
import logging
import math
import os
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec

from tqdm import tqdm

P = ParamSpec("P")
LINE_INTERVAL = 60.0  # seconds between progress lines when stderr is not a terminal
# Substrings of the RuntimeError that gloo or NCCL raises when another process of the group has died.
LOST_CONNECTION = ("Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe")
DISK_FULL = "existing files are unchanged; free some space and run the same command again"
OS_ERROR_HINTS = {
    errno.ENOSPC: DISK_FULL,
    errno.EDQUOT: DISK_FULL,
    errno.EFBIG: DISK_FULL,
    errno.EACCES: "give a folder that you have permission to use",
    errno.EPERM: "give a folder that you have permission to use",
    errno.EROFS: "give a folder on a writable file system",
}
EXTRAS = {  # package -> the extra of tvl-align that installs it
    **dict.fromkeys(("accelerate", "jinja2", "matplotlib", "rich", "sklearn", "tensorboard", "threadpoolctl"), "train"),
    **dict.fromkeys(("scipy", "taxim"), "demo"),
    **dict.fromkeys(("h5py", "zarr"), "arrays"),
    **dict.fromkeys(("sentence_transformers", "transformers"), "encoders"),
    "faiss": "search",
    **{name: name for name in ("datasets", "webdataset")},
    "av": "video",
    "pyarrow": "lerobot",
    "ray": "ray",
    "submitit": "slurm",
}


class UserError(Exception):
    """Bad input. The message names the value and the remedy in one sentence."""


def reports_errors(main: Callable[P, None]) -> Callable[P, None]:
    """Decorate an entry point: expected errors become one line on stderr and an exit code, without a traceback.

    UserError, a missing optional package, a full or read-only file system, a lost process of the group: exit code 2.
    Ctrl-C: exit code 130. Closed stdout (`| head`): exit code 141, without a message.
    """

    @wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            try:
                main(*args, **kwargs)
            finally:
                print(end="", flush=True)  # flush here, so that the handlers below catch a closed stdout
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except ModuleNotFoundError as error:
            extra = EXTRAS.get((error.name or "").partition(".")[0])
            if extra is None:
                raise
            print(f"error: {error.name} is not installed; run pip install 'tvl-align[{extra}]'.", file=sys.stderr)
            sys.exit(2)
        except RuntimeError as error:
            if not any(text in str(error) for text in LOST_CONNECTION):
                raise
            reason = " ".join(str(error).split())[:160]
            print(
                f"error: process {os.environ.get('RANK', '0')} lost the connection to another process ({reason}); "
                "see the log of that process for the cause, then run the same command again to resume.",
                file=sys.stderr,
            )
            os._exit(2)  # sys.exit would wait for the lost process
        except BrokenPipeError:
            os._exit(141)  # sys.exit would try to write the rest
        except OSError as error:
            hint = OS_ERROR_HINTS.get(error.errno or 0)
            if hint is None:
                raise
            path = f" {error.filename}" if error.filename else ""
            print(f"error: cannot read or write{path}: {error.strerror}; {hint}.", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("interrupted; run train or encode again with the same flags to resume.", file=sys.stderr, flush=True)
            os._exit(130)  # sys.exit would wait for batches in other threads

    return wrapped


class _ProgressLines(tqdm):
    """A tqdm that prints a plain line every LINE_INTERVAL seconds, for stderr that is not a terminal."""

    def __init__(self, total: int | None, desc: str, unit: str, initial: int) -> None:
        timing = {"mininterval": LINE_INTERVAL, "maxinterval": LINE_INTERVAL, "delay": LINE_INTERVAL, "miniters": 1}
        super().__init__(total=total, desc=desc, unit=unit, initial=initial, leave=False, **timing)

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        """Set the text after the rate; it is printed with the next line, not at once."""
        super().set_postfix_str(s, refresh=False)

    def set_postfix(self, ordered_dict: Any = None, refresh: bool = True, **values: Any) -> None:
        """As `set_postfix_str`, for named values."""
        super().set_postfix(ordered_dict, refresh=False, **values)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Print the line; `msg` "" is tqdm's request to clear the bar, which is ignored."""
        elapsed = self.format_dict["elapsed"]
        if msg is None and self.n > self.initial and elapsed > 0:
            rate = (self.n - self.initial) / elapsed
            speed = f"{rate:.1f} {self.unit}/s" if rate >= 1 else f"{1 / rate:.1f} s/{self.unit}"
            of_all, left = "", ""
            if self.total is not None:
                of_all, left = f"/{self.total}", f", {math.ceil((self.total - self.n) / rate / 60)} min left"
            postfix = f", {self.postfix}" if self.postfix else ""
            line = f"{self.desc.removesuffix(': ')}: {self.unit} {self.n}{of_all}, {speed}{left}{postfix}"
            print(line, file=self.fp, flush=True)


def progress(total: int | None, desc: str, unit: str, quiet: bool = False, initial: int = 0) -> "tqdm[Any]":
    """Progress of a job on stderr: a tqdm bar on a terminal, else one line per minute; nothing if `quiet`.

    total, initial: number of units in all (None: not known), and done before. desc, unit: names of the job and of one unit.
    """
    if quiet or sys.stderr.isatty():
        return tqdm(total=total, desc=desc, unit=unit, initial=initial, disable=quiet, dynamic_ncols=True, mininterval=0.5)
    return _ProgressLines(total, desc, unit, initial)


def quiet_logs() -> None:
    """Log warnings to stderr, except open_clip's "No pretrained weights loaded": weights are loaded after construction."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger().addFilter(lambda record: "No pretrained weights loaded" not in record.getMessage())
