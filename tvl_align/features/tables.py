"""The files of a feature store: memory-mapped tensors of a known dtype and shape.

A store is a folder `<feature_dir>/<key>`. The key hashes the content of everything that determines the features
(tvl_align.features.identity). Other content gets another folder.

    manifest.json         key, settings, shapes, skipped rows with their reasons; written last, so it marks a complete store
    <split>/rows/         dataset, group (N,) int64; names (bytes,) uint8, the concatenated names of the rows; name_ends (N,)
                          int64, the end of each name; content_keys {modality: (N,) int64}, only of modalities in which rows
                          repeat the content of others (the manifest counts them as `repeated`)
    <split>/index/        {modality: (N, V+1) int64}, the table row of every view, -1 = absent; caption_keys (N, V+1, 2)
                          int64, the ids of caption and sentence
    <split>/<modality>/   the table, R rows: tokens (R, T, W) fp16, mask (R, T) bool, pooled (R, E) fp32

The text table has every distinct sentence once. Only training rows have augmented views (V > 0).

A store in parts (`parts` in the manifest) has `parts/<number>/<modality>/` in place of `<split>/<modality>/`: the tables of
the parts, one after the other, are the table of every split.
"""

import hashlib
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import MemoryMappedTensor, TensorDict
from torch import Tensor

from tvl_align.contract import FeatureSpec
from tvl_align.system.console import UserError
from tvl_align.system.files import lock_folder, warn_once
from tvl_align.system.runtime import release_pages

FORMAT = 3
ROWS_PER_READ = 128
UNFINISHED = ".unfinished-"  # begins the names of folders in a store that is being written
NO_MAPS = "unable to mmap"  # PyTorch's text where a file system has no memory maps, as some FUSE ones


class RowNames(Sequence[str]):
    """The names of the rows of a split, decoded from a memory map on access."""

    def __init__(self, folder: Path, rows: int) -> None:
        self.ends = open_memmap(folder / "name_ends.memmap", torch.int64, (rows,))
        self.text = open_memmap(folder / "names.memmap", torch.uint8, (int(self.ends[-1]) if rows else 0,))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]
        start, end = int(self.ends[index - 1]) if index else 0, int(self.ends[index])
        return bytes(self.text[start:end].numpy()).decode(errors="replace")


def write_rows(
    folder: Path,
    names: Sequence[str],
    datasets: Sequence[str],
    groups: Sequence[str] | None = None,
    content_keys: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Write names, data sets, groups (default: every row is one) and content keys of a split's rows to `folder`/rows.

    Returns the split's entries for the manifest.
    """
    content = {m: keys for m, keys in (content_keys or {}).items() if len(keys.unique()) < len(keys)}
    index = {group: i for i, group in enumerate(dict.fromkeys(names if groups is None else groups))}
    encoded = [name.encode(errors="backslashreplace") for name in names]
    distinct = sorted(set(datasets))
    columns = {
        "names": torch.from_numpy(np.frombuffer(b"".join(encoded), dtype=np.uint8).copy()),
        "name_ends": torch.tensor([len(name) for name in encoded]).cumsum(0),
        "dataset": torch.tensor([distinct.index(name) for name in datasets]),
        "group": torch.tensor([index[group] for group in (names if groups is None else groups)]),
    }
    TensorDict(columns | ({"content_keys": TensorDict(content)} if content else {})).memmap(folder / "rows")
    repeated = {m: len(keys) - len(keys.unique()) for m, keys in content.items()}
    return {"rows": len(names), "datasets": distinct, "repeated": repeated}


def hash_ids(values: Iterable[bytes | str]) -> np.ndarray:
    """(N,) int64 of N values: 64 bits of a hash, so that processes that know nothing of each other give equal values equal
    numbers. Two of 10 million values share a number by chance with a probability of 3e-6."""
    encoded = (v.encode(errors="backslashreplace") if isinstance(v, str) else v for v in values)
    return np.frombuffer(b"".join(hashlib.blake2b(v, digest_size=8).digest() for v in encoded), np.int64)


class Parts:
    """(R, ...) rows of one dtype in the files of several parts, one after the other, which `read_rows` reads as one table.

    Rows are read from the files, not mapped: there may be more files than a process can map. Raises UserError for a file
    that is no whole number of rows.
    """

    def __init__(self, files: Sequence[Path], dtype: torch.dtype, *shape: int) -> None:
        self.files, self.dtype = files, dtype
        row_bytes = max(1, dtype.itemsize * math.prod(shape))
        sizes = [file.stat().st_size if file.is_file() else 0 for file in files]
        for file, size in zip(files, sizes, strict=True):
            if size % row_bytes:
                raise UserError(f"{file} has {size} bytes, not rows of {row_bytes}; the store is damaged, make it again.")
        self.starts = torch.tensor([0, *(size // row_bytes for size in sizes)]).cumsum(0)
        self.shape = (int(self.starts[-1]), *shape)

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, rows: Tensor, length: int | None = None) -> Tensor:
        """A copy of rows (B,) int64, cut to `length` along the second axis; see `read_rows`."""
        result = torch.empty(len(rows), *torch.empty(self.shape[1:], device="meta")[:length].shape, dtype=self.dtype)
        content: Any = result.flatten(1).view(torch.uint8).numpy()
        row_bytes = self.dtype.itemsize * math.prod(self.shape[1:])
        part = torch.searchsorted(self.starts, rows, right=True) - 1
        places = sorted(zip(part.tolist(), ((rows - self.starts[part]) * row_bytes).tolist(), range(len(rows)), strict=True))
        for number, of_part in groupby(places, key=itemgetter(0)):
            with self.files[number].open("rb", buffering=0) as file:
                for _, place, i in of_part:
                    if os.preadv(file.fileno(), [content[i]], place) != len(content[i]):
                        raise UserError(f"{self.files[number]} has become shorter; the store is damaged, make it again.")
        return result


def read_rows(mapped: Tensor | Parts, rows: Tensor, length: int | None = None) -> Tensor:
    """A copy of `mapped[rows, :length]`.

    The pages that were read are unmapped from this process afterwards, so that its memory does not grow with the store: a
    read maps the 64 KB around a row. They stay in the page cache of the operating system.
    """
    if isinstance(mapped, Parts):
        return mapped.read(rows, length)
    result = torch.empty(len(rows), *mapped[0, :length].shape, dtype=mapped.dtype)
    for chunk, out in zip(rows.split(ROWS_PER_READ), result.split(ROWS_PER_READ), strict=True):
        torch.index_select(mapped[:, :length] if mapped.ndim > 2 else mapped, 0, chunk, out=out)
        release_if_mapped(mapped)
    return result


def part_name(number: int) -> str:
    """The folder of a part of a store, relative to the store."""
    return f"parts/{number:06d}"


def open_table(folder: Path, spec: FeatureSpec) -> dict[str, Tensor]:
    """Open the table of a modality: tokens, mask and pooled. A missing table has no rows."""
    file = folder / "mask.memmap"
    rows = file.stat().st_size // max(1, spec.tokens) if file.is_file() else 0
    return {
        "tokens": open_memmap(folder / "tokens.memmap", torch.float16, (rows, spec.tokens, spec.width)),
        "mask": open_memmap(file, torch.bool, (rows, spec.tokens)),
        "pooled": open_memmap(folder / "pooled.memmap", torch.float32, (rows, spec.pooled_width)),
    }


def open_parts(folders: Sequence[Path], spec: FeatureSpec) -> dict[str, Parts]:
    """Open the tables of a modality in several folders as one; see `open_table`. Raises UserError if one is damaged."""
    table = {
        "tokens": Parts([folder / "tokens.memmap" for folder in folders], torch.float16, spec.tokens, spec.width),
        "mask": Parts([folder / "mask.memmap" for folder in folders], torch.bool, spec.tokens),
        "pooled": Parts([folder / "pooled.memmap" for folder in folders], torch.float32, spec.pooled_width),
    }
    for column in table.values():
        if bad := (column.starts != table["mask"].starts).nonzero().tolist():
            raise UserError(
                f"{folders[bad[0][0] - 1]} has files of other numbers of rows; the store is damaged, make it again."
            )
    return table


def open_memmap(file: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Open a raw binary file as a memory-mapped tensor. Raises UserError unless its size matches dtype and shape.

    Metadata files beside it are ignored, since tensordict could unpickle them. On a file system without memory maps the
    content is read into memory, with a warning.
    """
    size, expected = file.stat().st_size if file.is_file() else -1, dtype.itemsize * math.prod(shape)
    if size != expected or not expected:
        if not expected:
            return torch.empty(shape, dtype=dtype)
        found = "is missing" if size < 0 else f"has {size} bytes"
        raise UserError(f"{file} {found}, expected {expected} bytes; the store is damaged, make it again.")
    try:
        return MemoryMappedTensor.from_filename(file, dtype, torch.Size(shape))
    except RuntimeError as error:
        if NO_MAPS not in str(error):
            raise
        warn_once(f"{file.parents[2]} is on a file system without memory maps: features are read into memory")
        return torch.frombuffer(bytearray(file.read_bytes()), dtype=dtype).view(shape)


@contextmanager
def maps_needed(folder: Path) -> Iterator[None]:
    """Raise UserError where a table cannot be written because its file system has no memory maps."""
    try:
        yield
    except RuntimeError as error:
        if NO_MAPS not in str(error):
            raise
        raise UserError(
            f"{folder} is on a file system without memory maps, which writing a feature store needs; give --feature_dir (or "
            "--out) a folder on a local disk."
        ) from error


@contextmanager
def unfinished(out: Path, part: str) -> Iterator[Path]:
    """An empty folder inside `out` for `part` of a store that is not complete; removed when the block ends.

    Raises UserError if `out` has content that is not a store, or another process writes to it.
    """
    if (
        out.exists()
        and not (out / "manifest.json").exists()
        and any(not p.name.startswith(UNFINISHED) for p in out.iterdir())
    ):
        raise UserError(f"{out} is not empty; give a new folder for the store.")
    scratch = out / f"{UNFINISHED}{part}"
    with lock_folder(scratch, wait=False, why="writes to"):
        try:
            shutil.rmtree(scratch / "files", ignore_errors=True)  # of a process that was killed
            (scratch / "files").mkdir()
            yield scratch / "files"
        finally:
            shutil.rmtree(scratch)


def release_if_mapped(table: Tensor) -> None:
    """`release_pages` of a memory-mapped tensor; other tensors are left alone, their content would be lost."""
    if isinstance(table, MemoryMappedTensor):
        release_pages(table)


def empty_table(rows: int, spec: FeatureSpec) -> TensorDict:
    """A table of zeros that takes no memory, the template of `TensorDict.memmap_like`."""
    return TensorDict(
        {
            "tokens": torch.zeros((), dtype=torch.float16).expand(rows, spec.tokens, spec.width),
            "mask": torch.zeros((), dtype=torch.bool).expand(rows, spec.tokens),
            "pooled": torch.zeros((), dtype=torch.float32).expand(rows, spec.pooled_width),
        },
        batch_size=[rows],
    )
