"""RePercENT's synthetic data, drawn by its own generator, and its metric, the distance to the ideal disentanglement.

Source: https://github.com/Vascorn/RePercENT (commit 1e595b6a3dba, MIT licence). Paper: "RePercENT: Scaling
Disentangled Representation Learning Beyond Two Modalities". `arrays` runs the code of the clone: the class
GenerateTokenizedData of DATA/RePercENT/src/utils/synthetic_dataset.py, which needs torch, numpy, scipy and einops.

Every non-empty set of the M modalities has a latent of 16 independent normal numbers (variance 0.5), so M = 3 has seven.
Modality i is 8 tokens of 16 * 2 ** (M - 1) = 64 numbers: tanh of 0.3 times a linear map of the latents of all sets that
contain i. A random rotation mixes these latents; random 16 x 16 blocks, nearly equal in all tokens and modalities, follow.
In every token half of the blocks, on average, are zero, so 16 to 64 of its numbers are not. The unique part u_ij is the
latents of the sets with i and without j, the shared part s_ij those with i and j. Each part has a binary label: a random
projection, cut at the median. Owners of u_ij: x<i> (the third modality holds one of its two latents); of s_ij: x<i> and
x<j>.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from benchmarks.clones import module_of_clone
from tvl_align.config import parse
from tvl_align.features.arrays import Arrays, check_arrays
from tvl_align.methods.base import DEFAULTS, Stage2Config, quantise, rounded, unit_owners
from tvl_align.system.bounds import at_least
from tvl_align.system.console import reports_errors
from tvl_align.system.files import write_atomically
from tvl_align.system.provenance import provenance

URL = "https://github.com/Vascorn/RePercENT"
LATENT = 16  # numbers of a latent
ROWS = (14_000, 2_000, 4_000)  # train, val, test: the proportions of the original, with 20,000 of its 150,000 rows


def arrays(folder: Path, seed: int, rows: tuple[int, int, int] = ROWS, modalities: int = 3) -> Arrays:
    """One draw of the modalities x1 to x<M>, each of shape (rows, 8, 16 * 2 ** (M - 1)), with the settings of its configs.

    folder: the parent of the clone. seed: of NumPy's and PyTorch's global generators during the draw. rows: for training,
    validation and test; rows are independent, so the split is by order. Raises UserError for a missing clone or package.
    """
    path = folder / "RePercENT" / "src" / "utils" / "synthetic_dataset.py"
    count, tokens = sum(rows), [8] * modalities
    with module_of_clone(path, URL, seed) as module:
        generator = module.GenerateTokenizedData(count, trans_type="uniform", latent_dim=LATENT, M=modalities)
        draw = generator.create_dataset(dist="normal", ts=tokens, gammas=[1.5] * modalities, normalize=False, sigma=0.5)
    names = [f"x{i + 1}" for i in range(modalities)]
    labels = {key: np.asarray(column, np.int64) for key, column in (draw["labels_u"] | draw["labels_s"]).items()}
    owners = {key: (f"x{key[2]}",) if key[0] == "u" else (f"x{key[2]}", f"x{key[3]}") for key in labels}
    return check_arrays(
        {name: np.stack([row[i] for row in draw["total_data"]]) for i, name in enumerate(names)},
        labels=labels,
        owners=owners,
        split=np.repeat(["train", "val", "test"], rows),
        seed=seed,
    )


def pair(folder: Path, seed: int, rows: tuple[int, int, int] = ROWS) -> Arrays:
    """The modalities x1 and x2 of a draw of three, as `arrays`. What x1 has in common with x3 alone is unique to x1 here."""
    drawn = arrays(folder, seed, rows)
    chosen = {key: owners for key, owners in drawn.owners.items() if "3" not in key}
    return replace(
        drawn,
        modalities={m: x for m, x in drawn.modalities.items() if m != "x3"},
        labels={key: drawn.labels[key] for key in chosen},
        owners=chosen,
    )


@dataclass(frozen=True)
class Readings:
    """Mean accuracies in percent over ordered pairs (i, j), and their distance to the ideal.

    unique: the label u_ij read from the unique representation of (i, j), ideally 100. shared: s_ij from the shared one, 100.
    unique_from_shared: u_ij from the shared one, ideally 50 (chance). shared_from_unique: s_ij from the unique one, 50.
    """

    unique: float
    shared: float
    unique_from_shared: float
    shared_from_unique: float

    @property
    def distance(self) -> float:
        """The mean of the four absolute differences from the ideal, in points; 0 is perfect, lower is better."""
        ideal = (100, 100, 50, 50)
        found = (self.unique, self.shared, self.unique_from_shared, self.shared_from_unique)
        return float(np.mean([abs(a - b) for a, b in zip(found, ideal, strict=True)]))


def distance(
    unique: Mapping[tuple[int, int], np.ndarray],
    shared: Mapping[tuple[int, int], np.ndarray],
    labels: Mapping[str, np.ndarray],
    train: np.ndarray,
    test: np.ndarray,
) -> Readings:
    """Read the labels of all pairs from given representations, with the probe of RePercENT.

    unique: {(i, j): (N, D)}, i != j from 1: what modality i has and j lacks. shared: {(i, j): (N, D)}, i < j: what both
    have; RePercENT concatenates the representations of both sides. labels: {"u_ij" or "s_ij": (N,)}. train, test: (N,) bool.
    The probe is a logistic regression (scikit-learn's defaults: L2, C = 1, up to 10,000 iterations, no standardisation) that
    is fitted on the training rows and scored on the test rows. The clone reports the sum of the first two readings minus the
    other two; the distance holds the same numbers.
    """

    def accuracy(x: np.ndarray, label: str) -> float:
        y = np.asarray(labels[label])
        probe = LogisticRegression(max_iter=10_000).fit(x[train], y[train])
        return 100 * float(probe.score(x[test], y[test]))

    numbers = sorted({i for pair in unique for i in pair})
    pairs, ordered = list(combinations(numbers, 2)), list(permutations(numbers, 2))
    both = {(i, j): (min(i, j), max(i, j)) for i, j in ordered}
    return Readings(
        unique=float(np.mean([accuracy(unique[i, j], f"u_{i}{j}") for i, j in ordered])),
        shared=float(np.mean([accuracy(shared[i, j], f"s_{i}{j}") for i, j in pairs])),
        unique_from_shared=float(np.mean([accuracy(shared[both[i, j]], f"u_{i}{j}") for i, j in ordered])),
        shared_from_unique=float(np.mean([accuracy(unique[i, j], "s_{}{}".format(*both[i, j])) for i, j in ordered])),
    )


def report(title: str, found: Readings, config: Any) -> None:
    """Print the readings, and write them with the config (which names the file, `out`), command and commit as JSON."""
    print(f"{title}distance {found.distance:.1f}: " + ", ".join(f"{name} {x:.1f}" for name, x in vars(found).items()))
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(config).items()}
    content = {"distance": found.distance, **vars(found), "config": settings, "made_by": provenance()}
    config.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(config.out, json.dumps(content, indent=1, allow_nan=False) + "\n")
    print(f"written: {config.out.resolve()}")


@dataclass(frozen=True)
class IdealConfig:
    """What codes of a size tell that keep all latents apart, each in units of its own: a guide to what size costs."""

    units: int = DEFAULTS.units
    """Units of the overlapping tokens: half of them hold the latent of all three modalities, the others those of pairs."""
    complementary_units: int = DEFAULTS.complementary_units
    """Units of the complementary token, which hold the latent of the modality alone."""
    levels: int = DEFAULTS.levels
    """Levels of a unit of a complementary token, an odd number."""
    resolution: float = DEFAULTS.resolution
    """Step of overlapping units; 0: not rounded."""
    seed: int = 0
    """Seed of latents and labels."""
    out: Path = Path("away/repercent_ideal.json")
    """File of the result."""

    def __post_init__(self) -> None:
        at_least(2, self, "units")
        options = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("seed", "out")}
        Stage2Config(**options)  # raises UserError for what the base refuses


def ideal(config: IdealConfig) -> Readings:
    """The readings of codes of three modalities that keep all latents apart. A latent has at most LATENT units."""
    rng, names = np.random.default_rng(config.seed), ("1", "2", "3")
    rows = ROWS[0] + ROWS[2]
    subsets = [s for size in (1, 2, 3) for s in combinations(names, size)]
    latents = {s: rng.normal(size=(rows, LATENT)) for s in subsets}
    first = (config.units + 1) // 2
    owners = np.array(unit_owners(names, [first, config.units - first], pairs=True))
    columns = {s: owners.T[first:] == [m in s for m in names] for s in subsets if len(s) == 2}
    counts = {s: int(of.all(1).sum()) for s, of in columns.items()} | {names: first}
    over: dict[str, dict[tuple[str, ...], np.ndarray]] = {}
    comp: dict[str, np.ndarray] = {}
    for m in names:
        held = {s: latents[s][:, : counts[s]] for s in (names, *(s for s in counts if s != names)) if m in s}
        units = torch.from_numpy(np.concatenate(list(held.values()), axis=1)).float()
        if config.resolution:
            units = rounded(units, held[names].shape[1], config.resolution)
        ends = np.cumsum([x.shape[1] for x in held.values()])[:-1]
        over[m] = dict(zip(held, np.split(units.numpy(), ends, axis=1), strict=True))
        alone = torch.from_numpy(latents[m,][:, : config.complementary_units])
        comp[m] = quantise(0.9 * alone, config.levels).numpy()  # 0.9: the least error of 3 levels
    labels: dict[str, np.ndarray] = {}
    unique: dict[tuple[int, int], np.ndarray] = {}
    shared: dict[tuple[int, int], np.ndarray] = {}
    for i, j in permutations(names, 2):
        pair = int(i), int(j)
        labels[f"u_{i}{j}"] = _cut([latents[s] for s in subsets if i in s and j not in s], rng)
        unique[pair] = np.concatenate([comp[i], *(x for s, x in over[i].items() if j not in s)], axis=1)
        if i < j:
            labels[f"s_{i}{j}"] = _cut([latents[s] for s in subsets if i in s and j in s], rng)
            shared[pair] = np.concatenate([x for m in (i, j) for s, x in over[m].items() if i in s and j in s], axis=1)
    train = np.arange(rows) < ROWS[0]
    return distance(unique, shared, labels, train, ~train)


def _cut(latents: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """A random projection of latents, cut at the median: (N,) of 0 and 1."""
    x = np.concatenate(latents, axis=1)
    projection = x @ rng.normal(size=x.shape[1])
    return np.asarray(projection > np.median(projection), np.int64)


@reports_errors
def main() -> None:
    """Entry point of `python -m benchmarks.repercent`."""
    config = parse(IdealConfig, prog="python -m benchmarks.repercent", examples=("python -m benchmarks.repercent",))
    report("", ideal(config), config)


if __name__ == "__main__":
    main()
