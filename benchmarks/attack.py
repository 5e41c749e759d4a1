"""Attackers that no probe of the evaluation resembles, on the codes of a trained run.

`python -m benchmarks.attack RUN` reads every factor from the group of tokens where it does not belong, with classifiers of
scikit-learn on whitened components: a deeper MLP, support vectors, trees, boosting, nearest neighbours. Each is fitted on
the probe rows, and on them and all training rows, which a model may hide less on and an attacker has more of. Scores are
those of the evaluation: 0 = chance, 100 = the ceiling in results.json. They are printed and written to attack.json.
"""

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from sklearn.base import ClassifierMixin
from sklearn.ensemble import ExtraTreesClassifier, HistGradientBoostingClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.svm import SVC
from torch import Tensor

from tvl_align.config import parse
from tvl_align.evaluation.labels import Labels
from tvl_align.evaluation.measure import EvaluateConfig, OpenedRun, labelled_rows, needed_labels, open_run
from tvl_align.evaluation.probes import Components
from tvl_align.evaluation.scores import normalised_score
from tvl_align.evaluation.split_tokens import SplitTokens, compute_tokens
from tvl_align.system.bounds import at_least
from tvl_align.system.console import UserError, progress, reports_errors
from tvl_align.system.files import write_atomically
from tvl_align.system.provenance import provenance

EXAMPLES = ("python -m benchmarks.attack demo/runs/base",)


@dataclass(frozen=True)
class AttackConfig:
    """Read factors from the tokens of a run where they do not belong, with other classifiers than the evaluation's."""

    run: tyro.conf.Positional[Path]
    """Run folder that has been evaluated."""
    rows: int = 10_000
    """Most rows of the larger of the two sets that attackers are fitted on."""

    def __post_init__(self) -> None:
        at_least(20, self, "rows")


def attackers(seed: int, held_out: bool = True) -> dict[str, ClassifierMixin]:
    """{name: a classifier that is not fitted}. held_out: stop by held-out rows, of which every level must have some."""
    return {
        "mlp 3 x 256": MLPClassifier(
            (256, 256, 256), early_stopping=held_out, n_iter_no_change=5, max_iter=60, random_state=seed
        ),
        "support vectors": SVC(C=3.0, random_state=seed),
        "trees": ExtraTreesClassifier(300, min_samples_leaf=2, random_state=seed),
        "boosting": HistGradientBoostingClassifier(max_iter=60, early_stopping=held_out, random_state=seed),
        "neighbours": KNeighborsClassifier(15),
    }


def fit(classifier: ClassifierMixin, x: np.ndarray, y: np.ndarray) -> ClassifierMixin:
    """Fit a classifier; an MLP may end at its last iteration, which is its budget."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return classifier.fit(x, y)


@dataclass(frozen=True)
class Rows:
    """Rows to fit attackers on or to test them on: their names, and their tokens in parts."""

    names: list[str]
    parts: tuple[SplitTokens, ...]

    def of(self, labels: Labels, modality: str, factor: str, group: str) -> tuple[Tensor, np.ndarray]:
        """Flattened tokens (M, n * D) of a group and the levels (M,) of a factor, of the rows that have both."""
        levels, tokens = labels.of(factor, self.names), torch.cat([getattr(part, group)[modality] for part in self.parts])
        known = torch.cat([part.present[modality] for part in self.parts]) & torch.from_numpy(levels >= 0)
        return tokens[known].flatten(1), levels[known.numpy()]


def attack(config: AttackConfig) -> Path:
    """Attack a run; prints a table, writes attack.json into its folder and returns the path.

    Raises UserError for a run that has not been evaluated or has no labels.
    """
    results = _results(config.run)
    options = EvaluateConfig(config.run)
    run = open_run(options)
    labels = needed_labels(options, run.settings.data)
    sides, test = _rows(run, config.rows), Rows(list(run.test.names), (run.on_test(run.model),))
    misplaced = list(_misplaced(results))
    found: dict[str, Any] = {}
    with progress(len(misplaced) * len(sides) * len(attackers(0)), "attack", "classifier") as bar:
        for modality, factor, group in misplaced:
            read = results["factors"][modality][factor]
            chance, ceiling = read["chance"], max(read["accuracy"]["stage1"].values())
            scores: dict[str, dict[str, float]] = {}
            for size, rows in sides.items():
                (x, y), (tested, answers) = (r.of(labels, modality, factor, group) for r in (rows, test))
                components = Components(x)
                x, tested = components(x), components(tested)
                levels = np.bincount(y)
                held_out = levels[levels > 0].min() >= 2 and len(y) >= 20 * len(levels)
                for name, classifier in attackers(run.settings.run.seed, held_out).items():
                    right = 100 * fit(classifier, x.numpy(), y).score(tested.numpy(), answers)
                    scores.setdefault(name, {})[size] = normalised_score(right, chance, ceiling)
                    bar.update()
            probes = read["score"][group]
            found.setdefault(group, {}).setdefault(modality, {})[factor] = {"probes": probes, "attackers": scores}
    summary = {group: _strongest(of_group) for group, of_group in found.items()}
    for group, strongest in summary.items():
        kind = "shared leak" if group == "complementary" else "unique leak"
        print(f"{kind}: " + ", ".join(f"{name} {score:.1f}" for name, score in strongest.items()), flush=True)
    counts = {size: len(rows.names) for size, rows in sides.items()}
    content = {"rows": counts, "summary": summary, "factors": found, "run": str(config.run), "made_by": provenance()}
    path = config.run / "attack.json"
    write_atomically(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
    return path


def _results(run: Path) -> dict[str, Any]:
    path = run / "results.json"
    if not path.is_file():
        raise UserError(f"{run} has no results.json; evaluate the run first: tvl-align evaluate {run}.")
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return results


def _rows(run: OpenedRun, most: int) -> dict[str, Rows]:
    """{"probe rows": those of the evaluation, "more rows": with training rows too}."""
    names, tokens = [run.probe.names[i] for i in run.rows.tolist()], run.on_probe(run.model)
    train, chosen = labelled_rows(run.inputs.splits["train"], max(1, most - len(names)))
    more = compute_tokens(run.model, train, chosen, run.device)
    both = Rows([*names, *(train.names[i] for i in chosen.tolist())], (tokens, more))
    return {"probe rows": Rows(names, (tokens,)), "more rows": both}


def _misplaced(results: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(modality, factor, group of tokens where the factor does not belong) of every factor that the modality shows."""
    for modality, factors in results["factors"].items():
        for factor, read in factors.items():
            if read["readable"] and modality in read["ownership"]:
                yield modality, factor, "complementary" if len(read["ownership"]) > 1 else "overlapping"


def _strongest(of_group: dict[str, Any]) -> dict[str, float]:
    """Mean over factors of the score of the evaluation's probes, and of the strongest attacker with each number of rows; a
    leak below 0 counts as 0, as in the evaluation."""
    entries = [entry for factors in of_group.values() for entry in factors.values()]
    sizes = next(iter(entries[0]["attackers"].values()))
    means = {size: np.mean([max(0.0, *(s[size] for s in e["attackers"].values())) for e in entries]) for size in sizes}
    return {"probes": float(np.mean([max(0.0, e["probes"]) for e in entries]))} | {
        size: float(x) for size, x in means.items()
    }


@reports_errors
def main() -> None:
    """Entry point of `python -m benchmarks.attack`."""
    attack(parse(AttackConfig, prog="python -m benchmarks.attack", examples=EXAMPLES))


if __name__ == "__main__":
    main()
