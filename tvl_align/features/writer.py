"""Collect features on disk, chunk by chunk, so that a store of any size is written with one chunk in memory."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tvl_align.contract import FeatureSpec
from tvl_align.features.arrays import (
    NUMBERS,
    Arrays,
    ModalityArrays,
    RowDifferences,
    check_belonging,
    check_modality,
    check_names,
    column_of,
    complete,
    split_of,
    strings_of,
    title,
)
from tvl_align.features.tables import open_memmap, read_rows
from tvl_align.system.console import UserError


class StoredRows:
    """Rows of one shape in a file: appended in chunks, read by index like those of an array, and never all in memory."""

    def __init__(self, file: Path, dtype: type, *shape: int) -> None:
        self.file, self.dtype, self.shape = file, np.dtype(dtype), (0, *shape)

    def append(self, rows: np.ndarray) -> None:
        """Append (B, ...) rows."""
        with np.errstate(over="ignore"), self.file.open("ab") as file:  # views of unused rows may have any values
            file.write(np.ascontiguousarray(rows, self.dtype).tobytes())
        self.shape = (self.shape[0] + len(rows), *self.shape[1:])

    def skip(self, count: int) -> None:
        """Append `count` rows of zeros, which take no space on most file systems."""
        self.shape = (self.shape[0] + count, *self.shape[1:])
        with self.file.open("ab") as file:
            file.truncate(self.dtype.itemsize * int(np.prod(self.shape)))

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        dtype = torch.from_numpy(np.empty(0, self.dtype)).dtype
        return read_rows(open_memmap(self.file, dtype, self.shape), torch.from_numpy(rows)).numpy()


class _Modality:
    """The rows of a modality on disk. has: what it was given with, such as {"pooled"}; None before its first row."""

    def __init__(self, folder: Path, name: str, spec: FeatureSpec) -> None:
        folder.mkdir()
        self.folder, self.name, self.spec = folder, name, spec
        self.tokens = StoredRows(folder / "tokens", np.float32, spec.tokens, spec.width)
        self.mask = StoredRows(folder / "mask", np.bool_, spec.tokens)
        self.pooled = StoredRows(folder / "pooled", np.float32, spec.pooled_width)
        self.views: StoredRows | None = None
        self.views_pooled: StoredRows | None = None
        self.present: list[np.ndarray] = []
        self.has: set[str] | None = None
        self.differences = RowDifferences(name)

    def append(self, given: Any, rows: ModalityArrays, has: set[str]) -> None:
        if rows.views is not None and self.views is None:
            self.views = StoredRows(self.folder / "views", np.float32, *rows.views.shape[1:])
            self.views.skip(self.tokens.shape[0])
        if rows.views_pooled is not None and self.views_pooled is None:
            self.views_pooled = StoredRows(self.folder / "views_pooled", np.float32, *rows.views_pooled.shape[1:])
            self.views_pooled.skip(self.tokens.shape[0])
        for stored, new in (
            (self.tokens, rows.tokens),
            (self.mask, rows.mask),
            (self.pooled, rows.pooled),
            (self.views, rows.views),
            (self.views_pooled, rows.views_pooled),
        ):
            if stored is not None:
                stored.append(np.asarray(new))
        self.present.append(rows.present)
        self.differences.add(given, rows)
        self.has = has

    def skip(self, count: int) -> None:
        for stored in (self.tokens, self.mask, self.pooled, self.views, self.views_pooled):
            if stored is not None:
                stored.skip(count)
        self.present.append(np.zeros(count, bool))

    def arrays(self) -> ModalityArrays:
        self.differences.check()
        present = np.concatenate(self.present)
        return ModalityArrays(self.tokens, self.mask, self.pooled, present, self.views, self.views_pooled)


class FeatureWriter:
    """Takes the features of a new store in chunks; see `FeatureStore.writer`. Its files are in `folder`, an empty folder.

    specs: {modality: FeatureSpec}, with the largest number of tokens of any chunk; default: the shapes of the first chunk.
    """

    def __init__(self, folder: Path, specs: Mapping[str, FeatureSpec] | None = None) -> None:
        self.folder, self.rows = folder, 0
        self.modalities: dict[str, _Modality] = {}
        self.columns: dict[tuple[str, str], list[np.ndarray]] = {}  # ("names", ""), ("labels", factor), ...: chunks
        self.names: set[str] = set()
        if specs is not None:
            self._begin(specs)

    def _begin(self, specs: Mapping[str, FeatureSpec]) -> None:
        check_names(list(specs))
        self.modalities = {name: _Modality(self.folder / name, name, spec) for name, spec in specs.items()}

    def add(
        self,
        arrays: Mapping[str, Any],
        *,
        labels: Mapping[str, Any] | None = None,
        pooled: Mapping[str, Any] | None = None,
        mask: Mapping[str, Any] | None = None,
        present: Mapping[str, Any] | None = None,
        views: Mapping[str, Any] | None = None,
        views_pooled: Mapping[str, Any] | None = None,
        captions: Mapping[str, Any] | None = None,
        split: Any = None,
        groups: Any = None,
        names: Any = None,
    ) -> None:
        """Append B rows: {modality: (B, T, W) or (B, W)} and the options of `check_arrays`, of these rows.

        A column may be one value for all rows, such as split="train". The same columns are needed in every chunk. A chunk of
        fewer tokens is padded. A modality that is not in a chunk is absent in its rows. Raises UserError for what
        `check_arrays` refuses and for other shapes than those of the specs; then nothing of the chunk is added.
        """
        given = {"pooled": pooled, "mask": mask, "present": present, "views": views, "views_pooled": views_pooled}
        check_belonging(given, list(arrays))
        check_belonging({"captions": captions}, list(self.modalities or arrays))
        if not self.modalities:
            check_names(list(arrays))
        unknown = [name for name in arrays if self.modalities and name not in self.modalities]
        if unknown or not arrays:
            what = f"the modality {unknown[0]!r}" if unknown else "no modality"
            raise UserError(f"a chunk has {what}; the store has {', '.join(self.modalities)}, as its specs or first chunk.")
        count = len(np.asarray(next(iter(arrays.values()))))
        checked = {}
        for name, x in arrays.items():
            options: dict[str, Any] = {what: (given[what] or {}).get(name) for what in NUMBERS}
            if name in self.modalities:
                x, options = _padded(np.asarray(x), options, self.modalities[name].spec.tokens)
            rows = check_modality(name, x, count, first_row=self.rows, **options)
            has = {what for what in ("pooled", "views") if options[what] is not None}
            self._check_like_before(name, rows, has)
            checked[name] = x, rows, has
        columns = {(k, ""): x for k, x in (("split", split), ("groups", groups), ("names", names)) if x is not None}
        columns |= {("labels", k): x for k, x in (labels or {}).items()}
        columns |= {("captions", k): x for k, x in (captions or {}).items()}
        columns = {k: np.full(count, x) if np.ndim(x) == 0 else column_of(title(*k), x, count) for k, x in columns.items()}
        new_names = self._check_columns(columns, count)
        if not self.modalities:
            self._begin({name: _spec(rows) for name, (_, rows, _) in checked.items()})
        for name, modality in self.modalities.items():
            if name in checked:
                modality.append(*checked[name])
            else:
                modality.skip(count)
        for key, column in columns.items():
            self.columns.setdefault(key, []).append(column)
        self.names |= new_names
        self.rows += count

    def _check_like_before(self, name: str, rows: ModalityArrays, has: set[str]) -> None:
        if name not in self.modalities:
            return
        modality, spec = self.modalities[name], _spec(rows)
        if spec != modality.spec:
            raise UserError(
                f"{name} has {spec} from row {self.rows} on, which does not fit {modality.spec}; give rows of one shape, or "
                "specs with the largest number of tokens."
            )
        if modality.has is not None and has != modality.has:
            raise UserError(f"{name}.{min(has ^ modality.has)} is given for some chunks only; give it for all or none.")
        if modality.views is not None and rows.views is not None and rows.views.shape[1] != modality.views.shape[1]:
            counts = f"{rows.views.shape[1]} from row {self.rows} on, and {modality.views.shape[1]} before"
            raise UserError(f"{name} has views that are {counts}; give the same number.")

    def _check_columns(self, columns: Mapping[tuple[str, str], np.ndarray], count: int) -> set[str]:
        """Names of these rows. Raises UserError for what can be seen before the last chunk."""
        changed = sorted(columns.keys() ^ self.columns.keys()) if self.rows else []
        if changed:
            raise UserError(f"{title(*changed[0])} is given for some chunks only; give it for all or none.")
        if ("split", "") in columns:
            split_of("split", columns["split", ""], count)
        names: set[str] = set()
        for name in strings_of("names", columns["names", ""], count).tolist() if ("names", "") in columns else ():
            if name in names or name in self.names:
                raise UserError(f"the name {name!r} is given twice; names must be unique, as labels are matched by name.")
            names.add(name)
        return names

    def arrays(self, owners: Mapping[str, Sequence[str]] | None = None, seed: int = 0) -> Arrays:
        """All rows, which stay on disk, with what follows from them together. See `check_arrays`."""
        if not self.rows:
            raise UserError("the store has no rows; add a chunk before the block of the writer ends.")
        columns: dict[str, Any] = {"labels": {}, "captions": {}}
        for (what, name), chunks in self.columns.items():
            if name:
                columns[what][name] = np.concatenate(chunks)
            else:
                columns[what] = np.concatenate(chunks)
        modalities = {name: modality.arrays() for name, modality in self.modalities.items()}
        return complete(modalities, owners=owners, seed=seed, **columns)


def _spec(rows: ModalityArrays) -> FeatureSpec:
    return FeatureSpec(rows.tokens.shape[2], rows.tokens.shape[1], rows.pooled.shape[1])


def _padded(x: np.ndarray, options: dict[str, Any], tokens: int) -> tuple[np.ndarray, dict[str, Any]]:
    """(B, T, W) tokens, their mask and views with padding up to `tokens`; other shapes stay as they are, to be refused."""
    if x.ndim == 2 and tokens > 1:
        x = x[:, None]
    missing = tokens - x.shape[1] if x.ndim == 3 else 0
    if missing <= 0:
        return x, options
    mask = np.ones(x.shape[:2], bool) if options["mask"] is None else np.asarray(options["mask"])
    views = None if options["views"] is None else np.asarray(options["views"])
    if views is not None:
        views = _pad(views[:, :, None] if views.ndim == 3 else views, 2, missing)
    return _pad(x, 1, missing), options | {"mask": _pad(mask, 1, missing), "views": views}


def _pad(x: np.ndarray, axis: int, missing: int) -> np.ndarray:
    if x.ndim <= axis:
        return x
    return np.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])
