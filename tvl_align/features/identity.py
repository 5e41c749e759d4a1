"""What a feature store is identified by: the content of what changes a feature, never its place or its time.

Bytes of image files, rows, sentences, transforms, weights of the encoders, and the versions of the packages that compute
features. Hashes of files are kept in a file beside the stores, so that unchanged files are read once.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from tvl_align.data.image_options import ImageOptions
from tvl_align.data.samples import Samples, TextOptions
from tvl_align.data.text import Sentence
from tvl_align.data.tvl import background_file, file_of, name_of
from tvl_align.encoders.tvl import Stage1
from tvl_align.features.tables import FORMAT
from tvl_align.system.console import progress
from tvl_align.system.distributed import barrier, is_main
from tvl_align.system.files import write_atomically
from tvl_align.system.provenance import FEATURE_PACKAGES, package_versions

HASHES = "hashes.json"  # in the folder of the stores
LATER_OPTIONS = {  # of images: {name: default}
    name: getattr(ImageOptions(), name)
    for name in (
        *("photo_crop", "touch_crop", "touch_turn", "photo_mean", "photo_std", "touch_mean", "touch_std"),
        *("more_bits", "touch_frames", "earlier_touch"),
    )
}
UNNAMED = {"precision": "float32"}  # ingredients that are left out where they have this value, so that stores keep their key
GONE = "gone"  # stands for the hash of a file that cannot be read


@dataclass(frozen=True)
class Identity:
    """The key of a feature store and the ingredients that it hashes; of an imported store, the key alone."""

    key: str | None
    ingredients: Mapping[str, Any] = field(default_factory=dict)

    def differences(self, other: "Identity") -> list[tuple[str, str]]:
        """(ingredient, what differs), such as ("packages", "torch 2.9 (it was 2.8)"). `other` is the earlier identity."""
        found: list[tuple[str, str]] = []
        for name, what in WHAT.items():
            now, was = (side.ingredients.get(name, UNNAMED.get(name)) for side in (self, other))
            if now == was or now is None or was is None:
                continue
            if name == "images":
                now, was = LATER_OPTIONS | now, LATER_OPTIONS | was
            if name == "rows":
                texts = [f"the rows or images of {split}" for split in sorted(now) if now[split] != was.get(split)]
            elif name in ("packages", "images"):
                texts = [f"{k} {now.get(k)} (it was {was.get(k)})" for k in sorted({*now, *was}) if now.get(k) != was.get(k)]
            elif name == "precision":
                texts = [f"{what} {now} (it was {was})"]
            else:
                texts = [what]
            found += [(name, text) for text in texts]
        return found


WHAT = {
    "format": "the format of stores",
    "encoders": "the weights of the Stage-1 checkpoint",
    "features": "--features",
    "precision": "--encode_precision",
    "images": "the transforms of images",
    "text": "prompt, order or synonyms of sentences",
    "views": "--views",
    "seed": "--seed",
    "rows": "the rows",
    "packages": "the versions of packages",
}


def identify(stage1: Stage1, samples: Mapping[str, Samples], views: int, feature_dir: Path) -> Identity:
    """The identity of the feature store for these settings. All processes of a distributed run must call this.

    feature_dir: where hashes of files are kept. The main process reads the files, with a progress bar.
    """
    first = next(iter(samples.values()))  # all splits have the same options
    if is_main():
        rows_digests(samples, feature_dir)
    barrier()  # the other processes find the hashes in the file
    ingredients = {
        "format": FORMAT,
        **encoder_ingredients(stage1),
        "images": image_ingredients(first.images.options),
        "text": text_ingredients(first.text, any(isinstance(r.caption, Sentence) for s in samples.values() for r in s.rows)),
        "views": views,
        "seed": first.seed,
        "packages": package_versions(FEATURE_PACKAGES),
        "rows": rows_digests(samples, feature_dir),
    }
    text = json.dumps(ingredients, sort_keys=True)
    return Identity(hashlib.sha256(text.encode()).hexdigest()[:16], json.loads(text))


def encoder_ingredients(stage1: Stage1) -> dict[str, str]:
    """What features depend on beside the inputs: weights, kind of features, and the precision if it is not float32."""
    found = {"encoders": stage1.fingerprint(), "features": stage1.features, "precision": stage1.precision}
    return {name: value for name, value in found.items() if UNNAMED.get(name) != value}


def precision_of(ingredients: Mapping[str, Any]) -> Any:
    """The precision of the encoders that made features of these ingredients."""
    return ingredients.get("precision", UNNAMED["precision"])


def image_ingredients(options: ImageOptions) -> dict[str, Any]:
    """The options as {name: value}; `ImageOptions(**ingredients)` is the inverse.

    Options that earlier versions did not have are left out where they have their default, so that stores keep their key.
    """
    return {k: v for k, v in asdict(options).items() if k not in LATER_OPTIONS or v != LATER_OPTIONS[k]}


def text_ingredients(text: TextOptions, sentences: bool) -> dict[str, Any]:
    """What is done to a caption. sentences: captions are sentences, used as they are; not named if they are adjectives."""
    found: dict[str, Any] = {"prompt": text.prompt, "shuffle": text.shuffle, "synonyms": dict(text.synonyms)}
    return found | ({"sentences": True} if sentences else {})


def rows_digests(samples: Mapping[str, Samples], feature_dir: Path) -> dict[str, str]:
    """{split: SHA-256 of its rows and of the bytes of their files}; see `identify`."""
    root = next(iter(samples.values())).root
    hashes = _hashes(root, sorted(set(chain.from_iterable(map(_files, samples.values())))), feature_dir)
    return {name: _rows_digest(split, hashes) for name, split in samples.items()}


def _files(samples: Samples) -> Iterator[str]:
    """The files of a split, relative to the data folder; earlier frames and backgrounds where they are used."""
    for row in samples.rows:
        yield from row.files.values()
        if samples.images.options.earlier_touch and row.earlier is not None:
            yield row.earlier
        if samples.images.options.subtract_background and (path := background_file(samples.root, row)) is not None:
            yield name_of(path.relative_to(samples.root))


def _rows_digest(samples: Samples, hashes: Mapping[str, str]) -> str:
    """SHA-256 of the rows of a split and of the bytes of their files."""
    digest = hashlib.sha256()
    for row in samples.rows:
        digest.update(repr(row).encode())
    for path in _files(samples):
        digest.update(f"{path} {hashes[path]}\n".encode())
    return digest.hexdigest()


def _hashes(root: Path, paths: Sequence[str], folder: Path) -> dict[str, str]:
    """{path: SHA-256 of the file's bytes}. Known hashes of files of the same size and time are not computed again."""
    stats, kept, here = {path: _stat(file_of(root, path)) for path in paths}, folder / HASHES, str(root.resolve())
    known = _read_hashes(kept)
    own = known.get(here, {})
    changed = [path for path in paths if own.get(path, ["", ""])[0] != stats[path]]
    if changed:
        with progress(len(changed), "hash images", "file", quiet=not is_main()) as bar, ThreadPoolExecutor() as pool:
            for path, value in zip(changed, pool.map(lambda p: _hash(file_of(root, p)), changed), strict=True):
                own[path] = [stats[path], value]
                bar.update()
        if is_main():
            with suppress(OSError):  # a read-only folder: files are hashed again next time
                folder.mkdir(parents=True, exist_ok=True)
                write_atomically(kept, json.dumps(known | {here: own}))
    return {path: own[path][1] for path in paths}


def _read_hashes(path: Path) -> dict[str, dict[str, list[str]]]:
    """{data folder: {path: [size and time, hash]}}; {} for a file that is missing or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        whole = isinstance(found, dict) and all(
            isinstance(files, dict) and all(isinstance(x, list) and len(x) == 2 for x in files.values())
            for files in found.values()
        )
        return found if whole else {}
    except (OSError, ValueError):
        return {}


def _stat(path: Path) -> str:
    try:
        stat = path.stat()
        return f"{stat.st_size} {stat.st_mtime_ns}"
    except OSError:
        return GONE


def _hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return GONE
