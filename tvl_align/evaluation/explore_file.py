"""explore.npz: what the page of a run lets a reader explore, as arrays of numbers and text. Imports no torch.

Shapes: Q test rows, K numbers of kept registers, D directions, F finds, N registers, T frozen tokens, C axes of a map.
"""

import zipfile
import zlib
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np

from tvl_align.system.console import UserError
from tvl_align.system.files import atomic_file

NAME = "explore.npz"
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Exploration:
    """What each test row finds, where registers look, and maps of the tokens.

    modalities (M,), names, datasets and captions (Q,): text; a caption is "" where a row has none, or it is not known.
    files: {modality: (Q,) paths in the data folder}, "" for none; empty for a run on features of its own.
    present: {modality: (Q,) bool}.
    lengths (K,): numbers of kept overlapping registers. overlapping (): how many there are; the others are complementary.
    directions (D, 2): modality of the query and of the finds, as indices.
    finds (K, D, Q, F) int32: the nearest rows, nearest first; of rows with equal content only the first is found. -1: none.
    scores (K, D, Q, F) float16: their cosine similarities. right (K, D, Q, F) bool: which are positives of the query.
    rank (K, D, Q) int32: how many negatives of the full gallery are as near as the nearest positive; -1: not a query.
    answers (D, Q) int32: how many finds would be right, of rows with equal content one.
    attention: {modality: (Q, N, T) float16}, see `tvl_align.registers.attention`, of every look_step-th row, from row 0 on;
    zero for the others. look_step: ().
    maps: {"group.modality": (Q, C) float16}, principal components; NaN for absent rows. variance: {"group.modality": (C,)},
    their share of the variance.
    levels: {factor: (L,) text}. labels: {factor: (Q,) int16}, -1: none. owners: {factor: modalities that contain it}.
    """

    modalities: np.ndarray
    names: np.ndarray
    datasets: np.ndarray
    captions: np.ndarray
    lengths: np.ndarray
    overlapping: np.ndarray
    directions: np.ndarray
    finds: np.ndarray
    scores: np.ndarray
    right: np.ndarray
    rank: np.ndarray
    answers: np.ndarray
    look_step: np.ndarray
    present: Arrays
    files: Arrays = field(default_factory=dict)
    attention: Arrays = field(default_factory=dict)
    maps: Arrays = field(default_factory=dict)
    variance: Arrays = field(default_factory=dict)
    levels: Arrays = field(default_factory=dict)
    labels: Arrays = field(default_factory=dict)
    owners: Arrays = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    def save(self, run: Path) -> None:
        """Write explore.npz into a run folder; the entries of a dict are named "field.key"."""
        arrays: Arrays = {}
        for f in fields(self):
            value = getattr(self, f.name)
            arrays |= {f"{f.name}.{key}": x for key, x in value.items()} if isinstance(value, dict) else {f.name: value}
        with atomic_file(run / NAME) as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, run: Path) -> "Exploration":
        """Read explore.npz of a run folder. Raises UserError if it is missing or damaged."""
        remedy = f"run tvl-align evaluate {run} again."
        try:
            with (run / NAME).open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
        except FileNotFoundError as error:
            raise UserError(f"{run} has no {NAME}; {remedy}") from error
        except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{run / NAME} is damaged; {remedy}") from error
        plain = {name: x for name, x in arrays.items() if "." not in name}
        nested: dict[str, Arrays] = {}
        for name, x in arrays.items():
            head, dot, key = name.partition(".")
            if dot:
                nested.setdefault(head, {})[key] = x
        try:
            return cls(**plain, **nested)  # type: ignore[arg-type]
        except TypeError as error:
            raise UserError(f"{run / NAME} has other entries than this version writes; {remedy}") from error
