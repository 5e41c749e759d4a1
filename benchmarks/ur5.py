"""UR5-95: a robot arm handles 95 objects, recorded as vision, audio, effort and force.

Source: https://github.com/gtatiya/Implicit-Knowledge-Transfer (commit 612cbf9dad6e). It has no licence file, so nothing of
it is copied here: the user clones it. Paper: Tatiya et al., "Transferring Implicit Knowledge of Non-Visual Object
Properties Across Heterogeneous Robot Morphologies".

Layout of the clone, DATA/Implicit-Knowledge-Transfer/data/UR5_Dataset/3_Binary/:

    dataset_discretized.bin           pickle: {behaviour: {modality: {object index: (1, 5 trials, features)}}}
    dataset_metadata_discretized.bin  pickle: the names of the objects; the index of an object counts the sorted names

Rows are 95 objects x 7 behaviours x 5 trials = 3,325. Audio (10 bins of time x 10), effort (10 x 6) and force (10 x 3) are
recordings of the same trial. Vision, an 8 x 8 colour histogram, was recorded in a behaviour of its own, "look", so it pairs
with the others by object only. Names such as `red-marbles-150g` give the factors. Unique: colour (vision), content (audio).
Shared by audio, effort and force: behaviour and weight. Owners are by measured ceilings, logistic regressions on the raw
features of one behaviour, five splits: the best behaviour reads content at 72% from audio, 29% from vision and 23% from
effort, and weight at 66% from effort, 54% from audio, 45% from force and 19% from vision. So content counts as audio's. One
linear probe over all behaviours reads weight hardly above chance from any modality.
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.clones import file_of_clone
from tvl_align.features.arrays import Arrays, check_arrays
from tvl_align.system.console import UserError

URL = "https://github.com/gtatiya/Implicit-Knowledge-Transfer"
BEHAVIOURS = ("grasp", "pick", "hold", "shake", "lower", "drop", "push")
SHAPES = {"vision": (1, 64), "audio": (10, 10), "effort": (10, 6), "force": (10, 3)}  # tokens x width
TRIALS = 5
VALIDATION, TEST = 0.1, 0.2  # fractions of the objects
OWNERS = {
    "colour": ("vision",),
    "content": ("audio",),
    "weight": ("audio", "effort", "force"),
    "behaviour": ("audio", "effort", "force"),
}


def arrays(folder: Path, seed: int) -> Arrays:
    """The modalities vision (1 token of 64 numbers), audio (10 x 10), effort (10 x 6) and force (10 x 3) of 3,325 rows.

    folder: the parent of the clone. seed: of the split by object, 67 for training, 9 for validation, 19 for testing.
    Histograms become fractions of the pixels, and every column is standardised by its mean and standard deviation over the
    training rows (and bins of time). Raises UserError for a missing clone and for pickles of other contents.
    """
    root = folder / "Implicit-Knowledge-Transfer" / "data" / "UR5_Dataset" / "3_Binary"
    data, metadata = read_pickle(root / "dataset_discretized.bin"), read_pickle(root / "dataset_metadata_discretized.bin")
    try:
        objects = sorted(map(str, metadata["grasp"]["objects"]))
        colour, content, weight = (np.array(part) for part in zip(*(name.split("-") for name in objects), strict=True))
        tokens = {m: _read_modality(data, m, len(objects)) for m in SHAPES}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{root} has other contents than expected ({error!r}); clone {URL} again.") from error
    row_object = np.repeat(np.arange(len(objects)), len(BEHAVIOURS) * TRIALS)
    row_behaviour = np.tile(np.repeat(BEHAVIOURS, TRIALS), len(objects))
    order = np.random.default_rng(seed).permutation(len(objects))
    test, validation = int(TEST * len(objects)), int(VALIDATION * len(objects))
    split_of = np.full(len(objects), "train", dtype="<U5")
    split_of[order[:test]], split_of[order[test : test + validation]] = "test", "val"
    split = split_of[row_object]
    labels = {"colour": colour[row_object], "content": content[row_object], "weight": weight[row_object]}
    groups = np.array(objects)[row_object]
    names = [f"{o}/{b}/trial-{i % TRIALS}" for i, (o, b) in enumerate(zip(groups, row_behaviour, strict=True))]
    return check_arrays(
        {m: _standardise(x, split == "train") for m, x in tokens.items()},
        labels=labels | {"behaviour": row_behaviour},
        owners=OWNERS,
        split=split,
        groups=groups,
        names=names,
        seed=seed,
    )


def _read_modality(data: Any, modality: str, objects: int) -> np.ndarray:
    """(rows, tokens, width) float64 in the order objects, behaviours, trials."""
    sources = (
        [("look", "camera_rgb_image_raw")] * len(BEHAVIOURS) if modality == "vision" else [(b, modality) for b in BEHAVIOURS]
    )
    values = [
        [np.asarray(data[b][m][i], np.float64).reshape(TRIALS, *SHAPES[modality]) for b, m in sources]
        for i in range(objects)
    ]
    tokens = np.array(values).reshape(-1, *SHAPES[modality])
    return tokens / tokens.sum(2, keepdims=True) if modality == "vision" else tokens


def _standardise(tokens: np.ndarray, train: np.ndarray) -> np.ndarray:
    mean, deviation = tokens[train].mean((0, 1)), tokens[train].std((0, 1))
    return np.asarray((tokens - mean) / np.where(deviation > 1e-9, deviation, 1))


def read_pickle(path: Path) -> Any:
    """The content of a pickle of dicts, sets, tuples, strings, numbers and NumPy arrays. Nothing else in it is run.

    Raises UserError if the file is missing, damaged or contains anything else.
    """
    try:
        with file_of_clone(path, URL).open("rb") as file:
            return _ArrayUnpickler(file).load()
    except (
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        TypeError,
        AttributeError,
        IndexError,
        KeyError,
        MemoryError,
    ) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is not a pickle of NumPy arrays ({reason}); clone {URL} again.") from error


class _ArrayUnpickler(pickle.Unpickler):
    """Builds arrays and their types only. A pickle can otherwise call any function of Python."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in {("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")}:
            return np.empty(0).__reduce__()[0]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"it contains {module}.{name}")
