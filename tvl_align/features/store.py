"""Frozen features on disk. Encoders never change, so their outputs are computed once and read from a memory map.

A store is a folder, `<feature_dir>/<key>`. The key is a hash of everything that shaped it (encoder weights, transforms,
text options, rows, file sizes and times, package versions), so another setting is another folder and an old one is never
reused in silence. Layout:

    manifest.json                 key, what made it, the shapes, what was left out and why; written last: with it the
                                  store is whole
    <split>/rows/                 memory-mapped: dataset (N,) int64, names (bytes,) uint8 of all rows' names one after
                                  another, and name_ends (N,) int64, where each ends
    <split>/index/                memory-mapped TensorDict: {modality: (N, V+1) int64} rows of the tables, -1 = absent
                                  and caption_keys (N, V+1, 2) int64
    <split>/<modality>/           memory-mapped TensorDict of R rows: tokens (R, T, W) fp16, mask (R, T) bool,
                                  pooled (R, E) fp32

Text tables hold each distinct sentence once. Only training rows have views beyond the plain one.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tvl_align.contract import Features, FeatureSpec, Tokens
from tvl_align.features.arrays import Arrays, arrays_key, check_arrays, write_arrays
from tvl_align.features.tables import FORMAT, RowNames, open_mapped, open_table, read_rows
from tvl_align.system.console import UserError
from tvl_align.system.runtime import release_pages


class FeatureSource(Protocol):
    """Where features of a split come from: a store, or the encoders themselves."""

    views: int
    names: Sequence[str]
    datasets: Tensor
    """(N,) int64: equal for rows of the same data set."""

    def __len__(self) -> int: ...

    def batches(self, rows: Sequence[Tensor], views: Sequence[Tensor], device: torch.device) -> Iterator[Features]:
        """One Features per (rows, views) pair of (B,) int64 index tensors; a row -1 lacks every modality."""
        ...


class StoredSplit:
    """A split of a store, memory-mapped: reading a batch touches only its rows."""

    def __init__(self, folder: Path, modalities: Mapping[str, FeatureSpec], info: Mapping[str, Any]) -> None:
        self.views = int(info["views"])
        shape = int(info["rows"]), self.views + 1
        self.names = RowNames(folder / "rows", shape[0])
        self.datasets = open_mapped(folder / "rows" / "dataset.memmap", torch.int64, shape[:1])
        if shape[0] and not 0 <= int(self.datasets.min()) <= int(self.datasets.max()) < len(info["datasets"]):
            raise UserError(f"{folder} names data sets that are not in the manifest; the store is damaged, make it again.")
        self.index = {m: open_mapped(folder / "index" / f"{m}.memmap", torch.int64, shape) for m in modalities}
        self.index["caption_keys"] = open_mapped(folder / "index" / "caption_keys.memmap", torch.int64, (*shape, 2))
        tables = {m: open_table(folder / m, spec) for m, spec in modalities.items()}
        self.tables = {m: table for m, table in tables.items() if len(table["mask"])}
        for m in modalities:
            rows = len(self.tables[m]["mask"]) if m in self.tables else 0
            if shape[0] and int(self.index[m].max()) >= rows:
                raise UserError(f"{folder} points to rows of {m} that are not there; the store is damaged, make it again.")
            release_pages(self.index[m])

    def __len__(self) -> int:
        return len(self.names)

    def read(self, rows: Tensor, views: Tensor | None = None) -> Features:
        """(B,) rows and views (default: plain) -> Features in storage precision, on the CPU. A row -1 lacks everything."""
        views = torch.zeros_like(rows) if views is None else views
        tokens = {}
        for name, table in self.tables.items():
            where = self.index[name][rows, views].masked_fill(rows < 0, -1)
            present = where >= 0
            at = where.clamp(min=0)
            mask = read_rows(table["mask"], at) & present[:, None]
            longest = max(1, int(mask.any(0).nonzero().max()) + 1 if mask.any() else 1)  # sentences are short
            read = read_rows(table["tokens"], at, longest), mask[:, :longest], read_rows(table["pooled"], at)
            tokens[name] = Tokens(*read, present)
        return Features(tokens, self.index["caption_keys"][rows, views], rows)

    def batches(self, rows: Sequence[Tensor], views: Sequence[Tensor], device: torch.device) -> Iterator[Features]:
        for row, view in zip(rows, views, strict=True):
            batch = self.read(row, view)
            for index in self.index.values():
                release_pages(index)
            if device.type == "cuda":
                batch = batch.map(Tensor.pin_memory)
            yield batch.to(device)


class FeatureStore:
    """An opened store: its splits, shapes and manifest. Nothing in it is executed, whoever made it."""

    def __init__(self, folder: Path) -> None:
        path = folder / "manifest.json"
        if not path.is_file():
            raise UserError(f"{folder} is not a feature store (no manifest.json); make one with `tvl-align encode`.")
        self.folder = folder
        try:
            self.manifest = json.loads(path.read_text(encoding="utf-8"))
            if self.manifest.get("format") != FORMAT:
                raise UserError(f"{folder} has store format {self.manifest.get('format')}, not {FORMAT}; encode it again.")
            self.key = str(self.manifest["key"])
            self.specs = {str(m): FeatureSpec(**{k: int(v) for k, v in s.items()}) for m, s in self._inside("modalities")}
            self.splits = {name: StoredSplit(folder / name, self.specs, info) for name, info in self._inside("splits")}
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            ArithmeticError,
            RecursionError,
            RuntimeError,
            OSError,
        ) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise UserError(f"{path} is not the manifest of a feature store ({reason}); make the store again.") from error

    def _inside(self, what: str) -> list[tuple[str, Any]]:
        """Entries of the manifest that name a folder each, inside the store."""
        for name in self.manifest[what]:
            if not str(name).isidentifier():
                raise ValueError(f"{name!r} names no {what}")
        return list(self.manifest[what].items())

    def only(self, names: Sequence[str]) -> "FeatureStore":
        """Restrict it to some of its modalities, in the order given."""
        unknown = [name for name in names if name not in self.specs]
        if unknown:
            raise UserError(f"{self.folder} has no modality {unknown[0]!r}; it holds {', '.join(self.specs)}.")
        self.specs = {name: self.specs[name] for name in names}
        for split in self.splits.values():
            split.tables = {name: split.tables[name] for name in names if name in split.tables}
        return self

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any] | Arrays, out: Path, **options: Any) -> "FeatureStore":
        """A store of any two or more modalities: {name: (N, T, W) or (N, W)}; `out` is a new or empty folder.

        options: labels, owners, pooled, mask, present, split, groups, names, seed, as in tvl_align.arrays.check_arrays.
        A store that already holds exactly this is opened. Raises UserError for wrong arrays and for another store there.
        """
        checked = arrays if isinstance(arrays, Arrays) else check_arrays(arrays, **options)
        key = arrays_key(checked)
        if (out / "manifest.json").is_file():
            store = cls(out)
            if store.key != key:
                raise UserError(f"{out} already holds another store ({store.key}); give another folder.")
            return store
        write_arrays(checked, out, key)
        return cls(out)
