"""Nested dropout: orders registers from coarse to fine by dropping later ones more often.

Source: Rippel et al. 2014, arXiv:1402.0915. Register i of N is dropped with probability linspace(0, rate, N)[i]: 0, 17, 33
and 50% for N = 4 and rate = 0.5. The first register is never dropped.
"""

from functools import cache
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

NestedMode = Literal["nested", "independent"]


def drop_probabilities(registers: int, rate: float) -> Tensor:
    """(N,) float64 drop probabilities, rising linearly from 0 to `rate`."""
    return torch.linspace(0, rate, registers, dtype=torch.float64)


def draw_kept(
    batch: int, registers: int, rate: float, mode: NestedMode = "nested", generator: torch.Generator | None = None
) -> Tensor:
    """Draw a nested-dropout mask: (B, N) bool, True = kept.

    In both modes register i is dropped with probability `drop_probabilities(registers, rate)[i]`. `nested`: one uniform
    draw per sample is compared with all N probabilities; since they rise, the kept registers are always a prefix.
    `independent`: one draw per register, so there can be gaps. generator: default torch's global generator.
    """
    draws = torch.rand(batch, registers if mode == "independent" else 1, generator=generator, dtype=torch.float64)
    return draws >= drop_probabilities(registers, rate)


@cache
def prefix_probabilities(registers: int, rate: float, leading: int) -> tuple[float, ...]:
    """The probabilities that nested dropout keeps 1, 2, ..., or all of the leading registers."""
    survival = [*(1 - drop_probabilities(registers, rate)[:leading]).tolist(), 0.0]
    return tuple(longer - shorter for longer, shorter in pairwise(survival))


def prefix(batch: int, registers: int, length: int) -> Tensor:
    """(B, N) bool mask that keeps the first `length` registers of every sample."""
    return (torch.arange(registers) < length).expand(batch, registers)
