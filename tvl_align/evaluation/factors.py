"""Probes of every factor on every group of tokens: retention and leak, each by the strongest probe.

A factor belongs to the modalities that own it: shared by several, or unique to one. Retention: shared factors are read from
overlapping tokens, unique ones from complementary tokens. Leak: the opposite groups. Joint retention: unique factors are
read from all tokens at once, which also tells what complementary tokens hold relative to what is shared.

Shapes: M probe rows, Q test rows.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tvl_align.contract import Features
from tvl_align.evaluation.labels import Labels
from tvl_align.evaluation.probes import (
    MAX_STEPS,
    OF_FROZEN,
    STRENGTHS,
    Probed,
    ProbeKind,
    Problem,
    Target,
    accuracy,
    bits,
    fit_probes,
    r2,
)
from tvl_align.evaluation.scores import normalised_score
from tvl_align.evaluation.uncertainty import Estimate, mean_estimate, weighted_mean
from tvl_align.system.checkpoint import load_safely, save_checkpoint
from tvl_align.system.console import UserError

KINDS: tuple[ProbeKind, ...] = ("linear", "mlp")  # probes that read a group of tokens
CEILING = "stage1"  # the group of the frozen features
CEILINGS_VERSION = 6  # of the probes that read ceilings; a new one where they change
MIN_MARGIN = 5.0  # percentage points and
MIN_ERRORS = 2.0  # standard errors that a ceiling must be above chance
MIN_BITS = 0.05  # usable bits of a ceiling that are divided by
MIN_ROWS = 20  # labelled probe rows of a factor
SUMMARY = {  # name: (is the factor shared, group)
    "shared_retention": (True, "overlapping"),
    "unique_retention": (False, "complementary"),
    "joint_unique_retention": (False, "all_registers"),
    "shared_leak": (True, "complementary"),
    "unique_leak": (False, "overlapping"),
}


@dataclass(frozen=True)
class Rows:
    """The rows that probes are fitted on (`probe`) or tested on (`test`): names and frozen features, on one device, and
    groups (M,) int64 of rows that are held out together."""

    names: Sequence[str]
    frozen: Features
    groups: Tensor | None = None


@dataclass(frozen=True)
class Reading:
    """What one kind of probe reads of a factor on test rows: correct (Q,) 1 or 0, and usable (Q,) bits, less than 0 where
    the frequencies of the levels tell more; NaN in rows without the factor. r2 of real-valued factors."""

    correct: Tensor
    usable: Tensor
    r2: float | None = None

    @property
    def accuracy(self) -> float:
        """Percent of the labelled test rows."""
        return 100 * float(self.correct.nanmean())

    @property
    def bits(self) -> float:
        """Usable information: the mean over the labelled test rows."""
        return float(self.usable.nanmean())


@dataclass
class Factor:
    """One factor in one modality. chance: accuracy in percent of the most frequent level of the test rows. entropy: bits of
    the levels, by their frequencies in the probe rows. readings: {group: {kind: Reading}}."""

    ownership: tuple[str, ...]
    chance: float
    entropy: float
    rows: int
    readings: dict[str, dict[str, Reading]] = field(default_factory=dict)

    def best(self, group: str, kind: str | None = None) -> Reading:
        """The reading of the most accurate probe of a group, or of the given kind."""
        readings = self.readings[group]
        return readings[kind] if kind else max(readings.values(), key=lambda r: r.accuracy)

    @property
    def readable(self) -> bool:
        """Whether the ceiling is above chance, beyond the error of a proportion."""
        error = 100 * (self.chance / 100 * (1 - self.chance / 100) / max(1, self.rows)) ** 0.5
        return self.best(CEILING).accuracy > self.chance + max(MIN_MARGIN, MIN_ERRORS * error)

    def score(self, group: str, kind: str | None = None) -> float:
        """The normalised score of a group, by its strongest probe or by the given kind: 0 = chance, 100 = ceiling."""
        return normalised_score(self.best(group, kind).accuracy, self.chance, self.best(CEILING).accuracy)

    def bits_score(self, group: str) -> float:
        """Usable bits of a group in percent of those of the frozen features, each by the probe that has most."""
        read, ceiling = (self._most_bits(g).bits for g in (group, CEILING))
        return 100 * max(0.0, read) / max(ceiling, MIN_BITS)

    def _most_bits(self, group: str) -> Reading:
        return max(self.readings[group].values(), key=lambda r: r.bits)

    def resampled(self, group: str, weights: Tensor, kind: str | None = None, least: float = -math.inf) -> Estimate:
        """`score`, at least `least`, under (R, Q) bootstrap weights; the ceiling is resampled with it."""
        read, ceiling = (100 * weighted_mean(x.correct, weights) for x in (self.best(group, kind), self.best(CEILING)))
        samples = 100 * (read - self.chance) / (ceiling - self.chance).clamp(min=MIN_MARGIN / 2)
        return Estimate(max(least, self.score(group, kind)), samples.clamp(min=least))

    def resampled_bits(self, group: str, weights: Tensor) -> Estimate:
        """`bits_score` under (R, Q) bootstrap weights."""
        read, ceiling = (weighted_mean(self._most_bits(g).usable, weights) for g in (group, CEILING))
        return Estimate(self.bits_score(group), 100 * read.clamp(min=0) / ceiling.clamp(min=MIN_BITS))

    def as_json(self) -> dict[str, Any]:
        """Plain numbers for results.json; no NaN."""
        return {
            "ownership": list(self.ownership),
            "chance": self.chance,
            "entropy": self.entropy,
            "readable": self.readable,
            "accuracy": {g: {k: r.accuracy for k, r in rs.items()} for g, rs in self.readings.items()},
            "bits": {g: {k: r.bits for k, r in rs.items()} for g, rs in self.readings.items()},
            "r2": {g: {k: r.r2 for k, r in rs.items()} for g, rs in self.readings.items() if self._real_valued},
            "score": {g: self.score(g) for g in self.readings} if self.readable else {},
        }

    @property
    def _real_valued(self) -> bool:
        return any(r.r2 is not None for rs in self.readings.values() for r in rs.values())


@dataclass(frozen=True)
class _Labelled:
    """A factor in a modality: levels of the probe, test and ceiling rows (-1: none), and their numbers (NaN: none) if it is
    real-valued."""

    probe: Tensor
    test: Tensor
    ceiling: Tensor
    levels: int
    numbers: tuple[Tensor, Tensor, Tensor] | None

    @property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the numbers of the probe rows, by which all are standardised."""
        values = self.numbers[0] if self.numbers else torch.zeros(1)
        known = values[values.isfinite()]
        return known.mean(), known.std(correction=0).clamp(min=1e-9)


@dataclass(frozen=True)
class Group:
    """Tokens to probe: {modality: (M, n, D)} of the probe rows and {modality: (Q, n, D)} of the test rows.

    share: fraction of the probe rows to use. only: "shared" or "unique", factors that several modalities own or one does.
    """

    probe: Mapping[str, Tensor]
    test: Mapping[str, Tensor]
    share: float = 1.0
    only: Literal["shared", "unique"] | None = None


@dataclass(frozen=True)
class _Job:
    """A problem of all `factors` of a modality, and where its readings go: to `group`, under the kind of probe and `of`."""

    modality: str
    group: str
    factors: Mapping[str, "_Labelled"]
    problem: Problem
    of: str = ""


class FactorProbes:
    """The factors of every modality, and the probes that have read them so far.

    Factors with fewer than MIN_ROWS labelled probe rows, one level only, or no labelled test row are left out and named in
    `left_out`, {modality: {factor: reason}}.

    ceiling: rows that probes of the frozen features are fitted on; default: the probe rows. More rows make better ceilings,
    and rows that a model was trained on are allowed, because the features are frozen.
    """

    def __init__(
        self, labels: Labels, probe: Rows, test: Rows, seed: int, steps: int = MAX_STEPS, ceiling: Rows | None = None
    ) -> None:
        self.labels, self.probe, self.test, self.seed, self.steps = labels, probe, test, seed, steps
        self.ceiling = ceiling or probe
        self.factors: dict[str, dict[str, Factor]] = {}
        self.left_out: dict[str, dict[str, str]] = {}
        self._labelled: dict[str, dict[str, _Labelled]] = {}
        for modality in probe.frozen.modalities:
            for name in labels.levels:
                if not labels.ownership[name] or modality in labels.ownership[name]:
                    self._add(modality, name)

    def _add(self, modality: str, name: str) -> None:
        sides = []
        for rows in (self.probe, self.test, self.ceiling):
            levels = torch.from_numpy(self.labels.of(name, rows.names))
            sides.append(torch.where(rows.frozen.modalities[modality].present.cpu(), levels, -1))
        probe, test, ceiling = sides
        known, tested = probe[probe >= 0], test[test >= 0]
        if len(known) < MIN_ROWS or not len(tested) or len(known.unique()) < 2:
            reason = f"{len(known)} labelled probe rows with {len(known.unique())} levels, {len(tested)} test rows"
            self.left_out.setdefault(modality, {})[name] = reason
            return
        count = len(self.labels.levels[name])
        frequency = (known.bincount(minlength=count) + 0.5) / (len(known) + 0.5 * count)
        entropy = float(-frequency.log2()[tested].mean())
        chance = 100 * int(tested.bincount().max()) / len(tested)
        self.factors.setdefault(modality, {})[name] = Factor(self.labels.ownership[name], chance, entropy, len(tested))
        numbers = None
        if name in self.labels.numbers:
            values = self.labels.numbers[name]
            one, two, three = (
                torch.tensor([values.get(n, math.nan) for n in r.names])[:, None]
                for r in (self.probe, self.test, self.ceiling)
            )
            numbers = one, two, three
        self._labelled.setdefault(modality, {})[name] = _Labelled(probe, test, ceiling, count, numbers)

    def read_ceilings(self, cache: Path | None = None) -> None:
        """Probe the frozen features: pooled features and token sequences, by every kind of probe.

        cache: folder where the readings are kept, as those of the same rows, labels and steps are the same in every run.
        """
        kept = cache / f"ceilings-{self._digest()}.pt" if cache is not None else None
        if kept is not None and kept.is_file():
            with suppress(UserError):  # a damaged file is written again
                for modality, factors in load_safely(kept).items():
                    for name, readings in factors.items():
                        self.factors[modality][name].readings[CEILING] = {k: Reading(*r) for k, r in readings.items()}
                return
        jobs = []
        for m in self.factors:
            a, b = (rows.frozen.modalities[m] for rows in (self.ceiling, self.test))
            length = min(a.tokens.shape[1], b.tokens.shape[1])
            x, y = ((t.tokens[:, :length], t.mask[:, :length]) for t in (a, b))
            flat, flat_test = ((tokens * mask[..., None]).flatten(1) for tokens, mask in (x, y))
            jobs.append(self._job(m, CEILING, x, y))
            jobs.append(self._job(m, CEILING, (flat,), (flat_test,), of=" on tokens"))
            jobs.append(self._job(m, CEILING, (a.pooled,), (b.pooled,), of=" on pooled"))
        self._run(jobs, KINDS, "ceilings")
        if kept is not None:
            plain = {
                m: {n: {k: (r.correct, r.usable, r.r2) for k, r in f.readings[CEILING].items()} for n, f in factors.items()}
                for m, factors in self.factors.items()
            }
            with suppress(OSError):  # a folder that cannot be written to only costs time
                save_checkpoint(kept, plain)

    def _digest(self) -> str:
        """A hash of all that the ceilings depend on."""
        digest = hashlib.sha256(f"{CEILINGS_VERSION} {self.seed} {self.steps} {STRENGTHS} {OF_FROZEN}".encode())
        for rows in (self.ceiling, self.test):
            for m, tokens in rows.frozen.modalities.items():
                digest.update(f"{m} {tuple(tokens.tokens.shape)}".encode())
                for part in (tokens.tokens, tokens.mask, tokens.pooled, tokens.present):
                    digest.update(part.cpu().numpy().tobytes())
            if rows.groups is not None:
                digest.update(rows.groups.numpy().tobytes())
        for m, factors in self._labelled.items():
            for name, x in factors.items():
                digest.update(f"{m} {name} {x.levels}".encode())
                for part in (x.probe, x.test, x.ceiling, *(x.numbers or ())):
                    digest.update(part.numpy().tobytes())
        return digest.hexdigest()[:16]

    def read(self, groups: Mapping[str, Group], kinds: Sequence[ProbeKind] = KINDS) -> None:
        """Probe groups of tokens; the readings get the names of the groups. Groups that are read together cost less."""
        device = self.probe.frozen.rows.device
        jobs = []
        for name, group in groups.items():
            for m in self.factors:
                x, y = ((tokens[m].flatten(1).to(device),) for tokens in (group.probe, group.test))
                jobs.append(self._job(m, name, x, y, group.share, group.only))
        self._run(jobs, kinds, "tokens")

    def _job(
        self,
        modality: str,
        group: str,
        train: Sequence[Tensor],
        test: Sequence[Tensor],
        share: float = 1.0,
        only: str | None = None,
        of: str = "",
    ) -> _Job:
        chosen = {
            name: labelled
            for name, labelled in self._labelled[modality].items()
            if only is None
            or (len(self.labels.ownership[name]) > 1 if only == "shared" else len(self.labels.ownership[name]) == 1)
        }
        of_ceiling = group == CEILING
        side = self.ceiling if of_ceiling else self.probe
        at = side.frozen.modalities[modality].present.nonzero().squeeze(1)
        at = at[: max(MIN_ROWS, math.ceil(share * len(at)))]
        rows, targets = at.cpu(), []
        for x in chosen.values():
            targets.append(Target((x.ceiling if of_ceiling else x.probe)[rows].to(at.device), x.levels))
            if x.numbers is not None:
                mean, std = x.moments
                targets.append(Target(((x.numbers[2 if of_ceiling else 0][rows] - mean) / std).to(at.device)))
        own = side.groups[rows] if side.groups is not None else None
        return _Job(modality, group, chosen, Problem([x[at] for x in train], targets, test, own, of_ceiling), of)

    def _run(self, jobs: Sequence[_Job], kinds: Sequence[ProbeKind], title: str) -> None:
        jobs = [job for job in jobs if job.factors]
        found = fit_probes([job.problem for job in jobs], kinds, self.seed, self.steps, f"probe {title}")
        for job, by_kind in zip(jobs, found, strict=True):
            for kind, probed in by_kind.items():
                each = iter(probed)  # a factor's classes, then its numbers
                for name, x in job.factors.items():
                    readings = self.factors[job.modality][name].readings.setdefault(job.group, {})
                    entropy = self.factors[job.modality][name].entropy
                    readings[kind + job.of] = _reading(x, entropy, next(each), next(each) if x.numbers is not None else None)

    def each(self) -> Iterator[Factor]:
        """All factors of all modalities."""
        for factors in self.factors.values():
            yield from factors.values()

    def summary(self, weights: Tensor) -> dict[str, dict[str, float]]:
        """Retention and leak: {name: {score, low, high, linear, linear_low, ...}}, averaged over modalities and factors.

        weights: (R, Q) bootstrap weights of the test rows. low, high: 95% interval. linear: by linear probes alone. bits:
        usable bits in percent. half, untrained: of other readings of the same group, if they were made. Factors without
        owners or with a ceiling at chance are left out. A leak below 0, worse than chance, counts as 0: it hides no other.
        """
        result = {}
        for name, (shared, group) in SUMMARY.items():
            factors = self._owned(shared, group)
            if not factors:
                continue
            least = 0.0 if name.endswith("leak") else -math.inf
            readings = {"linear": (group, "linear")} | {x: (f"{x}_{group}", None) for x in ("half", "untrained")}
            entry = mean_estimate([f.resampled(group, weights, None, least) for f in factors]).entries("score", prefix="")
            for other, (read, kind) in readings.items():
                if read in factors[0].readings:
                    entry |= mean_estimate([f.resampled(read, weights, kind, least) for f in factors]).entries(other)
            result[name] = entry | mean_estimate([f.resampled_bits(group, weights) for f in factors]).entries("bits")
        return result

    def shared_scores(self, group: str, weights: Tensor) -> dict[str, Estimate]:
        """Of the shared factors in a group, the mean normalised score, "shared_retention", and usable bits in percent,
        "shared_bits"; empty without shared factors. weights: as for `summary`."""
        factors = self._owned(True, group)
        if not factors:
            return {}
        return {
            "shared_retention": mean_estimate([f.resampled(group, weights) for f in factors]),
            "shared_bits": mean_estimate([f.resampled_bits(group, weights) for f in factors]),
        }

    def _owned(self, shared: bool, group: str) -> list[Factor]:
        """The readable factors of several modalities (`shared`) or of one, that were read from a group."""
        owned = [f for f in self.each() if f.ownership and (len(f.ownership) > 1) == shared]
        return [f for f in owned if f.readable and group in f.readings]

    def as_json(self) -> dict[str, dict[str, Any]]:
        """{modality: {factor: plain numbers}}."""
        return {m: {name: f.as_json() for name, f in factors.items()} for m, factors in self.factors.items()}


def _reading(x: _Labelled, entropy: float, classes: Probed, numbers: Probed | None) -> Reading:
    present = x.test >= 0
    correct = torch.where(present, accuracy(classes, x.test), torch.nan)
    usable = torch.where(present, entropy - bits(classes, x.test.clamp(min=0)), torch.nan)
    if x.numbers is None or numbers is None:
        return Reading(correct, usable)
    mean, std = x.moments
    return Reading(correct, usable, r2(numbers, (x.numbers[1] - mean) / std, torch.zeros(1)))
