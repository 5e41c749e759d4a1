"""stage2_closed v2. No training: canonical correlations, and the principal components of what they leave. A baseline.

Overlapping tokens hold canonical variates, weighted in each modality by their largest correlation with another one on
held-out rows; those below canonical.MIN_CORRELATION are dropped. Complementary tokens hold principal components of the
frozen tokens minus what the variates predict. Gradients change nothing but the temperature; one epoch is enough.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tvl_align.contract import Features, FeatureSpec, Implementation, Method
from tvl_align.losses.register_loss import RegisterLoss
from tvl_align.methods.canonical import canonical, residual_components, ridge_regression
from tvl_align.methods.codes import CodeConfig
from tvl_align.methods.direct import DirectModel


@dataclass(frozen=True)
class ClosedConfig(CodeConfig):
    """The registers and their loss."""

    components: int = 512
    """Principal components of a modality's frozen tokens that are read."""
    complementary_units: int = 32
    """Units of a complementary token."""
    noise: float = 0.0
    """Standard deviation of the Gaussian noise added in training to what is read."""


class Closed(DirectModel):
    """Linear maps fitted in `calibrate`; before, the leading components."""

    def __init__(self, specs: Mapping[str, FeatureSpec], knobs: ClosedConfig) -> None:
        super().__init__(specs, knobs)
        self.registers.requires_grad_(False)
        units, comp_units = sum(self.codes.counts), sum(self.codes.comp_counts)
        for m, k in self.codes.principal.sizes.items():
            start = torch.eye(k, max(units, comp_units))
            self.register_buffer(f"centre_{m}", torch.zeros(k))
            self.register_buffer(f"over_{m}", start[:, :units].clone())
            self.register_buffer(f"comp_{m}", start[:, :comp_units].clone())
            self.register_buffer(f"back_{m}", torch.zeros(units + comp_units, self.codes.principal.counts[m]))

    def units_of(self, name: str, components: Tensor) -> tuple[Tensor, Tensor]:
        centred = components - self.get_buffer(f"centre_{name}")
        return centred @ self.get_buffer(f"over_{name}"), centred @ self.get_buffer(f"comp_{name}")

    def rebuild(self, name: str, over: Tensor, comp: Tensor) -> Tensor:
        back = self.get_buffer(f"back_{name}")
        return torch.cat([over, comp], dim=1) @ back + self.get_buffer(f"centre_{name}")[: back.shape[1]]

    @torch.no_grad()
    def calibrate(self, batches: Callable[[], Iterable[Features]]) -> None:
        """Fit the principal components, the canonical variates and the components of what they leave."""
        super().calibrate(batches)
        scores = self.codes.paired_scores(batches)
        if len(next(iter(scores.values()))) < 2:
            return
        for m, x in scores.items():
            self.get_buffer(f"centre_{m}").copy_(x.mean(0))
        scores = {m: x - x.mean(0) for m, x in scores.items()}
        maps, strengths = canonical(scores, sum(self.codes.counts))
        for m, x in scores.items():
            over, comp, back = (self.get_buffer(f"{group}_{m}").zero_() for group in ("over", "comp", "back"))
            over[:, : maps[m].shape[1]] = maps[m] * strengths[m]
            found = residual_components(x, maps[m], int(comp.shape[1]))
            comp[:, : found.shape[1]] = found
            back.copy_(ridge_regression(torch.cat([x @ over, x @ comp], dim=1), x[:, : back.shape[1]], ridge=1e-4))


CLOSED = Method(
    Implementation("stage2_closed", "2", "CLOSED"), ClosedConfig, lambda knobs, specs: Closed(specs, knobs), RegisterLoss
)
