"""The files of a feature store: tables of numbers, opened as memory maps of a stated size and shape."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import MemoryMappedTensor, TensorDict
from torch import Tensor

from tvl_align.contract import FeatureSpec
from tvl_align.system.console import UserError
from tvl_align.system.runtime import release_pages

FORMAT = 2
READ_AT_ONCE = 128  # rows


class RowNames(Sequence[str]):
    """The names of the rows of a split, read from a memory map one at a time."""

    def __init__(self, folder: Path, rows: int) -> None:
        self.ends = open_mapped(folder / "name_ends.memmap", torch.int64, (rows,))
        self.text = open_mapped(folder / "names.memmap", torch.uint8, (int(self.ends[-1]) if rows else 0,))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [self[i] for i in range(len(self))[at]]
        at = range(len(self))[at]
        start, end = int(self.ends[at - 1]) if at else 0, int(self.ends[at])
        return bytes(self.text[start:end].numpy()).decode(errors="replace")


def write_rows(folder: Path, names: Sequence[str], datasets: Sequence[str]) -> dict[str, Any]:
    """The rows of a split -> `folder`/rows, and what the manifest says of them."""
    encoded = [name.encode(errors="backslashreplace") for name in names]
    known = sorted(set(datasets))
    columns = {
        "names": torch.from_numpy(np.frombuffer(b"".join(encoded), dtype=np.uint8).copy()),
        "name_ends": torch.tensor([len(name) for name in encoded]).cumsum(0),
        "dataset": torch.tensor([known.index(name) for name in datasets]),
    }
    TensorDict(columns).memmap(folder / "rows")
    return {"rows": len(names), "datasets": known}


def read_rows(mapped: Tensor, at: Tensor, length: int | None = None) -> Tensor:
    """mapped[at, :length], read in pieces. Pages stay in the system's cache, but not in this process, whose memory would
    otherwise grow with the store: a row that is read maps the 64 KB around it."""
    read = torch.empty(len(at), *mapped[0, :length].shape, dtype=mapped.dtype)
    for piece, out in zip(at.split(READ_AT_ONCE), read.split(READ_AT_ONCE), strict=True):
        torch.index_select(mapped[:, :length] if mapped.ndim > 2 else mapped, 0, piece, out=out)
        release_pages(mapped)
    return read


def open_table(folder: Path, spec: FeatureSpec) -> dict[str, Tensor]:
    file = folder / "mask.memmap"
    rows = file.stat().st_size // max(1, spec.tokens) if file.is_file() else 0
    return {
        "tokens": open_mapped(folder / "tokens.memmap", torch.float16, (rows, spec.tokens, spec.width)),
        "mask": open_mapped(file, torch.bool, (rows, spec.tokens)),
        "pooled": open_mapped(folder / "pooled.memmap", torch.float32, (rows, spec.pooled_width)),
    }


def open_mapped(file: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A file of plain numbers as a tensor, memory-mapped. Nothing but its size decides how it is read."""
    size, needed = file.stat().st_size if file.is_file() else -1, dtype.itemsize * math.prod(shape)
    if size != needed or not needed:
        if not needed:
            return torch.empty(shape, dtype=dtype)
        found = "is missing" if size < 0 else f"holds {size} bytes"
        raise UserError(f"{file} {found}, and the manifest says {needed}; the store is damaged, make it again.")
    return MemoryMappedTensor.from_filename(file, dtype, torch.Size(shape))


def empty_table(rows: int, spec: FeatureSpec) -> TensorDict:
    return TensorDict(
        {
            "tokens": torch.zeros((), dtype=torch.float16).expand(rows, spec.tokens, spec.width),
            "mask": torch.zeros((), dtype=torch.bool).expand(rows, spec.tokens),
            "pooled": torch.zeros((), dtype=torch.float32).expand(rows, spec.pooled_width),
        },
        batch_size=[rows],
    )
