"""Probes of every factor on every group of tokens: retention and leak."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tvl_align.contract import Features
from tvl_align.evaluation.labels import Labels
from tvl_align.evaluation.probes import attentive_probe, linear_probe, normalised_score, probe_all
from tvl_align.evaluation.split_tokens import SplitTokens
from tvl_align.features.store import FeatureSource
from tvl_align.system.console import UserError, progress

MIN_MINORITY = 10  # rows outside the most common level, so that a random fifth of the rows does not contain all of them


@dataclass(frozen=True)
class ProbeData:
    """Data that all probes share.

    rows (M,): indices into `train` of the rows that probes are fitted on. test: the split they are tested on. frozen: frozen
    features of these rows, under "train" and "test".
    """

    labels: Labels
    train: FeatureSource
    rows: Tensor
    test: FeatureSource
    frozen: Mapping[str, Features]
    seed: int
    steps: int = 600

    def rows_of(self, modality: str, factors: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(M,) bool masks of the training and the test rows that have this modality and a label for every factor."""
        masks = []
        for split, names in (("train", self._names), ("test", list(self.test.names))):
            known = np.all([self.labels.of(f, names) >= 0 for f in factors], axis=0)
            masks.append(self.frozen[split].modalities[modality].present & torch.from_numpy(known))
        return masks[0], masks[1]

    def targets(self, factor: str, train_rows: Tensor, test_rows: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Levels of a factor in the masked training and test rows, int64. Raises UserError for too few labelled rows."""
        y, y_test = self.labels.of(factor, self._names), self.labels.of(factor, list(self.test.names))
        y, y_test = y[train_rows.numpy()], y_test[test_rows.numpy()]
        minority, needed = len(y) - int(np.bincount(y, minlength=1).max()), min(MIN_MINORITY, len(y) // 5 + 2)
        if minority < needed or not len(y_test):
            raise UserError(
                f"the label {factor!r} cannot be probed: at least {needed} of its {len(y)} training rows must differ from "
                f"the most common level ({minority} do) and at least 1 test row must be labelled ({len(y_test)} are); "
                "remove its column or raise --probe_rows."
            )
        return y, y_test

    @property
    def _names(self) -> list[str]:
        return [self.train.names[i] for i in self.rows.tolist()]


def probe_factors(
    tokens: Mapping[str, tuple[SplitTokens, SplitTokens]], data: ProbeData
) -> dict[str, dict[str, dict[str, Any]]]:
    """Probe every factor in every modality that may contain it, all groups of tokens on the same rows.

    tokens: {"": of the trained model, "untrained_": of an untrained one}, each on training and on test rows. Returns
    {modality: {factor: results}}; scores are accuracies in percent.
    """
    labels, groups = data.labels, [prefix + group for prefix in tokens for group in ("overlapping", "complementary")]
    factors = {
        m: [f for f in labels.levels if not labels.ownership[f] or m in labels.ownership[f]]
        for m in tokens[""][0].overlapping
    }
    modalities = [m for m in factors if factors[m]]
    rows = {m: data.rows_of(m, factors[m]) for m in modalities}
    targets = {m: {f: data.targets(f, *rows[m]) for f in factors[m]} for m in modalities}

    def attentive_job(modality: str) -> tuple[Any, ...]:
        train_rows, test_rows = rows[modality]
        a, b = (data.frozen[split].modalities[modality] for split in ("train", "test"))
        y = targets[modality].values()
        return (
            *(a.tokens[train_rows], a.mask[train_rows], [train for train, _ in y]),
            *(_resized(b.tokens, a.tokens)[test_rows], _resized(b.mask, a.mask)[test_rows], [test for _, test in y]),
        )

    def linear_jobs(modality: str, factor: str) -> Iterator[tuple[Any, ...]]:
        (train_rows, test_rows), (y, y_test) = rows[modality], targets[modality][factor]
        yield (
            *(data.frozen["train"].modalities[modality].pooled[train_rows], y),
            *(data.frozen["test"].modalities[modality].pooled[test_rows], y_test),
        )
        for on_train, on_test in tokens.values():
            for group in ("overlapping", "complementary"):
                x, x_test = (getattr(split, group)[modality].flatten(1) for split in (on_train, on_test))
                yield x[train_rows], y, x_test[test_rows], y_test

    results: dict[str, dict[str, dict[str, Any]]] = {}
    with progress(sum(map(len, factors.values())), "probe", "factor") as bar:
        ceilings = list(
            probe_all(partial(attentive_probe, steps=data.steps), (attentive_job(m) for m in modalities), data.seed)
        )
        jobs = (job for m in modalities for f in factors[m] for job in linear_jobs(m, f))
        scores = probe_all(linear_probe, jobs, data.seed)
        for modality, attentive in zip(modalities, ceilings, strict=True):
            results[modality] = {}
            for factor, ceiling in zip(factors[modality], attentive, strict=True):
                y_test = targets[modality][factor][1]
                entry: dict[str, Any] = {name: next(scores) for name in ("stage1_pooled", *groups)}
                entry |= {
                    "ownership": list(labels.ownership[factor]),
                    "chance": 100 * float(np.bincount(y_test).max() / len(y_test)),
                    "stage1": max(ceiling, entry["stage1_pooled"]),
                }
                results[modality][factor] = entry
                bar.update()
    return results


def _resized(x: Tensor, like: Tensor) -> Tensor:
    """Truncate or zero-pad the token axis of x to the length of `like`."""
    missing = like.shape[1] - x.shape[1]
    return x[:, : like.shape[1]] if missing <= 0 else torch.cat([x, x.new_zeros(len(x), missing, *x.shape[2:])], 1)


def shared_retention(
    on_train: SplitTokens, on_test: SplitTokens, data: ProbeData, factors: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> float | None:
    """Shared retention as in `summary`, computed from the given overlapping tokens.

    factors: the results of `probe_factors`. Returns None if no factor is shared.
    """
    jobs, bounds = [], []
    for modality, entries in factors.items():
        train_rows, test_rows = data.rows_of(modality, list(entries))
        for factor, entry in entries.items():
            if len(entry["ownership"]) > 1:
                y, y_test = data.targets(factor, train_rows, test_rows)
                x, x_test = (split.overlapping[modality].flatten(1) for split in (on_train, on_test))
                jobs.append((x[train_rows], y, x_test[test_rows], y_test))
                bounds.append((entry["chance"], entry["stage1"]))
    scores = list(probe_all(linear_probe, jobs, data.seed))
    return float(np.mean([normalised_score(s, *b) for s, b in zip(scores, bounds, strict=True)])) if scores else None


def summary(factors: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, float]:
    """Retention and leak: normalised scores (0 = chance, 100 = ceiling), averaged over modalities and factors.

    Shared factors belong to two or more modalities, unique factors to one. Retention: probes of shared factors on
    overlapping tokens and of unique factors on complementary tokens. Leak: the opposite groups.
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
