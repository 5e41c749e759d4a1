"""Bounds of the numbers in options: a number outside them is an error before anything runs."""

import math

from tvl_align.system.console import UserError


def at_least(low: float, options: object, *names: str) -> None:
    """Raise UserError unless the named options are finite and at least `low`. None is left alone."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not (low <= value < math.inf):
            raise UserError(f"--{name} {value} is out of range; give a number from {low:g} on.")


def between(low: float, high: float, options: object, *names: str, below: bool = False) -> None:
    """Raise UserError unless the named options are in [low, high], or in [low, high) with `below`. None is left alone."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not (low <= value < high if below else low <= value <= high):
            most = f"below {high:g}" if below else f"to {high:g}"
            raise UserError(f"--{name} {value} is out of range; give a number from {low:g} {most}.")
