"""stage2_subsets v1.0. The base with overlapping registers of subsets of modalities: one of all, then one of each pair.

What two of three modalities share is unique to neither, and not shared by all. So a token of a pair is zero in the other
modalities. With two modalities there is one subset. A variant, to be compared with the base.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import cast

import torch
from torch import Tensor

from tvl_align.contract import FeatureSpec, Implementation, Method
from tvl_align.methods.base import BaseLoss, Stage2Config, TVLStage2


@dataclass(frozen=True)
class SubsetsConfig(Stage2Config):
    """The registers and their loss."""

    num_register_tokens: int = 5
    """Number of registers."""
    num_overlapping_tokens: int = 4
    """Number of leading registers that are aligned across modalities; the rest are complementary."""


class SubsetRegisters(TVLStage2):
    """The base; `owned_<modality>` (U,): 1 for units of tokens whose subset contains the modality, else 0."""

    def __init__(self, specs: Mapping[str, FeatureSpec], **options: object) -> None:
        super().__init__(specs, **options)  # type: ignore[arg-type]
        subsets = subsets_of(list(specs), len(self.codes.counts))
        counts = torch.tensor(self.codes.counts)
        for m in specs:
            owned = torch.tensor([m in subset for subset in subsets], dtype=torch.float32)
            self.register_buffer(f"owned_{m}", owned.repeat_interleave(counts))

    def overlapping_units(self, name: str, attended: Tensor, trunk: Tensor) -> Tensor:
        return super().overlapping_units(name, attended, trunk) * cast(Tensor, getattr(self, f"owned_{name}"))


def subsets_of(modalities: Sequence[str], tokens: int) -> list[tuple[str, ...]]:
    """The modalities of each token: all, then the pairs in turn."""
    pairs = list(combinations(modalities, 2)) if len(modalities) > 2 else []
    every: list[tuple[str, ...]] = [tuple(modalities), *pairs]
    return [every[i % len(every)] for i in range(tokens)]


SUBSETS = Method(Implementation("stage2_subsets", "1.0", "SUBSETS"), SubsetsConfig, SubsetRegisters.of, BaseLoss)
