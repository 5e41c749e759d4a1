"""DirectModel: tokens that are a function of a modality's components, without attention. Baselines use it."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from tvl_align.contract import Features, FeatureSpec, Reconstruction, Tokens
from tvl_align.methods.codes import CodeConfig, Codes
from tvl_align.registers.model import Encoded, NestedModel


class DirectModel(NestedModel):
    """Tokens from `units_of`, embedded by the bases of tvl_align.methods.codes, plus a learned constant per token.

    `registers` (N, D) are the constants. register_tokens is the mean over the present modalities.
    """

    def __init__(self, specs: Mapping[str, FeatureSpec], knobs: CodeConfig) -> None:
        super().__init__(specs, knobs, starts=torch.zeros(knobs.num_register_tokens, knobs.register_token_dim))
        self.knobs, self.codes = knobs, Codes(specs, knobs)

    @abstractmethod
    def units_of(self, name: str, components: Tensor) -> tuple[Tensor, Tensor]:
        """Components (B, K) -> units of overlapping (B, U) and of complementary tokens (B, V)."""

    def rebuild(self, name: str, over: Tensor, comp: Tensor) -> Tensor | None:
        """Units (B, U), (B, V) -> components (B, K); None: the method does not reconstruct."""
        return None

    def encode(self, features: Features, kept: Tensor | None) -> Encoded:
        """`inputs` of the result: {modality: (components (B, K + E), the part of the features outside them (B,))}."""
        read = {name: self.codes.read(name, m) for name, m in features.modalities.items()}
        units = [self.units_of(name, self.codes.noisy(components)) for name, (components, _) in read.items()]
        over, comp = (torch.stack(x) for x in zip(*units, strict=True))
        over, comp = Codes.tokens(over, self.codes.over), Codes.tokens(comp, self.codes.comp)
        split = self.num_overlapping
        return Encoded(list(read), over + self.registers[:split], comp + self.registers[split:], read)

    def joint(self, encoded: Encoded, kept: Tensor, features: Features) -> Tensor:
        weights = torch.stack([m.present for m in features.modalities.values()]).float()
        weights = weights / weights.sum(0).clamp(min=1)
        tokens = torch.cat([encoded.over, encoded.comp], dim=2) * kept[..., None]
        return torch.einsum("mb,mbnd->bnd", weights, torch.where(weights[..., None, None] > 0, tokens, 0.0))

    def reconstruct(
        self, encoded: Encoded, over: Tensor, comp: Tensor, kept: Tensor, features: Features
    ) -> dict[str, Reconstruction]:
        found, visible, split = {}, kept[..., None], self.num_overlapping
        for i, (name, (components, rest)) in enumerate(encoded.inputs.items()):
            units = Codes.units(over[i] - self.registers[:split] * visible[:, :split], self.codes.over)
            comp_units = Codes.units(comp[i] - self.registers[split:] * visible[:, split:], self.codes.comp)
            rebuilt = self.rebuild(name, units, comp_units)
            if rebuilt is not None:
                error = self.codes.principal.squared_error(name, components, rebuilt, rest)
                found[name] = Reconstruction(error[:, None], features.modalities[name].present[:, None])
        return found

    def condense(self, name: str, tokens: Tokens) -> Tensor:
        """Components of the tokens, (B, K + 1); see Stage2Model."""
        return self.codes.condense(name, tokens)

    @torch.no_grad()
    def calibrate(self, batches: Callable[[], Iterable[Features]]) -> None:
        """Fit the principal components."""
        self.codes.principal.fit(batches)
