"""An oracle that knows labels: complementary codes of the size of the base, made from what the base reads.

`python -m benchmarks.discriminant RUN` fits Fisher's linear discriminants (Fisher 1936) of every unique factor to labels of
training rows, on the components and pooled features that a run of `base` reads, and rounds them as its complementary units
are rounded. The probes of the evaluation read these codes: unique retention and shared leak. It is no method. It
shows whether a goal is out of reach of the size of the codes, or only of training without labels.

Shapes: M rows, K components, C levels of a factor, U units.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from tvl_align.config import parse
from tvl_align.contract import Features
from tvl_align.evaluation.factors import Group
from tvl_align.evaluation.labels import Labels
from tvl_align.evaluation.measure import EvaluateConfig, OpenedRun, factor_probes, labelled_rows, needed_labels, open_run
from tvl_align.evaluation.split_tokens import all_rows, stage1_features
from tvl_align.evaluation.uncertainty import group_weights
from tvl_align.methods.base import TVLStage2, quantise
from tvl_align.system.console import UserError, reports_errors
from tvl_align.system.files import write_atomically
from tvl_align.system.provenance import provenance

EXAMPLES = ("python -m benchmarks.discriminant demo/runs/base",)
RIDGE = 1e-3  # added to variances, relative to their mean
SPREAD = 1.5  # standard deviation of a unit before it is rounded


@dataclass(frozen=True)
class DiscriminantConfig:
    """Read codes that were made with labels, of the size of those of a run of base."""

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


def discriminant(config: DiscriminantConfig) -> Path:
    """Read the codes of a run's oracle; prints scores, writes discriminant.json into its folder and returns the path.

    Raises UserError for a run of another method and for data without labels.
    """
    options = EvaluateConfig(config.run)
    run = open_run(options)
    model = run.model
    if not isinstance(model, TVLStage2):
        raise UserError(f"{config.run} is a run of {run.config['implementation']['experiment_id']}; give a run of base.")
    labels = needed_labels(options, run.settings.data)
    if not any(len(owners) == 1 for owners in labels.ownership.values()):
        raise UserError(
            f"the labels of {config.run} have no factor that one modality alone owns, so there is nothing to make."
        )
    frozen = stage1_features(run.test, all_rows(run.test), run.device)
    probes = factor_probes(run, options, labels, frozen)
    codes = _codes(run, model, labels, {"probe": probes.probe.frozen, "test": frozen})
    probes.read({"complementary": Group(codes["probe"], codes["test"], thorough=True)})
    summary = probes.summary(group_weights(run.test.groups, run.settings.run.seed))
    for name, found in summary.items():
        print(f"{name.replace('_', ' ')} {found['score']:.1f} [{found['low']:.1f}, {found['high']:.1f}]", flush=True)
    content = {"summary": summary, "factors": probes.as_json(), "run": str(config.run), "made_by": provenance()}
    path = config.run / "discriminant.json"
    write_atomically(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
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


@reports_errors
def main() -> None:
    """Entry point of `python -m benchmarks.discriminant`."""
    discriminant(parse(DiscriminantConfig, prog="python -m benchmarks.discriminant", examples=EXAMPLES))


if __name__ == "__main__":
    main()
