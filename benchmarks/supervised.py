"""An oracle trained with labels: what codes of the size of the base can hold and leave out.

`python -m benchmarks.supervised RUN` trains a run of `base` again, next to it, with the same options and two more terms.
Heads learn to read the factors that a code should hold. Adversaries, MLPs, learn to read those that it should not, and the
code is trained so that their answer is uniform. Labels are those of training rows. It is no method: it shows whether a goal
is out of reach of the codes, or only of training without labels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.base_runs import load_base, train_next_to
from tvl_align.config import parse
from tvl_align.contract import MODALITIES, Features, FeatureSpec, Implementation, Method, Output
from tvl_align.evaluation.labels import Labels, read_labels
from tvl_align.features.identity import Identity
from tvl_align.losses.complementary import masked_mean
from tvl_align.methods.base import CRITIC_WIDTH, BaseLoss, Stage2Config, TVLStage2, model_options
from tvl_align.registers.model import Encoded
from tvl_align.report.page import print_table, write_page
from tvl_align.system.console import reports_errors
from tvl_align.system.runtime import pick_device

EXAMPLES = ("python -m benchmarks.supervised demo/runs/base",)


@dataclass(frozen=True)
class SupervisedConfig(Stage2Config):
    """The registers and their loss."""

    factors: tuple[str, ...] = ()
    """Factors as "modality factor levels shared|unique"."""
    label_weight: float = 1.0
    """Weight of the heads' loss."""
    adversary_weight: float = 1.0
    """Weight of what adversaries read."""


@dataclass(frozen=True)
class _Factor:
    modality: str
    name: str
    levels: int
    shared: bool

    @classmethod
    def of(cls, text: str) -> "_Factor":
        modality, name, levels, kind = text.split()
        return cls(modality, name, int(levels), kind == "shared")


def _mlp(units: int, levels: int) -> nn.Sequential:
    hidden = nn.Linear(CRITIC_WIDTH, CRITIC_WIDTH)
    return nn.Sequential(nn.Linear(units, CRITIC_WIDTH), nn.GELU(), hidden, nn.GELU(), nn.Linear(CRITIC_WIDTH, levels))


class Supervised(TVLStage2):
    """The base with a head and an adversary per factor.

    extras["labelled"]: {(modality, factor): (B, levels) logits of the head, of the adversary with a gradient for itself
    only, and of the adversary with a gradient for the code only}.
    """

    def __init__(self, specs: Mapping[str, FeatureSpec], knobs: SupervisedConfig) -> None:
        super().__init__(specs, **model_options(knobs))
        self.factors = [_Factor.of(text) for text in knobs.factors]
        units = {True: sum(self.codes.counts), False: sum(self.codes.comp_counts)}
        self.heads = nn.ModuleList(_mlp(units[f.shared], f.levels) for f in self.factors)
        self.adversaries = nn.ModuleList(_mlp(units[not f.shared], f.levels) for f in self.factors)

    def encode(self, features: Features, kept: Tensor | None) -> Encoded:
        encoded, labelled = super().encode(features, kept), {}
        for factor, head, adversary in zip(self.factors, self.heads, self.adversaries, strict=True):
            if factor.modality in features.modalities:
                i = encoded.names.index(factor.modality)
                sides = encoded.inputs.units[i], encoded.inputs.comp_units[i]
                holds, lacks = sides if factor.shared else sides[::-1]
                frozen = {name: p.detach() for name, p in adversary.named_parameters()}
                answers = head(holds), adversary(lacks.detach()), functional_call(adversary, frozen, lacks)
                labelled[factor.modality, factor.name] = answers
        return replace(encoded, extras=encoded.extras | {"labelled": labelled})


class SupervisedLoss(BaseLoss):
    """The loss of the base, heads and adversaries.

    levels: {(modality, factor): (N,) int64 level of every training row, -1: none}.
    """

    def __init__(
        self, levels: Mapping[tuple[str, str], Tensor], knobs: SupervisedConfig, modalities: Sequence[str] = MODALITIES
    ) -> None:
        super().__init__(knobs, modalities)
        self.levels, self.label_weights = levels, (knobs.label_weight, knobs.adversary_weight)

    def forward(self, output: Output) -> dict[str, Tensor]:
        numbers = super().forward(output)
        if output.nested_dropout_mask is None or output.features is None:  # validation rows have no labels here
            return numbers
        rows = output.features.rows
        own_sentence = output.caption_keys[:, 0] == output.caption_keys[:, 1]  # labels are those of the row's own sentence
        losses, penalties = [], []
        for (m, name), (head, adversary, answer) in output.extras["labelled"].items():
            target = self.levels[m, name].to(rows.device)[rows]
            known = (target >= 0) & output.present[m] & (own_sentence if m == "text" else True)
            target = target.clamp(min=0)
            errors = (F.cross_entropy(x, target, reduction="none") for x in (head, adversary))
            losses += [masked_mean(error[:, None], known[:, None]) for error in errors]
            log_probability = answer.log_softmax(1)
            uniform = torch.full_like(log_probability, 1 / answer.shape[1])
            divergence = F.kl_div(uniform.log(), log_probability, log_target=True, reduction="none").sum(1)
            penalties.append(masked_mean(divergence[:, None], output.present[m][:, None]))
        labelled, leak = torch.stack(losses).sum(), torch.stack(penalties).sum()
        weights = self.label_weights
        total = numbers["total_loss"] + weights[0] * labelled + weights[1] * leak
        return numbers | {"label_loss": labelled, "label_leak": leak, "total_loss": total}


SUPERVISED = Method(
    Implementation("supervised_oracle", "1.0", "SUPERVISED"), SupervisedConfig, lambda k, s: Supervised(s, k), BaseLoss
)


@dataclass(frozen=True)
class OracleConfig:
    """Train a run of base again with labels, as an upper bound, and evaluate it."""

    run: tyro.conf.Positional[Path]
    """Run folder of base."""
    label_weight: float = 1.0
    """Weight of the heads' loss."""
    adversary_weight: float = 1.0
    """Weight of what adversaries read."""


def supervised(config: OracleConfig) -> Path:
    """Train and evaluate the oracle; returns its run folder. Raises UserError for a run of another method."""
    settings, recorded = load_base(config.run)
    data = settings.data.store or settings.data.datasets_dir
    labels = read_labels(data / ("labels.csv" if settings.data.store else "factors.csv"))
    inputs = settings.open_inputs(
        pick_device(settings.run.device), Identity(recorded["store"], recorded.get("features", {}))
    )
    names = list(inputs.splits["train"].names)
    levels = {(m, f): torch.as_tensor(labels.told(m, [f], names)[:, 0]) for m, f, _ in _owned(labels, list(inputs.specs))}
    factors = tuple(f"{m} {f} {len(labels.levels[f])} {kind}" for m, f, kind in _owned(labels, list(inputs.specs)))
    knobs = SupervisedConfig(
        **vars(settings.knobs), factors=factors, label_weight=config.label_weight, adversary_weight=config.adversary_weight
    )
    method = replace(SUPERVISED, loss=partial(SupervisedLoss, levels))
    name = "benchmarks.supervised:SUPERVISED"
    folder = train_next_to(config.run, "supervised", settings, knobs, name, method, "test")
    write_page(folder)
    print_table(folder / "results.json")
    return folder


def _owned(labels: Labels, modalities: Sequence[str]) -> list[tuple[str, str, str]]:
    """(modality, factor, "shared" or "unique") of every modality that owns a factor."""
    return [
        (m, factor, "shared" if len(owners) > 1 else "unique")
        for factor, owners in labels.ownership.items()
        for m in owners
        if m in modalities
    ]


@reports_errors
def main() -> None:
    """Entry point of `python -m benchmarks.supervised`."""
    supervised(parse(OracleConfig, prog="python -m benchmarks.supervised", examples=EXAMPLES))


if __name__ == "__main__":
    main()
