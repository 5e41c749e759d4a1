"""`make benchmarks DATA=folder`: methods on data that were not made for this project -> one report per data set.

Each data set is read from a clone that the user has made; its file in this folder names the public source, its licence and
what is shared and unique: tactip.py, ur5.py, repercent.py, disentangled_ssl.py. DATA holds one folder per clone. A method
has the same settings on all data sets, but for the number of steps (docs/benchmarks.md says where they were chosen). One
more run per data set is a control: the first method and seed on shuffled pairs. Parts that are complete are reused.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations, permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import disentangled_ssl, repercent, tactip, ur5
from tvl_align.config import parse
from tvl_align.encoders.tvl import Stage1Config
from tvl_align.evaluation.labels import read_labels
from tvl_align.evaluation.measure import EvaluateConfig, measure
from tvl_align.evaluation.split_tokens import SplitTokens, all_rows, compute_tokens
from tvl_align.features.arrays import Arrays
from tvl_align.features.inputs import DataConfig
from tvl_align.features.store import FeatureStore
from tvl_align.features.subset import set_probe_rows_aside
from tvl_align.methods.registry import load_method
from tvl_align.report.compare import write_comparison
from tvl_align.synthetic.contest import on_shuffled_pairs
from tvl_align.synthetic.demo import optimisation_of, run_name, timed, with_options
from tvl_align.system.bounds import at_least
from tvl_align.system.checkpoint import load_checkpoint
from tvl_align.system.console import UserError, reports_errors
from tvl_align.system.machine import cores
from tvl_align.system.workers import run_in_processes
from tvl_align.training.engine import build_model, fit
from tvl_align.training.run import load_run
from tvl_align.training.settings import RunConfig, Settings

EXAMPLES = ("make benchmarks DATA=clones", "python -m benchmarks.away --data clones --datasets tactip --seeds 0")
READERS: dict[str, Callable[[Path, int], Arrays]] = {
    "tactip": tactip.arrays,
    "tactip_edge": partial(tactip.arrays, contact="edge_2d"),
    "tactip_efficientnet": partial(tactip.arrays, views=2, encoder="efficientnet"),
    "ur5": ur5.arrays,
    "repercent": repercent.arrays,
    "repercent_pair": repercent.pair,
    "disentangled_ssl": disentangled_ssl.arrays,
}
STEPS = {"tactip": 6000, "tactip_edge": 6000, "tactip_efficientnet": 3000}  # of Stage 2, else:
OTHER_STEPS = 1500  # about as many as on the synthetic data


@dataclass(frozen=True)
class AwayConfig:
    """Train and evaluate methods on data of others, with the same settings everywhere but for the number of steps."""

    data: Path
    """Folder that holds the clones."""
    out: Path = Path("away")
    """Folder for stores, runs and reports."""
    datasets: tuple[str, ...] = tuple(name for name in READERS if name != "tactip_efficientnet")
    """Data sets: these, or tactip_efficientnet, TacTip's images as a frozen EfficientNet-Lite0 sees them."""
    methods: tuple[str, ...] = ("base", "disentangled", "cursor", "closed", "mlp")
    """Methods to train; options follow the name: "base --units 32"."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs."""
    steps: int | None = None
    """Optimizer steps of Stage 2; the number of epochs follows from the rows. Default: 6,000 of TacTip (3,000 with
    EfficientNet), else 1,500."""
    jobs: int = field(default_factory=cores)
    """Runs in parallel; they share the CPU cores."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.datasets if name not in READERS]
        if unknown:
            raise UserError(f"unknown data set {unknown[0]!r}; --datasets takes {', '.join(READERS)}.")
        at_least(1, self, "steps", "jobs")


def away(config: AwayConfig) -> list[Path]:
    """Run the benchmarks; returns the paths of the reports."""
    runs: dict[str, list[Settings[Any]]] = {}
    for name in config.datasets:
        store = config.out / name / "store"
        if not (store / "manifest.json").is_file():
            timed(f"{name}: features", partial(_write_store, config, name, store))
        of_store = [_settings(config, name, store, *choice) for choice in product(config.seeds, config.methods)]
        runs[name] = [*of_store, on_shuffled_pairs(of_store[0])]
    todo = {str(s.folder): (_run, name, s) for name, settings in runs.items() for s in settings}
    todo = {folder: job for folder, job in todo.items() if not (Path(folder) / "results.json").is_file()}
    run_in_processes(todo, config.jobs, max(1, cores() // config.jobs))
    pages = []
    for name, settings in runs.items():
        pages.append(write_comparison([s.folder for s in settings], config.out / name, " ".join(sys.argv)))
        print(f"report: {pages[-1].resolve()}", flush=True)
    return pages


def _settings(config: AwayConfig, name: str, store: Path, seed: int, text: str) -> Settings[Any]:
    """Settings of a run; as on the synthetic data, but for the number of epochs."""
    rows = len(set_probe_rows_aside(FeatureStore(store).splits["train"], DataConfig().probe_rows, seed=0)[0])
    method, knobs = with_options(text)
    optim = optimisation_of(method, 1, rows)
    optim = replace(
        optim, epochs=max(1, round((config.steps or STEPS.get(name, OTHER_STEPS)) / max(1, rows // optim.batch_size)))
    )
    run = RunConfig(config.out / name / "runs", f"{run_name(text)}-{seed}", method=method, draw_seed=seed)
    return Settings(Stage1Config(None), knobs, DataConfig(store=store), optim, run)


def _write_store(config: AwayConfig, name: str, store: Path) -> None:
    FeatureStore.from_arrays(READERS[name](config.data, 0), store)


def _run(name: str, settings: Settings[Any]) -> None:
    label = str(settings.folder)
    timed(f"{label}: {settings.optim.epochs} epochs", partial(fit, settings, load_method(settings.run.method)))
    results = timed(f"{label}: test split", partial(measure, EvaluateConfig(settings.folder)))
    if name in THEIR_METRICS:
        content = json.loads(results.read_text(encoding="utf-8"))
        content[name] = THEIR_METRICS[name](_representations(settings))
        results.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        print(f"   {settings.folder.name}, metric of {name}: {json.dumps(content[name])}", flush=True)


@dataclass(frozen=True)
class Representations:
    """Flattened tokens {modality: (N, F)} of the training rows, then the test rows, of a run; labels {factor: (N,)}; train
    (N,) bool."""

    overlapping: dict[str, np.ndarray]
    complementary: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]
    train: np.ndarray


def _representations(settings: Settings[Any]) -> Representations:
    loaded, method, _ = load_run(settings.folder)
    folder = settings.data.store or Path()
    store, device = FeatureStore(folder), torch.device("cpu")
    model = build_model(method, loaded.knobs, store.specs)
    model.load_state_dict(load_checkpoint(settings.folder / "checkpoint.pth")["model"])
    splits = [store.splits[name] for name in ("train", "test")]
    sides = [compute_tokens(model, split, all_rows(split), device) for split in splits]
    read, rows = read_labels(folder / "labels.csv"), [name for split in splits for name in split.names]
    over, comp = ({m: _joined(sides, group, m) for m in store.specs} for group in ("overlapping", "complementary"))
    labels = {factor: read.of(factor, rows) for factor in read.levels}
    return Representations(over, comp, labels, np.arange(len(rows)) < len(splits[0]))


def _of_repercent(x: Representations) -> dict[str, float]:
    """RePercENT's metric, of one model for all modalities.

    With three modalities a modality has some of its overlapping code in common with only one of the others: to the pair with
    the other it is unique. What is shared by a pair is the overlapping code of each, projected onto the dimensions in which
    that of the other varies; unique are the complementary code and the rest of the projection.
    """
    names = dict(enumerate(x.overlapping, start=1))
    varying = {i: _varying(x.overlapping[name][x.train]) for i, name in names.items()}

    def shared_with(i: int, j: int) -> np.ndarray:
        return x.overlapping[names[i]] @ varying[j] @ varying[j].T

    unique = {
        (i, j): np.concatenate([x.complementary[names[i]], x.overlapping[names[i]] - shared_with(i, j)], axis=1)
        for i, j in permutations(names, 2)
    }
    shared = {(i, j): np.concatenate([shared_with(i, j), shared_with(j, i)], axis=1) for i, j in combinations(names, 2)}
    found = repercent.distance(unique, shared, x.labels, x.train, ~x.train)
    return {"distance": found.distance, **vars(found)}


def _varying(x: np.ndarray) -> np.ndarray:
    """(n, F) -> (F, r): an orthonormal basis of the dimensions in which the rows vary."""
    variances, directions = np.linalg.eigh(np.cov(x, rowvar=False))
    return directions[:, variances > 1e-6 * variances[-1]]


def _of_disentangled_ssl(x: Representations) -> dict[str, dict[str, float]]:
    """The accuracies of DisentangledSSL's figure."""
    representations = {"shared": np.concatenate(list(x.overlapping.values()), axis=1)}
    representations |= {f"specific {m}": tokens for m, tokens in x.complementary.items()}
    return disentangled_ssl.accuracies(representations, x.labels, x.train, ~x.train)


THEIR_METRICS: dict[str, Callable[[Representations], Any]] = {
    "repercent": _of_repercent,
    "repercent_pair": _of_repercent,
    "disentangled_ssl": _of_disentangled_ssl,
}


def _joined(sides: Sequence[SplitTokens], group: str, modality: str) -> np.ndarray:
    return torch.cat([getattr(side, group)[modality].flatten(1) for side in sides]).numpy()


@reports_errors
def main() -> None:
    """Entry point of `python -m benchmarks.away`."""
    away(parse(AwayConfig, prog="python -m benchmarks.away", examples=EXAMPLES))


if __name__ == "__main__":
    main()
