"""Which factor is read from which group of tokens: retention and leak."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tvl_align.contract import Features
from tvl_align.evaluation.labels import Labels
from tvl_align.evaluation.probes import attentive_probe, linear_probe, normalised_score, probe_all
from tvl_align.evaluation.readings import SplitTokens
from tvl_align.features.store import FeatureSource
from tvl_align.system.console import UserError, progress

LEAST_OTHERS = 10  # rows of another level than the most common: by chance a fifth of the rows never has them all


@dataclass(frozen=True)
class ProbeData:
    """What every probe shares: labels, the training rows it is fitted on, the rows it reads, their frozen features."""

    labels: Labels
    train: FeatureSource
    rows: Tensor
    test: FeatureSource
    frozen: Mapping[str, Features]
    seed: int

    def rows_of(self, modality: str, factors: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(M,) bool masks of the fitted and the read rows that have this modality and every one of its labels."""
        masks = []
        for split, names in (("train", self._names), ("test", list(self.test.names))):
            known = np.all([self.labels.of(f, names) >= 0 for f in factors], axis=0)
            masks.append(self.frozen[split].modalities[modality].present & torch.from_numpy(known))
        return masks[0], masks[1]

    def truth(self, factor: str, fit_rows: Tensor, read_rows: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """The levels of a factor in the masked rows. Raises UserError where no probe can learn them."""
        y, y_test = self.labels.of(factor, self._names), self.labels.of(factor, list(self.test.names))
        y, y_test = y[fit_rows.numpy()], y_test[read_rows.numpy()]
        others, needed = len(y) - int(np.bincount(y, minlength=1).max()), min(LEAST_OTHERS, len(y) // 5 + 2)
        if others < needed or not len(y_test):
            raise UserError(
                f"the label {factor!r} cannot be probed: of its {len(y)} training rows {needed} must have another level "
                f"than the most common one ({others} have), and some row must be read ({len(y_test)} are); leave out its "
                "column or raise --probe_rows."
            )
        return y, y_test

    @property
    def _names(self) -> list[str]:
        return [self.train.names[i] for i in self.rows.tolist()]


def probe_factors(
    readings: Mapping[str, tuple[SplitTokens, SplitTokens]], probes: ProbeData
) -> dict[str, dict[str, dict[str, Any]]]:
    """Probe every factor in every modality that may carry it. All groups are read from the same rows.

    readings: {"": of the trained model, "untrained_": of an untrained one}, each of training and of test rows.
    """
    labels, groups = probes.labels, [who + group for who in readings for group in ("overlapping", "complementary")]
    plan = {
        m: [f for f in labels.levels if not labels.ownership[f] or m in labels.ownership[f]]
        for m in readings[""][0].overlapping
    }
    modalities = [m for m in plan if plan[m]]
    rows = {m: probes.rows_of(m, plan[m]) for m in modalities}
    truth = {m: {f: probes.truth(f, *rows[m]) for f in plan[m]} for m in modalities}

    def tokens(modality: str) -> tuple[Any, ...]:
        fit_rows, read_rows = rows[modality]
        a, b = (probes.frozen[split].modalities[modality] for split in ("train", "test"))
        answers = truth[modality].values()
        return (
            *(a.tokens[fit_rows], a.mask[fit_rows], [y for y, _ in answers]),
            *(_fitted(b.tokens, a.tokens)[read_rows], _fitted(b.mask, a.mask)[read_rows], [y for _, y in answers]),
        )

    def features(modality: str, factor: str) -> Iterator[tuple[Any, ...]]:
        (fit_rows, read_rows), (y, y_test) = rows[modality], truth[modality][factor]
        yield (
            *(probes.frozen["train"].modalities[modality].pooled[fit_rows], y),
            *(probes.frozen["test"].modalities[modality].pooled[read_rows], y_test),
        )
        for on_train, on_test in readings.values():
            for group in ("overlapping", "complementary"):
                x, x_test = (getattr(reading, group)[modality].flatten(1) for reading in (on_train, on_test))
                yield x[fit_rows], y, x_test[read_rows], y_test

    found: dict[str, dict[str, dict[str, Any]]] = {}
    with progress(sum(map(len, plan.values())), "probe", "factor") as bar:
        ceilings = list(probe_all(attentive_probe, (tokens(m) for m in modalities), probes.seed))
        scores = probe_all(linear_probe, (job for m in modalities for f in plan[m] for job in features(m, f)), probes.seed)
        for modality, attentive in zip(modalities, ceilings, strict=True):
            found[modality] = {}
            for factor, ceiling in zip(plan[modality], attentive, strict=True):
                y_test = truth[modality][factor][1]
                entry: dict[str, Any] = {name: next(scores) for name in ("stage1_pooled", *groups)}
                entry |= {
                    "ownership": list(labels.ownership[factor]),
                    "chance": 100 * float(np.bincount(y_test).max() / len(y_test)),
                    "stage1": max(ceiling, entry["stage1_pooled"]),
                }
                found[modality][factor] = entry
                bar.update()
    return found


def _fitted(x: Tensor, like: Tensor) -> Tensor:
    """Cut or zero-pad the token axis of x to that of `like`."""
    missing = like.shape[1] - x.shape[1]
    return x[:, : like.shape[1]] if missing <= 0 else torch.cat([x, x.new_zeros(len(x), missing, *x.shape[2:])], 1)


def shared_retention(
    on_train: SplitTokens, on_test: SplitTokens, probes: "ProbeData", factors: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> float | None:
    """The summary's number, from the overlapping tokens of these readings."""
    jobs, ends = [], []
    for modality, entries in factors.items():
        fit_rows, read_rows = probes.rows_of(modality, list(entries))
        for factor, entry in entries.items():
            if len(entry["ownership"]) > 1:
                y, y_test = probes.truth(factor, fit_rows, read_rows)
                x, x_test = (r.overlapping[modality].flatten(1) for r in (on_train, on_test))
                jobs.append((x[fit_rows], y, x_test[read_rows], y_test))
                ends.append((entry["chance"], entry["stage1"]))
    scores = list(probe_all(linear_probe, jobs, probes.seed))
    return float(np.mean([normalised_score(s, *e) for s, e in zip(scores, ends, strict=True)])) if scores else None


def summary(factors: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, float]:
    """Retention and leak in percent of the way from chance to the ceiling, averaged over modalities and factors.

    shared: factors of two or more modalities; unique: of one. retention: shared read from overlapping, unique from
    complementary tokens; leak: the other way round.
    """
    groups: dict[str, list[float]] = {}
    for modality in factors.values():
        for entry in modality.values():
            if not entry["ownership"]:
                continue
            shared = len(entry["ownership"]) > 1
            over, comp = (
                normalised_score(entry[g], entry["chance"], entry["stage1"]) for g in ("overlapping", "complementary")
            )
            groups.setdefault("shared_retention" if shared else "unique_leak", []).append(over)
            groups.setdefault("shared_leak" if shared else "unique_retention", []).append(comp)
    return {name: float(np.mean(groups[name])) for name in sorted(groups)}
