"""Nested dropout: registers ordered from coarse to fine by how often they are dropped (Rippel et al. 2014, arXiv:1402.0915).

Register i of N is dropped with probability linspace(0, rate, N)[i]: 0, 17, 33, 50% for N = 4 and rate = 0.5. The first is
never dropped, so something is always kept.
"""

from typing import Literal

import torch
from torch import Tensor

NestedMode = Literal["nested", "independent"]


def drop_probabilities(registers: int, rate: float) -> Tensor:
    """(N,) float64 probabilities of being dropped, rising linearly from 0 to `rate`."""
    return torch.linspace(0, rate, registers, dtype=torch.float64)


def draw_kept(
    batch: int, registers: int, rate: float, mode: NestedMode = "nested", generator: torch.Generator | None = None
) -> Tensor:
    """(B, N) bool, True = kept; every register is dropped with exactly its marginal probability.

    `nested`: one uniform draw per sample decides all its registers. Because the probabilities rise, what is kept is
    always a prefix. `independent`: one draw per register, so gaps occur.
    """
    draws = torch.rand(batch, registers if mode == "independent" else 1, generator=generator, dtype=torch.float64)
    return draws >= drop_probabilities(registers, rate)


def prefix(batch: int, registers: int, length: int) -> Tensor:
    """(B, N) bool: the first `length` registers kept in every sample."""
    return (torch.arange(registers) < length).expand(batch, registers)
