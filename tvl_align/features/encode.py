"""Filling a feature store: every image and sentence goes through the frozen encoders once."""

import hashlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from tvl_align.contract import FeatureSpec, Tokens
from tvl_align.data.loading import ImageBatch, Jobs, load_images
from tvl_align.data.samples import Samples
from tvl_align.data.swapped import swapped_groups
from tvl_align.data.transforms import PHOTO_MEAN, PHOTO_STD, TOUCH_MEAN, TOUCH_STD
from tvl_align.data.tvl import Tolerance
from tvl_align.encoders.tvl import Stage1
from tvl_align.features.store import FeatureStore
from tvl_align.features.tables import FORMAT, empty_table, write_rows
from tvl_align.system.console import UserError, progress
from tvl_align.system.distributed import barrier, is_main, rank, world_size
from tvl_align.system.files import lock_folder
from tvl_align.system.provenance import package_versions, provenance
from tvl_align.system.workers import run_in_threads

ENCODE_BATCH = 64
LEAST_BATCHES = 8  # unless rows are fewer: where few batches are encoded, no core waits long for the last
log = logging.getLogger(__name__)


def store_key(stage1: Stage1, samples: Mapping[str, Samples], views: int) -> tuple[str, dict[str, Any]]:
    """The key of the store for these settings, and the ingredients it hashes."""
    some = next(iter(samples.values()))
    ingredients = {
        "format": FORMAT,
        "encoders": stage1.fingerprint(),
        "features": stage1.features,
        "images": asdict(some.images.options),
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

    expected: the key it must have. tolerance: how many images may be bad; these are absent in the store, and counted in
    its manifest. Raises UserError for another key, before anything is encoded; for more bad images; for data that change
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
        with lock_folder(feature_dir, wait=True, why="encodes into") if is_main() else nullcontext():
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
                log.warning("%s: images that cannot be used, by reason: %s", name, dict(counts))
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
            told |= write_rows(unfinished / name, [row.name for row in rows], [row.dataset for row in rows])
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
    {modality: rows of its table}; texts: each sentence once; views: of images, the plain one included.
    """

    index: dict[str, Tensor]
    keys: Tensor
    sizes: dict[str, int]
    texts: list[str]
    views: int

    @classmethod
    def of(cls, samples: Samples, views: int, modalities: Sequence[str]) -> "_Plan":
        count = len(samples)
        drawn_views = views + 1 if samples.images.options.augment else 1  # of images; sentences always vary
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
                empty_table(size, specs[modality]).memmap_like(folder / modality)
        flags = {"images": count * self.views, "text": len(self.texts)}
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
    todo, untold = (_batches_left(done[what]) for what in ("images", "text"))
    barrier()  # nobody ticks anything off before everybody has looked
    tables = {m: TensorDict.load_memmap(folder / m) for m, size in plan.sizes.items() if size}
    written = TensorDict.load_memmap(folder / "index")
    bad_rows: set[int] = set()

    def write_text(at: Tensor) -> int:
        encoded = stage1.encode({"text": stage1.tokenize([plan.texts[i] for i in at.tolist()]).to(device)}).modalities
        _write(tables["text"], at, encoded["text"])
        done["text"].numpy()[at.numpy()] = True
        return len(at)

    def write_pictures(at: Tensor, part: Jobs, batch: ImageBatch) -> int:
        for modality, (positions, images) in batch.images.items():
            encoded = stage1.encode({modality: images.to(device)}).modalities
            _write(tables[modality], torch.stack([plan.index[modality][part[i]] for i in positions]), encoded[modality])
            plain = [i for i, position in enumerate(positions) if part[position][1] == 0]
            if plain:
                done[f"look_{modality}"][[part[positions[i]][0] for i in plain]] = _look(modality, images[plain])
        done["images"].numpy()[at.numpy()] = True
        return len(at)

    def note(part: Jobs, faults: Sequence[tuple[int, str, str]]) -> None:
        for position, modality, reason in faults:
            row, view = part[position]
            if modality in plan.index:
                written[modality][row, slice(view, view + 1) if plan.views > 1 else slice(None)] = -1
                _note_fault(folder, row, modality, reason)
                bad_rows.add(row)
                tolerance.check(len(bad_rows), count, f"{modality} of {samples.rows[row].name}: {reason}")

    def images() -> Iterator[Callable[[], int]]:
        parts = [[divmod(i, plan.views) for i in at.tolist()] for at in todo]  # (row, view)
        for at, part, batch in zip(todo, parts, load_images(samples, parts, workers, stage1.modalities), strict=True):
            note(part, batch.faults)
            yield partial(write_pictures, at, part, batch)

    with progress(sum(map(len, todo + untold)), f"encode {name}", "view", quiet=not is_main()) as bar:
        for work in ((partial(write_text, at) for at in untold), images()):
            for finished in run_in_threads(work):
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
    """(row, modality, reason) of every image that could not be used, noted by whatever process."""
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


def _write(table: TensorDict, rows: Tensor, tokens: Tokens) -> None:
    """Write into these rows what a table keeps of tokens, in its precision; what pads a batch is not kept."""
    kept = (tokens.tokens * tokens.mask[..., None]).half()
    if not (kept.isfinite().all() and tokens.pooled.isfinite().all()):
        raise UserError("the encoders gave features that are NaN, inf or above 65,504; their checkpoint is of no use.")
    for name, column in (("tokens", kept), ("mask", tokens.mask), ("pooled", tokens.pooled.float())):
        table[name].numpy()[rows.numpy(), : column.shape[1]] = column.cpu().numpy()
