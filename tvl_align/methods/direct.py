"""DirectModel: tokens that are a function of a modality's components, without attention. Baselines use it."""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from tvl_align.contract import Batch, Features, FeatureSpec, Output, Reconstruction, Stage2Model, Tokens
from tvl_align.methods.codes import CodeConfig, Codes
from tvl_align.registers.model import MAX_LOGIT_SCALE, checked
from tvl_align.registers.nested import draw_kept
from tvl_align.system.console import UserError


class DirectModel(nn.Module, Stage2Model):
    """Tokens from `encode`, embedded by the bases of tvl_align.methods.codes, plus a learned constant per token.

    `registers` (N, D) are the constants. register_tokens is the mean over the present modalities.
    """

    def __init__(self, specs: Mapping[str, FeatureSpec], knobs: CodeConfig) -> None:
        super().__init__()
        self.specs, self.knobs, self.codes = dict(specs), knobs, Codes(specs, knobs)
        self.registers = nn.Parameter(torch.zeros(knobs.num_register_tokens, knobs.register_token_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def draw_kept(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw a nested-dropout mask for training: (B, N) bool, True = kept."""
        return draw_kept(
            batch, len(self.registers), self.knobs.nested_dropout_rate, self.knobs.nested_dropout_mode, generator
        )

    @abstractmethod
    def encode(self, name: str, components: Tensor) -> tuple[Tensor, Tensor]:
        """Components (B, K) -> units of overlapping (B, U) and of complementary tokens (B, V)."""

    def rebuild(self, name: str, over: Tensor, comp: Tensor) -> Tensor | None:
        """Units (B, U), (B, V) -> components (B, K); None: the method does not reconstruct."""
        return None

    def forward(self, batch: Batch | Features, kept: Tensor | None = None, joint: bool = True) -> Output:
        """Stored features -> Output (tvl_align.contract). Arguments as in RegisterModel.forward."""
        if not isinstance(batch, Features):
            raise UserError("this method is used on stored features only; encode raw inputs first.")
        features, dropping = checked(batch, self.registers), kept is not None or self.training
        if kept is None:
            kept = self.draw_kept(len(features)) if self.training else torch.ones(len(features), len(self.registers)).bool()
        kept = kept.to(self.registers.device)
        count = len(self.codes.counts)
        over, comp, reconstruction = {}, {}, {}
        for name, m in features.modalities.items():
            scores, rest = self.codes.read(name, m)
            units, comp_units = self.encode(name, self.codes.noisy(scores))
            tokens = Codes.tokens(units, self.codes.over) * kept[:, :count, None]
            comp_tokens = Codes.tokens(comp_units, self.codes.comp) * kept[:, count:, None]
            over[name] = tokens + self.registers[:count] * kept[:, :count, None]
            comp[name] = comp_tokens + self.registers[count:] * kept[:, count:, None]
            rebuilt = self.rebuild(name, Codes.units(tokens, self.codes.over), Codes.units(comp_tokens, self.codes.comp))
            if rebuilt is not None:
                error = self.codes.principal.squared_error(name, scores, rebuilt, rest)
                reconstruction[name] = Reconstruction(error[:, None], m.present[:, None])
        present = {name: m.present for name, m in features.modalities.items()}
        return Output(
            overlapping_tokens=over,
            complementary_tokens=comp,
            stage1_features={name: m.pooled for name, m in features.modalities.items()},
            logit_scale=self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp(),
            present=present,
            caption_keys=features.caption_keys,
            register_tokens=_mean_of_present(over, comp, present) if joint else None,
            nested_dropout_mask=kept if dropping else None,
            reconstruction=reconstruction,
            features=features,
        )

    def condense(self, name: str, tokens: Tokens) -> Tensor:
        """Components of the tokens, (B, K + 1); see Stage2Model."""
        return self.codes.condense(name, tokens)

    @torch.no_grad()
    def calibrate(self, batches: Callable[[], Iterable[Features]]) -> None:
        """Fit the principal components."""
        self.codes.principal.fit(batches)


def _mean_of_present(over: Mapping[str, Tensor], comp: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
    weights = torch.stack(list(present.values())).float()
    weights = weights / weights.sum(0).clamp(min=1)
    tokens = torch.stack([torch.cat([over[m], comp[m]], dim=1) for m in present])
    return torch.einsum("mb,mbnd->bnd", weights, torch.where(weights[..., None, None] > 0, tokens, 0.0))
