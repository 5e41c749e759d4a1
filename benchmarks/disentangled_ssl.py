"""DisentangledSSL's synthetic data, drawn by its own generator, and the accuracies that its paper reports.

Source: https://github.com/uhlerlab/DisentangledSSL (commit cda29ec29bf8). It has no licence file, so nothing of it is copied
here: the user clones it. Paper: Wang et al., "An Information Criterion for Controlled Disentanglement of Multimodal Data"
(ICLR 2025). `arrays` runs the code of the clone: the function generate_data of
DATA/DisentangledSSL/synthetic_task/dataset.py and the files that it imports beside it, which need torch and numpy.

Three latents of 50 independent normal numbers (variance 0.5): Z1 of x, Z2 of y, and Zs of both. x and y are vectors of 100
numbers, random linear maps of (Z1, Zs) and of (Z2, Zs). Each latent has a binary label, a random two-layer network of it
plus noise, cut at the median. Unique: `specific_x` (Z1) to x and `specific_y` (Z2) to y; shared by both: `common` (Zs).
"""

import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from benchmarks.clones import module_of_clone
from tvl_align.features.arrays import Arrays, check_arrays

URL = "https://github.com/uhlerlab/DisentangledSSL"
OWNERS = {"specific_x": ("x",), "common": ("x", "y"), "specific_y": ("y",)}
TEST, VALIDATION = 0.2, 0.1  # fractions: of all rows, as in the clone, and of the remaining ones


def arrays(folder: Path, seed: int, rows: int = 90_000) -> Arrays:
    """One draw of the modalities x and y, (rows, 100) each, with the settings of the paper.

    folder: the parent of the clone. seed: of the latents and maps; the networks of the labels are the same in all draws. The
    test split is the clone's, a fifth of the rows; a tenth of the others is for validation. Raises UserError for a missing
    clone or package.
    """
    path = folder / "DisentangledSSL" / "synthetic_task" / "dataset.py"
    sizes = {"X": 100, "Y": 100, "Z1": 50, "Z2": 50, "Zs": 50}
    latents = {"Z1": 50, "Z2": 50, "Zs": 50}
    of_label = [{name: 50 if name == latent else 0 for name in latents} for latent in ("Z1", "Zs", "Z2")]
    with module_of_clone(path, URL, seed) as module:
        _, *columns = module.generate_data(rows, 256, sizes, latents, *of_label, seed=seed)
        labels, x, y = columns[:3], columns[3], columns[4]
        train = int((1 - TEST) * rows)
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(0)).numpy()  # as its random_split
    split = np.full(rows, "train", dtype="<U5")
    split[order[train:]] = "test"
    split[order[train - int(VALIDATION * train) : train]] = "val"
    return check_arrays(
        {"x": x, "y": y},
        labels={name: np.asarray(column, np.int64) for name, column in zip(OWNERS, labels, strict=True)},
        owners=OWNERS,
        split=split,
        seed=seed,
    )


def accuracies(
    representations: Mapping[str, np.ndarray], labels: Mapping[str, np.ndarray], train: np.ndarray, test: np.ndarray
) -> dict[str, dict[str, float]]:
    """{representation: {label: test accuracy, 0 to 1}}, the quantities of the paper's figure.

    representations: {name: (N, D)}. labels: {name: (N,)}. train, test: (N,) bool. The paper reads the shared representation
    (of both modalities, concatenated) and the specific one of each. Ideal: `common` is read from shared, and
    `specific_x` from the specific one of x, as well as from the data, and all others at chance, 0.5. The probe is that of
    the clone: a logistic regression with scikit-learn's defaults and at most 200 iterations, converged or not, fitted on
    the training rows.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return {
            name: {
                label: float(LogisticRegression(max_iter=200).fit(x[train], y[train]).score(x[test], y[test]))
                for label, y in labels.items()
            }
            for name, x in representations.items()
        }
