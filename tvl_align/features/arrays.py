"""Write a feature store from arrays: features of any encoders, sensors and modalities.

An .npz file, an HDF5 file (.h5, .hdf5) or a zarr folder (.zarr) has these arrays for N rows and two or more modalities of
any name:

    <modality>            (N, T, W) or (N, W) float: token sequences, or one vector per row
    <modality>.pooled     (N, E) float, optional: pooled features of Stage-1 retrieval; default: the mean of the tokens
    <modality>.mask       (N, T) bool, optional: True = a real token, False = padding
    <modality>.present    (N,) bool, optional: True = the row has the modality
    <modality>.captions   (N,) strings or integers, optional: for a modality that holds sentences or classes, the one of
                          each row ("" or -1: not known)
    <modality>.views      (N, V, T, W) or (N, V, W) float, optional: V augmented versions of the tokens, for training only
    <modality>.views_pooled  (N, V, E) float, needed with .views and .pooled: the pooled features of the views
    label.<name>          (N,) integers or strings, optional: a factor to probe; floats of more than 20 distinct values are
                          numbers (NaN: unknown), everything else is a class
    owners.<name>         names of the modalities that carry this factor, optional: required to report retention and leakage
    split                 (N,) of "train", "val", "test", optional; default: a random split of the groups, 80%, 10%, 10%
    groups                (N,) strings, optional: rows of a group are never split apart; default: every row is a group
    names                 (N,) strings, optional: unique names of the rows

Rows with equal numbers in a modality, or with equal captions, are positives of each other in pairs with that modality. Rows
with equal numbers are kept on one side of the split: their groups are joined. This does not hold for a modality with
captions, nor for one that is named `text`, because a few sentences describe many rows.

View v of two modalities shares its augmentation, so V is the same in all modalities that have views; a modality without
views repeats its plain tokens. Views have the mask of the row, and without .views_pooled the mean of their tokens as pooled
features. Only the views of training rows are read; those of other rows may have any values. Views count as augmented
pictures in all modalities but `text`: half of a batch is plain, and from it complementary registers learn what to hold.
"""

import csv
import hashlib
import json
import logging
import os
import random
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from tvl_align.contract import FeatureSpec
from tvl_align.data.split import copies_across, join_groups, repeats, row_keys
from tvl_align.data.text import decoded, is_absent
from tvl_align.encoders.names import check_modalities
from tvl_align.features.tables import FORMAT, empty_table, release_if_mapped, unfinished, write_rows
from tvl_align.system.console import UserError
from tvl_align.system.provenance import provenance

SPLITS = ("train", "val", "test")
SPLIT_FRACTIONS = (0.8, 0.1, 0.1)
KINDS = {  # what is read, and what writes it, by suffix; any other suffix is read as .npz
    ".npz": ("an .npz file", "numpy.savez"),
    **dict.fromkeys((".h5", ".hdf5"), ("an HDF5 file", "h5py")),
    ".zarr": ("a zarr folder", "zarr.open_group"),
}
MAX_UNPACKED_BYTES, MAX_COMPRESSION_RATIO = 2**26, 200  # a file above both is refused as a zip bomb
NUMBERS = ("pooled", "mask", "present", "views", "views_pooled")  # what a modality may have besides its tokens
MAX_CLASSES = 20  # float labels of more distinct values are numbers
MAX_TOKEN = 60_000  # the largest value of half precision is 65,504
MAX_LOSS = 0.1  # of half precision: error / standard deviation over the rows
ROWS_AT_ONCE = 256  # rows in memory at a time, where a whole modality need not be
CHUNK_BYTES = 2**24  # of a file that is imported in chunks of rows
SAMPLE_ROWS, SAMPLE_BYTES = 256, 2**26  # at most, of the rows in which differences are looked for
log = logging.getLogger(__name__)


class Rows(Protocol):
    """(N, ...) numbers that are read by row: an array, or rows on disk (`tvl_align.features.writer`)."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: np.ndarray, /) -> np.ndarray: ...


@dataclass(frozen=True)
class ModalityArrays:
    """One modality: tokens (N, T, W) float32, mask (N, T) bool, pooled (N, E) float32 of unit norm, present (N,) bool.

    views: (N, V, T, W) of any float dtype, as given, which may be a memory map; None: no augmented views. views_pooled:
    (N, V, E) of unit norm; None: the mean of the views' tokens.
    """

    tokens: Rows
    mask: Rows
    pooled: Rows
    present: np.ndarray
    views: Rows | None = None
    views_pooled: Rows | None = None

    def contents(self) -> Iterator[bytes | None]:
        """A hash of the numbers that are stored of each row, None for a row that lacks the modality."""
        for rows in in_chunks(np.arange(len(self.present))):
            columns = self.tokens[rows].astype(np.float16), self.mask[rows], self.pooled[rows]
            for has, *numbers in zip(self.present[rows], *columns, strict=True):
                yield hashlib.sha256(b"".join(x.tobytes() for x in numbers)).digest() if has else None

    def view_tokens(self, rows: np.ndarray) -> np.ndarray:
        """The tokens of the views of `rows`, (B,) int64: (B, V, T, W) float32, padding zeroed."""
        assert self.views is not None
        return np.where(self.mask[rows][:, None, :, None], self.views[rows], 0).astype(np.float32)

    def view_pooled(self, rows: np.ndarray) -> np.ndarray:
        """The pooled features of the views of `rows`, (B,) int64: (B, V, E) float32 of unit norm."""
        if self.views_pooled is not None:
            return _normalise(self.views_pooled[rows])
        return _normalise(_mean(self.view_tokens(rows), self.mask[rows][:, None]))


def in_chunks(rows: np.ndarray) -> Iterator[np.ndarray]:
    """(N,) rows in chunks of ROWS_AT_ONCE."""
    return (rows[start : start + ROWS_AT_ONCE] for start in range(0, len(rows), ROWS_AT_ONCE))


@dataclass(frozen=True)
class Arrays:
    """Checked features of N rows.

    modalities: {modality: its arrays}. split: (N,) of "train", "val", "test". names: unique names of the rows. labels:
    {factor: (N,) str}. owners: {factor: modalities that carry it}. numbers: the factors that are numbers, of 6 significant
    digits, "" if unknown; the others are classes. groups: (N,) str, or None: every row is a group. content_keys: {modality:
    (N,) int64}, equal for rows with equal numbers or captions; a modality in which all rows differ is not in it.
    ingredients: what made the features, as `tvl_align.features.identity` records it; empty: not known.
    """

    modalities: dict[str, ModalityArrays]
    split: np.ndarray
    names: list[str]
    labels: dict[str, np.ndarray] = field(default_factory=dict)
    owners: dict[str, tuple[str, ...]] = field(default_factory=dict)
    numbers: tuple[str, ...] = ()
    groups: np.ndarray | None = None
    content_keys: dict[str, np.ndarray] = field(default_factory=dict)
    ingredients: Mapping[str, Any] = field(default_factory=dict)

    @property
    def views(self) -> int:
        """Number of augmented views of every training row."""
        return max(0 if m.views is None else m.views.shape[1] for m in self.modalities.values())

    def rows_with_views(self, modality: str) -> np.ndarray:
        """(R,) int64: the rows whose views of the modality are used, the training rows that have it; none without views."""
        arrays = self.modalities[modality]
        return np.flatnonzero((self.split == "train") & arrays.present & (arrays.views is not None))


def read_npz(path: Path, seed: int = 0) -> Arrays:
    """Read and check the arrays of an .npz file; the module's docstring lists them. `seed` determines the default split.

    Raises UserError for a file that is not an .npz file of plain arrays, and for invalid arrays.
    """
    return check_arrays(**arguments(_npz_arrays(path), path), seed=seed)


@contextmanager
def open_arrays(path: Path) -> Iterator[dict[str, Any]]:
    """The arguments of `check_arrays` but the seed, of an .npz file, an HDF5 file (.h5, .hdf5) or a zarr folder (.zarr).

    Features of the latter two are not in memory: they are read when they are indexed. Raises UserError for a file of another
    kind and for one that contains more than plain arrays.
    """
    if path.suffix in (".h5", ".hdf5"):
        import h5py

        with readable(path):
            file = h5py.File(path, "r")
        with file:
            with readable(path):
                content = _plain_arrays(dict(file), h5py.Dataset, path.stat().st_size)
                given = arguments(content, path)
            yield given
    elif path.suffix == ".zarr":
        import zarr

        with readable(path):
            group = zarr.open_group(path, mode="r")
            content = {name: group[name] for name in sorted(part.name for part in path.iterdir() if part.is_dir())}
            content = _plain_arrays(content, zarr.Array, sum(f.stat().st_size for f in path.rglob("*") if f.is_file()))
            codecs = [codec for x in content.values() for codec in (*x.filters, *x.compressors)]
            if any(getattr(codec, "codec_id", None) == "pickle" for codec in codecs):
                raise ValueError("it has pickled objects")
            given = arguments(content, path)
        yield given
    else:
        yield arguments(_npz_arrays(path), path)


def _npz_arrays(path: Path) -> dict[str, np.ndarray]:
    with readable(path):
        with zipfile.ZipFile(path) as archive:
            unpacked, packed = (sum(getattr(part, k) for part in archive.infolist()) for k in ("file_size", "compress_size"))
        _refuse_bomb(unpacked, packed)
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}


def _plain_arrays(content: dict[str, Any], kind: type, size: int) -> dict[str, Any]:
    """The content of a file of `size` bytes. Raises ValueError unless it is arrays that are not far larger than the file."""
    groups = [name for name, x in content.items() if not isinstance(x, kind)]
    if groups:
        raise ValueError(f"{groups[0]} is a group, not an array")
    _refuse_bomb(sum(x.size * x.dtype.itemsize for x in content.values()), size)
    return content


def _refuse_bomb(unpacked: int, packed: int) -> None:
    if unpacked > MAX_UNPACKED_BYTES and unpacked > MAX_COMPRESSION_RATIO * packed:
        raise ValueError(f"it unpacks to {unpacked} bytes, more than {MAX_COMPRESSION_RATIO} times its size")


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Raise UserError in place of the errors of reading a file that is not what its suffix says, or is damaged."""
    try:
        yield
    except (OSError, ValueError, AttributeError, TypeError, zipfile.BadZipFile, EOFError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        kind, remedy = KINDS.get(path.suffix, KINDS[".npz"])
        raise UserError(f"{path} cannot be read as {kind} of plain arrays ({reason}); write it with {remedy}.") from error


def arguments(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Sort the arrays of a file by their names into the arguments of `check_arrays`. Columns are read, features are not."""
    dotted: dict[str, dict[str, Any]] = {}  # {"mask": {modality: array}, "label": {factor: array}, ...}
    for key, value in content.items():
        if "." in key:
            first, _, second = key.partition(".")
            kind, name = (first, second) if first in ("label", "owners") else (second, first)
            dotted.setdefault(kind, {})[name] = value
    unknown = sorted(dotted.keys() - {"label", "owners", "captions", *NUMBERS})
    if unknown:
        raise UserError(
            f"{path} has arrays with the unknown suffix .{unknown[0]}; use .pooled, .mask, .present, .captions, .views or "
            ".views_pooled."
        )
    plain = {k: v for k, v in content.items() if "." not in k}
    columns: dict[str, Any] = {k: _in_memory(plain.pop(k)) for k in ("split", "groups", "names") if k in plain}
    owners = {k: np.atleast_1d(_in_memory(v)).tolist() for k, v in dotted.get("owners", {}).items()}
    return {
        "arrays": plain,
        "labels": {k: _in_memory(v) for k, v in dotted.get("label", {}).items()},
        "owners": {k: [decoded(m, f"owners.{k}") for m in v] for k, v in owners.items()},
        "captions": {k: _in_memory(v) for k, v in dotted.get("captions", {}).items()},
        **{k: dotted.get(k, {}) for k in NUMBERS},
        **columns,
    }


def title(what: str, name: str = "") -> str:
    """The name in a file of an argument of `check_arrays`, such as ("labels", "depth"): label.depth."""
    if what == "labels":
        return f"label.{name}"
    return name if what == "arrays" else f"{name}.{what}" if name else what


def chunks_of(given: Mapping[str, Any], path: Path) -> Iterator[dict[str, Any]]:
    """The arguments of `check_arrays` in chunks of about CHUNK_BYTES. Raises UserError for unequal numbers of rows."""
    features = [x for what in ("arrays", *NUMBERS) for x in given[what].values()]
    check_names(list(given["arrays"]))
    with readable(path):
        shapes = {title(k, m): x.shape for k, by in given.items() if isinstance(by, dict) for m, x in by.items()}
        shapes |= {k: x.shape for k, x in given.items() if not isinstance(x, dict)}
        first, rows = next(iter(given["arrays"])), (*features[0].shape, 0)[0]
        for name, shape in shapes.items():
            if shape[:1] != (rows,):
                raise UserError(f"{name} has the shape {shape}, and {first} {rows} rows; all arrays need the same rows.")
        row_bytes = sum(x.dtype.itemsize * x.size for x in features) // max(1, rows)
        stored = [(getattr(x, "chunks", None) or (1,))[0] for x in features]  # a part of a chunk costs as much as the chunk
        at_once = max(1, CHUNK_BYTES // max(1, row_bytes), *stored)
    for start in range(0, rows, at_once):
        part = slice(start, start + at_once)
        with readable(path):
            chunk = {k: {m: x[part] for m, x in by.items()} if isinstance(by, dict) else by[part] for k, by in given.items()}
        yield chunk


def _in_memory(x: Any) -> np.ndarray:
    """An array of a file; strings of any length, as of zarr, as objects."""
    column = np.asarray(x[()])
    return column.astype(object) if column.dtype.kind == "T" else column


def check_arrays(
    arrays: Mapping[str, Any],
    *,
    labels: Mapping[str, Any] | None = None,
    owners: Mapping[str, Sequence[str]] | None = None,
    pooled: Mapping[str, Any] | None = None,
    mask: Mapping[str, Any] | None = None,
    present: Mapping[str, Any] | None = None,
    views: Mapping[str, Any] | None = None,
    views_pooled: Mapping[str, Any] | None = None,
    captions: Mapping[str, Any] | None = None,
    split: Any = None,
    groups: Any = None,
    names: Any = None,
    seed: int = 0,
) -> Arrays:
    """Check the arrays of N rows and fill in defaults. The module's docstring describes the arguments.

    labels, owners, pooled, mask, present, views, views_pooled and captions are dicts by factor or modality name. Views are
    read in chunks of rows and kept as given, so that they may be memory maps or in half precision. Raises UserError for
    fewer than two modalities, different numbers of rows or views, wrong shapes, and NaN or inf in a present row.
    """
    check_names(list(arrays))
    given = {"pooled": pooled, "mask": mask, "present": present, "views": views, "views_pooled": views_pooled}
    check_belonging(given | {"captions": captions}, list(arrays))
    count = len(np.asarray(next(iter(arrays.values()))))
    modalities = {}
    for name, x in arrays.items():
        options: dict[str, Any] = {what: (given[what] or {}).get(name) for what in NUMBERS}
        modalities[name] = check_modality(name, x, count, **options)
        differences = RowDifferences(name)
        differences.add(x, modalities[name])
        differences.check()
    return complete(modalities, labels, owners, captions, split, groups, names, seed)


def complete(
    modalities: Mapping[str, ModalityArrays],
    labels: Mapping[str, Any] | None = None,
    owners: Mapping[str, Sequence[str]] | None = None,
    captions: Mapping[str, Any] | None = None,
    split: Any = None,
    groups: Any = None,
    names: Any = None,
    seed: int = 0,
) -> Arrays:
    """Add the columns of all rows, and what follows from them: split, groups and content keys. See `check_arrays`."""
    count = len(next(iter(modalities.values())).present)
    factors = {name: column_of(f"label.{name}", x, count) for name, x in (labels or {}).items()}
    numbers = tuple(name for name, x in factors.items() if x.dtype.kind == "f" and len(np.unique(x)) > MAX_CLASSES)
    factors = {name: _numbers(name, x) if name in numbers else _classes(name, x) for name, x in factors.items()}
    for name, carriers in (owners or {}).items():
        unknown = [m for m in carriers if m not in modalities]
        if unknown:
            known = ", ".join(modalities)
            raise UserError(f"owners.{name} has {unknown[0]}, which is not a modality; choose from {known}.")
        if name not in factors:
            raise UserError(f"owners.{name} belongs to no label; add label.{name} or remove it.")
    ids = [f"row{i}" for i in range(count)] if names is None else strings_of("names", names, count).tolist()
    if len(set(ids)) < count:
        raise UserError("names must be unique, since labels are matched by name.")
    keys, copies = _content_keys(modalities, captions or {})
    group = None if groups is None else strings_of("groups", groups, count)
    if split is not None and group is not None:
        _warn_of_split_groups(group, strings_of("split", split, count))
    if copies:
        own = [str(i) for i in range(count)] if group is None else group.tolist()
        group = np.array(join_groups(own, copies.values()))
    splits = _draw_split(group, count, seed) if split is None else split_of("split", split, count)
    _log_repeats(keys, copies, group, splits, split is not None)
    carriers_of = {k: tuple(v) for k, v in (owners or {}).items()}
    arrays = Arrays(dict(modalities), splits, ids, factors, carriers_of, numbers, group, keys)
    for name in modalities:
        _check_views(name, arrays)
    counts = {name: m.views.shape[1] for name, m in modalities.items() if m.views is not None}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{name} has {n}" for name, n in counts.items())
        raise UserError(f"views must be as many in all modalities that have views, but {found}; give the same number.")
    return arrays


def check_belonging(given: Mapping[str, Mapping[str, Any] | None], modalities: Sequence[str]) -> None:
    """Raise UserError for an entry of {"mask": {modality: ...}, ...} whose modality does not exist."""
    for what, by_modality in given.items():
        for name in by_modality or {}:
            if name not in modalities:
                raise UserError(f"{name}.{what} belongs to no modality; the modalities are {', '.join(modalities)}.")


def check_names(names: Sequence[str]) -> None:
    """Raise UserError unless these are names of two or more modalities."""
    if len(names) < 2:
        raise UserError(
            f"registers align two or more modalities, got {', '.join(names) or 'none'}; give arrays of at least two."
        )
    check_modalities(names)


def check_modality(
    name: str,
    x: Any,
    count: int,
    pooled: Any = None,
    mask: Any = None,
    present: Any = None,
    views: Any = None,
    views_pooled: Any = None,
    first_row: int = 0,
) -> ModalityArrays:
    """Check the numbers of `count` rows of a modality, numbered from `first_row` in messages, and fill in defaults."""
    tokens = np.asarray(x)
    tokens = tokens[:, None] if tokens.ndim == 2 else tokens
    if tokens.ndim != 3 or not np.issubdtype(tokens.dtype, np.number) or np.iscomplexobj(tokens) or 0 in tokens.shape:
        raise UserError(
            f"{name} must be numbers of shape (rows, tokens, width) or (rows, width), not {np.shape(x)} {tokens.dtype}."
        )
    if len(tokens) != count:
        raise UserError(f"{name} has {len(tokens)} rows and the first modality {count}; all arrays need the same rows.")
    has = np.ones(count, bool) if present is None else column_of(f"{name}.present", present, count).astype(bool)
    real = np.ones(tokens.shape[:2], bool) if mask is None else np.asarray(mask).astype(bool)
    if real.shape != tokens.shape[:2]:
        raise UserError(f"{name}.mask has shape {real.shape}; it must be {tokens.shape[:2]}, as the tokens.")
    has = has & real.any(1)
    real = real & has[:, None]
    tokens = np.where(real[..., None], tokens, 0).astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(tokens).all((1, 2)))
    if len(bad):
        raise UserError(
            f"{name} has NaN or inf in row {first_row + bad[0]} ({len(bad)} of {count} rows); fix them or mark them in "
            f"{name}.present."
        )
    if np.abs(tokens).max(initial=0) > MAX_TOKEN:
        raise UserError(
            f"{name} has values up to {np.abs(tokens).max():.3g}, beyond the range of half precision; scale it down."
        )
    if (views_pooled is not None) != (views is not None and pooled is not None):
        alone = f"{name}.views_pooled needs {name}.views and {name}.pooled; give all three."
        given = f"{name}.pooled cannot be given with {name}.views alone; give {name}.views_pooled too, or remove it."
        raise UserError(given if views_pooled is None else alone)
    if pooled is None:
        vectors = _mean(tokens, real)
    else:
        vectors = np.where(has[:, None], np.asarray(pooled, np.float32), 0) if np.ndim(pooled) == 2 else np.zeros(0)
        if len(vectors) != count or not np.isfinite(vectors).all():
            raise UserError(f"{name}.pooled must be finite numbers of shape ({count}, width), not {np.shape(pooled)}.")
    seen = None if views is None else _view_tokens(name, views, tokens.shape)
    if views_pooled is not None and seen is not None:
        expected = (*seen.shape[:2], vectors.shape[1])
        if np.shape(views_pooled) != expected:
            raise UserError(f"{name}.views_pooled must have the shape {expected}, not {np.shape(views_pooled)}.")
    return ModalityArrays(tokens, real, _normalise(vectors), has, seen, views_pooled)


class RowDifferences:
    """Whether the rows of a modality differ, and half precision keeps the differences, by evenly spaced rows as given."""

    def __init__(self, name: str) -> None:
        self.name, self.rows, self.step = name, 0, 1
        self.sample: list[np.ndarray] = []  # every `step`-th of the present rows
        self.first, self.constant = np.zeros(0), True

    def add(self, given: Any, checked: ModalityArrays) -> None:
        """Look at more rows. given: (B, T, W) or (B, W), as given; checked: the same in single precision, padding zeroed."""
        present = np.flatnonzero(checked.present)
        if not len(present):
            return
        numbers, mask, tokens = (
            np.asarray(given).reshape(checked.tokens.shape),
            np.asarray(checked.mask),
            np.asarray(checked.tokens),
        )
        if not self.rows:
            self.first = tokens[present[0]].copy()
        self.constant = self.constant and all(np.array_equal(tokens[row], self.first) for row in present)
        limit = min(SAMPLE_ROWS, max(2, SAMPLE_BYTES // numbers[0].nbytes))
        while (self.rows + len(present)) > limit * self.step:
            self.sample, self.step = self.sample[::2], 2 * self.step
        for row in present[-self.rows % self.step :: self.step]:
            self.sample.append(np.where(mask[row][:, None], numbers[row], 0))
        self.rows += len(present)

    def check(self) -> None:
        """Warn of equal rows. Raise UserError if half precision loses the differences."""
        if self.rows < 2:
            return
        numbers = np.stack(self.sample).astype(np.float64)
        if not np.ptp(numbers, axis=0).any():
            if self.constant:
                log.warning("%s is the same in all of its %d rows: nothing can be learned from it", self.name, self.rows)
            return
        spread = float(np.sqrt(numbers.var(0).mean()))
        factor = 10.0 ** -round(np.log10(spread))
        if _half_error(numbers) > MAX_LOSS * spread:
            largest = np.abs(numbers).max()
            scaled = largest * factor < MAX_TOKEN and _half_error(numbers * factor) <= MAX_LOSS * spread * factor
            remedy = f"multiply it by {factor:.0e}" if scaled else "subtract its mean over the rows, or standardise it"
            raise UserError(
                f"{self.name} has values up to {largest:.3g} that differ between rows by {spread:.1g}, "
                f"too little for half precision; {remedy}."
            )


def _half_error(numbers: np.ndarray) -> float:
    return float(np.sqrt(np.square(numbers - numbers.astype(np.float16)).mean()))


def _mean(tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """(..., W) mean of the real tokens of (..., T, W), whose padding is zero."""
    return np.asarray(tokens.sum(-2) / np.maximum(mask.sum(-1, keepdims=True), 1))


def _normalise(vectors: np.ndarray) -> np.ndarray:
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12), np.float32)


def _view_tokens(name: str, x: Any, shape: tuple[int, ...]) -> np.ndarray:
    """The views as an array (N, V, T, W) without a copy. shape: (N, T, W) of the plain tokens."""
    views = np.asarray(x)
    views = views[:, :, None] if views.ndim == 3 else views
    if (
        views.ndim != 4
        or not np.issubdtype(views.dtype, np.floating)
        or (len(views), *views.shape[2:]) != shape
        or not views.size
    ):
        rows, tokens, width = shape
        expected = f"({rows}, views, {tokens}, {width})" + (f" or ({rows}, views, {width})" if tokens == 1 else "")
        raise UserError(f"{name}.views must be floats of shape {expected}, not {np.shape(x)} {views.dtype}.")
    return views


def _check_views(name: str, arrays: Arrays) -> None:
    """Raise UserError for a training row whose views are not finite or beyond half precision."""
    for rows in in_chunks(arrays.rows_with_views(name)):
        largest = np.abs(arrays.modalities[name].view_tokens(rows)).max((1, 2, 3))
        finite = np.isfinite(arrays.modalities[name].view_pooled(rows)).all((1, 2))
        bad = np.flatnonzero(~np.isfinite(largest) | ~finite)  # the maximum of NaN and anything is NaN
        if len(bad):
            raise UserError(f"{name}.views has NaN or inf in row {rows[bad[0]]}; fix it or mark it in {name}.present.")
        if largest.max() > MAX_TOKEN:
            raise UserError(
                f"{name}.views has values up to {largest.max():.3g}, beyond the range of half precision; scale it down."
            )


def _numbers(name: str, column: np.ndarray) -> np.ndarray:
    """(N,) str of 6 significant digits, "" for NaN."""
    if np.isinf(column).any():
        raise UserError(f"label.{name} is inf in row {np.flatnonzero(np.isinf(column))[0]}; use NaN for unknown values.")
    return np.array(["" if np.isnan(x) else f"{x:.6g}" for x in column.tolist()])


def _classes(name: str, column: np.ndarray) -> np.ndarray:
    """(N,) str of a label, "" where it says "no value"."""
    labels = strings_of(f"label.{name}", column, len(column), every_row=False)
    absent = np.array([is_absent(label) for label in labels.tolist()], bool)
    for word in sorted(set(labels[absent].tolist()) - {""}) if column.dtype.kind in "USO" else ():
        log.warning("label.%s: %d rows are %r, which is no label", name, (labels == word).sum(), word)
    return np.where(absent, "", labels)


def strings_of(name: str, x: Any, count: int, every_row: bool = True) -> np.ndarray:
    """(N,) str of strings, UTF-8 bytes or numbers. Raises UserError for other bytes, and with `every_row` for no value."""
    column = column_of(name, x, count)
    column = np.array([decoded(v, name) for v in column.tolist()]) if column.dtype.kind in "SO" else column.astype(str)
    missing = [row for row, value in enumerate(column.tolist()) if is_absent(value)] if every_row else []
    if missing:
        raise UserError(f"{name} has no value in row {missing[0]} ({len(missing)} rows in total); give every row one.")
    return column


def _warn_of_split_groups(groups: np.ndarray, split: np.ndarray) -> None:
    """A given split is used as it is, also where rows of a group are on both sides."""
    sides: dict[str, set[str]] = {}
    for group, side in zip(groups.tolist(), split.tolist(), strict=True):
        sides.setdefault(group, set()).add(side)
    across = sum(len(found) > 1 for found in sides.values())
    if across:
        text = "%d of %d groups are in more than one split: the given split is used, and test rows resemble training rows"
        log.warning(text, across, len(sides))


def column_of(name: str, x: Any, count: int) -> np.ndarray:
    column = np.asarray(x)
    if column.shape != (count,):
        raise UserError(f"{name} must have one entry per row, shape ({count},), not {column.shape}.")
    return column


def _content_keys(
    modalities: Mapping[str, ModalityArrays], captions: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Content keys of the modalities in which rows repeat; and of those among them that hold no sentences."""
    keys = {name: row_keys(modality.contents()) for name, modality in modalities.items()}
    copies = {name: k for name, k in keys.items() if repeats(k) and name not in captions and name != "text"}
    for name, x in captions.items():
        sentences = strings_of(f"{name}.captions", x, len(keys[name]), every_row=False).tolist()
        rows = enumerate(zip(sentences, modalities[name].present.tolist(), strict=True))
        named = [s if has and s != "-1" and not is_absent(s) else f"\0{i}" for i, (s, has) in rows]
        keys[name] = row_keys(join_groups(named, [keys[name]]))
    return {name: k for name, k in keys.items() if repeats(k)}, copies


def _log_repeats(
    keys: Mapping[str, np.ndarray],
    copies: Mapping[str, np.ndarray],
    groups: np.ndarray | None,
    splits: np.ndarray,
    split_is_given: bool,
) -> None:
    for name, column in keys.items():
        log.warning("%d rows repeat the %s of another row", repeats(column), name)
    across = copies_across(copies, splits.tolist())
    if across and split_is_given:
        log.warning("%d rows have equal numbers in another split (%s)", across, ", ".join(copies))
    elif copies and groups is not None:
        remedy = (
            "; give .captions of those that hold sentences or classes" if len(set(splits.tolist())) < len(SPLITS) else ""
        )
        log.warning("rows with equal %s are kept in one split, %d groups%s", " or ".join(copies), len(set(groups)), remedy)


def split_of(name: str, x: Any, count: int) -> np.ndarray:
    """(N,) str of the names of splits. Raises UserError for any other."""
    column = strings_of(name, x, count)
    unknown = sorted(set(column.tolist()) - set(SPLITS))
    if unknown:
        raise UserError(f"{name} has {unknown[0]!r}; use train, val and test.")
    return column


def _draw_split(groups: np.ndarray | None, count: int, seed: int) -> np.ndarray:
    group = np.arange(count).astype(str) if groups is None else groups
    distinct = sorted(set(group.tolist()))
    random.Random(seed).shuffle(distinct)
    edges = np.cumsum(SPLIT_FRACTIONS[:2]) * len(distinct)
    split_of_group = {name: SPLITS[int(np.searchsorted(edges, i, side="right"))] for i, name in enumerate(distinct)}
    return np.array([split_of_group[name] for name in group.tolist()])


def arrays_key(arrays: Arrays) -> str:
    """The key of the store of these arrays: the first 16 hex digits of a SHA-256 of their content."""
    digest = hashlib.sha256(repr((FORMAT, arrays.names, arrays.split.tolist(), arrays.owners)).encode())
    for name, modality in arrays.modalities.items():
        digest.update(name.encode())
        for x in (modality.tokens, modality.mask, modality.pooled, modality.present):
            digest.update(repr(x.shape).encode())
            for rows in in_chunks(np.arange(len(modality.present))):
                digest.update(x[rows].tobytes())
        for rows in in_chunks(arrays.rows_with_views(name)):
            views = modality.view_tokens(rows)
            digest.update(repr(("views", views.shape)).encode() + views.tobytes())
            if modality.views_pooled is not None:
                digest.update(modality.view_pooled(rows).tobytes())
    for name, column in arrays.labels.items():
        digest.update(repr((name, column.tolist(), *(["number"] if name in arrays.numbers else []))).encode())
    for name, keys in arrays.content_keys.items():
        digest.update(repr(("content", name, keys.tolist())).encode())
    if arrays.groups is not None:
        digest.update(repr(("groups", arrays.groups.tolist())).encode())
    if arrays.ingredients:
        digest.update(json.dumps(arrays.ingredients, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def write_arrays(arrays: Arrays, out: Path, key: str) -> None:
    """Write checked arrays as a feature store to `out`, a new or empty folder. Raises UserError for any other folder."""
    specs = {
        name: FeatureSpec(modality.tokens.shape[2], modality.tokens.shape[1], modality.pooled.shape[1])
        for name, modality in arrays.modalities.items()
    }
    with unfinished(out, "store") as folder:
        splits: dict[str, Any] = {}
        for split in SPLITS:
            rows = np.flatnonzero(arrays.split == split)
            if len(rows):
                names, groups = (
                    [arrays.names[i] for i in rows],
                    None if arrays.groups is None else arrays.groups[rows].tolist(),
                )
                views, keys = arrays.views if split == "train" else 0, arrays.content_keys
                content = {name: torch.from_numpy(column[rows]) for name, column in keys.items()}
                captions = content.pop("text", torch.arange(len(rows)))  # without captions all rows differ
                info = write_rows(folder / split, names, ["arrays"] * len(rows), groups, content)
                splits[split] = {"views": views, **info}
                _write_split(folder / split, arrays.modalities, rows, specs, views, captions)
        if arrays.labels:
            _write_labels(folder, arrays)
        manifest = {"format": FORMAT, "key": key, "root": str(out.resolve()), "splits": splits}
        manifest |= {"ingredients": dict(arrays.ingredients), "made_by": provenance()}
        manifest |= {"modalities": {m: asdict(spec) for m, spec in specs.items()}}
        (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        for part in sorted(folder.iterdir(), key=lambda path: path.name == "manifest.json"):  # last: it completes the store
            os.replace(part, out / part.name)


def _write_split(
    folder: Path,
    modalities: Mapping[str, ModalityArrays],
    rows: np.ndarray,
    specs: Mapping[str, FeatureSpec],
    views: int,
    captions: Tensor,
) -> None:
    index = {}
    for name, modality in modalities.items():
        present = torch.from_numpy(modality.present[rows])
        present_rows = rows[modality.present[rows]]
        stored = (
            1 if modality.views is None or not views else views + 1
        )  # table rows of a row; 1: every view is the plain one
        table_rows = torch.full((len(rows), views + 1), -1, dtype=torch.int64)
        table_rows[present] = torch.arange(len(present_rows) * stored).view(-1, stored).expand(-1, views + 1)
        index[name] = table_rows
        if len(present_rows):
            table = empty_table(len(present_rows) * stored, specs[name]).memmap_like(folder / name)
            by_row = {k: table[k].view(-1, stored, *table[k].shape[1:]) for k in ("tokens", "mask", "pooled")}
            for at in in_chunks(np.arange(len(present_rows))):
                chunk, to = present_rows[at], slice(at[0], at[-1] + 1)
                by_row["tokens"][to, 0].copy_(torch.from_numpy(modality.tokens[chunk]))
                by_row["mask"][to].copy_(torch.from_numpy(modality.mask[chunk])[:, None])
                by_row["pooled"][to, 0].copy_(torch.from_numpy(modality.pooled[chunk]))
                if stored > 1:
                    by_row["tokens"][to, 1:].copy_(torch.from_numpy(modality.view_tokens(chunk)))
                    by_row["pooled"][to, 1:].copy_(torch.from_numpy(modality.view_pooled(chunk)))
                for column in ("tokens", "mask", "pooled"):
                    release_if_mapped(table[column])
    keys = captions[:, None, None].expand(-1, views + 1, 2).contiguous()
    TensorDict({**index, "caption_keys": keys}, batch_size=[len(rows)]).memmap(folder / "index")


def _write_labels(folder: Path, arrays: Arrays) -> None:
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["row", *arrays.labels])
        writer.writerows(zip(arrays.names, *(column.tolist() for column in arrays.labels.values()), strict=True))
    factors: dict[str, dict[str, Any]] = {}
    for name in arrays.labels:
        if name in arrays.owners or name in arrays.numbers:
            factors[name] = {"ownership": list(arrays.owners.get(name, ()))}
        if name in arrays.numbers:
            factors[name]["kind"] = "number"
    (folder / "labels.json").write_text(json.dumps({"factors": factors}), encoding="utf-8")
