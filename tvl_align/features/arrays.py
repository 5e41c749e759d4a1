"""Write a feature store from arrays: features of any encoders, sensors and modalities.

An .npz file has these arrays for N rows and two or more modalities of any name:

    <modality>            (N, T, W) or (N, W) float: token sequences, or one vector per row
    <modality>.pooled     (N, E) float, optional: pooled features of Stage-1 retrieval; default: the mean of the tokens
    <modality>.mask       (N, T) bool, optional: True = a real token, False = padding
    <modality>.present    (N,) bool, optional: True = the row has the modality
    <modality>.views      (N, V, T, W) or (N, V, W) float, optional: V augmented versions of the tokens, for training only
    label.<name>          (N,) integers or strings, optional: a factor to probe; floats of more than 20 distinct values are
                          numbers (NaN: unknown), everything else is a class
    owners.<name>         names of the modalities that carry this factor, optional: required to report retention and leakage
    split                 (N,) of "train", "val", "test", optional; default: a random split of the groups, 80%, 10%, 10%
    groups                (N,) strings, optional: rows of a group are never split apart; default: every row is a group
    names                 (N,) strings, optional: unique names of the rows

View v of two modalities shares its augmentation, so V is the same in all modalities that have views; a modality without
views repeats its plain tokens. Views have the mask of the row, and the normalised mean of their tokens as pooled features.
Only the views of training rows are read; those of other rows may have any values.
"""

import csv
import hashlib
import json
import random
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
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
MAX_CLASSES = 20  # float labels of more distinct values are numbers
MAX_TOKEN = 60_000  # the largest value of half precision is 65,504
ROWS_AT_ONCE = 256  # rows whose views are in memory in single precision at a time


@dataclass(frozen=True)
class ModalityArrays:
    """One modality: tokens (N, T, W) float32, mask (N, T) bool, pooled (N, E) float32 of unit norm, present (N,) bool.

    views: (N, V, T, W) of any float dtype, as given, which may be a memory map; None: no augmented views.
    """

    tokens: np.ndarray
    mask: np.ndarray
    pooled: np.ndarray
    present: np.ndarray
    views: np.ndarray | None = None

    def view_chunks(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield chunks of `rows`, (B,) int64, and the tokens of their views, (B, V, T, W) float32, padding zeroed."""
        for start in range(0, len(rows) if self.views is not None else 0, ROWS_AT_ONCE):
            chunk = rows[start : start + ROWS_AT_ONCE]
            assert self.views is not None
            yield chunk, np.where(self.mask[chunk][:, None, :, None], self.views[chunk], 0).astype(np.float32)


@dataclass(frozen=True)
class Arrays:
    """Checked features of N rows.

    modalities: {modality: its arrays}. split: (N,) of "train", "val", "test". names: unique names of the rows. labels:
    {factor: (N,) str}. owners: {factor: modalities that carry it}. numbers: the factors that are numbers, of 6 significant
    digits, "" if unknown; the others are classes. groups: (N,) str, or None: every row is a group.
    """

    modalities: dict[str, ModalityArrays]
    split: np.ndarray
    names: list[str]
    labels: dict[str, np.ndarray] = field(default_factory=dict)
    owners: dict[str, tuple[str, ...]] = field(default_factory=dict)
    numbers: tuple[str, ...] = ()
    groups: np.ndarray | None = None

    @property
    def views(self) -> int:
        """Number of augmented views of every training row."""
        return max(0 if m.views is None else m.views.shape[1] for m in self.modalities.values())

    def rows_with_views(self, modality: str) -> np.ndarray:
        """(R,) int64: the rows whose views of the modality are used, the training rows that have it."""
        return np.flatnonzero((self.split == "train") & self.modalities[modality].present)


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
    unknown = sorted(dotted.keys() - {"label", "owners", "pooled", "mask", "present", "views"})
    if unknown:
        raise UserError(f"{path} has arrays with the unknown suffix .{unknown[0]}; use .pooled, .mask, .present or .views.")
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
        views=dotted.get("views"),
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
    views: Mapping[str, Any] | None = None,
    split: Any = None,
    groups: Any = None,
    names: Any = None,
    seed: int = 0,
) -> Arrays:
    """Check the arrays of N rows and fill in defaults. The module's docstring describes the arguments.

    labels, owners, pooled, mask, present and views are dicts by factor or modality name. Views are read in chunks of rows
    and kept as given, so that they may be memory maps or in half precision. Raises UserError for fewer than two modalities,
    different numbers of rows or views, wrong shapes, and NaN or inf in a present row.
    """
    if len(arrays) < 2:
        raise UserError(
            f"registers align two or more modalities, got {', '.join(arrays) or 'none'}; give arrays of at least two."
        )
    _check_names(list(arrays))
    for what, by_modality in (("pooled", pooled), ("mask", mask), ("present", present), ("views", views)):
        for name in by_modality or {}:
            if name not in arrays:
                raise UserError(f"{name}.{what} belongs to no modality; the modalities are {', '.join(arrays)}.")
    count = len(np.asarray(next(iter(arrays.values()))))
    modalities = {
        name: _check_modality(name, x, (mask or {}).get(name), (pooled or {}).get(name), (present or {}).get(name), count)
        for name, x in arrays.items()
    }
    factors = {name: _column(f"label.{name}", x, count) for name, x in (labels or {}).items()}
    numbers = tuple(name for name, x in factors.items() if x.dtype.kind == "f" and len(np.unique(x)) > MAX_CLASSES)
    factors = {name: _numbers(name, x) if name in numbers else x.astype(str) for name, x in factors.items()}
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
    group = None if groups is None else _column("groups", groups, count).astype(str)
    checked = Arrays(modalities, splits, ids, factors, {k: tuple(v) for k, v in (owners or {}).items()}, numbers, group)
    for name, x in (views or {}).items():
        if name in (pooled or {}):
            raise UserError(
                f"{name}.pooled cannot be given with {name}.views, which are pooled as the mean of their tokens; remove one."
            )
        modalities[name] = replace(modalities[name], views=_view_tokens(name, x, modalities[name].tokens.shape))
        _check_views(name, checked)
    counts = {name: m.views.shape[1] for name, m in modalities.items() if m.views is not None}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{name} has {n}" for name, n in counts.items())
        raise UserError(f"views must be as many in all modalities that have views, but {found}; give the same number.")
    return checked


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
    if np.abs(tokens).max(initial=0) > MAX_TOKEN:
        raise UserError(
            f"{name} has values up to {np.abs(tokens).max():.3g}, beyond the range of half precision; scale it down."
        )
    if pooled is None:
        vectors = _mean(tokens, real)
    else:
        vectors = np.where(has[:, None], np.asarray(pooled, np.float32), 0) if np.ndim(pooled) == 2 else np.zeros(0)
        if len(vectors) != count or not np.isfinite(vectors).all():
            raise UserError(f"{name}.pooled must be finite numbers of shape ({count}, width), not {np.shape(pooled)}.")
    return ModalityArrays(tokens, real, _normalise(vectors), has)


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
    for rows, tokens in arrays.modalities[name].view_chunks(arrays.rows_with_views(name)):
        largest = np.abs(tokens).max((1, 2, 3))
        bad = np.flatnonzero(~np.isfinite(largest))  # the maximum of NaN and anything is NaN
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
        for x in (modality.tokens, modality.mask, modality.pooled, modality.present):
            digest.update(repr(x.shape).encode() + np.ascontiguousarray(x).tobytes())
        for _, views in modality.view_chunks(arrays.rows_with_views(name)):
            digest.update(repr(("views", views.shape)).encode() + views.tobytes())
    for name, column in arrays.labels.items():
        digest.update(repr((name, column.tolist(), *(["number"] if name in arrays.numbers else []))).encode())
    if arrays.groups is not None:
        digest.update(repr(("groups", arrays.groups.tolist())).encode())
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
            names, groups = [arrays.names[i] for i in rows], None if arrays.groups is None else arrays.groups[rows].tolist()
            views = arrays.views if split == "train" else 0
            splits[split] = {"views": views, **write_rows(out / split, names, ["arrays"] * len(rows), groups)}
            _write_split(out / split, arrays.modalities, rows, specs, views)
    if arrays.labels:
        _write_labels(out, arrays)
    manifest = {"format": FORMAT, "key": key, "root": str(out.resolve()), "splits": splits, "ingredients": {}}
    manifest |= {"modalities": {m: asdict(spec) for m, spec in specs.items()}, "made_by": provenance()}
    (out / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def _write_split(
    folder: Path, modalities: Mapping[str, ModalityArrays], rows: np.ndarray, specs: Mapping[str, FeatureSpec], views: int
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
            by_row["tokens"][:, 0].copy_(torch.from_numpy(modality.tokens[present_rows]))
            by_row["mask"].copy_(torch.from_numpy(modality.mask[present_rows])[:, None])
            by_row["pooled"][:, 0].copy_(torch.from_numpy(modality.pooled[present_rows]))
            start = 0
            for chunk, tokens in modality.view_chunks(present_rows) if stored > 1 else ():
                end = start + len(chunk)
                by_row["tokens"][start:end, 1:].copy_(torch.from_numpy(tokens))
                by_row["pooled"][start:end, 1:].copy_(
                    torch.from_numpy(_normalise(_mean(tokens, modality.mask[chunk][:, None])))
                )
                start = end
    keys = torch.arange(len(rows))[:, None, None].expand(-1, views + 1, 2).contiguous()  # no captions: all rows differ
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
