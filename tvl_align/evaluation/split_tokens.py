"""Tokens, pooled vectors and reconstruction errors of a model on a whole split."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tvl_align.contract import Features, Output
from tvl_align.evaluation.uncertainty import Estimate
from tvl_align.features.store import FeatureSource
from tvl_align.registers.nested import prefix
from tvl_align.registers.pooling import pooled_overlapping

EVAL_BATCH = 256  # rows


@dataclass(frozen=True)
class SplitTokens:
    """The tokens of one model on M rows of a split, on the CPU.

    overlapping, complementary: {modality: (M, n, D)}. pooled: {modality: (M, D)}, L2-normalised. present: {modality: (M,)
    bool}. keys: (M, K) int64 caption keys. scale: the logit scale. errors: {modality: (M, 2)}, the squared error of
    rebuilding the frozen tokens of a row and the number of its tokens; empty without decoders.
    """

    overlapping: dict[str, Tensor]
    complementary: dict[str, Tensor]
    pooled: dict[str, Tensor]
    present: dict[str, Tensor]
    keys: Tensor
    scale: float
    errors: dict[str, Tensor]

    def reconstruction(self, weights: Tensor) -> dict[str, Estimate]:
        """{modality: error of rebuilding its frozen tokens in percent of their variance}. weights: (R, M) of resamples."""
        found = {}
        for m, errors in self.errors.items():
            sums = torch.cat([errors.sum(0, keepdim=True), weights @ errors])  # of all rows, then of every resample
            percent = 100 * sums[:, 0] / sums[:, 1].clamp(min=1e-9)
            found[m] = Estimate(float(percent[0]), percent[1:])
        return found


def all_rows(source: FeatureSource) -> Tensor:
    """(M,) indices of all rows of a split."""
    return torch.arange(len(source))


def plain_batches(source: FeatureSource, rows: Tensor, device: torch.device) -> Any:
    """Features of the given rows without augmentation (view 0), in batches of EVAL_BATCH."""
    parts = list(rows.split(EVAL_BATCH))
    return source.batches(parts, [torch.zeros_like(p) for p in parts], device)


def stage1_features(source: FeatureSource, rows: Tensor, device: torch.device) -> Features:
    """Frozen features of the given rows without augmentation, on the CPU; text is padded to its longest sentence."""
    return joined_features([batch.to("cpu") for batch in plain_batches(source, rows, device)])


def joined_features(parts: Sequence[Features]) -> Features:
    """Features of several batches as one; text is padded to its longest sentence."""
    joined = {}
    for name in parts[0].modalities:
        longest = max(p.modalities[name].tokens.shape[1] for p in parts)

        def padded(x: Tensor, longest: int = longest) -> Tensor:
            return torch.cat([x, x.new_zeros(len(x), longest - x.shape[1], *x.shape[2:])], dim=1)

        tokens = [p.modalities[name] for p in parts]
        joined[name] = type(tokens[0])(
            torch.cat([padded(t.tokens) for t in tokens]),
            torch.cat([padded(t.mask) for t in tokens]),
            torch.cat([t.pooled for t in tokens]),
            torch.cat([t.present for t in tokens]),
        )
    return Features(joined, torch.cat([p.caption_keys for p in parts]), torch.cat([p.rows for p in parts]))


@torch.no_grad()
def compute_tokens(
    model: nn.Module, source: FeatureSource, rows: Tensor, device: torch.device, length: int | None = None
) -> SplitTokens:
    """Compute tokens of the given rows in evaluation mode, keeping the first `length` registers (None: all)."""
    model.eval()
    outputs: list[Output] = []
    pooled: list[dict[str, Tensor]] = []
    errors: dict[str, list[Tensor]] = {}
    registers = len(model.get_parameter("registers"))
    for features in plain_batches(source, rows, device):
        kept = None if length is None else prefix(len(features), registers, length)
        output = model(features, kept=kept, joint=False)
        for name, r in output.reconstruction.items():
            squared = torch.where(r.mask, r.error, 0.0).float()
            errors.setdefault(name, []).append(torch.stack([squared.sum(1), r.mask.float().sum(1)], dim=1).cpu())
        pooled.append(pooled_overlapping(output))
        outputs.append(replace(output, features=None, reconstruction={}, extras={}))  # they are large

    def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {m: torch.cat([part[m] for part in parts]).cpu() for m in parts[0]}

    return SplitTokens(
        joined([output.overlapping_tokens for output in outputs]),
        joined([output.complementary_tokens for output in outputs]),
        joined(pooled),
        joined([output.present for output in outputs]),
        torch.cat([output.caption_keys for output in outputs]).cpu(),
        float(outputs[0].logit_scale),
        {m: torch.cat(parts) for m, parts in errors.items()},
    )
