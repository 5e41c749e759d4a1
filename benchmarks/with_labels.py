"""What labels get out of the features that a run of `base` reads: its components and pooled features.

`python -m benchmarks.with_labels RUN` makes two things with labels and measures them on test rows as the run was measured.
Neither is a method:

- Codes of the size of the complementary ones: Fisher's linear discriminants (Fisher 1936) of every unique factor, fitted to
  training rows and rounded as the units are. Their unique retention and shared leak show whether a goal is out of reach of
  the size of the codes, or only of training without labels.
- Partners: classifiers of every shared factor, one a modality, fitted to training and probe rows. Two rows match as far as
  both are likely to have equal levels. Better classifiers would find more; and so does a method where modalities share more
  than factors, such as the noise of a texture.

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
        found = factor[known].unique(return_inverse=True)
        if len(found[0]) < 2:
            continue
        targets = F.one_hot(found[1]).float()
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
    reader = model.codes.cpu()
    if any(len(owners) == 1 for owners in labels.ownership.values()):
        codes = _codes(run, model, labels, {"probe": probes.probe.frozen, "test": frozen})
        probes.read({"complementary": Group(codes["probe"], codes["test"])})
    summary, found = probes.summary(weights), _label_retrieval(run, reader, probes, weights)
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
    reader, units, levels = model.codes, sum(model.codes.comp_counts), model.knobs.levels
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


def level_posteriors(logits: Tensor, frequency: Tensor) -> Tensor:
    """Logits (Q, C) of the levels, or (Q, C + 1) with a class for rows that do not name theirs, and how frequent levels are
    (C,) -> the probability of each level (Q, C). A level that is not named may be any, as frequent as it is."""
    levels, rest = logits.softmax(1).split([len(frequency), logits.shape[1] - len(frequency)], dim=1)
    return levels + rest.sum(1, keepdim=True) * frequency


def match_scores(first: Sequence[Tensor], second: Sequence[Tensor], frequencies: Sequence[Tensor]) -> Tensor:
    """Log-likelihood ratios (Q, Q) of equal against independent levels.

    first, second: the probabilities (Q, C) of each factor. frequencies: (C,) of each.
    """
    scores = torch.zeros(len(first[0]), len(second[0]))
    for a, b, frequency in zip(first, second, frequencies, strict=True):
        scores += ((a / frequency) @ b.T).clamp(min=1e-30).log()  # probabilities of 0 and 1 must not give -inf
    return scores


def _label_retrieval(run: OpenedRun, reader: Codes, probes: FactorProbes, weights: Tensor) -> dict[str, dict[str, float]]:
    """{pair: Acc@1 in percent, mean of both directions, and its 95% interval} of classifiers of the shared factors.

    reader: on the CPU. The frequencies of levels are those of the first modality of a pair.
    """
    labels, test = probes.labels, probes.test
    meanings = Meanings(labels, test.names, test.frozen.caption_keys.cpu(), run.test.content_keys)
    posteriors: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for m in run.inputs.specs:
        shared = [f for f, owners in labels.ownership.items() if m in owners and len(owners) > 1]
        posteriors[m] = _classified(run, reader, probes, m, shared) if shared else {}
    found = {}
    for one, other in combinations(posteriors, 2):
        both = [f for f in posteriors[one] if f in posteriors[other]]
        valid = (test.frozen.modalities[one].present & test.frozen.modalities[other].present).cpu()
        if not both or not valid.any():
            continue
        (a, frequencies), (b, _) = (zip(*(posteriors[m][f] for f in both), strict=True) for m in (one, other))
        scores = match_scores([x[valid] for x in a], [x[valid] for x in b], frequencies)
        keys = meanings.of(one, other)
        ids = torch.arange(len(scores))[:, None] if keys is None else keys[valid]
        positive = positive_mask(ids, ids)
        hits = 50 * (expected_hits(scores, positive, 1) + expected_hits(scores.T, positive.T, 1))
        low, high = interval(weighted_mean(hits, weights[:, valid]))
        found[pair_name(one, other)] = {"acc1": float(hits.mean()), "low": low, "high": high}
    return found


def _classified(
    run: OpenedRun, reader: Codes, probes: FactorProbes, modality: str, factors: Sequence[str]
) -> dict[str, tuple[Tensor, Tensor]]:
    """{factor: probabilities of its levels on test rows (Q, C), frequencies of its levels (C,)}, by the better probe."""
    labels, known, test = probes.labels, probes.ceiling, probes.test
    at = known.frozen.modalities[modality].present.cpu()
    sides = [reader.read(modality, rows.frozen.to("cpu").modalities[modality].float())[0] for rows in (known, test)]
    targets, frequencies = [], []
    for f in factors:
        levels, named = (torch.from_numpy(x) for x in (labels.of(f, known.names), labels.told(modality, [f], known.names)))
        named, count = named[:, 0], len(labels.levels[f])
        silent = (levels >= 0) & (named < 0)
        targets.append(Target(torch.where(silent, count, named)[at], count + bool(silent.any())))
        frequency = named[at & (named >= 0)].bincount(minlength=count).float() + 0.5
        frequencies.append(frequency / frequency.sum())
    groups = known.groups[at] if known.groups is not None else None
    problem = Problem((sides[0][at],), targets, (sides[1],), groups, frozen=True)
    (fitted,) = fit_probes([problem], KINDS, run.settings.run.seed)
    best = [min((fitted[k][i] for k in KINDS), key=attrgetter("held_out_loss")) for i in range(len(factors))]
    return {f: (level_posteriors(p.output, q), q) for f, p, q in zip(factors, best, frequencies, strict=True)}


@reports_errors
def main() -> None:
    """Entry point of `python -m benchmarks.with_labels`."""
    with_labels(parse(WithLabelsConfig, prog="python -m benchmarks.with_labels", examples=EXAMPLES))


if __name__ == "__main__":
    main()
