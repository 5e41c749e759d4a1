"""`tvl-align features`: feature stores from your own arrays."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from tvl_align.config import parse
from tvl_align.system.console import UserError

ACTIONS = {"import": "write a feature store from arrays of two or more modalities (.npz, .h5, .zarr)"}
EXAMPLES = (
    "tvl-align features import --npz digits.npz --out store",
    "tvl-align features import --file features.h5 --out store",
    "tvl-align train --store store --register_token_dim 64 --epochs 10",
)


@dataclass(frozen=True)
class ImportConfig:
    """Write a feature store from arrays of two or more modalities; tvl_align/features/arrays.py documents their names."""

    file: Annotated[Path, tyro.conf.arg(aliases=("--npz",))]
    """.npz file, HDF5 file (.h5, .hdf5) or .zarr folder. The latter two are read in chunks of rows."""
    out: Path
    """Folder for the store; new or empty."""
    seed: int = 0
    """Seed of the random split; used if the file has no split."""


def run(argv: Sequence[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: tvl-align features ACTION [OPTIONS]\n")
        print("\n".join(f"  {action:10s} {summary}" for action, summary in ACTIONS.items()))
        print("\nOptions and defaults of an action: tvl-align features ACTION --help.")
        print("examples:\n" + "\n".join(f"  {line}" for line in EXAMPLES))
        return
    if argv[0] not in ACTIONS:
        close = difflib.get_close_matches(argv[0], ACTIONS, 1) or list(ACTIONS)
        raise UserError(f"unknown action {argv[0]!r}; did you mean tvl-align features {close[0]}?")
    config = parse(ImportConfig, argv[1:], "tvl-align features import", examples=EXAMPLES)
    from tvl_align.features.store import FeatureStore  # here: --help takes a second without torch

    store = FeatureStore.from_file(config.file, config.out, config.seed)
    rows = ", ".join(f"{len(split)} {name}" for name, split in store.splits.items())
    print(f"{', '.join(store.specs)}: {rows} rows")
    print(store.folder)
