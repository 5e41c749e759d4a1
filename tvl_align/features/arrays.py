"""Features from other encoders, sensors and modalities: arrays -> checked arrays, ready for a store.

An .npz file holds, for N rows and any two or more modalities of any name:

    <modality>            (N, T, W) or (N, W) float: tokens, or one vector a row
    <modality>.pooled     (N, E) float, optional: what Stage 1 would retrieve by; default: the mean of the tokens
    <modality>.mask       (N, T) bool, optional: which tokens are real
    <modality>.present    (N,) bool, optional: which rows have the modality
    label.<name>          (N,) whole numbers or strings, optional: a factor to probe
    owners.<name>         names of the modalities that carry that factor, optional: without it no retention or leak
    split                 (N,) of "train", "val", "test", optional; default: 80, 10, 10% drawn by groups
    groups                (N,) strings, optional: rows of a group are never split apart
    names                 (N,) strings, optional
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
SHARES = (0.8, 0.1, 0.1)
MOST_UNPACKED, MOST_RATIO = 2**26, 200  # above both a compressed file is taken for a bomb
TAKEN = ("index", "caption_keys")  # beside the tables of a store


@dataclass(frozen=True)
class ModalityArrays:
    """One modality: tokens (N, T, W) float32, mask (N, T) bool, pooled (N, E) float32 of unit norm, present (N,) bool."""

    tokens: np.ndarray
    mask: np.ndarray
    pooled: np.ndarray
    present: np.ndarray


@dataclass(frozen=True)
class Arrays:
    """Checked features of N rows: views by modality, split (N,) of train, val, test, names, labels {factor: (N,) str}."""

    views: dict[str, ModalityArrays]
    split: np.ndarray
    names: list[str]
    labels: dict[str, np.ndarray] = field(default_factory=dict)
    owners: dict[str, tuple[str, ...]] = field(default_factory=dict)


def read_npz(path: Path, seed: int = 0) -> Arrays:
    """The arrays of an .npz file. Raises UserError for anything that is not as the module's docstring says."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked, packed = (sum(getattr(part, k) for part in archive.infolist()) for k in ("file_size", "compress_size"))
        if unpacked > MOST_UNPACKED and unpacked > MOST_RATIO * packed:
            raise ValueError(f"it would unpack to {unpacked} bytes, more than {MOST_RATIO} times what it is")
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            given = {name: file[name] for name in file.files}
    except (OSError, ValueError, AttributeError, TypeError, zipfile.BadZipFile, EOFError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} cannot be read as an .npz file of plain arrays ({reason}); write it with numpy.savez."
        ) from error
    extras = {k: v for k, v in given.items() if "." in k}
    parts: dict[str, dict[str, Any]] = {}
    for key, value in extras.items():
        first, _, second = key.partition(".")
        group, name = (first, second) if first in ("label", "owners") else (second, first)
        parts.setdefault(group, {})[name] = value
    unknown = sorted(parts.keys() - {"label", "owners", "pooled", "mask", "present"})
    if unknown:
        raise UserError(f"{path} has arrays .{unknown[0]}, which mean nothing here; use .pooled, .mask or .present.")
    plain = {k: v for k, v in given.items() if "." not in k}
    options = {k: plain.pop(k) for k in ("split", "groups", "names") if k in plain}
    owners = {k: [str(m) for m in np.atleast_1d(v)] for k, v in parts.get("owners", {}).items()}
    return check_arrays(
        plain,
        labels=parts.get("label"),
        owners=owners,
        pooled=parts.get("pooled"),
        mask=parts.get("mask"),
        present=parts.get("present"),
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
    """Check and complete arrays of N rows; the arguments are those of the module's docstring.

    Raises UserError for fewer than two modalities, unequal numbers of rows, wrong shapes, NaN or inf in a present row.
    """
    if len(arrays) < 2:
        raise UserError(
            f"registers align modalities: give arrays of at least two (there is: {', '.join(arrays) or 'none'})."
        )
    _check_names(list(arrays))
    for what, group in (("pooled", pooled), ("mask", mask), ("present", present)):
        for name in group or {}:
            if name not in arrays:
                raise UserError(f"{name}.{what} belongs to no modality; there are {', '.join(arrays)}.")
    count = len(np.asarray(next(iter(arrays.values()))))
    views = {
        name: _view(name, x, (mask or {}).get(name), (pooled or {}).get(name), (present or {}).get(name), count)
        for name, x in arrays.items()
    }
    found = {name: _column(f"label.{name}", x, count).astype(str) for name, x in (labels or {}).items()}
    for name, who in (owners or {}).items():
        strange = [m for m in who if m not in arrays]
        if name not in found or strange:
            what = f"names {strange[0]}, which is no modality" if strange else "belongs to no label"
            raise UserError(f"owners.{name} {what}.")
    ids = [f"row{i}" for i in range(count)] if names is None else _column("names", names, count).astype(str).tolist()
    if len(set(ids)) < count:
        raise UserError("names must differ from row to row, since labels are found by them.")
    return Arrays(views, _split(split, groups, count, seed), ids, found, {k: tuple(v) for k, v in (owners or {}).items()})


def _check_names(names: Sequence[str]) -> None:
    """Names become keys of modules, of tables and, joined by an underscore, of pairs."""
    for name in names:
        if not name.isidentifier():
            raise UserError(f"modality {name!r} needs a name of letters, digits and underscores.")
        if name in TAKEN or hasattr(nn.ModuleDict, name) or hasattr(nn.ModuleDict(), name):
            raise UserError(f"modality {name!r} cannot be called that, the word is taken; give it another name.")
    pairs: dict[str, tuple[str, str]] = {}
    for pair in combinations(sorted(names), 2):
        other = pairs.setdefault("_".join(pair), pair)
        if other != pair:
            raise UserError(f"the pairs {other} and {pair} would both be called {'_'.join(pair)}; rename a modality.")


def _view(name: str, x: Any, mask: Any, pooled: Any, present: Any, count: int) -> ModalityArrays:
    tokens = np.asarray(x)
    tokens = tokens[:, None] if tokens.ndim == 2 else tokens
    if tokens.ndim != 3 or not np.issubdtype(tokens.dtype, np.number) or np.iscomplexobj(tokens) or 0 in tokens.shape:
        raise UserError(
            f"{name} must be numbers of shape (rows, tokens, width) or (rows, width), not {np.shape(x)} {tokens.dtype}."
        )
    if len(tokens) != count:
        raise UserError(f"{name} has {len(tokens)} rows and the first modality {count}; all arrays need the same rows.")
    there = np.ones(count, bool) if present is None else _column(f"{name}.present", present, count).astype(bool)
    real = np.ones(tokens.shape[:2], bool) if mask is None else np.asarray(mask).astype(bool)
    if real.shape != tokens.shape[:2]:
        raise UserError(f"{name}.mask has shape {real.shape}, but the tokens are {tokens.shape[:2]}.")
    there = there & real.any(1)
    real = real & there[:, None]
    tokens = np.where(real[..., None], tokens, 0).astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(tokens).all((1, 2)))
    if len(bad):
        raise UserError(
            f"{name} has NaN or inf in row {bad[0]} ({len(bad)} rows in all); mend them or mark them in {name}.present."
        )
    if np.abs(tokens).max(initial=0) > 60_000:
        raise UserError(
            f"{name} has values up to {np.abs(tokens).max():.3g}, which half precision cannot hold; scale it down."
        )
    if pooled is None:
        mean = tokens.sum(1) / np.maximum(real.sum(1, keepdims=True), 1)
    else:
        mean = np.where(there[:, None], np.asarray(pooled, np.float32), 0) if np.ndim(pooled) == 2 else np.zeros(0)
        if len(mean) != count or not np.isfinite(mean).all():
            raise UserError(f"{name}.pooled must be finite numbers of shape ({count}, width), not {np.shape(pooled)}.")
    unit = mean / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12)
    return ModalityArrays(tokens, real, unit.astype(np.float32), there)


def _column(name: str, x: Any, count: int) -> np.ndarray:
    column = np.asarray(x)
    if column.shape != (count,):
        raise UserError(f"{name} must have one entry for each of the {count} rows, not shape {column.shape}.")
    return column


def _split(split: Any, groups: Any, count: int, seed: int) -> np.ndarray:
    if split is not None:
        column = _column("split", split, count).astype(str)
        strange = sorted(set(column.tolist()) - set(SPLITS))
        if strange:
            raise UserError(f"split has {strange[0]!r}; it takes train, val and test.")
        return column
    owner = np.arange(count).astype(str) if groups is None else _column("groups", groups, count).astype(str)
    distinct = sorted(set(owner.tolist()))
    random.Random(seed).shuffle(distinct)
    edges = np.cumsum(SHARES[:2]) * len(distinct)
    place = {name: SPLITS[int(np.searchsorted(edges, i, side="right"))] for i, name in enumerate(distinct)}
    return np.array([place[name] for name in owner.tolist()])


def arrays_key(arrays: Arrays) -> str:
    digest = hashlib.sha256(repr((FORMAT, arrays.names, arrays.split.tolist(), arrays.owners)).encode())
    for name, view in arrays.views.items():
        digest.update(name.encode())
        for x in vars(view).values():
            digest.update(repr(x.shape).encode() + np.ascontiguousarray(x).tobytes())
    for name, column in arrays.labels.items():
        digest.update(repr((name, column.tolist())).encode())
    return digest.hexdigest()[:16]


def write_arrays(arrays: Arrays, out: Path, key: str) -> None:
    """Checked arrays -> the store `out`, a new or empty folder. Raises UserError for any other folder."""
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; give a new folder for the store.")
    out.mkdir(parents=True, exist_ok=True)
    shapes = {
        name: FeatureSpec(view.tokens.shape[2], view.tokens.shape[1], view.pooled.shape[1])
        for name, view in arrays.views.items()
    }
    splits: dict[str, Any] = {}
    for split in SPLITS:
        rows = np.flatnonzero(arrays.split == split)
        if len(rows):
            written = write_rows(out / split, [arrays.names[i] for i in rows], ["arrays"] * len(rows))
            splits[split] = {"views": 0, **written}
            _write_split(out / split, arrays.views, rows, shapes)
    if arrays.labels:
        _write_labels(out, arrays)
    manifest = {"format": FORMAT, "key": key, "root": str(out.resolve()), "splits": splits, "ingredients": {}}
    manifest |= {"modalities": {m: asdict(spec) for m, spec in shapes.items()}, "made_by": provenance()}
    (out / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def _write_split(
    folder: Path, views: Mapping[str, ModalityArrays], rows: np.ndarray, shapes: Mapping[str, FeatureSpec]
) -> None:
    index = {}
    for name, view in views.items():
        here = rows[view.present[rows]]
        place = torch.full((len(rows), 1), -1, dtype=torch.int64)
        place[torch.from_numpy(view.present[rows])] = torch.arange(len(here))[:, None]
        index[name] = place
        if len(here):
            table = empty_table(len(here), shapes[name]).memmap_like(folder / name)
            table["tokens"].copy_(torch.from_numpy(view.tokens[here]).half())
            table["mask"].copy_(torch.from_numpy(view.mask[here]))
            table["pooled"].copy_(torch.from_numpy(view.pooled[here]))
    keys = torch.arange(len(rows))[:, None, None].expand(-1, 1, 2).contiguous()  # no row says what another says
    TensorDict({**index, "caption_keys": keys}, batch_size=[len(rows)]).memmap(folder / "index")


def _write_labels(folder: Path, arrays: Arrays) -> None:
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["row", *arrays.labels])
        writer.writerows(zip(arrays.names, *(column.tolist() for column in arrays.labels.values()), strict=True))
    owners = {name: {"ownership": list(arrays.owners[name])} for name in arrays.labels if name in arrays.owners}
    (folder / "labels.json").write_text(json.dumps({"factors": owners}), encoding="utf-8")
