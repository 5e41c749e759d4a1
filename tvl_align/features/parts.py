"""A store in parts: the blocks of a source are encoded one by one, in any order, by any process, and joined by reference.

`encode_blocks` does it, in one process, in those of a process group (torchrun), or in those of a Ray cluster, which
`tvl_align.features.cluster` gives. A part is a folder:

    parts/<number>/<modality>/   the table of a block, see `tables.py`: equal inputs of the block share a table row
    parts/<number>/rows.npz      names, groups, captions, split, label.<factor> (N,); index.<modality> (N, V+1) int64, table
                                 rows of this part; content.<modality> (N,) int64, equal for equal inputs
    parts/<number>/about.json    written last: number of samples, and which were bad

Parts know nothing of each other: groups, captions and contents are compared by 64-bit hashes. Of all rows, the process that
joins the parts holds numbers only, 8 bytes for each of these columns; texts are read part by part.
"""

import csv
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tvl_align.contract import FeatureSpec
from tvl_align.data.image_options import ImageOptions
from tvl_align.data.sources import Block
from tvl_align.data.split import repeats
from tvl_align.data.text import PROMPT, Sentence, is_absent
from tvl_align.data.tvl import Tolerance
from tvl_align.encoders.tvl import Stage1
from tvl_align.features.arrays import MAX_CLASSES, MAX_TOKEN, SPLIT_FRACTIONS, SPLITS, ModalityArrays, check_modality
from tvl_align.features.identity import encoder_ingredients, precision_of
from tvl_align.features.store import FeatureStore
from tvl_align.features.stream import (
    BadSamples,
    Sample,
    SampleColumns,
    encode_batch,
    plain_images,
    stream_ingredients,
    usable_batches,
)
from tvl_align.features.tables import FORMAT, hash_ids, part_name
from tvl_align.features.writer import StoredRows
from tvl_align.system.console import UserError, progress
from tvl_align.system.distributed import barrier, is_main, rank, world_size
from tvl_align.system.files import lock_folder, write_atomically
from tvl_align.system.provenance import provenance
from tvl_align.system.workers import run_in_threads

ABOUT, ROWS, PLAN = "about.json", "rows.npz", "plan.json"
Task = tuple[int, Block]
"""A block and the number of its part."""
Work = Callable[[int, Block], None]
"""Encodes a block to the part of this number."""
Engine = Callable[[Sequence[Task], Callable[[], Work]], Iterator[int]]
"""engine(tasks, make): calls make() once in each of its processes, and the work that it gives for every task; yields the
numbers of all parts, when they are done. Work may be done twice."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """What is done to a sample; see `encode_stream`."""

    images: ImageOptions
    prompt: str = PROMPT
    views: int = 0
    seed: int = 0


def in_process_group(tasks: Sequence[Task], make: Callable[[], Work]) -> Iterator[int]:
    """An engine: each of the N processes of the group encodes every N-th block; without a group, one process all of them."""
    work, own = make(), rank()
    for number, block in tasks[own :: world_size()]:
        work(number, block)
        yield number
    barrier()
    yield from (number for i, (number, _) in enumerate(tasks) if i % world_size() != own)


def encode_blocks(
    blocks: Sequence[Block],
    stage1: Stage1,
    load: Callable[[], Stage1],
    out: Path,
    images: ImageOptions | None = None,
    *,
    engine: Engine = in_process_group,
    prompt: str = PROMPT,
    views: int = 0,
    tolerance: Tolerance | None = None,
    seed: int = 0,
    quiet: bool = False,
) -> FeatureStore:
    """Encode the blocks of a source with frozen encoders into a store in the folder `out`, and open it.

    The features are those of `encode_stream` for all samples, and so are groups, positives and given splits; where samples
    have no split it is drawn from the groups as 80%, 10%, 10%, by another draw. The key depends on the inputs, and not on
    the blocks or on who encoded them. An encode that was interrupted goes on with the blocks that are missing. A sample
    that is one of the bad ones is treated as in `encode_stream`.

    stage1: the encoders here. load: gives the encoders in each process of the engine; of a cluster, it must be possible to
    pickle it. out: in a file system that all processes share. engine: who does the work; all processes of a process group
    must call this.

    Raises UserError as `encode_stream`, and if `out` has parts of other blocks, encoders or options.
    """
    out, recipe = out.resolve(), Recipe(images or plain_images(stage1), prompt, views, seed)
    if (out / "manifest.json").exists():
        raise UserError(f"{out} is a feature store already; give a new folder.")
    if len(stage1.modalities) < 2:
        raise UserError(f"the encoders are of {', '.join(stage1.modalities)}; give those of two or more modalities.")
    if not blocks:
        raise UserError("there are no samples; check the source.")
    if not (out / "parts" / PLAN).is_file() and out.exists() and any(part.name != "parts" for part in out.iterdir()):
        raise UserError(f"{out} is not empty; give a new folder for the store.")
    ingredients = stream_ingredients(stage1, recipe.images, prompt, False)
    ingredients |= {"views": views, "seed": seed} if views else {}
    barrier()  # all processes have checked before one starts to write
    with lock_folder(out / "parts", wait=False, why="encodes into") if is_main() else nullcontext():
        if is_main():
            _plan(out, blocks, ingredients)
        barrier()
        totals = [block.total for block in blocks]
        total = None if None in totals else sum(t for t in totals if t is not None)
        bad, missing = BadSamples(tolerance or Tolerance(), total), list[int]()
        for i in range(len(blocks)):
            if (out / part_name(i) / ABOUT).is_file():
                _count_bad(bad, out / part_name(i))
            else:
                missing.append(i)
        make = partial(_worker, out, load, encoder_ingredients(stage1), recipe)
        barrier()  # all processes know the same parts
        with progress(len(blocks), "encode", "block", quiet or not is_main(), len(blocks) - len(missing)) as bar:
            for i in engine([(i, blocks[i]) for i in missing], make):
                _count_bad(bad, out / part_name(i))
                bar.update()
        bad.check()
        if is_main():
            _join(out, len(blocks), stage1.specs, ingredients, recipe)
        barrier()
    return FeatureStore(out)


def _plan(out: Path, blocks: Sequence[Block], ingredients: Mapping[str, Any]) -> None:
    """Write what the parts in a folder are of. Raises UserError if it has parts of something else."""
    plan = json.dumps({"blocks": [block.name for block in blocks], "ingredients": ingredients}, sort_keys=True)
    file = out / "parts" / PLAN
    if not file.is_file():
        write_atomically(file, plan)
    elif (earlier := file.read_text(encoding="utf-8")) != plan:
        found = json.loads(earlier)
        what = "other samples" if found.get("blocks") != json.loads(plan)["blocks"] else "other encoders or options"
        raise UserError(f"{out} has a part of an encode of {what}; give the same flags to go on with it, or a new folder.")


def _count_bad(bad: BadSamples, folder: Path) -> None:
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    bad.add_all(about["samples"], about["bad"], about["reasons"], about["example"])


def _worker(out: Path, load: Callable[[], Stage1], expected: Mapping[str, str], recipe: Recipe) -> Work:
    """Work in this process, with its own encoders, whose `encoder_ingredients` are the expected ones."""
    machine = os.uname().nodename
    if not (out / "parts" / PLAN).is_file():
        raise UserError(f"{machine} does not see {out}; give --out a folder that all machines share.")
    stage1 = load()
    stage1.encode_precision = precision_of(expected)
    if encoder_ingredients(stage1) != expected:
        raise UserError(f"the encoders of {machine} have other weights; give it the same files.")

    def work(number: int, block: Block) -> None:
        if not (out / part_name(number) / ABOUT).is_file():
            write_part(block.read(), stage1, out / part_name(number), recipe)

    return work


def write_part(samples: Iterable[Sample], stage1: Stage1, folder: Path, recipe: Recipe) -> None:
    """Encode samples to the folder of a part, which appears when it is complete."""
    scratch = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    scratch.mkdir(parents=True)
    bad = BadSamples(Tolerance(max_skipped=1), None)
    tables = {m: _Table(scratch / m, spec, recipe.views) for m, spec in stage1.specs.items()}
    chunks: dict[str, list[np.ndarray]] = {}
    columns: SampleColumns | None = None
    sentences = False
    options = stage1, recipe.images, recipe.prompt, recipe.views, recipe.seed, True
    jobs = (partial(encode_batch, batch, *options) for batch in usable_batches(samples, stage1, bad))
    for encoded in run_in_threads(jobs):
        if columns is None:
            columns, sentences = SampleColumns(encoded.samples[0]), isinstance(encoded.samples[0].get("text"), Sentence)
        for row, modality, reason in encoded.faults:
            bad.add(str(encoded.samples[row]["name"]), modality, reason)
        given = columns.of(encoded.samples, "text" in stage1.modalities)
        given |= {"captions": given["captions"]["text"]} if "captions" in given else {}
        new = {f"label.{k}": np.asarray(x) for k, x in given.pop("labels").items()}
        new |= {k: np.asarray(x) for k, x in given.items()}
        training = np.array([side == "train" for side in given.get("split", ["train"] * len(encoded.samples))])
        for m, table in tables.items():
            arrays = {what: of[m] for what, of in encoded.features.items() if m in of}
            first = sum(map(len, chunks.get("names", [])))
            rows = check_modality(m, arrays.pop("arrays"), len(training), **arrays, first_row=first)
            new |= {f"index.{m}": table.add(m, rows, encoded.contents[m], training), f"content.{m}": encoded.contents[m]}
        for k, x in new.items():
            chunks.setdefault(k, []).append(x)
    if chunks:
        rows_of_part: dict[str, Any] = {k: np.concatenate(x) for k, x in chunks.items()}
        np.savez_compressed(scratch / ROWS, **rows_of_part)
    about = {"samples": bad.seen, "bad": bad.count, "reasons": bad.reasons, "example": bad.example, "sentences": sentences}
    write_atomically(scratch / ABOUT, json.dumps(about))
    try:
        os.replace(scratch, folder)
    except OSError:  # another process that was taken for dead has written it
        if not (folder / ABOUT).is_file():
            raise
        shutil.rmtree(scratch)


class _Table:
    """The table of a modality of a part, in files that grow."""

    def __init__(self, folder: Path, spec: FeatureSpec, views: int) -> None:
        folder.mkdir()
        self.views, self.known = views, dict[int, int]()  # {content: its table row}
        self.tokens = StoredRows(folder / "tokens.memmap", np.float16, spec.tokens, spec.width)
        self.mask = StoredRows(folder / "mask.memmap", np.bool_, spec.tokens)
        self.pooled = StoredRows(folder / "pooled.memmap", np.float32, spec.pooled_width)

    def add(self, name: str, rows: ModalityArrays, contents: np.ndarray, training: np.ndarray) -> np.ndarray:
        """Append B rows: (B, V+1) their table rows, -1 = absent. Rows of a content that is there are not written again."""
        index = np.full((len(training), self.views + 1), -1)
        shown = training & (rows.views is not None)
        tokens: list[np.ndarray] = []
        mask: list[np.ndarray] = []
        pooled: list[np.ndarray] = []
        for i in np.flatnonzero(rows.present):
            content, at = int(contents[i]), self.tokens.shape[0] + len(mask)
            if not shown[i] and content in self.known:
                index[i] = self.known[content]
                continue
            index[i] = at + np.arange(self.views + 1) if shown[i] else at
            self.known.setdefault(content, at)
            one = np.array([i])
            tokens.append(rows.tokens[one])
            pooled.append(rows.pooled[one])
            if shown[i]:
                tokens.append(rows.view_tokens(one)[0])
                pooled.append(rows.view_pooled(one)[0])
                if not (np.abs(tokens[-1]).max() <= MAX_TOKEN and np.isfinite(pooled[-1]).all()):
                    raise UserError(f"a view of {name} is not finite in half precision; use other encoders.")
            mask += [rows.mask[one]] * (self.views + 1 if shown[i] else 1)
        if mask:
            for stored, new in ((self.tokens, tokens), (self.mask, mask), (self.pooled, pooled)):
                stored.append(np.concatenate(new))
        return index


# Joining


def _join(out: Path, count: int, specs: Mapping[str, FeatureSpec], ingredients: Mapping[str, Any], recipe: Recipe) -> None:
    """Make a store of complete parts: write the rows and the index of every split, and the manifest."""
    folders = [out / part_name(i) for i in range(count)]
    names = _column(folders, "names")
    if not len(names):
        raise UserError("there are no samples; check the source.")
    _check_unique(folders, names)
    own, given = _column(folders, "groups"), _sides(folders)
    contents = {m: np.concatenate([part[f"content.{m}"] for part in _each(folders)]) for m in specs}
    present = {m: sum(int((part[f"index.{m}"][:, 0] >= 0).sum()) for part in _each(folders)) for m in specs}
    if absent := [m for m, n in present.items() if not n]:
        raise UserError(f"no sample has {' or '.join(absent)}; name its key, or leave out its encoder.")
    copies = {m: keys for m, keys in contents.items() if m != "text" and repeats(keys)}
    groups = linked(own, copies.values())
    sides = _draw(groups, recipe.seed) if given is None else given
    _log_copies(contents, copies, present, own, sides, given is not None)
    if "text" in specs:
        contents["text"] = linked(_captions(folders), [contents["text"]])
    sentences = next(about["sentences"] for about in map(_about, folders) if about["samples"] > about["bad"])
    if sentences:
        ingredients = {**ingredients, "text": {**ingredients["text"], "sentences": True}}
    digest = hashlib.sha256(json.dumps([FORMAT, ingredients], sort_keys=True).encode())
    for column in (names, own, sides, *contents.values()):
        digest.update(column.tobytes())
    scratch = out / "parts" / ".store"
    shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
    scratch.mkdir()
    splits = {}
    repeated = {m for m, keys in contents.items() if m != "text" and repeats(keys)}
    for side, split in enumerate(SPLITS):
        if (sides == side).any():
            views = recipe.views if split == "train" else 0
            info = _write_split(scratch / split, folders, sides == side, views, groups, contents, repeated)
            splits[split] = {"views": views, **info}
    digest.update(_write_labels(scratch, folders))
    manifest = {
        "format": FORMAT,
        "key": digest.hexdigest()[:16],
        "root": str(out),
        "splits": splits,
        "parts": count,
        "ingredients": ingredients,
        "made_by": provenance(),
        "modalities": {m: asdict(spec) for m, spec in specs.items()},
    }
    write_atomically(scratch / "manifest.json", json.dumps(manifest))
    for part in sorted(scratch.iterdir(), key=lambda path: path.name == "manifest.json"):  # last: it completes the store
        if (out / part.name).is_dir():
            shutil.rmtree(out / part.name)  # of a process that was killed here
        os.replace(part, out / part.name)
    for left in (out / "parts").glob(".[0-9s]*"):  # of processes that were killed, and the empty scratch folder
        shutil.rmtree(left)


def _about(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / ABOUT).read_text(encoding="utf-8")))


def _each(folders: Iterable[Path]) -> Iterator[Mapping[str, np.ndarray]]:
    """The columns of every part that has rows. They are read when they are asked for."""
    for folder in folders:
        if (folder / ROWS).is_file():
            with np.load(folder / ROWS, allow_pickle=False) as columns:
                yield columns


def _column(folders: Sequence[Path], name: str) -> np.ndarray:
    """(N,) int64 of the texts of a column of all rows, equal for equal texts."""
    return np.concatenate([np.zeros(0, np.int64), *(hash_ids(part[name].tolist()) for part in _each(folders))])


def _captions(folders: Sequence[Path]) -> np.ndarray:
    """As `_column`; every row without a caption is another one."""
    parts = (zip(part["captions"].tolist(), part["names"].tolist(), strict=True) for part in _each(folders))
    return np.concatenate([hash_ids(caption or f"\0{name}" for caption, name in rows) for rows in parts])


def _check_unique(folders: Sequence[Path], ids: np.ndarray) -> None:
    distinct, counts = np.unique(ids, return_counts=True)
    if len(distinct) < len(ids):
        twice = distinct[counts.argmax()]
        name = next(n for part in _each(folders) for n in part["names"].tolist() if hash_ids([n])[0] == twice)
        raise UserError(f"the name {name!r} is given twice; names must be unique, as labels are matched by name.")


def _sides(folders: Sequence[Path]) -> np.ndarray | None:
    """(N,) int8: the split of every row, as a number in SPLITS; None if samples have none."""
    found = [
        np.array([SPLITS.index(s) for s in part["split"].tolist()], np.int8) if "split" in part else None
        for part in _each(folders)
    ]
    given = [column for column in found if column is not None]
    if given and len(given) < len(found):
        raise UserError("some samples have a split and some have none; give it for all or none.")
    return np.concatenate(given) if given else None


def linked(ids: np.ndarray, keys: Iterable[np.ndarray]) -> np.ndarray:
    """(N,) numbers, equal for rows that are linked by equal ids or by an equal key in any (N,) array of keys: the least id
    of the linked rows. `join_groups` does the same to names.
    """
    classes = [np.unique(column, return_inverse=True)[1] for column in (ids, *keys)]
    while True:
        before = ids
        for column in classes:
            least = np.full(int(column.max()) + 1, np.iinfo(ids.dtype).max)
            np.minimum.at(least, column, ids)
            ids = least[column]
        if np.array_equal(ids, before):
            return ids


def _draw(groups: np.ndarray, seed: int) -> np.ndarray:
    """(N,) int8: the split of every row, drawn from the distinct groups."""
    distinct, at = np.unique(groups, return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(distinct))
    edges = np.cumsum(SPLIT_FRACTIONS[:2]) * len(distinct)
    return np.searchsorted(edges, order, side="right").astype(np.int8)[at]


def _log_copies(
    contents: Mapping[str, np.ndarray],
    copies: Mapping[str, np.ndarray],
    present: Mapping[str, int],
    groups: np.ndarray,
    sides: np.ndarray,
    given: bool,
) -> None:
    """Say what a stream says of equal rows."""
    for m, keys in contents.items():
        if present[m] == len(keys) > 1 and (keys == keys[0]).all():
            log.warning("%s is the same in all of its %d rows: nothing can be learned from it", m, len(keys))
        elif m in copies:
            log.warning("%d rows repeat the %s of another row", repeats(keys), m)
    if not given:
        return
    if across := int(_across(groups, sides)[np.unique(groups, return_index=True)[1]].sum()):
        log.warning("%d groups are in more than one split: the given split is used", across)
    across = int(np.any([_across(keys, sides) for keys in copies.values()], axis=0).sum()) if copies else 0
    if across:
        log.warning("%d rows have equal inputs in another split (%s)", across, ", ".join(copies))


def _across(keys: np.ndarray, sides: np.ndarray) -> np.ndarray:
    """(N,) bool: whether an equal key is in another split."""
    at = np.unique(keys, return_inverse=True)[1]
    low, high = np.full(at.max() + 1, len(SPLITS), np.int8), np.zeros(at.max() + 1, np.int8)
    np.minimum.at(low, at, sides)
    np.maximum.at(high, at, sides)
    return np.asarray((low < high)[at])


def _write_split(
    folder: Path,
    folders: Sequence[Path],
    chosen: np.ndarray,
    views: int,
    groups: np.ndarray,
    contents: Mapping[str, np.ndarray],
    repeated: Iterable[str],
) -> dict[str, Any]:
    """Write the chosen rows of all parts to `folder`; returns the split's entries for the manifest."""
    (folder / "rows/content_keys").mkdir(parents=True)
    (folder / "index").mkdir()
    index = {m: StoredRows(folder / f"index/{m}.memmap", np.int64, views + 1) for m in contents}
    caption_keys = StoredRows(folder / "index/caption_keys.memmap", np.int64, views + 1, 2)
    names, ends = (StoredRows(folder / f"rows/{k}.memmap", t) for k, t in (("names", np.uint8), ("name_ends", np.int64)))
    offsets, start = dict.fromkeys(contents, 0), 0
    for part, place in _each_with_tables(folders, contents):
        here = chosen[start : start + len(part["names"])]
        encoded = [name.encode(errors="backslashreplace") for name in part["names"][here].tolist()]
        ends.append(names.shape[0] + np.cumsum([len(name) for name in encoded], dtype=np.int64))
        names.append(np.frombuffer(b"".join(encoded), np.uint8))
        for m, stored in index.items():
            rows = part[f"index.{m}"][here, : views + 1]
            stored.append(np.where(rows < 0, -1, rows + offsets[m]))
            offsets[m] += place[m]
        rows = np.arange(start, start + len(here))[here]
        text = contents["text"][rows] if "text" in contents else rows
        caption_keys.append(np.broadcast_to(text[:, None, None], (len(rows), views + 1, 2)))
        start += len(here)
    for name, column in (("group", groups), ("dataset", np.zeros_like(groups))):
        StoredRows(folder / f"rows/{name}.memmap", np.int64).append(column[chosen])
    counts = {m: repeats(contents[m][chosen]) for m in sorted(repeated)}
    counts = {m: n for m, n in counts.items() if n}
    for m in counts:
        StoredRows(folder / f"rows/content_keys/{m}.memmap", np.int64).append(contents[m][chosen])
    return {"rows": int(chosen.sum()), "datasets": ["arrays"], "repeated": counts}


def _each_with_tables(
    folders: Iterable[Path], modalities: Iterable[str]
) -> Iterator[tuple[Mapping[str, np.ndarray], dict[str, int]]]:
    """As `_each`, with {modality: number of rows of the part's table}."""
    for folder in folders:
        for part in _each([folder]):
            yield part, {m: int(part[f"index.{m}"].max(initial=-1)) + 1 for m in modalities}


def _write_labels(out: Path, folders: Sequence[Path]) -> bytes:
    """Write labels.csv and labels.json if samples have labels; returns a hash of them."""
    factors: dict[str, set[str]] = {}  # the kinds of columns that parts have: "f" of floats, "U" of texts
    values: dict[str, np.ndarray] = {}  # distinct floats, as many as decide whether they are classes
    for part in _each(folders):
        for k in (key.removeprefix("label.") for key in part if key.startswith("label.")):
            column = part[f"label.{k}"]
            known = column.dtype.kind == "U" or not np.isnan(column).all()
            if known:
                factors.setdefault(k, set()).add(column.dtype.kind)
            if column.dtype.kind == "f":
                values[k] = np.unique(np.concatenate([values.get(k, column[:0]), column]))[: MAX_CLASSES + 1]
            factors.setdefault(k, set())
    if mixed := [k for k, kinds in factors.items() if len(kinds) > 1]:
        raise UserError(f"the label {mixed[0]} is a number in some samples and none in others; give one kind.")
    numbers = {k for k, kinds in factors.items() if kinds == {"f"} and len(values[k]) > MAX_CLASSES}
    if not factors:
        return b""
    digest = hashlib.sha256(repr(sorted(numbers)).encode())
    with (out / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["row", *factors])
        for part in _each(folders):
            columns = []
            for k in factors:
                if f"label.{k}" not in part:
                    raise UserError(f"some samples have the label {k} and some have not; give None there.")
                texts = part[f"label.{k}"].tolist()
                texts = [f"{x:.6g}" if k in numbers else str(x) for x in texts]
                columns.append(["" if is_absent(text) else text for text in texts])
            rows = list(zip(part["names"].tolist(), *columns, strict=True))
            writer.writerows(rows)
            for row in rows:
                digest.update(repr(row).encode())
    kinds = {k: {"ownership": [], "kind": "number"} for k in factors if k in numbers}
    write_atomically(out / "labels.json", json.dumps({"factors": kinds}))
    return digest.digest()
