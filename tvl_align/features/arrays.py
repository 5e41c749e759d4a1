"""Write a feature store from arrays: features of any encoders, sensors and modalities.

An .npz file has these arrays for N rows and two or more modalities of any name:

    <modality>            (N, T, W) or (N, W) float: token sequences, or one vector per row
    <modality>.pooled     (N, E) float, optional: pooled features of Stage-1 retrieval; default: the mean of the tokens
    <modality>.mask       (N, T) bool, optional: True = a real token, False = padding
    <modality>.present    (N,) bool, optional: True = the row has the modality
    label.<name>          (N,) integers or strings, optional: a factor to probe
    owners.<name>         names of the modalities that carry this factor, optional: required to report retention and leakage
    split                 (N,) of "train", "val", "test", optional; default: a random split of the groups, 80%, 10%, 10%
    groups                (N,) strings, optional: rows of a group are never split apart; default: every row is a group
    names                 (N,) strings, optional: unique names of the rows
"""

import csv
import hashlib
import json
import random
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import nn

from tvl_align.contract import FeatureSpec
from tvl_align.features.tables import FORMAT, empty_table, write_rows
from tvl_align.system.console import UserError
from tvl_align.system.provenance import provenance

SPLITS = ("train", "val", "test")
SPLIT_FRACTIONS = (0.8, 0.1, 0.1)
MAX_UNPACKED_BYTES, MAX_COMPRESSION_RATIO = 2**26, 200  # a file above both is refused as a zip bomb
RESERVED_NAMES = ("index", "caption_keys")  # names inside a store


@dataclass(frozen=True)
class ModalityArrays:
    """One modality: tokens (N, T, W) float32, mask (N, T) bool, pooled (N, E) float32 of unit norm, present (N,) bool."""

    tokens: np.ndarray
    mask: np.ndarray
    pooled: np.ndarray
    present: np.ndarray


@dataclass(frozen=True)
class Arrays:
    """Checked features of N rows.

    modalities: {modality: its arrays}. split: (N,) of "train", "val", "test". names: unique names of the rows. labels:
    {factor: (N,) str}. owners: {factor: modalities that carry it}.
    """

    modalities: dict[str, ModalityArrays]
    split: np.ndarray
    names: list[str]
    labels: dict[str, np.ndarray] = field(default_factory=dict)
    owners: dict[str, tuple[str, ...]] = field(default_factory=dict)


def read_npz(path: Path, seed: int = 0) -> Arrays:
    """Read and check the arrays of an .npz file; the module's docstring lists them. `seed` determines the default split.

    Raises UserError for a file that is not an .npz file of plain arrays, and for invalid arrays.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked, packed = (sum(getattr(part, k) for part in archive.infolist()) for k in ("file_size", "compress_size"))
        if unpacked > MAX_UNPACKED_BYTES and unpacked > MAX_COMPRESSION_RATIO * packed:
            raise ValueError(f"it unpacks to {unpacked} bytes, more than {MAX_COMPRESSION_RATIO} times its size")
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            content = {name: file[name] for name in file.files}
    except (OSError, ValueError, AttributeError, TypeError, zipfile.BadZipFile, EOFError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} cannot be read as an .npz file of plain arrays ({reason}); write it with numpy.savez."
        ) from error
    dotted: dict[str, dict[str, Any]] = {}  # {"mask": {modality: array}, "label": {factor: array}, ...}
    for key, value in content.items():
        if "." in key:
            first, _, second = key.partition(".")
            kind, name = (first, second) if first in ("label", "owners") else (second, first)
            dotted.setdefault(kind, {})[name] = value
    unknown = sorted(dotted.keys() - {"label", "owners", "pooled", "mask", "present"})
    if unknown:
        raise UserError(f"{path} has arrays with the unknown suffix .{unknown[0]}; use .pooled, .mask or .present.")
    plain = {k: v for k, v in content.items() if "." not in k}
    options = {k: plain.pop(k) for k in ("split", "groups", "names") if k in plain}
    owners = {k: [str(m) for m in np.atleast_1d(v)] for k, v in dotted.get("owners", {}).items()}
    return check_arrays(
        plain,
        labels=dotted.get("label"),
        owners=owners,
        pooled=dotted.get("pooled"),
        mask=dotted.get("mask"),
        present=dotted.get("present"),
        seed=seed,
        **options,
    )


def check_arrays(
    arrays: Mapping[str, Any],
    *,
    labels: Mapping[str, Any] | None = None,
    owners: Mapping[str, Sequence[str]] | None = None,
    pooled: Mapping[str, Any] | None = None,
    mask: Mapping[str, Any] | None = None,
    present: Mapping[str, Any] | None = None,
    split: Any = None,
    groups: Any = None,
    names: Any = None,
    seed: int = 0,
) -> Arrays:
    """Check the arrays of N rows and fill in defaults. The module's docstring describes the arguments.

    labels, owners, pooled, mask and present are dicts by factor or modality name. Raises UserError for fewer than two
    modalities, different numbers of rows, wrong shapes, and NaN or inf in a present row.
    """
    if len(arrays) < 2:
        raise UserError(
            f"registers align two or more modalities, got {', '.join(arrays) or 'none'}; give arrays of at least two."
        )
    _check_names(list(arrays))
    for what, by_modality in (("pooled", pooled), ("mask", mask), ("present", present)):
        for name in by_modality or {}:
            if name not in arrays:
                raise UserError(f"{name}.{what} belongs to no modality; the modalities are {', '.join(arrays)}.")
    count = len(np.asarray(next(iter(arrays.values()))))
    modalities = {
        name: _check_modality(name, x, (mask or {}).get(name), (pooled or {}).get(name), (present or {}).get(name), count)
        for name, x in arrays.items()
    }
    factors = {name: _column(f"label.{name}", x, count).astype(str) for name, x in (labels or {}).items()}
    for name, carriers in (owners or {}).items():
        unknown = [m for m in carriers if m not in arrays]
        if unknown:
            raise UserError(f"owners.{name} has {unknown[0]}, which is not a modality; choose from {', '.join(arrays)}.")
        if name not in factors:
            raise UserError(f"owners.{name} belongs to no label; add label.{name} or remove it.")
    ids = [f"row{i}" for i in range(count)] if names is None else _column("names", names, count).astype(str).tolist()
    if len(set(ids)) < count:
        raise UserError("names must be unique, since labels are matched by name.")
    splits = _split(split, groups, count, seed)
    return Arrays(modalities, splits, ids, factors, {k: tuple(v) for k, v in (owners or {}).items()})


def _check_names(names: Sequence[str]) -> None:
    """Names of modalities become names of modules and of tables, and pairs are named by joining two with an underscore."""
    for name in names:
        if not name.isidentifier():
            raise UserError(f"modality {name!r} is not a valid name; use letters, digits and underscores.")
        if name in RESERVED_NAMES or hasattr(nn.ModuleDict, name) or hasattr(nn.ModuleDict(), name):
            raise UserError(f"modality {name!r} has a reserved name; give it another name.")
    pairs: dict[str, tuple[str, str]] = {}
    for pair in combinations(sorted(names), 2):
        other = pairs.setdefault("_".join(pair), pair)
        if other != pair:
            raise UserError(f"the pairs {other} and {pair} would both be named {'_'.join(pair)}; rename a modality.")


def _check_modality(name: str, x: Any, mask: Any, pooled: Any, present: Any, count: int) -> ModalityArrays:
    tokens = np.asarray(x)
    tokens = tokens[:, None] if tokens.ndim == 2 else tokens
    if tokens.ndim != 3 or not np.issubdtype(tokens.dtype, np.number) or np.iscomplexobj(tokens) or 0 in tokens.shape:
        raise UserError(
            f"{name} must be numbers of shape (rows, tokens, width) or (rows, width), not {np.shape(x)} {tokens.dtype}."
        )
    if len(tokens) != count:
        raise UserError(f"{name} has {len(tokens)} rows and the first modality {count}; all arrays need the same rows.")
    has = np.ones(count, bool) if present is None else _column(f"{name}.present", present, count).astype(bool)
    real = np.ones(tokens.shape[:2], bool) if mask is None else np.asarray(mask).astype(bool)
    if real.shape != tokens.shape[:2]:
        raise UserError(f"{name}.mask has shape {real.shape}; it must be {tokens.shape[:2]}, as the tokens.")
    has = has & real.any(1)
    real = real & has[:, None]
    tokens = np.where(real[..., None], tokens, 0).astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(tokens).all((1, 2)))
    if len(bad):
        raise UserError(
            f"{name} has NaN or inf in row {bad[0]} ({len(bad)} rows in total); fix them or mark them in {name}.present."
        )
    if np.abs(tokens).max(initial=0) > 60_000:
        raise UserError(
            f"{name} has values up to {np.abs(tokens).max():.3g}, beyond the range of half precision; scale it down."
        )
    if pooled is None:
        vectors = tokens.sum(1) / np.maximum(real.sum(1, keepdims=True), 1)
    else:
        vectors = np.where(has[:, None], np.asarray(pooled, np.float32), 0) if np.ndim(pooled) == 2 else np.zeros(0)
        if len(vectors) != count or not np.isfinite(vectors).all():
            raise UserError(f"{name}.pooled must be finite numbers of shape ({count}, width), not {np.shape(pooled)}.")
    normalised = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return ModalityArrays(tokens, real, normalised.astype(np.float32), has)


def _column(name: str, x: Any, count: int) -> np.ndarray:
    column = np.asarray(x)
    if column.shape != (count,):
        raise UserError(f"{name} must have one entry per row, shape ({count},), not {column.shape}.")
    return column


def _split(split: Any, groups: Any, count: int, seed: int) -> np.ndarray:
    if split is not None:
        column = _column("split", split, count).astype(str)
        unknown = sorted(set(column.tolist()) - set(SPLITS))
        if unknown:
            raise UserError(f"split has {unknown[0]!r}; use train, val and test.")
        return column
    group = np.arange(count).astype(str) if groups is None else _column("groups", groups, count).astype(str)
    distinct = sorted(set(group.tolist()))
    random.Random(seed).shuffle(distinct)
    edges = np.cumsum(SPLIT_FRACTIONS[:2]) * len(distinct)
    split_of = {name: SPLITS[int(np.searchsorted(edges, i, side="right"))] for i, name in enumerate(distinct)}
    return np.array([split_of[name] for name in group.tolist()])


def arrays_key(arrays: Arrays) -> str:
    """The key of the store of these arrays: the first 16 hex digits of a SHA-256 of their content."""
    digest = hashlib.sha256(repr((FORMAT, arrays.names, arrays.split.tolist(), arrays.owners)).encode())
    for name, modality in arrays.modalities.items():
        digest.update(name.encode())
        for x in vars(modality).values():
            digest.update(repr(x.shape).encode() + np.ascontiguousarray(x).tobytes())
    for name, column in arrays.labels.items():
        digest.update(repr((name, column.tolist())).encode())
    return digest.hexdigest()[:16]


def write_arrays(arrays: Arrays, out: Path, key: str) -> None:
    """Write checked arrays as a feature store to `out`, a new or empty folder. Raises UserError for any other folder."""
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; give a new folder for the store.")
    out.mkdir(parents=True, exist_ok=True)
    specs = {
        name: FeatureSpec(modality.tokens.shape[2], modality.tokens.shape[1], modality.pooled.shape[1])
        for name, modality in arrays.modalities.items()
    }
    splits: dict[str, Any] = {}
    for split in SPLITS:
        rows = np.flatnonzero(arrays.split == split)
        if len(rows):
            entries = write_rows(out / split, [arrays.names[i] for i in rows], ["arrays"] * len(rows))
            splits[split] = {"views": 0, **entries}
            _write_split(out / split, arrays.modalities, rows, specs)
    if arrays.labels:
        _write_labels(out, arrays)
    manifest = {"format": FORMAT, "key": key, "root": str(out.resolve()), "splits": splits, "ingredients": {}}
    manifest |= {"modalities": {m: asdict(spec) for m, spec in specs.items()}, "made_by": provenance()}
    (out / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def _write_split(
    folder: Path, modalities: Mapping[str, ModalityArrays], rows: np.ndarray, specs: Mapping[str, FeatureSpec]
) -> None:
    index = {}
    for name, modality in modalities.items():
        present_rows = rows[modality.present[rows]]
        table_rows = torch.full((len(rows), 1), -1, dtype=torch.int64)
        table_rows[torch.from_numpy(modality.present[rows])] = torch.arange(len(present_rows))[:, None]
        index[name] = table_rows
        if len(present_rows):
            table = empty_table(len(present_rows), specs[name]).memmap_like(folder / name)
            table["tokens"].copy_(torch.from_numpy(modality.tokens[present_rows]).half())
            table["mask"].copy_(torch.from_numpy(modality.mask[present_rows]))
            table["pooled"].copy_(torch.from_numpy(modality.pooled[present_rows]))
    keys = torch.arange(len(rows))[:, None, None].expand(-1, 1, 2).contiguous()  # rows have no captions: all keys differ
    TensorDict({**index, "caption_keys": keys}, batch_size=[len(rows)]).memmap(folder / "index")


def _write_labels(folder: Path, arrays: Arrays) -> None:
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["row", *arrays.labels])
        writer.writerows(zip(arrays.names, *(column.tolist() for column in arrays.labels.values()), strict=True))
    owners = {name: {"ownership": list(arrays.owners[name])} for name in arrays.labels if name in arrays.owners}
    (folder / "labels.json").write_text(json.dumps({"factors": owners}), encoding="utf-8")
