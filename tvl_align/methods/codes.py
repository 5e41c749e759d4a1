"""Narrow codes of the principal components of a modality, and the tokens that stand for them.

A token of width D holds few units: an orthonormal basis, drawn once, embeds the units of each token. The first overlapping
token has more units than the others, so that a short prefix is of use. The tokens span orthogonal subspaces, so every token
adds to the pooled mean. Everything a token tells is in its units.

Shapes: B rows, K components, n tokens with U units together, D token width.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import itemgetter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tvl_align.contract import Features, FeatureSpec, Tokens
from tvl_align.registers.model import RegisterConfig
from tvl_align.registers.principal import PrincipalComponents
from tvl_align.system.bounds import at_least
from tvl_align.system.console import UserError
from tvl_align.system.distributed import joint_noise


@dataclass(frozen=True)
class CodeConfig(RegisterConfig):
    """The registers and their loss."""

    components: int = 256
    """Principal components of a modality's frozen tokens that are read."""
    units: int = 24
    """Units of all overlapping tokens; the first token holds half of them, the others share the rest."""
    complementary_units: int = 12
    """Units of a complementary token."""
    noise: float = 0.2
    """Standard deviation of the Gaussian noise added in training to what is read (of a mean variance of 1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "components", "units", "complementary_units")
        at_least(0, self, "noise")


class Codes(nn.Module):
    """Components of the frozen tokens, and the bases of the tokens: `over` (No, U, D) and `comp` (Nc, V, D).

    U, V: units of all overlapping and of all complementary tokens. The basis of a unit is zero in all tokens but its own.
    counts, comp_counts: units of each token. If D is too small for all units, tokens have fewer, D // N on average.
    fine: see PrincipalComponents.
    """

    over: Tensor
    comp: Tensor
    prefixes: Tensor  # (No, U), True for the units of the first 1, 2, ... overlapping tokens
    token_of: Tensor  # (U + V,), the token of each unit

    def __init__(self, specs: Mapping[str, FeatureSpec], knobs: CodeConfig, fine: bool = False) -> None:
        super().__init__()
        count, dim, leading = knobs.num_register_tokens, knobs.register_token_dim, knobs.num_overlapping_tokens
        if dim < count:
            raise UserError(f"register width {dim} is less than {count} registers; give a larger --register_token_dim.")
        most = dim // count
        self.counts = _unit_counts(min(max(knobs.units, leading), most * leading), leading)
        self.comp_counts = [min(knobs.complementary_units, most)] * (count - leading)
        self.noise, self.principal = knobs.noise, PrincipalComponents(specs, knobs.components, fine)
        total = sum(self.counts) + sum(self.comp_counts)
        basis = torch.linalg.qr(torch.randn(dim, total))[0].T.contiguous()
        for name, counts, part in (
            ("over", self.counts, basis[: sum(self.counts)]),
            ("comp", self.comp_counts, basis[sum(self.counts) :]),
        ):
            owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
            self.register_buffer(name, (owner == torch.arange(len(counts))[:, None])[..., None] * part)
        every = torch.repeat_interleave(torch.arange(count), torch.tensor([*self.counts, *self.comp_counts]))
        self.register_buffer("token_of", every, persistent=False)
        within = every[: sum(self.counts)] <= torch.arange(leading)[:, None]
        self.register_buffer("prefixes", within, persistent=False)

    def read(self, name: str, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """What is read of a modality (B, K + E), and the part of its features outside the components (B,).

        In float32, also under autocast, as the components were fitted.
        """
        if tokens.condensed:
            return tokens.tokens[:, 0, :-1], tokens.tokens[:, 0, -1]
        with torch.autocast(tokens.tokens.device.type, enabled=False):
            read, rest = self.principal(name, tokens)
        return read, rest

    def read_all(self, features: Features) -> tuple[Tensor, Tensor, Tensor]:
        """What is read of all modalities at once: (M, B, K + E), with zeros after the end of smaller ones, the rest (M, B),
        and whether a row has the modality (M, B). A modality that the batch lacks is absent in all rows, and zero."""
        sizes, found = self.principal.sizes, features.modalities
        most, alike = max(sizes.values()), len(set(sizes.values())) == 1 and len(found) == len(sizes)
        present = [found[m].present if m in found else torch.zeros_like(features.rows, dtype=torch.bool) for m in sizes]
        if alike and all(t.condensed for t in found.values()):
            joined = torch.stack([found[m].tokens[:, 0] for m in sizes])
            return joined[..., :-1], joined[..., -1], torch.stack(present)
        parts = {m: self.read(m, t) for m, t in found.items()}
        blank = next(iter(parts.values()))[0].new_zeros(len(features), 0), next(iter(parts.values()))[1] * 0
        parts = {m: parts.get(m, blank) for m in sizes}
        read = torch.stack([F.pad(x, (0, most - x.shape[1])) for x, _ in parts.values()])
        return read, torch.stack([rest for _, rest in parts.values()]), torch.stack(present)

    def kept_units(self, kept: Tensor) -> Tensor:
        """(B, N) bool -> (B, U + V) bool, True for the units of kept tokens."""
        return kept.index_select(1, self.token_of)

    def condense(self, name: str, tokens: Tokens) -> Tensor:
        """All that is read of the tokens, (B, K + E + 1)."""
        read, rest = self.read(name, tokens)
        return torch.cat([read, rest[:, None]], dim=1)

    def noisy(self, components: Tensor) -> Tensor:
        """Components (..., B, K), with noise in training."""
        if not self.training or not self.noise:
            return components
        return torch.add(components, joint_noise(components, -2), alpha=self.noise)

    @staticmethod
    def tokens(units: Tensor, basis: Tensor) -> Tensor:
        """Units (..., B, U), basis (n, U, D) -> tokens (..., B, n, D)."""
        return torch.einsum("...u,nud->...nd", units, basis)

    @staticmethod
    def units(tokens: Tensor, basis: Tensor) -> Tensor:
        """Tokens (..., B, n, D) -> units (..., B, U)."""
        return torch.einsum("...nd,nud->...u", tokens, basis)

    def paired_scores(self, batches: Callable[[], Iterable[Features]]) -> dict[str, Tensor]:
        """Components {modality: (n, K)} of the rows that have every modality."""
        parts: dict[str, list[Tensor]] = {m: [] for m in self.principal.specs}
        for features in _complete_rows(batches(), list(parts)):
            for m, tokens in features.modalities.items():
                parts[m].append(self.read(m, tokens)[0])
        scores = {m: torch.cat(part) if part else torch.zeros(0, 1) for m, part in parts.items()}
        finite = torch.stack([x.isfinite().all(1) for x in scores.values()]).all(0)
        return {m: x[finite] for m, x in scores.items()}


def _unit_counts(total: int, tokens: int) -> list[int]:
    """Units of each token: half of them for the first, the rest in equal parts, earlier tokens first."""
    if tokens == 1:
        return [total]
    first = min((total + 1) // 2, total - (tokens - 1))
    rest, more = divmod(total - first, tokens - 1)
    return [first, *(rest + (i < more) for i in range(tokens - 1))]


def _complete_rows(batches: Iterable[Features], names: list[str]) -> Iterator[Features]:
    """The rows that have every modality, in float32; batches without such rows are skipped."""
    for features in map(Features.float, batches):
        if all(m in features.modalities for m in names):
            complete = torch.stack([features.modalities[m].present for m in names]).all(0)
            if complete.any():
                yield features.only(names).map(itemgetter(complete))


def dropped(components: Tensor, rate: float) -> Tensor:
    """Components (..., B, K), each zero with probability `rate`, the others scaled up; the same on 2 processes as on 1."""
    return components * (joint_noise(components, -2, torch.rand) >= rate) * (1 / (1 - rate))
