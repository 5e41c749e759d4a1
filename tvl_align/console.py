"""What a person at the terminal sees: progress, and one-sentence errors."""

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec

from tqdm import tqdm

P = ParamSpec("P")


class UserError(Exception):
    """Bad input. The message names the value and the remedy in one sentence."""


def says_it_plainly(main: Callable[P, None]) -> Callable[P, None]:
    """Wrap an entry point: a `UserError` becomes one line on stderr and exit code 2."""

    @wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    return wrapped


def progress(total: int, desc: str, unit: str, quiet: bool = False) -> "tqdm[Any]":
    """A bar with rate and time left; silent when `quiet` or when stderr is not a terminal."""
    return tqdm(total=total, desc=desc, unit=unit, disable=True if quiet else None, dynamic_ncols=True, mininterval=0.5)
