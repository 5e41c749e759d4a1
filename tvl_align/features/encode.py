"""Write a feature store: encode every image and sentence of the data once with the frozen encoders."""

import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, cycle, product
from pathlib import Path
from typing import Any, TypeVar

import torch
from tensordict import TensorDict
from torch import Tensor

from tvl_align.contract import FeatureSpec, Tokens
from tvl_align.data.constant import constant_modalities
from tvl_align.data.image_options import Colours
from tvl_align.data.loading import ImageBatch, RowViews, load_images
from tvl_align.data.samples import Samples
from tvl_align.data.swapped import swapped_groups
from tvl_align.data.tvl import PICTURES, Tolerance
from tvl_align.encoders.tvl import Stage1
from tvl_align.features.identity import Identity, identify, rows_digests
from tvl_align.features.store import FeatureStore
from tvl_align.features.tables import FORMAT, empty_table, maps_needed, write_rows
from tvl_align.system.console import UserError, progress
from tvl_align.system.distributed import barrier, is_main, rank, world_size
from tvl_align.system.files import lock_folder
from tvl_align.system.provenance import provenance
from tvl_align.system.workers import run_in_threads

ENCODE_BATCH = 64  # rows
GPU_BATCH = 128  # rows; larger ones are 3% faster and hold twice the memory
GPU_LANES = 3  # batches at a time on a GPU: one is computed while others are copied and written
LOOK = "look_"  # begins the names of the files of colour statistics in an unfinished store
MIN_BATCHES = 8  # smaller batches for small splits, so that no core idles long during the last batch
log = logging.getLogger(__name__)
T = TypeVar("T")


def open_or_encode(
    feature_dir: Path,
    stage1: Stage1,
    samples: Mapping[str, Samples],
    views: int,
    num_workers: int,
    expected: Identity | None = None,
    tolerance: Tolerance | None = None,
) -> FeatureStore:
    """Open the feature store for these settings, and encode it first if it does not exist.

    All processes of a distributed run must call this. An interrupted encode is resumed.

    feature_dir: folder of stores. views: augmented views per training row. expected: the identity that the store must have.
    If only versions of packages differ and that store exists, it is used. tolerance: how many rows may have images that
    cannot be used; these images are absent in the store and listed in its manifest. Raises UserError if the identity differs
    from `expected` (before encoding), if too many rows are bad, and if the data change during encoding.
    """
    identity = identify(stage1, samples, views, feature_dir)
    if expected is not None and expected.key != identity.key:
        return _earlier_store(feature_dir, expected, identity)
    assert identity.key is not None
    folder = feature_dir / identity.key
    if not (folder / "manifest.json").is_file():
        barrier()  # all processes have checked before one starts to write
        with lock_folder(feature_dir, wait=True, why="encodes into") if is_main() else nullcontext():
            barrier()
            if not (folder / "manifest.json").is_file():  # another run may have encoded it while this one waited
                with maps_needed(feature_dir):
                    _encode(folder, identity, stage1, samples, views, num_workers, tolerance or Tolerance())
    store = FeatureStore(folder)
    if store.key != identity.key:
        raise UserError(f"{folder} contains the store {store.key}, not {identity.key}; remove the folder and run again.")
    return store


def _earlier_store(feature_dir: Path, expected: Identity, now: Identity) -> FeatureStore:
    """The store of a run that would have another key today, if only versions of packages differ.

    Raises UserError, which names what differs.
    """
    folder = feature_dir / str(expected.key)
    stored = (folder / "manifest.json").is_file()
    recorded = Identity(expected.key, FeatureStore(folder).manifest["ingredients"]) if stored else expected
    differences = now.differences(recorded)
    what = ", ".join(text for _, text in differences)
    if stored and {name for name, _ in differences} == {"packages"}:
        log.warning("using the stored features of this run, which other versions made: %s", what)
        return FeatureStore(folder)
    raise changed_features(recorded, now)


def changed_features(expected: Identity, now: Identity) -> UserError:
    """The error for features of another identity than those of a run; it names what differs."""
    what = ", ".join(text for _, text in now.differences(expected)) or "Stage 1, data, options or packages"
    return UserError(
        f"the features of this run are {expected.key}, and these settings give {now.key}, because of {what}; restore what "
        "differs, or train again under another --log_name."
    )


def _encode(
    folder: Path,
    identity: Identity,
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
            log.warning("%s has stores of other settings only; encoding a new store", folder.parent)
        unfinished.mkdir(parents=True, exist_ok=True)  # kept if an encode of the same store was interrupted
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
        skipped = {name: _read_faults(unfinished / name) for name in splits}
        for name, faults in skipped.items():
            bad_rows = {row for row, _, _ in faults}
            if faults:
                row, modality, reason = faults[0]
                counts = Counter(f"{m}: {r}" for _, m, r in faults)
                log.warning("%s: files that cannot be used, by reason: %s", name, dict(counts))
                tolerance.check(len(bad_rows), len(samples[name]), f"{modality} of {samples[name].rows[row].name}: {reason}")
        if rows_digests(samples, folder.parent) != identity.ingredients["rows"]:
            shutil.rmtree(unfinished)
            raise UserError("the data changed while they were encoded; the unfinished store was removed, run again.")
        looks = _looks(unfinished, list(splits))
        for clause in constant_modalities(looks):
            log.warning("%s; nothing can be learned from them", clause)
        groups = [row.group for name in splits for row in samples[name].rows]
        swapped = swapped_groups(groups, *(looks[m] for m in PICTURES))
        if swapped:
            examples = ", ".join(swapped[:3]) + (" and more" if len(swapped) > 3 else "")
            log.warning("photos and touch images seem to be swapped in %d groups: %s", len(swapped), examples)
            if tolerance.strict:
                raise UserError(f"photos and touch images seem to be swapped in {examples}; swap their folders.")
        for name, info in splits.items():
            rows = samples[name].rows
            names, datasets, groups = ([getattr(row, column) for row in rows] for column in ("name", "dataset", "group"))
            info |= write_rows(unfinished / name, names, datasets, groups, samples[name].content_keys)
            shutil.rmtree(unfinished / name / "done")
        first = next(iter(samples.values()))
        manifest = {
            "format": FORMAT,
            "key": identity.key,
            "root": str(first.root.resolve()),
            "modalities": {name: asdict(spec) for name, spec in specs.items()},
            "splits": splits,
            "ingredients": identity.ingredients,
            "made_by": provenance(),
            "dropped": first.dropped,
            "skipped": {
                name: [{"row": samples[name].rows[r].name, "modality": m, "reason": reason} for r, m, reason in faults]
                for name, faults in skipped.items()
            },
            "swapped": swapped,
        }
        (unfinished / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(unfinished, folder)
    barrier()


@dataclass(frozen=True)
class _Plan:
    """The images and sentences of a split to encode, and their rows in the tables.

    index: {modality: (N, V+1) int64} table row of every view, -1 = absent. keys: (N, V+1, 2) int64 ids of the caption and of
    the sentence. sizes: {modality: number of rows of its table}. texts: the distinct sentences. passes: {name: (modalities
    with files that are loaded together, number of their views per row, including the plain one)}. looks: the modalities of
    pictures, whose colours are described.
    """

    index: dict[str, Tensor]
    keys: Tensor
    sizes: dict[str, int]
    texts: list[str]
    passes: dict[str, tuple[list[str], int]]
    looks: list[str]

    @classmethod
    def make(cls, samples: Samples, views: int, modalities: Sequence[str]) -> "_Plan":
        count = len(samples)
        image_views = views + 1 if samples.images.options.augment else 1  # sentences differ between views in any case
        index = {m: torch.full((count, views + 1), -1, dtype=torch.int64) for m in modalities}
        passes = {"images": ([m for m in PICTURES if m in index], image_views)}
        passes["further"] = [m for m in samples.further if m in index], 1
        passes = {name: (of_pass, n) for name, (of_pass, n) in passes.items() if of_pass}
        sizes: dict[str, int] = {}
        for of_pass, views_of_pass in passes.values():
            for modality in of_pass:
                has_file = torch.tensor([modality in row.files for row in samples.rows])
                sizes[modality] = int(has_file.sum()) * views_of_pass
                index[modality][has_file] = torch.arange(sizes[modality]).view(-1, views_of_pass)
        sentences: dict[str, int] = {}
        ids = torch.full((count, views + 1), -1, dtype=torch.int64)
        for row, view in product(range(count), range(views + 1)):
            sentence = samples.sentence(row, view)
            if sentence is not None:
                ids[row, view] = sentences.setdefault(sentence, len(sentences))
        if "text" in index:
            index["text"], sizes["text"] = ids, len(sentences)
        captions = samples.caption_ids()[:, None].expand_as(ids)
        unique = -1 - torch.arange(count)[:, None].expand_as(ids)  # rows without a sentence have no positives in text
        keys = torch.stack([captions, torch.where(ids >= 0, ids, unique)], dim=-1)
        looks = [*PICTURES, *(m for m, take in samples.further.items() if take.colours is not None)]
        return cls(index, keys, sizes, list(sentences) if "text" in index else [], passes, looks)

    def create_files(self, folder: Path, specs: Mapping[str, FeatureSpec]) -> None:
        """Create the index, the tables filled with zeros, and the flags of what has been encoded."""
        count = len(self.keys)
        shutil.rmtree(folder, ignore_errors=True)
        TensorDict({**self.index, "caption_keys": self.keys}, batch_size=[count]).memmap(folder / "index")
        for modality, size in self.sizes.items():
            if size:
                empty_table(size, specs[modality]).memmap_like(folder / modality)
        flags = {"text": len(self.texts), **{name: count * views for name, (_, views) in self.passes.items()}}
        done = {what: torch.zeros(size, dtype=torch.bool) for what, size in flags.items()}
        done |= {f"{LOOK}{m}": torch.full((count, 6), torch.nan) for m in self.looks}
        TensorDict(done).memmap(folder / "begun")
        os.replace(folder / "begun", folder / "done")  # the folder "done" exists only if all files above do


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
    """Encode one split. Each process fills its own rows of the shared tables. Batches that are done are skipped.

    Photos and touch images are encoded once for each view, files of further modalities, which are not augmented, once.

    Several batches are in work at a time. On a GPU each has a CUDA stream of its own, so that only its own thread waits for
    its copies: the GPU computes the next batch while this one is copied to the GPU, back, and written.
    """
    count, device, plan = len(samples), stage1.logit_scale.device, _Plan.make(samples, views, stage1.modalities)
    if is_main() and not (folder / "done").is_dir():
        plan.create_files(folder, specs)
    barrier()
    done = TensorDict.load_memmap(folder / "done")
    largest = GPU_BATCH if device.type == "cuda" else ENCODE_BATCH
    batches = {what: _remaining_batches(done[what], largest) for what in ("text", *plan.passes)}
    barrier()  # all processes have read the flags before one sets any
    tables = {m: TensorDict.load_memmap(folder / m) for m, size in plan.sizes.items() if size}
    index = TensorDict.load_memmap(folder / "index")
    bad_rows: set[int] = set()

    def encode(modality: str, inputs: Tensor) -> Tokens:
        return stage1.encode({modality: inputs}).modalities[modality]

    def write_text(batch: Tensor) -> int:
        tokens = stage1.tokenize([plan.texts[i] for i in batch.tolist()])
        _write(tables["text"], batch, encode("text", tokens.to(device, non_blocking=True)))
        done["text"].numpy()[batch.numpy()] = True
        return len(batch)

    def write_images(name: str, batch: Tensor, row_views: RowViews, loaded: ImageBatch) -> int:
        for modality, (positions, images) in loaded.images.items():
            images = images.to(device, non_blocking=True)
            encoded = encode(modality, images)
            plain = [i for i, position in enumerate(positions) if row_views[position][1] == 0]
            if plain and modality in plan.looks:
                rows = [row_views[positions[i]][0] for i in plain]
                look = _colour_statistics(images[plain, :3], samples.colours(modality))  # of the first of two touch frames
                done[f"{LOOK}{modality}"][rows] = look.cpu()
            _write(tables[modality], torch.stack([plan.index[modality][row_views[i]] for i in positions]), encoded)
        done[name].numpy()[batch.numpy()] = True
        return len(batch)

    def record_faults(row_views: RowViews, faults: Sequence[tuple[int, str, str]], views: int) -> None:
        for position, modality, reason in faults:
            row, view = row_views[position]
            index[modality][row, slice(view, view + 1) if views > 1 else slice(None)] = -1
            _append_fault(folder, row, modality, reason)
            bad_rows.add(row)
            tolerance.check(len(bad_rows), count, f"{modality} of {samples.rows[row].name}: {reason}")

    def image_jobs(name: str, modalities: Sequence[str], views: int) -> Iterator[Callable[[], int]]:
        pairs = [[divmod(i, views) for i in batch.tolist()] for batch in batches[name]]  # (row, view)
        images = load_images(samples.only(modalities), pairs, workers, modalities)
        for batch, row_views, loaded in zip(batches[name], pairs, images, strict=True):
            record_faults(row_views, loaded.faults, views)
            yield partial(write_images, name, batch, row_views, loaded)

    texts = (partial(write_text, batch) for batch in batches["text"])
    images = (image_jobs(what, *of_pass) for what, of_pass in plan.passes.items())
    jobs: Iterator[Callable[[], int]] = chain(texts, chain.from_iterable(images))
    with progress(sum(map(len, chain(*batches.values()))), f"encode {name}", "view", quiet=not is_main()) as bar:
        for finished in run_in_threads(on_streams(jobs, device), GPU_LANES if device.type == "cuda" else None):
            bar.update(finished)


def on_streams(jobs: Iterable[Callable[[], T]], device: torch.device) -> Iterator[Callable[[], T]]:
    """The same jobs; on a GPU they use GPU_LANES CUDA streams in turn. On a CPU they are unchanged."""
    if device.type != "cuda":
        yield from jobs
        return
    streams = [torch.cuda.Stream(device) for _ in range(GPU_LANES)]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream(device))  # which copied the weights to the GPU

    def on(stream: torch.cuda.Stream, job: Callable[[], T]) -> T:
        with torch.cuda.stream(stream):
            return job()

    yield from (partial(on, stream, job) for stream, job in zip(cycle(streams), jobs, strict=False))


def _remaining_batches(done: Tensor, largest: int) -> list[Tensor]:
    """This process's share of the batches of `largest` rows, fewer in a small split, that are not encoded yet.

    The batches do not depend on the number of processes or on where an encode was interrupted: the other rows of a batch can
    change the last digit of a feature.
    """
    batches = torch.arange(len(done)).split(max(1, min(largest, len(done) // MIN_BATCHES)))
    return [batch for batch in batches if not done[batch].all()][rank() :: world_size()]


def _append_fault(folder: Path, row: int, modality: str, reason: str) -> None:
    """Append an image that cannot be used to this process's file. A resumed encode may append it again."""
    with (folder / "done" / f"faults-{rank()}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps([row, modality, reason]) + "\n")


def _read_faults(folder: Path) -> list[tuple[int, str, str]]:
    """The sorted (row, modality, reason) of every image that cannot be used, from the files of all processes."""
    lines = [line for file in (folder / "done").glob("faults-*.jsonl") for line in file.read_text("utf-8").splitlines()]
    return sorted({(int(row), str(modality), str(reason)) for row, modality, reason in map(json.loads, lines)})


def _colour_statistics(images: Tensor, colours: Colours) -> Tensor:
    """Images (n, 3, S, S) normalised by `colours` -> (n, 6): mean and standard deviation of each channel before that."""
    mean, std = colours
    scale, shift, average = images.new_tensor(std), images.new_tensor(mean), images.mean((2, 3))
    deviation = (images.square().mean((2, 3)) - average.square()).clamp(min=0).sqrt()
    return torch.cat([average * scale + shift, deviation * scale], dim=1)


def _looks(folder: Path, splits: Sequence[str]) -> dict[str, Tensor]:
    """Colour statistics of the pictures of all splits: {modality: (N, 6)}, NaN where a row has no picture."""
    done = [TensorDict.load_memmap(folder / name / "done") for name in splits]
    files = [file for file in map(str, done[0].keys()) if file.startswith(LOOK)]
    return {file.removeprefix(LOOK): torch.cat([d[file] for d in done]) for file in files}


def _write(table: TensorDict, rows: Tensor, tokens: Tokens) -> None:
    """Write features to these rows of a table in its precision. Padding is written as zeros.

    Raises UserError for features that are not finite in half precision.
    """
    masked = (tokens.tokens * tokens.mask[..., None]).half()
    if not (masked.isfinite().all() and tokens.pooled.isfinite().all()):
        raise UserError(
            "the encoders give features that are NaN, inf or above 65,504; use another Stage-1 checkpoint, or "
            "--encode_precision float32."
        )
    for name, column in (("tokens", masked), ("mask", tokens.mask), ("pooled", tokens.pooled.float())):
        table[name].numpy()[rows.numpy(), : column.shape[1]] = column.cpu().numpy()
