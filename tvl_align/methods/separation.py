"""Shared and unique information taken apart by two least-squares regressions in turn, without labels.

From complementary tokens is subtracted what the OTHER modalities can tell of them; from overlapping units what the
complementary tokens of the same modality, thus cleaned, can tell of them.

The first regression uses the other modalities as instruments (two-stage least squares, Theil 1953). A plain regression of
complementary tokens on overlapping units errs twice: where units leak what only this modality knows, that is subtracted
too, and where they are noisy the coefficients shrink and something shared stays. The other modalities know nothing unique,
and their noise is independent. The second regression removes leaks and noise alike, since nothing shared is left in what it
regresses on; so the first can be fitted anew on cleaner units. ROUNDS such turns are taken.

Shapes: B rows, O units that enter regressions, E further units that are only cleaned, C numbers of complementary tokens.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

ROUNDS = 3
FEATURES = 128
RIDGE = 1e-3  # relative: added to a covariance before it is inverted


class Separation(nn.Module):
    """The regressions of one modality: units (B, O + E) and complementary (B, C) -> both, cleaned.

    The first O units enter by themselves and through random tanh features (Rahimi & Recht 2007): a class is seldom a linear
    function of the units, and what is uncorrelated with a class no linear probe can read. Before the first fit: identity.
    """

    def __init__(self, units: int, further: int, comp: int, features: int = FEATURES, rounds: int = ROUNDS) -> None:
        super().__init__()
        self.units = units
        self.register_buffer("weight", torch.randn(features, units) * 1.5 / units**0.5)
        self.register_buffer("bias", torch.randn(features))
        self.register_buffer("centre", torch.zeros(rounds, units + features))
        self.register_buffer("to_comp", torch.zeros(rounds, units + features, comp))
        self.register_buffer("comp_centre", torch.zeros(comp))
        self.register_buffer("to_units", torch.zeros(rounds, comp, units + further))

    def forward(self, units: Tensor, comp: Tensor) -> tuple[Tensor, Tensor]:
        cleaned, rest = units, comp
        for turn in range(len(self.centre)):
            rest = comp - self.predicted(turn, cleaned)
            cleaned = self.without_unique(turn, units, rest)
        return cleaned, rest

    def predicted(self, turn: int, units: Tensor) -> Tensor:
        """What units tell of complementary tokens, as far as other modalities can tell it too: (B, C)."""
        return (self.features(units) - self.centre[turn]) @ self.to_comp[turn]

    def without_unique(self, turn: int, units: Tensor, rest: Tensor) -> Tensor:
        return units - (rest - self.comp_centre) @ self.to_units[turn]

    def features(self, units: Tensor) -> Tensor:
        """(B, O + F): the units that enter and their random features."""
        inner = units[:, : self.units]
        return torch.cat([inner, torch.tanh(inner @ self.weight.T + self.bias)], dim=1)


@torch.no_grad()
def fit_separations(separations: Mapping[str, Separation], units: Mapping[str, Tensor], comp: Mapping[str, Tensor]) -> None:
    """Fit the Separation of every modality on paired rows: units {m: (B, O + E)}, comp {m: (B, C)}."""
    cleaned = dict(units)
    rounds = len(next(iter(separations.values())).centre)
    for turn in range(rounds):
        seen = {m: s.features(cleaned[m]) for m, s in separations.items()}
        for m, s in separations.items():
            s.centre[turn], s.comp_centre[:] = seen[m].mean(0), comp[m].mean(0)
            instruments = torch.cat([seen[other] for other in seen if other != m], dim=1)
            told = centred(instruments) @ least_squares(instruments, seen[m])
            s.to_comp[turn] = least_squares(told, comp[m])
            rest = comp[m] - s.predicted(turn, cleaned[m])
            s.to_units[turn] = least_squares(rest, units[m])
            cleaned[m] = s.without_unique(turn, units[m], rest)


def least_squares(x: Tensor, y: Tensor) -> Tensor:
    """(B, F), (B, G) -> (F, G): ridge regression of y on x, both centred, in double precision.

    The ridge grows as rows become scarcer than numbers, which holds back what would be fitted to noise and rounding.
    """
    x, y = centred(x.double()), centred(y.double())
    inner, ridge = x.T @ x, RIDGE + (x.shape[1] / len(x)) ** 2
    inner += ridge * inner.diagonal().mean().clamp(min=1e-12) * torch.eye(len(inner), dtype=inner.dtype, device=inner.device)
    return torch.linalg.solve(inner, x.T @ y).float()


def centred(x: Tensor) -> Tensor:
    return x - x.mean(0)
