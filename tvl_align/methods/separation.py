"""Separation of shared and unique information by two alternating least-squares regressions, without labels.

1. Complementary tokens lose the part that the OTHER modalities predict.
2. Overlapping units lose the part that the complementary tokens of the same modality predict, after step 1.

Step 1 is two-stage least squares with the other modalities as instruments (Theil 1953). An ordinary regression of
complementary tokens on overlapping units has two errors. If the units leak unique information, that information is
subtracted too. If the units are noisy, the coefficients shrink and shared information remains. The other modalities contain
nothing unique to this one, and their noise is independent, so neither error occurs. Step 2 removes leaks and noise but
nothing shared, because its regressors contain nothing shared. Step 1 can then be fitted again on cleaner units; this
alternates ROUNDS times.

Shapes: B rows, O units used as regressors, E further units that are only cleaned, F random features, C complementary values.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

ROUNDS = 3
FEATURES = 128  # random tanh features
RIDGE = 1e-3  # added to a covariance before inversion, as a fraction of its mean diagonal


class Separation(nn.Module):
    """The regressions of one modality: units (B, O + E) and complementary tokens (B, C) -> both, cleaned.

    The first O units are regressors, together with F random tanh features of them (Rahimi & Recht 2007): a class is rarely a
    linear function of the units, and a linear probe cannot find a class in features uncorrelated with it. Before the first
    fit both are returned unchanged.
    """

    weight: Tensor
    bias: Tensor
    centre: Tensor
    to_comp: Tensor
    comp_centre: Tensor
    to_units: Tensor

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
        """Units (B, O + E), comp (B, C) -> cleaned units, cleaned comp."""
        cleaned, rest = units, comp
        for turn in range(len(self.centre)):
            rest = comp - self.predicted(turn, cleaned)
            cleaned = self.without_unique(turn, units, rest)
        return cleaned, rest

    def predicted(self, turn: int, units: Tensor) -> Tensor:
        """The shared part of the complementary tokens, predicted from units (B, O + E) -> (B, C)."""
        return (self.features(units) - self.centre[turn]) @ self.to_comp[turn]

    def without_unique(self, turn: int, units: Tensor, rest: Tensor) -> Tensor:
        """Units (B, O + E) minus the part that cleaned complementary tokens (B, C) predict."""
        return units - (rest - self.comp_centre) @ self.to_units[turn]

    def features(self, units: Tensor) -> Tensor:
        """Units (B, O + E) -> regressors (B, O + F): the first O units and their random features."""
        inner = units[:, : self.units]
        return torch.cat([inner, torch.tanh(inner @ self.weight.T + self.bias)], dim=1)


@torch.no_grad()
def fit_separations(separations: Mapping[str, Separation], units: Mapping[str, Tensor], comp: Mapping[str, Tensor]) -> None:
    """Fit the Separation of every modality on paired rows: units {modality: (B, O + E)}, comp {modality: (B, C)}."""
    cleaned = dict(units)
    rounds = len(next(iter(separations.values())).centre)
    for turn in range(rounds):
        regressors = {m: s.features(cleaned[m]) for m, s in separations.items()}
        for m, s in separations.items():
            s.centre[turn], s.comp_centre[:] = regressors[m].mean(0), comp[m].mean(0)
            instruments = torch.cat([regressors[other] for other in regressors if other != m], dim=1)
            first_stage = centred(instruments) @ least_squares(instruments, regressors[m])
            s.to_comp[turn] = least_squares(first_stage, comp[m])
            rest = comp[m] - s.predicted(turn, cleaned[m])
            s.to_units[turn] = least_squares(rest, units[m])
            cleaned[m] = s.without_unique(turn, units[m], rest)


def least_squares(x: Tensor, y: Tensor) -> Tensor:
    """Ridge regression of y (B, G) on x (B, F), both centred -> (F, G) float32, computed in float64.

    The ridge is RIDGE + (F / B)^2, relative to the mean variance of x: with few rows it limits overfitting.
    """
    x, y = centred(x.double()), centred(y.double())
    inner, ridge = x.T @ x, RIDGE + (x.shape[1] / len(x)) ** 2
    inner += ridge * inner.diagonal().mean().clamp(min=1e-12) * torch.eye(len(inner), dtype=inner.dtype, device=inner.device)
    return torch.linalg.solve(inner, x.T @ y).float()


def centred(x: Tensor) -> Tensor:
    """x minus its mean over rows."""
    return x - x.mean(0)
