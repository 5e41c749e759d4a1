"""Read a feature store: frozen features on disk, opened as memory maps. `tables.py` describes the files.

The encoders are frozen, so their features are computed once (`encode.py`, or `arrays.py` for features from other sources).
"""

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tvl_align.contract import Features, FeatureSpec, Tokens
from tvl_align.features.arrays import Arrays, arrays_key, check_arrays, chunks_of, open_arrays, write_arrays
from tvl_align.features.tables import (
    FORMAT,
    Parts,
    RowNames,
    maps_needed,
    open_memmap,
    open_parts,
    open_table,
    part_name,
    read_rows,
    release_if_mapped,
    unfinished,
)
from tvl_align.features.writer import FeatureWriter
from tvl_align.system.console import UserError, progress
from tvl_align.system.distributed import is_main
from tvl_align.system.workers import run_in_threads

Condense = Callable[[str, Tokens], Tensor | None]
"""Stage2Model.condense: modality, tokens of B rows -> (B, C) float32, or None."""
MAX_CONDENSED = 4 * 2**30  # bytes; larger splits are read from disk in every epoch
GPU_READERS = 3  # threads that read batches for a GPU
CONDENSE_BATCH = 256  # rows; fixed, because rounding depends on it


class FeatureSource(Protocol):
    """The features of a split of N rows: read from a store (StoredSplit) or computed on the fly (LiveSplit)."""

    @property
    def views(self) -> int:
        """Number of views of every row, beside the plain one."""
        ...

    @property
    def augmented(self) -> Sequence[str]:
        """Modalities of which views show augmented pictures; in others they are plain, or have another sentence."""
        ...

    @property
    def names(self) -> Sequence[str]:
        """Names of the rows."""
        ...

    @property
    def datasets(self) -> Tensor:
        """(N,) int64: the index of each row's data set."""
        ...

    @property
    def groups(self) -> Tensor:
        """(N,) int64: rows of a group, such as the frames of one press, are never split apart."""
        ...

    @property
    def content_keys(self) -> Mapping[str, Tensor]:
        """{modality: (N,) int64}: equal for rows with the same content. See Features; captions are not among them."""
        ...

    def __len__(self) -> int: ...

    def batches(self, rows: Sequence[Tensor], views: Sequence[Tensor], device: torch.device) -> Iterator[Features]:
        """Yield the Features of every (rows, views) pair of (B,) int64 tensors. Row -1 lacks every modality."""
        ...

    def condensed(self, condense: Condense, device: torch.device) -> "FeatureSource":
        """This source with all its features condensed and in memory, or itself if that is not possible."""
        ...


class StoredSplit:
    """A memory-mapped split of a store. Reading a batch loads only its rows.

    parts: the folders of tables that all splits share. Raises UserError if the files do not match the manifest.
    """

    def __init__(
        self,
        folder: Path,
        modalities: Mapping[str, FeatureSpec],
        info: Mapping[str, Any],
        parts: Sequence[Path] = (),
    ) -> None:
        self.views = int(info["views"])
        shape = int(info["rows"]), self.views + 1
        self.names = RowNames(folder / "rows", shape[0])
        self.datasets = open_memmap(folder / "rows" / "dataset.memmap", torch.int64, shape[:1])
        self.groups = open_memmap(folder / "rows" / "group.memmap", torch.int64, shape[:1])
        if shape[0] and not 0 <= int(self.datasets.min()) <= int(self.datasets.max()) < len(info["datasets"]):
            raise UserError(f"{folder} has data sets that are not in the manifest; the store is damaged, make it again.")
        contents = [m for m in info.get("repeated", ()) if m in modalities]
        files = {m: folder / "rows" / "content_keys" / f"{m}.memmap" for m in contents}
        self.content_keys = {m: open_memmap(file, torch.int64, shape[:1]) for m, file in files.items()}
        self.index = {m: open_memmap(folder / "index" / f"{m}.memmap", torch.int64, shape) for m in modalities}
        self.is_condensed = False
        self.augmented: tuple[str, ...] = ()
        self.index["caption_keys"] = open_memmap(folder / "index" / "caption_keys.memmap", torch.int64, (*shape, 2))
        tables: dict[str, Mapping[str, Any]] = {
            m: open_parts([part / m for part in parts], spec) if parts else open_table(folder / m, spec)
            for m, spec in modalities.items()
        }
        self.tables = {m: table for m, table in tables.items() if len(table["mask"])}
        for m in modalities:
            rows = len(self.tables[m]["mask"]) if m in self.tables else 0
            if shape[0] and int(self.index[m].max()) >= rows:
                raise UserError(f"{folder} refers to missing rows of {m}; the store is damaged, make it again.")
            if self.views and m != "text" and (self.index[m] != self.index[m][:, :1]).any():
                self.augmented = (*self.augmented, m)
            release_if_mapped(self.index[m])

    def __len__(self) -> int:
        return len(self.names)

    def read(self, rows: Tensor, views: Tensor | None = None, whole: bool = False) -> Features:
        """Features of (B,) int64 rows and views (default: 0, the plain view), as stored (tokens fp16), on the CPU.

        Token sequences are truncated to the longest sequence of the batch, unless `whole`. Row -1 lacks every modality.
        """
        views = torch.zeros_like(rows) if views is None else views
        tokens = {}
        for name, table in self.tables.items():
            table_rows = self.index[name][rows, views].masked_fill(rows < 0, -1)
            present = table_rows >= 0
            table_rows = table_rows.clamp(min=0)
            read = _select if self.is_condensed else read_rows  # only mapped pages may be released
            mask = read(table["mask"], table_rows) & present[:, None]
            length = mask.shape[1] if whole else max(1, int(mask.any(0).nonzero().max()) + 1 if mask.any() else 1)
            token_rows, pooled_rows = read(table["tokens"], table_rows, length), read(table["pooled"], table_rows)
            tokens[name] = Tokens(token_rows, mask[:, :length], pooled_rows, present, self.is_condensed)
        content = {m: keys[rows] for m, keys in self.content_keys.items()}
        augmented = {m: self.index[m][rows, views] != self.index[m][rows, 0] for m in self.augmented}
        return Features(tokens, self.index["caption_keys"][rows, views], rows, content, augmented)

    def batches(self, rows: Sequence[Tensor], views: Sequence[Tensor], device: torch.device) -> Iterator[Features]:
        """Yield the Features of every (rows, views) pair on `device`. See FeatureSource.

        For a GPU, which is faster than one reader, several threads read the next batches, into pinned memory. Their token
        sequences are whole: steps of one shape can be replayed (tvl_align.training.graphs).
        """
        on_gpu = device.type == "cuda"

        def read(row: Tensor, view: Tensor) -> Features:
            batch = self.read(row, view, whole=on_gpu)
            for index in self.index.values():
                release_if_mapped(index)
            return batch.map(Tensor.pin_memory) if on_gpu else batch

        work = (partial(read, *of_batch) for of_batch in zip(rows, views, strict=True))
        for batch in run_in_threads(work, GPU_READERS) if on_gpu else (task() for task in work):
            yield batch.to(device)

    @torch.no_grad()
    def condensed(self, condense: Condense, device: torch.device) -> "FeatureSource":
        """This split, condensed and in memory; itself if `condense` gives None or the result is too large."""
        result, size = copy.copy(self), 0
        result.tables, result.index, result.is_condensed = {}, dict(self.index), True
        for name, table in self.tables.items():
            used = torch.arange(len(table["mask"]))
            if isinstance(table["mask"], Parts):  # other rows are of other splits
                used = (index := self.index[name])[index >= 0].unique()
                result.index[name] = torch.searchsorted(used, index.contiguous()).masked_fill(index < 0, -1)
            rows = used.split(CONDENSE_BATCH)
            parts = []
            with progress(len(rows), f"condense {name}", "batch", quiet=not is_main()) as bar:
                for at in rows:
                    mask = read_rows(table["mask"], at)
                    tokens = Tokens(read_rows(table["tokens"], at), mask, read_rows(table["pooled"], at), mask.any(1))
                    small = condense(name, tokens.map(lambda t: t.to(device)).float())
                    if small is None or size + len(used) * small[0].nbytes > MAX_CONDENSED:
                        return self
                    parts.append(small.cpu())
                    bar.update()
            size += sum(part.nbytes for part in parts)
            whole = torch.cat(parts)
            ones = torch.ones(len(whole), 1, dtype=torch.bool)
            result.tables[name] = {"tokens": whole[:, None], "mask": ones, "pooled": whole[:, :0]}
        return result


def _select(table: Tensor, rows: Tensor, length: int | None = None) -> Tensor:
    return table[rows]


class FeatureStore:
    """An open feature store: {name: StoredSplit} in `splits`, {modality: FeatureSpec} in `specs`, `manifest` and `key`.

    No code in its files is executed. Raises UserError for a folder that is not a store or is damaged.
    """

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
            self.specs = {str(m): FeatureSpec(**{k: int(v) for k, v in s.items()}) for m, s in self._entries("modalities")}
            count, found = int(self.manifest.get("parts", 0)), len(list(folder.glob("parts/[0-9]*")))
            if count != found:
                raise UserError(f"{folder} has {found} of {count} parts; the store is damaged, make it again.")
            parts = [folder / part_name(i) for i in range(count)]
            self.splits = {
                name: StoredSplit(folder / name, self.specs, info, parts) for name, info in self._entries("splits")
            }
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

    def _entries(self, key: str) -> list[tuple[str, Any]]:
        """The (name, value) entries under a key of the manifest. Names are folder names and must stay inside the store."""
        for name in self.manifest[key]:
            if not str(name).isidentifier():
                raise ValueError(f"{name!r} is not a valid name in {key}")
        return list(self.manifest[key].items())

    def only(self, names: Sequence[str]) -> "FeatureStore":
        """Restrict the store to these modalities, in this order, and return it. Raises UserError for an unknown modality."""
        unknown = [name for name in names if name not in self.specs]
        if unknown:
            raise UserError(f"{self.folder} has no modality {unknown[0]!r}; choose from {', '.join(self.specs)}.")
        self.specs = {name: self.specs[name] for name in names}
        for split in self.splits.values():
            split.tables = {name: split.tables[name] for name in names if name in split.tables}
            split.content_keys = {name: keys for name, keys in split.content_keys.items() if name in names}
            split.augmented = tuple(name for name in split.augmented if name in names)
        return self

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any] | Arrays, out: Path, **options: Any) -> "FeatureStore":
        """Write arrays of two or more modalities, {name: (N, T, W) or (N, W)}, to the folder `out` and open it as a store.

        options: labels, owners, pooled, mask, present, views, views_pooled, captions, split, groups, names and seed of
        `tvl_align.features.arrays.check_arrays`. If `out` is a store of the same arrays, it is only opened. Raises UserError
        for invalid arrays and if `out` has other content.
        """
        checked = arrays if isinstance(arrays, Arrays) else check_arrays(arrays, **options)
        key = arrays_key(checked)
        if (out / "manifest.json").is_file():
            store = cls(out)
            if store.key != key:
                raise UserError(f"{out} already contains another store ({store.key}); give another folder.")
            return store
        with maps_needed(out):
            write_arrays(checked, out, key)
        return cls(out)

    @classmethod
    @contextmanager
    def writer(
        cls,
        out: Path,
        specs: Mapping[str, FeatureSpec] | None = None,
        *,
        owners: Mapping[str, Sequence[str]] | None = None,
        seed: int = 0,
        ingredients: Mapping[str, Any] | None = None,
    ) -> Iterator[FeatureWriter]:
        """Write a store to the folder `out` in chunks of rows, with one chunk in memory:

            with FeatureStore.writer(Path("store")) as writer:
                writer.add({"vision": tokens, "audio": vectors}, split="train", names=names)  # for every chunk

        The store is that of `from_arrays` for all rows together. It exists once the block has ended without an error; after
        an error `out` is empty. The chunks are in `out` until then, in single precision: twice the space of the store, in
        addition to it. specs: see FeatureWriter. owners, seed: see `check_arrays`. ingredients: what makes the features, see
        `tvl_align.features.stream`; a run on this store can then embed new inputs. Raises UserError for invalid chunks (see
        `FeatureWriter.add`), and if `out` has other content.
        """
        with unfinished(out, "chunks") as folder:
            writer = FeatureWriter(folder, specs)
            yield writer
            cls.from_arrays(replace(writer.arrays(owners, seed), ingredients=ingredients or {}), out)

    @classmethod
    def from_file(cls, file: Path, out: Path, seed: int = 0) -> "FeatureStore":
        """Write the arrays of a file to the folder `out`, in chunks, and open it as a store.

        file: .npz, .h5 or .hdf5 (package h5py), or a .zarr folder (package zarr), with the names of arrays that
        `tvl_align.features.arrays` lists. An .npz file is read into memory, the others are read in chunks. seed: of the
        default split. Raises UserError for invalid files and arrays, and if `out` has other content.
        """
        with open_arrays(file) as given:
            with cls.writer(out, owners=given.pop("owners"), seed=seed) as writer:
                for chunk in chunks_of(given, file):
                    writer.add(**chunk)
        return cls(out)
