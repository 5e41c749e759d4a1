"""What labels get out of the features that a run of `base` reads, its components and pooled features. No method.

`python -m benchmarks.with_labels RUN` makes two things with labels, and measures them on test rows as the run was measured:

- Codes of the size of the complementary ones: Fisher's linear discriminants (Fisher 1936) of every unique factor, fitted to
  training rows and rounded as the units are. Their unique retention and shared leak show whether a goal is out of reach of
  the size of the codes, or only of training without labels.
- Partners: classifiers of every shared factor, one a modality, fitted to training and probe rows. Two rows match as far as
  both are likely to have equal levels. Their Acc@1 is what the frozen features tell of the shared factors; where modalities
  share more than factors, such as the noise of a texture, a method can find more.

Shapes: M rows, Q test rows, K components, C levels of a factor, U units.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from operator import attrgetter
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from tvl_align.config import parse
from tvl_align.contract import Features
from tvl_align.evaluation.factors import KINDS, FactorProbes, Group
from tvl_align.evaluation.labels import Labels
from tvl_align.evaluation.measure import (
    EvaluateConfig,
    Meanings,
    OpenedRun,
    factor_probes,
    labelled_rows,
    needed_labels,
    open_run,
)
from tvl_align.evaluation.oracle import expected_hits
from tvl_align.evaluation.probes import Problem, Target, fit_probes
from tvl_align.evaluation.split_tokens import all_rows, stage1_features
from tvl_align.evaluation.uncertainty import group_weights, interval, weighted_mean
from tvl_align.losses.alignment import pair_name
from tvl_align.losses.contrastive import positive_mask
from tvl_align.methods.base import TVLStage2, quantise
from tvl_align.methods.codes import Codes
from tvl_align.system.console import UserError, reports_errors
from tvl_align.system.files import write_atomically
from tvl_align.system.provenance import provenance

EXAMPLES = ("python -m benchmarks.with_labels demo/runs/base",)
RIDGE = 1e-3  # added to variances, relative to their mean
SPREAD = 1.5  # standard deviation of a unit before it is rounded


@dataclass(frozen=True)
class WithLabelsConfig:
    """Measure what labels get out of the features that a run of base reads: codes of its size, and partners."""

    run: tyro.conf.Positional[Path]
    """Run folder of base."""


@dataclass(frozen=True)
class Discriminants:
    """A linear map (K, U) of rows minus `mean` (K,), and the levels that its results are rounded to."""

    mean: Tensor
    directions: Tensor
    levels: int

    def __call__(self, read: Tensor) -> Tensor:
        """(M, K) -> (M, U) in [-1, 1]."""
        return quantise((read - self.mean) @ self.directions, self.levels)


def discriminants(read: Tensor, factors: Sequence[Tensor], units: int, levels: int) -> Discriminants:
    """Fit to read (M, K) and factors (M,) int64 (-1: unknown): C - 1 directions of each; the `units` strongest stay."""
    mean = read.mean(0)
    x = read - mean
    covariance = x.T @ x / len(x)
    covariance.diagonal().add_(RIDGE * covariance.diagonal().mean())
    directions, strengths = [x.new_zeros(x.shape[1], 0)], [x.new_zeros(0)]
    for factor in factors:
        known = factor >= 0
        targets = F.one_hot(factor[known]).float()
        regression = torch.linalg.solve(covariance, x[known].T @ (targets - targets.mean(0)) / known.sum())
        _, strength, axes = torch.linalg.svd(x @ regression, full_matrices=False)
        directions.append(regression @ axes[:-1].T)
        strengths.append(strength[:-1])
    strongest = torch.cat(strengths).argsort(descending=True)[:units]
    chosen = torch.cat(directions, dim=1)[:, strongest]
    return Discriminants(mean, chosen * (SPREAD / (x @ chosen).square().mean(0).sqrt().clamp(min=1e-12)), levels)


def with_labels(config: WithLabelsConfig) -> Path:
    """Make codes and find partners with labels; prints scores, writes with_labels.json into the run, returns its path.

    Raises UserError for a run of another method and for data without labels.
    """
    options = EvaluateConfig(config.run)
    run = open_run(options)
    model = run.model
    if not isinstance(model, TVLStage2):
        raise UserError(f"{config.run} is a run of {run.config['implementation']['experiment_id']}; give a run of base.")
    labels = needed_labels(options, run.settings.data)
    if not any(labels.ownership.values()):
        raise UserError(f"the labels of {config.run} do not say which modalities own a factor; see docs/own_data.md.")
    frozen = stage1_features(run.test, all_rows(run.test), run.device)
    probes, weights = factor_probes(run, options, labels, frozen), group_weights(run.test.groups, run.settings.run.seed)
    if any(len(owners) == 1 for owners in labels.ownership.values()):
        codes = _codes(run, model, labels, {"probe": probes.probe.frozen, "test": frozen})
        probes.read({"complementary": Group(codes["probe"], codes["test"], thorough=True)})
    summary, found = probes.summary(weights), _partners(run, model.codes, probes, weights)
    for name, numbers in summary.items():
        print(f"{name.replace('_', ' ')} {numbers['score']:.1f} [{numbers['low']:.1f}, {numbers['high']:.1f}]")
    for pair, numbers in found.items():
        print(f"{pair.replace('_', '-')} Acc@1 {numbers['acc1']:.1f} [{numbers['low']:.1f}, {numbers['high']:.1f}]")
    content = {"summary": summary, "factors": probes.as_json(), "partners": found, "run": str(config.run)}
    path = config.run / "with_labels.json"
    write_atomically(path, json.dumps(content | {"made_by": provenance()}, indent=1, allow_nan=False) + "\n")
    return path


@torch.no_grad()
def _codes(run: OpenedRun, model: TVLStage2, labels: Labels, sides: Mapping[str, Features]) -> dict[str, dict[str, Tensor]]:
    """{side: {modality: (M, 1, U + 1)}}, fitted to training rows; the last unit is zero, for modalities without a factor."""
    train, rows = labelled_rows(run.inputs.splits["train"], len(run.inputs.splits["train"]))
    fitted, names = stage1_features(train, rows, run.device), [train.names[i] for i in rows.tolist()]
    reader, units, levels = model.codes.cpu(), sum(model.codes.comp_counts), model.knobs.levels
    codes: dict[str, dict[str, Tensor]] = {side: {} for side in sides}
    for m in run.inputs.specs:
        present = fitted.modalities[m].present
        unique = [labels.of(f, names) for f, owners in labels.ownership.items() if list(owners) == [m]]
        factors = [torch.from_numpy(levels_of)[present] for levels_of in unique]
        of = discriminants(reader.read(m, fitted.modalities[m].float())[0][present], factors, units, levels)
        for side, features in sides.items():
            code = of(reader.read(m, features.to("cpu").modalities[m].float())[0])
            codes[side][m] = F.pad(code, (0, 1))[:, None]
    return codes


def likely(logits: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (Q, C + 1), the last class "not told", and the levels (M,) they were fitted to -> the probability of each level
    (Q, C), and how frequent it is (C,). A row that does not tell its level may have any."""
    frequency = levels[levels >= 0].bincount(minlength=logits.shape[1] - 1).float() + 0.5
    frequency = frequency / frequency.sum()
    told, untold = logits.softmax(1).split([logits.shape[1] - 1, 1], dim=1)
    return told + untold * frequency, frequency


def match(first: Sequence[Tensor], second: Sequence[Tensor], frequencies: Sequence[Tensor]) -> Tensor:
    """Log-likelihood ratios (Q, Q) of equal against independent levels.

    first, second: the probabilities (Q, C) of each factor. frequencies: (C,) of each.
    """
    scores = torch.zeros(len(first[0]), len(second[0]))
    for a, b, frequency in zip(first, second, frequencies, strict=True):
        scores += ((a / frequency) @ b.T).clamp(min=1e-30).log()
    return scores


def _partners(run: OpenedRun, reader: Codes, probes: FactorProbes, weights: Tensor) -> dict[str, dict[str, float]]:
    """{pair: Acc@1 in percent, mean of both directions, and its 95% interval} of what classifiers tell of shared factors."""
    labels, known, test = probes.labels, probes.ceiling, probes.test
    meanings = Meanings(labels, test.names, test.frozen.caption_keys.cpu(), test.frozen.to("cpu").content_keys)
    told: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for m in run.inputs.specs:
        shared = [f for f, owners in labels.ownership.items() if m in owners and len(owners) > 1]
        if not shared:
            continue
        levels = torch.from_numpy(labels.told(m, shared, known.names))
        sides = [reader.read(m, rows.frozen.to("cpu").modalities[m].float())[0] for rows in (known, test)]
        at = known.frozen.modalities[m].present.cpu()
        classes = [len(labels.levels[f]) for f in shared]
        targets = [Target(torch.where(x < 0, c, x)[at], c + 1) for x, c in zip(levels.T, classes, strict=True)]
        (fitted,) = fit_probes([Problem((sides[0][at],), targets, (sides[1],))], KINDS, run.settings.run.seed)
        each = [min((fitted[k][i] for k in KINDS), key=attrgetter("held_out_loss")) for i in range(len(shared))]
        told[m] = {f: likely(p.output.cpu(), x[at]) for f, p, x in zip(shared, each, levels.T, strict=True)}
    found = {}
    for one, other in combinations(told, 2):
        both = [f for f in told[one] if f in told[other]]
        valid = (test.frozen.modalities[one].present & test.frozen.modalities[other].present).cpu()
        if not both or not valid.any():
            continue
        (a, frequencies), (b, _) = (zip(*(told[m][f] for f in both), strict=True) for m in (one, other))
        scores = match([x[valid] for x in a], [x[valid] for x in b], frequencies)
        keys = meanings.of(one, other)
        ids = torch.arange(len(scores))[:, None] if keys is None else keys[valid]
        positive = positive_mask(ids, ids)
        hits = 50 * (expected_hits(scores, positive, 1) + expected_hits(scores.T, positive.T, 1))
        low, high = interval(weighted_mean(hits, weights[:, valid]))
        found[pair_name(one, other)] = {"acc1": float(hits.mean()), "low": low, "high": high}
    return found


@reports_errors
def main() -> None:
    """Entry point of `python -m benchmarks.with_labels`."""
    with_labels(parse(WithLabelsConfig, prog="python -m benchmarks.with_labels", examples=EXAMPLES))


if __name__ == "__main__":
    main()
