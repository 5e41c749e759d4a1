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

import csv
import hashlib
import json
import logging
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from tensordict import MemoryMappedTensor, TensorDict
from torch import Tensor
from torch.utils.data import DataLoader

from tvl_align.arrays import SPLITS, Arrays, View, check_arrays
from tvl_align.console import UserError, progress
from tvl_align.contract import Batch, Features, FeatureSpec, Tokens
from tvl_align.data.samples import Samples, Views
from tvl_align.data.swapped import swapped_groups
from tvl_align.data.transforms import PHOTO_MEAN, PHOTO_STD, TOUCH_MEAN, TOUCH_STD
from tvl_align.data.tvl import Tolerance
from tvl_align.encoders.tvl import Stage1
from tvl_align.files import hold
from tvl_align.runtime import barrier, is_main, package_versions, provenance, rank, release_pages, side_by_side, world_size

FORMAT = 2
ENCODE_BATCH = 64
LEAST_BATCHES = 8  # unless rows are fewer: where few batches are encoded, no core waits long for the last
READ_AT_ONCE = 128  # rows
log = logging.getLogger(__name__)


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
        self.datasets = _mapped(folder / "rows" / "dataset.memmap", torch.int64, shape[:1])
        if shape[0] and not 0 <= int(self.datasets.min()) <= int(self.datasets.max()) < len(info["datasets"]):
            raise UserError(f"{folder} names data sets that are not in the manifest; the store is damaged, make it again.")
        self.index = {m: _mapped(folder / "index" / f"{m}.memmap", torch.int64, shape) for m in modalities}
        self.index["caption_keys"] = _mapped(folder / "index" / "caption_keys.memmap", torch.int64, (*shape, 2))
        tables = {m: _open_table(folder / m, spec) for m, spec in modalities.items()}
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
            mask = _rows(table["mask"], at) & present[:, None]
            longest = max(1, int(mask.any(0).nonzero().max()) + 1 if mask.any() else 1)  # sentences are short
            read = _rows(table["tokens"], at, longest), mask[:, :longest], _rows(table["pooled"], at)
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


class RowNames(Sequence[str]):
    """The names of the rows of a split, read from a memory map one at a time."""

    def __init__(self, folder: Path, rows: int) -> None:
        self.ends = _mapped(folder / "name_ends.memmap", torch.int64, (rows,))
        self.text = _mapped(folder / "names.memmap", torch.uint8, (int(self.ends[-1]) if rows else 0,))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [self[i] for i in range(len(self))[at]]
        at = range(len(self))[at]
        start, end = int(self.ends[at - 1]) if at else 0, int(self.ends[at])
        return bytes(self.text[start:end].numpy()).decode(errors="replace")


def _write_rows(folder: Path, names: Sequence[str], datasets: Sequence[str]) -> dict[str, Any]:
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


def _rows(mapped: Tensor, at: Tensor, length: int | None = None) -> Tensor:
    """mapped[at, :length], read in pieces. Pages stay in the system's cache, but not in this process, whose memory would
    otherwise grow with the store: a row that is read maps the 64 KB around it."""
    read = torch.empty(len(at), *mapped[0, :length].shape, dtype=mapped.dtype)
    for piece, out in zip(at.split(READ_AT_ONCE), read.split(READ_AT_ONCE), strict=True):
        torch.index_select(mapped[:, :length] if mapped.ndim > 2 else mapped, 0, piece, out=out)
        release_pages(mapped)
    return read


def _open_table(folder: Path, spec: FeatureSpec) -> dict[str, Tensor]:
    file = folder / "mask.memmap"
    rows = file.stat().st_size // max(1, spec.tokens) if file.is_file() else 0
    return {
        "tokens": _mapped(folder / "tokens.memmap", torch.float16, (rows, spec.tokens, spec.width)),
        "mask": _mapped(file, torch.bool, (rows, spec.tokens)),
        "pooled": _mapped(folder / "pooled.memmap", torch.float32, (rows, spec.pooled_width)),
    }


def _mapped(file: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A file of plain numbers as a tensor, memory-mapped. Nothing but its size decides how it is read."""
    size, needed = file.stat().st_size if file.is_file() else -1, dtype.itemsize * math.prod(shape)
    if size != needed or not needed:
        if not needed:
            return torch.empty(shape, dtype=dtype)
        found = "is missing" if size < 0 else f"holds {size} bytes"
        raise UserError(f"{file} {found}, and the manifest says {needed}; the store is damaged, make it again.")
    return MemoryMappedTensor.from_filename(file, dtype, torch.Size(shape))


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
        key = _arrays_key(checked)
        if (out / "manifest.json").is_file():
            store = cls(out)
            if store.key != key:
                raise UserError(f"{out} already holds another store ({store.key}); give another folder.")
            return store
        if out.exists() and any(out.iterdir()):
            raise UserError(f"{out} is not empty; give a new folder for the store.")
        out.mkdir(parents=True, exist_ok=True)
        shapes = {
            name: FeatureSpec(view.tokens.shape[2], view.tokens.shape[1], view.pooled.shape[1])
            for name, view in checked.views.items()
        }
        splits: dict[str, Any] = {}
        for split in SPLITS:
            rows = np.flatnonzero(checked.split == split)
            if len(rows):
                told = _write_rows(out / split, [checked.names[i] for i in rows], ["arrays"] * len(rows))
                splits[split] = {"views": 0, **told}
                _write_arrays(out / split, checked.views, rows, shapes)
        if checked.labels:
            _write_labels(out, checked)
        manifest = {"format": FORMAT, "key": key, "root": str(out.resolve()), "splits": splits, "ingredients": {}}
        manifest |= {"modalities": {m: asdict(spec) for m, spec in shapes.items()}, "made_by": provenance()}
        (out / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        return cls(out)


def _arrays_key(arrays: Arrays) -> str:
    digest = hashlib.sha256(repr((FORMAT, arrays.names, arrays.split.tolist(), arrays.owners)).encode())
    for name, view in arrays.views.items():
        digest.update(name.encode())
        for x in vars(view).values():
            digest.update(repr(x.shape).encode() + np.ascontiguousarray(x).tobytes())
    for name, column in arrays.labels.items():
        digest.update(repr((name, column.tolist())).encode())
    return digest.hexdigest()[:16]


def _write_arrays(folder: Path, views: Mapping[str, View], rows: np.ndarray, shapes: Mapping[str, FeatureSpec]) -> None:
    index = {}
    for name, view in views.items():
        here = rows[view.present[rows]]
        place = torch.full((len(rows), 1), -1, dtype=torch.int64)
        place[torch.from_numpy(view.present[rows])] = torch.arange(len(here))[:, None]
        index[name] = place
        if len(here):
            table = _empty_table(len(here), shapes[name]).memmap_like(folder / name)
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


def store_key(stage1: Stage1, samples: Mapping[str, Samples], views: int) -> tuple[str, dict[str, Any]]:
    """The key of the store for these settings, and the ingredients it hashes."""
    some = next(iter(samples.values()))
    ingredients = {
        "format": FORMAT,
        "encoders": stage1.fingerprint(),
        "features": stage1.features,
        "images": asdict(some.pictures.options),
        "text": {"prompt": some.text.prompt, "shuffle": some.text.shuffle, "synonyms": dict(some.text.synonyms)},
        "views": views,
        "seed": some.seed,
        "packages": package_versions(),
        "rows": {name: _rows_digest(split) for name, split in samples.items()},
    }
    text = json.dumps(ingredients, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16], ingredients


def _rows_digest(samples: Samples) -> str:
    """A hash of the rows of a split with the sizes and times of their files."""
    digest = hashlib.sha256()
    for row in samples.rows:
        digest.update(repr(row).encode())
        for path in (row.vision, row.tactile):
            if path is not None:
                try:
                    stat = (samples.root / path).stat()
                    digest.update(f"{stat.st_size} {stat.st_mtime_ns}".encode())
                except OSError:
                    digest.update(b"gone")
    return digest.hexdigest()


def open_or_encode(
    feature_dir: Path,
    stage1: Stage1,
    samples: Mapping[str, Samples],
    views: int,
    num_workers: int,
    expected: str | None = None,
    tolerance: Tolerance | None = None,
) -> FeatureStore:
    """The store for these settings, encoded first where it is missing. All processes call this together.

    expected: the key it must have. tolerance: how many pictures may be bad; these are absent in the store, and counted in
    its manifest. Raises UserError for another key, before anything is encoded; for more bad pictures; for data that change
    meanwhile.
    """
    key, ingredients = store_key(stage1, samples, views)
    if expected is not None and key != expected:
        raise UserError(
            f"encoders and data now give the features {key}, not {expected}: the Stage-1 checkpoint, the data or a package "
            "changed since; put back what was there."
        )
    folder = feature_dir / key
    if not (folder / "manifest.json").is_file():
        barrier()  # nobody starts to write before everybody has looked
        with hold(feature_dir, wait=True, why="encodes into") if is_main() else nullcontext():
            barrier()
            if not (folder / "manifest.json").is_file():  # another run may have encoded it meanwhile
                _encode(folder, key, ingredients, stage1, samples, views, num_workers, tolerance or Tolerance())
    store = FeatureStore(folder)
    if store.key != key:
        raise UserError(f"{folder} holds the store {store.key}, not {key}; remove that folder and run again.")
    return store


def _encode(
    folder: Path,
    key: str,
    ingredients: dict[str, Any],
    stage1: Stage1,
    samples: Mapping[str, Samples],
    views: int,
    num_workers: int,
    tolerance: Tolerance,
) -> None:
    unfinished = folder.with_name(folder.name + ".partial")
    specs = stage1.specs
    if is_main():
        if len(list(folder.parent.glob("*/manifest.json"))):
            log.warning("%s holds stores of other settings; encoding one for these", folder.parent)
        unfinished.mkdir(parents=True, exist_ok=True)  # what an interrupted encode of this very store left goes on
    barrier()
    splits: dict[str, Any] = {}
    for name, split in samples.items():
        if len(split) == 0:
            continue
        split_views = views if name == "train" else 0
        _encode_split(unfinished / name, name, stage1, specs, split, split_views, num_workers, tolerance)
        splits[name] = {"views": split_views}
    barrier()
    if is_main():
        skipped = {name: _faults(unfinished / name) for name in splits}
        for name, faults in skipped.items():
            bad = {row for row, _, _ in faults}
            if faults:
                row, modality, why = faults[0]
                counts = Counter(f"{modality}: {reason}" for _, modality, reason in faults)
                log.warning("%s: pictures that cannot be used, by reason: %s", name, dict(counts))
                tolerance.check(len(bad), len(samples[name]), f"{modality} of {samples[name].rows[row].name}: {why}")
        now = {name: _rows_digest(split) for name, split in samples.items()}
        if now != ingredients["rows"]:
            shutil.rmtree(unfinished)
            raise UserError("the data changed while they were encoded; nothing of it is kept, give the command again.")
        suspects = _swapped(unfinished, {name: samples[name] for name in splits})
        if suspects:
            some = ", ".join(suspects[:3]) + (" and more" if len(suspects) > 3 else "")
            log.warning("photos and touch images look swapped in %d groups: %s", len(suspects), some)
            if tolerance.strict:
                raise UserError(f"photos and touch images look swapped in {some}; swap their folders back.")
        for name, told in splits.items():
            rows = samples[name].rows
            told |= _write_rows(unfinished / name, [row.name for row in rows], [row.dataset for row in rows])
            shutil.rmtree(unfinished / name / "done")
        left_out = {
            "dropped": next(iter(samples.values())).dropped,
            "skipped": {
                name: [{"row": samples[name].rows[r].name, "modality": m, "reason": why} for r, m, why in faults]
                for name, faults in skipped.items()
            },
            "swapped": suspects,
        }
        shapes = {name: asdict(spec) for name, spec in specs.items()}
        manifest = {"format": FORMAT, "key": key, "root": str(next(iter(samples.values())).root.resolve())}
        manifest |= {"modalities": shapes, "splits": splits, "ingredients": ingredients, "made_by": provenance()}
        manifest |= left_out
        (unfinished / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(unfinished, folder)
    barrier()


@dataclass(frozen=True)
class _Plan:
    """What is to be encoded of a split, and where it goes.

    index: {modality: (N, V+1) int64} rows of the tables; keys: (N, V+1, 2) int64 of captions and sentences; sizes:
    {modality: rows of its table}; texts: each sentence once; views: of pictures, the plain one included.
    """

    index: dict[str, Tensor]
    keys: Tensor
    sizes: dict[str, int]
    texts: list[str]
    views: int

    @classmethod
    def of(cls, samples: Samples, views: int, modalities: Sequence[str]) -> "_Plan":
        count = len(samples)
        drawn_views = views + 1 if samples.pictures.options.augment else 1  # of pictures; sentences always vary
        index = {m: torch.full((count, views + 1), -1, dtype=torch.int64) for m in modalities}
        sizes: dict[str, int] = {}
        for modality in ("vision", "tactile"):
            if modality in index:
                there = torch.tensor([getattr(row, modality) is not None for row in samples.rows])
                sizes[modality] = int(there.sum()) * drawn_views
                index[modality][there] = torch.arange(sizes[modality]).view(-1, drawn_views)
        sentences: dict[str, int] = {}
        drawn = torch.full((count, views + 1), -1, dtype=torch.int64)
        for row, view in product(range(count), range(views + 1)):
            sentence = samples.sentence(row, view)
            if sentence is not None:
                drawn[row, view] = sentences.setdefault(sentence, len(sentences))
        if "text" in index:
            index["text"], sizes["text"] = drawn, len(sentences)
        captions = samples.caption_ids()[:, None].expand_as(drawn)
        none = -1 - torch.arange(count)[:, None].expand_as(drawn)  # rows without a sentence agree with nobody
        keys = torch.stack([captions, torch.where(drawn >= 0, drawn, none)], dim=-1)
        return cls(index, keys, sizes, list(sentences) if "text" in index else [], drawn_views)

    def begin(self, folder: Path, specs: Mapping[str, FeatureSpec]) -> None:
        """Make the tables, empty, and the flags of what is done."""
        count = len(self.keys)
        shutil.rmtree(folder, ignore_errors=True)
        TensorDict({**self.index, "caption_keys": self.keys}, batch_size=[count]).memmap(folder / "index")
        for modality, size in self.sizes.items():
            if size:
                _empty_table(size, specs[modality]).memmap_like(folder / modality)
        flags = {"pictures": count * self.views, "text": len(self.texts)}
        done = {what: torch.zeros(size, dtype=torch.bool) for what, size in flags.items()}
        done |= {f"look_{m}": torch.full((count, 6), torch.nan) for m in ("vision", "tactile")}
        TensorDict(done).memmap(folder / "begun")
        os.replace(folder / "begun", folder / "done")  # now the tables are whole, if empty


def _encode_split(
    folder: Path,
    name: str,
    stage1: Stage1,
    specs: Mapping[str, FeatureSpec],
    samples: Samples,
    views: int,
    workers: int,
    tolerance: Tolerance,
) -> None:
    """Encode one split; each process fills its own rows of the same tables. Rows that are done are not done again."""
    count, device, plan = len(samples), stage1.logit_scale.device, _Plan.of(samples, views, stage1.modalities)
    if is_main() and not (folder / "done").is_dir():
        plan.begin(folder, specs)
    barrier()
    done = TensorDict.load_memmap(folder / "done")
    todo, untold = (_batches_left(done[what]) for what in ("pictures", "text"))
    barrier()  # nobody ticks anything off before everybody has looked
    tables = {m: TensorDict.load_memmap(folder / m) for m, size in plan.sizes.items() if size}
    written = TensorDict.load_memmap(folder / "index")
    bad_rows: set[int] = set()

    def write_text(at: Tensor) -> int:
        encoded = stage1.encode({"text": stage1.tokenize([plan.texts[i] for i in at.tolist()]).to(device)}).modalities
        _write(tables["text"], at, encoded["text"])
        done["text"].numpy()[at.numpy()] = True
        return len(at)

    def write_pictures(at: Tensor, part: Jobs, batch: Loaded) -> int:
        for modality, (positions, images) in batch.pictures.items():
            encoded = stage1.encode({modality: images.to(device)}).modalities
            _write(tables[modality], torch.stack([plan.index[modality][part[i]] for i in positions]), encoded[modality])
            plain = [i for i, position in enumerate(positions) if part[position][1] == 0]
            if plain:
                done[f"look_{modality}"][[part[positions[i]][0] for i in plain]] = _look(modality, images[plain])
        done["pictures"].numpy()[at.numpy()] = True
        return len(at)

    def note(part: Jobs, faults: Sequence[tuple[int, str, str]]) -> None:
        for position, modality, reason in faults:
            row, view = part[position]
            if modality in plan.index:
                written[modality][row, slice(view, view + 1) if plan.views > 1 else slice(None)] = -1
                _note_fault(folder, row, modality, reason)
                bad_rows.add(row)
                tolerance.check(len(bad_rows), count, f"{modality} of {samples.rows[row].name}: {reason}")

    def pictures() -> Iterator[Callable[[], int]]:
        parts = [[divmod(i, plan.views) for i in at.tolist()] for at in todo]  # (row, view)
        for at, part, batch in zip(todo, parts, load_pictures(samples, parts, workers, stage1.modalities), strict=True):
            note(part, batch.faults)
            yield partial(write_pictures, at, part, batch)

    with progress(sum(map(len, todo + untold)), f"encode {name}", "view", quiet=not is_main()) as bar:
        for work in ((partial(write_text, at) for at in untold), pictures()):
            for finished in side_by_side(work):
                bar.update(finished)


def _batches_left(done: Tensor) -> list[Tensor]:
    """This process's share of the batches that are not done. However many processes there are, and where an encode that goes
    on had stopped, the same rows are encoded together: what else is in a batch may change the last digit of a feature."""
    batches = torch.arange(len(done)).split(max(1, min(ENCODE_BATCH, len(done) // LEAST_BATCHES)))
    return [at for at in batches if not done[at].all()][rank() :: world_size()]


def _note_fault(folder: Path, row: int, modality: str, reason: str) -> None:
    """One line per fault, in a file per process; an encode that goes on may note the same again."""
    with (folder / "done" / f"faults-{rank()}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps([row, modality, reason]) + "\n")


def _faults(folder: Path) -> list[tuple[int, str, str]]:
    """(row, modality, reason) of every picture that could not be used, noted by whatever process."""
    lines = [line for file in (folder / "done").glob("faults-*.jsonl") for line in file.read_text("utf-8").splitlines()]
    return sorted({(int(row), str(modality), str(reason)) for row, modality, reason in map(json.loads, lines)})


def _look(modality: str, images: Tensor) -> Tensor:
    """(n, 3, S, S) normalised -> (n, 6): mean and spread of every channel as they are in the file, by which photos and touch
    images are told apart."""
    mean, std = (PHOTO_MEAN, PHOTO_STD) if modality == "vision" else (TOUCH_MEAN, TOUCH_STD)
    scale, average = torch.tensor(std), images.mean((2, 3))
    spread = (images.square().mean((2, 3)) - average.square()).clamp(min=0).sqrt()
    return torch.cat([average * scale + torch.tensor(mean), spread * scale], dim=1)


def _swapped(folder: Path, samples: Mapping[str, Samples]) -> list[str]:
    """Groups of any split whose photos and touch images look swapped."""
    looks = [TensorDict.load_memmap(folder / name / "done") for name in samples]
    groups = [row.group for split in samples.values() for row in split.rows]
    return swapped_groups(groups, *(torch.cat([d[f"look_{m}"] for d in looks]) for m in ("vision", "tactile")))


def _empty_table(rows: int, spec: FeatureSpec) -> TensorDict:
    return TensorDict(
        {
            "tokens": torch.zeros((), dtype=torch.float16).expand(rows, spec.tokens, spec.width),
            "mask": torch.zeros((), dtype=torch.bool).expand(rows, spec.tokens),
            "pooled": torch.zeros((), dtype=torch.float32).expand(rows, spec.pooled_width),
        },
        batch_size=[rows],
    )


def _write(table: TensorDict, rows: Tensor, tokens: Tokens) -> None:
    """Write into these rows what a table keeps of tokens, in its precision; what pads a batch is not kept."""
    kept = (tokens.tokens * tokens.mask[..., None]).half()
    if not (kept.isfinite().all() and tokens.pooled.isfinite().all()):
        raise UserError("the encoders gave features that are NaN, inf or above 65,504; their checkpoint is of no use.")
    for name, column in (("tokens", kept), ("mask", tokens.mask), ("pooled", tokens.pooled.float())):
        table[name].numpy()[rows.numpy(), : column.shape[1]] = column.cpu().numpy()


Jobs = list[tuple[int, int]]


@dataclass(frozen=True)
class Loaded:
    """Pictures of a batch: {modality: (positions in the batch that have it, (n, 3, S, S))}, and (position, modality, reason)
    of those that cannot be used."""

    pictures: dict[str, tuple[list[int], Tensor]]
    faults: list[tuple[int, str, str]]


def load_pictures(
    samples: Samples, batches: Sequence[Jobs], num_workers: int, modalities: Sequence[str]
) -> Iterator[Loaded]:
    """The pictures of every batch of (row, view), decoded by workers, a few batches ahead. A row -1 has none."""
    loader = DataLoader(
        samples,
        batch_sampler=batches,
        num_workers=min(num_workers, os.cpu_count() or 1, len(batches)),
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(int(torch.randint(2**62, ()))),  # one draw, however many workers there are
    )
    for batch in loader:
        faults = [fault for fault in batch.faults if fault[1] in modalities]
        yield Loaded({m: pictures for m, pictures in batch.pictures.items() if m in modalities}, faults)


def _collate(items: list[Views]) -> Loaded:
    found: dict[str, tuple[list[int], Tensor]] = {}
    for modality in ("vision", "tactile"):
        positions = [i for i, item in enumerate(items) if modality in item.pictures]
        if positions:
            found[modality] = positions, torch.stack([items[i].pictures[modality] for i in positions])
    return Loaded(found, [(i, m, reason) for i, item in enumerate(items) for m, reason in item.faults.items()])


class LiveSplit:
    """Features computed as they are asked for (`--views 0`): the documented architecture taken literally, and slow."""

    def __init__(
        self, stage1: Stage1, samples: Samples, num_workers: int, train: bool, tolerance: Tolerance | None = None
    ) -> None:
        self.stage1, self.samples, self.num_workers = stage1, samples, num_workers
        self.tolerance, self._bad = tolerance or Tolerance(), dict[tuple[int, str], str]()
        self.views = 10**9 if train else 0  # every draw is a new view
        self.names = [row.name for row in samples.rows]
        known = sorted({row.dataset for row in samples.rows})
        self.datasets = torch.tensor([known.index(row.dataset) for row in samples.rows], dtype=torch.int64)
        self._captions = samples.caption_ids()

    def __len__(self) -> int:
        return len(self.samples)

    def batches(self, rows: Sequence[Tensor], views: Sequence[Tensor], device: torch.device) -> Iterator[Features]:
        jobs = [list(zip(r.tolist(), v.tolist(), strict=True)) for r, v in zip(rows, views, strict=True)]
        pictures = load_pictures(self.samples, jobs, self.num_workers, self.stage1.modalities)
        for part, found in zip(jobs, pictures, strict=True):
            yield self._encode(part, found, device)

    def _encode(self, part: Jobs, loaded: Loaded, device: torch.device) -> Features:
        """All modalities are there, absent or not, so that every process has the same ones."""
        self._note(part, loaded.faults)
        raw: dict[str, Any] = {}
        present: dict[str, Tensor] = {}
        for modality, size in (("vision", self.stage1.photo_size), ("tactile", self.stage1.touch_size)):
            if modality in self.stage1.modalities:
                positions, images = loaded.pictures.get(modality, ([], torch.empty(0, 3, size, size)))
                there = torch.zeros(len(part), dtype=torch.bool)
                there[positions] = True
                full = images.new_zeros(len(part), *images.shape[1:])
                full[there] = images
                raw[modality], present[modality] = full.to(device), there.to(device)
        sentences = [self.samples.sentence(*job) if job[0] >= 0 else None for job in part]
        if "text" in self.stage1.modalities:
            raw["text"] = self.stage1.tokenize([s or "" for s in sentences]).to(device)
            present["text"] = torch.tensor([s is not None for s in sentences], device=device)
        rows = torch.tensor([row for row, _ in part])
        drawn = [
            self._sentence_id(s) if s is not None else -1 - row for s, row in zip(sentences, rows.tolist(), strict=True)
        ]
        keys = torch.stack([self._captions[rows], torch.tensor(drawn)], dim=-1)
        batch: Batch = {**raw, "present": present, "caption_keys": keys.to(device)}
        encoded = self.stage1.encode(batch)
        return Features(encoded.modalities, encoded.caption_keys, rows.to(device))

    def _note(self, part: Jobs, faults: Sequence[tuple[int, str, str]]) -> None:
        for position, modality, reason in faults:
            row = part[position][0]
            why = f"{modality} of {self.samples.rows[row].name}: {reason}"
            if (row, modality) not in self._bad:
                log.warning("left out, %s", why)
            self._bad[row, modality] = reason
            self.tolerance.check(len({row for row, _ in self._bad}), len(self), why)

    def _sentence_id(self, sentence: str) -> int:
        """A number that is the same on all processes: part of a hash of the sentence."""
        return int.from_bytes(hashlib.sha256(sentence.encode()).digest()[:7], "big")
