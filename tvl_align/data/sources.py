"""Streams of samples from common formats: Hugging Face `datasets`, WebDataset shards, tables of pairs, TVL's folders,
LeRobot datasets, video files.

`open_source` gives one; `tvl_align.features.stream` says what a sample is and encodes it. Each format is read once, in its
order, by the library made for it. LeRobot datasets are the exception: the library of that name brings a PyTorch of its own,
so their documented files (versions 2 and 3) are read with pyarrow and PyAV. `open_blocks` gives a source in blocks, which
are read on their own, by any process of any machine (`tvl_align.features.parts`).

Places are folders and files, for datasets, shards and tables also addresses that fsspec knows: s3://bucket/folder.

A `Keys` names the places of a sample's parts, and each reader says what a key is in its format.
"""

import csv
import hashlib
import importlib
import json
import math
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from tvl_align.data.pairs import SPLITS
from tvl_align.data.pictures import Touch
from tvl_align.data.text import Sentence, is_absent
from tvl_align.data.tvl import DELIMITERS, PICTURES, Row, file_of, read_header, read_table, read_tvl
from tvl_align.system.console import UserError

VIDEOS = (".mp4", ".mov", ".mkv", ".avi", ".webm")
ROWS_AT_ONCE = 64  # of a parquet file
BLOCK_ROWS = 1024  # samples of a block of a table
TVL_KEYS = ("vision", "tactile", "background", "caption", "group", "dataset")
RATE_TOLERANCE = 0.01  # relative, between the frame rates of videos recorded together


@dataclass(frozen=True)
class Keys:
    """Where the parts of a sample are; None: nowhere. text: adjectives. sentence: a text that is used as it is; where a
    sample has none its adjectives are used. labels: factors that probes predict. more: {further modality: its key}.
    earlier_touch, touch_background: of touch images of the same contact, some frames before, and without contact."""

    vision: str | None = None
    tactile: str | None = None
    text: str | None = None
    sentence: str | None = None
    group: str | None = None
    split: str | None = None
    labels: tuple[str, ...] = ()
    more: Mapping[str, str] = field(default_factory=dict)
    earlier_touch: str | None = None
    touch_background: str | None = None

    @property
    def files(self) -> dict[str, str]:
        """{modality: key} of pictures and of further modalities."""
        keys = {"vision": self.vision, "tactile": self.tactile, **self.more}
        return {m: key for m, key in keys.items() if key is not None}

    @property
    def of_files(self) -> list[str]:
        """The keys whose values are files, pictures or numbers, and no texts."""
        beside = (key for key in (self.earlier_touch, self.touch_background) if key is not None)
        return list(dict.fromkeys([*self.files.values(), *beside]))

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities that have a key."""
        text = ("text",) if self.text is not None or self.sentence is not None else ()
        return (*(m for m in PICTURES if m in self.files), *text, *self.more)

    @property
    def used(self) -> list[str]:
        """All keys that are given."""
        single = [getattr(self, f.name) for f in fields(self) if f.name not in ("labels", "more")]
        return list(dict.fromkeys(key for key in (*single, *self.labels, *self.more.values()) if key is not None))


@dataclass(frozen=True)
class Source:
    """A stream of samples, and how many they are; None: not known."""

    samples: Iterator[dict[str, Any]]
    total: int | None = None


@dataclass(frozen=True)
class Block:
    """A part of a source that is read on its own: a shard, or some rows of a table.

    name: what it is, the same whenever the source is opened; it has the size of its file. read: gives its samples; it can be
    pickled. total: how many they are; None: not known.
    """

    name: str
    read: Callable[[], Iterator[dict[str, Any]]]
    total: int | None = None


def open_source(name: str, keys: Keys, every: int = 1) -> Source:
    """Open `datasets:FOLDER`, `webdataset:SHARDS`, `pairs:TABLE`, `tvl:FOLDER`, `lerobot:FOLDER` or `video:FOLDER`.

    every: one of so many frames of videos and episodes is taken. Raises UserError for another name, for a folder that is not
    there or not of this format, for unknown keys and for a missing library; also while the samples are read.
    """
    kind, place = _kind(name)
    if every != 1 and kind not in STREAMS:
        raise UserError(f"--every counts frames, and {kind} has none; leave it out.")
    if kind in STREAMS:
        return STREAMS[kind](place, keys, every)
    blocks = BLOCKS[kind](place, keys, BLOCK_ROWS)
    totals = [block.total for block in blocks]
    total = None if None in totals else sum(t for t in totals if t is not None)
    return Source(chain.from_iterable(block.read() for block in blocks), total)


def open_blocks(name: str, keys: Keys, rows: int = BLOCK_ROWS) -> list[Block]:
    """The blocks of `datasets:`, `webdataset:`, `pairs:` or `tvl:`, in the order in which `open_source` reads them.

    rows: samples of a block of a table; a shard is a block of its own, as is a row group of a parquet file that has more.
    Nothing but names and sizes is read here, and the headers of tables; of TVL's folders, all tables. Raises UserError as
    `open_source`, and for the other sources.
    """
    kind, place = _kind(name)
    if kind in STREAMS:
        raise UserError(
            f"{kind} is read by one process; leave out --ray and torchrun, or write {place} as webdataset or parquet shards."
        )
    return BLOCKS[kind](place, keys, rows)


def _kind(name: str) -> tuple[str, str]:
    kind, colon, place = name.partition(":")
    if kind not in BLOCKS | STREAMS or not (colon and place):
        raise UserError(f"--source {name} names no source; give {', '.join(f'{k}:PLACE' for k in BLOCKS | STREAMS)}.")
    return kind, place


def _sample(name: str, keys: Keys, value: Callable[[str], Any], **known: Any) -> dict[str, Any]:
    """A sample whose parts are value(key); `known` are parts that need no key."""
    sentence = _text(value(keys.sentence)) if keys.sentence is not None else None
    text = _text(value(keys.text)) if keys.text is not None else None
    sample: dict[str, Any] = {"name": name, "text": text if sentence is None else Sentence(sentence)}

    def of_file(key: str | None) -> Any:
        found = value(key) if key is not None else None
        return np.asarray(found) if isinstance(found, list) else found

    sample |= {modality: of_file(key) for modality, key in keys.files.items()}
    beside = of_file(keys.earlier_touch), of_file(keys.touch_background)
    if sample.get("tactile") is not None and any(picture is not None for picture in beside):
        sample["tactile"] = Touch(sample["tactile"], *beside)
    for part in ("group", "split"):
        key = getattr(keys, part)
        sample[part] = value(key) if key is not None else None
    sample["labels"] = {factor: value(factor) for factor in keys.labels}
    return sample | {k: v for k, v in known.items() if sample.get(k) is None}


def _text(value: Any) -> str | None:
    """A text as it is, a list as adjectives; None where it says "no value"."""
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
    return None if text is None or is_absent(str(text)) else str(text)


def import_extra(name: str, extra: str) -> Any:
    """The package `name`. Raises UserError, which names the extra of tvl-align that installs it, if it is missing."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed; run pip install 'tvl-align[{extra}]'.") from error


def _folder(place: str, kind: str) -> Path:
    folder = Path(place)
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}; {kind}: takes a folder.")
    return folder


def _check_keys(keys: Iterable[str], known: Iterable[str], where: Path | str) -> None:
    names = list(known)
    if unknown := [key for key in keys if key not in names]:
        raise UserError(f"{where} has no {unknown[0]!r}; it has {', '.join(names) or 'nothing'}.")


@contextmanager
def _readable(path: Path | str, *errors: type[Exception]) -> Iterator[None]:
    """Raise UserError in place of the errors of a damaged file."""
    expected: tuple[type[Exception], ...] = (OSError, ValueError, KeyError, TypeError, EOFError, *errors)
    try:
        yield
    except expected as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise UserError(f"{path} cannot be read ({reason}); repair it or leave it out.") from error


# Files and addresses


def _local(place: str) -> Path | None:
    """The path of a place in this machine's file systems; None for an address, such as s3://bucket/folder."""
    if place.startswith("file://"):
        return Path(place.removeprefix("file://"))
    return None if "://" in place else Path(place)


def _absolute(place: str) -> str:
    """A place that is the same in processes whose current folder is another one."""
    return str(Path(place).absolute()) if ":" not in place else place


def _file_system(place: str) -> tuple[Any, str]:
    """fsspec's file system of a file or address, and the path there."""
    fsspec = importlib.import_module("fsspec")  # PyTorch brings it
    try:
        fs, path = fsspec.core.url_to_fs(place)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"{place} is an address that cannot be opened ({error}); install what it needs, or copy it."
        ) from error
    return fs, str(path)


def _size(place: str, what: str) -> int:
    """Bytes of a file. Raises UserError, which says what it should be, if there is none."""
    fs, path = _file_system(place)
    try:
        return int(fs.size(path))
    except FileNotFoundError as error:
        raise UserError(f"no such {what}: {place}; check the name, and write one with braces in quotes.") from error


def _file_in(folder: str, name: str) -> Path | bytes:
    """The path of a file in a folder, or the bytes of one at an address. Raises UserError if it is outside of the folder."""
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise UserError(f"{name} is outside of {folder}; give paths relative to it.")
    local = _local(folder)
    if local is not None:
        return file_of(local, name)
    fs, path = _file_system(folder)
    try:
        return bytes(fs.cat_file(f"{path}/{name}"))
    except FileNotFoundError:
        return Path(name)  # which is missing here too, and counted as such


def _ranges(ends: Iterable[int], rows: int) -> Iterator[tuple[int, int]]:
    """Ranges of at least `rows` rows, but for the last; they end at some of the increasing `ends`."""
    start = end = 0
    for end in ends:
        if end - start >= rows:
            yield start, end
            start = end
    if end > start:
        yield start, end


# Hugging Face datasets


def datasets_blocks(place: str, keys: Keys, rows: int) -> list[Block]:
    """A folder of `Dataset.save_to_disk` or `DatasetDict.save_to_disk`, or one with .parquet or .arrow files; of parquet
    files also an address.

    Keys are columns: of pictures, an Image, bytes, a path (relative to the folder) or an array of values from 0 to 255; of
    further modalities also an Audio, which is given as the bytes or the path of its file, or a list of numbers. Classes of a
    ClassLabel get their names. Without a split column the splits are those of the DatasetDict, or of files that begin with
    their name, as in train-00000-of-00002.parquet, where there are two or more.
    """
    import_extra("datasets", "datasets")
    if _local(place) is not None:
        place = str(_folder(str(_local(place)), "datasets").absolute())
    blocks = []
    with _readable(place):
        tables = _tables(place)
    splits = {split for split, _ in tables}
    named = len(splits) > 1 and "" not in splits and keys.split is None
    for split, open_table in tables:
        with _readable(place):
            table = open_table()
        _check_keys(keys.used, table.features, place)
        for start, stop in _ranges(table.ends, rows):
            read = partial(_table_rows, open_table, keys, start, stop, split if named else None)
            blocks.append(Block(f"{place} {table.name} {table.version} {start}-{stop}", read, stop - start))
    return blocks


@dataclass(frozen=True)
class _Table:
    """A table of a dataset: rows(columns, start, stop) gives some of its rows as {column: value}.

    version: another one if the table has changed. ends: row numbers at which a range of rows may end.
    """

    name: str
    version: str
    features: Mapping[str, Any]
    ends: Sequence[int]
    rows: Callable[[Sequence[str], int, int], Iterator[dict[str, Any]]]
    place: str

    def value(self, row: Mapping[str, Any], of_files: Sequence[str], key: str) -> Any:
        """A value of a row as a part of a sample. Text of a column of files is a path, and a list an array: a picture of
        0 to 255 if it has two or three axes.
        """
        value, names = row[key], getattr(self.features[key], "names", None)
        if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
            value = value["path"] if value["bytes"] is None else value["bytes"]
        if names is not None and isinstance(value, int):
            return names[value] if 0 <= value < len(names) else None  # -1: not known
        if key not in of_files:
            return value
        if isinstance(value, list):
            array = np.asarray(value)
            whole = array.dtype.kind in "iu" and 0 <= array.min(initial=0) <= array.max(initial=0) <= 255
            return array.astype(np.uint8) if whole and array.ndim > 1 else array
        if isinstance(value, str):
            if is_absent(value):
                return None
            return _file_in(self.place, value) if _local(self.place) is None else Path(self.place) / value
        return value


def _table_rows(
    open_table: Callable[[], _Table], keys: Keys, start: int, stop: int, split: str | None
) -> Iterator[dict[str, Any]]:
    """The samples of some rows of a table."""
    table, of_files = open_table(), keys.of_files
    known = {} if split is None else {"split": split}
    with _readable(table.place):
        for i, row in enumerate(table.rows(keys.used, start, stop), start):
            yield _sample(f"{table.name}/{i}", keys, partial(table.value, row, of_files), **known)


def _tables(place: str) -> list[tuple[str, Callable[[], _Table]]]:
    """(split, function that opens it) of every table of a dataset; the split is "" where none is named."""
    folder = _local(place)
    if folder is not None and ((folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()):
        loaded = import_extra("datasets", "datasets").load_from_disk(place)
        names = list(loaded) if isinstance(loaded, dict) else ["row"]
        return [(name, partial(_saved, place, name)) for name in names]
    fs, path = _file_system(place)
    names = sorted(PurePosixPath(f).relative_to(path).as_posix() for f in fs.find(path))
    found: list[tuple[str, Callable[[], _Table]]] = []
    for name in names:
        split = PurePosixPath(name).stem.partition("-")[0]
        split = split if split in SPLITS else ""
        if name.endswith(".parquet"):
            found.append((split, partial(_parquet, place, name)))
        elif name.endswith(".arrow") and folder is not None:
            found.append((split, partial(_arrow, place, name)))
    if not found:
        raise UserError(
            f"{place} has no dataset; give a folder of save_to_disk or one of .parquet or .arrow files, or an address of "
            ".parquet files."
        )
    return found


def _saved(place: str, name: str) -> _Table:
    loaded = import_extra("datasets", "datasets").load_from_disk(place)
    return _mapped(place, name, loaded[name] if isinstance(loaded, dict) else loaded)


def _arrow(place: str, name: str) -> _Table:
    table = import_extra("datasets", "datasets").Dataset.from_file(f"{place}/{name}")
    return _mapped(place, PurePosixPath(name).with_suffix("").as_posix(), table)


def _mapped(place: str, name: str, table: Any) -> _Table:
    """Memory-mapped rows. Pictures and sound are not decoded here, so that one that is damaged does not end the stream."""
    library = importlib.import_module("datasets")
    kinds = library.Image, library.Audio
    coded = {column: type(feature) for column, feature in table.features.items() if isinstance(feature, kinds)}

    def rows(columns: Sequence[str], start: int, stop: int) -> Iterator[dict[str, Any]]:
        chosen = table.with_format(None).select(range(start, stop)).select_columns(list(columns))
        for column in coded.keys() & set(columns):
            chosen = chosen.cast_column(column, coded[column](decode=False))
        return iter(chosen)

    return _Table(name, f"{len(table)} rows", table.features, range(1, len(table) + 1), rows, place)


def _parquet(place: str, name: str) -> _Table:
    library, parquet = import_extra("datasets", "datasets"), importlib.import_module("pyarrow.parquet")
    fs, path = _file_system(place)
    file = parquet.ParquetFile(fs.open(f"{path}/{name}"))
    sizes = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
    ends = np.cumsum(sizes).tolist()

    def rows(columns: Sequence[str], start: int, stop: int) -> Iterator[dict[str, Any]]:
        groups = [i for i, end in enumerate(ends) if start < end <= stop]
        for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=groups, columns=list(columns)):
            yield from batch.to_pylist()

    features = library.Features.from_arrow_schema(file.schema_arrow)
    return _Table(
        PurePosixPath(name).with_suffix("").as_posix(), f"{fs.size(f'{path}/{name}')} bytes", features, ends, rows, place
    )


# WebDataset


def webdataset_blocks(place: str, keys: Keys, rows: int) -> list[Block]:
    """Shards: `shards-{000..009}.tar`, or several such, separated by `::`; files, or addresses that fsspec or webdataset
    reads. A shard is a block.

    Keys are the extensions of a sample's files, such as jpg or touch.png, and what a JSON file has: json.material. Files of
    further modalities are given as bytes, lists of JSON as arrays. A sample may lack any. Shards are read in their order.
    Samples are named by shard and key.
    """
    library = import_extra("webdataset", "webdataset")
    shards = list(library.shardlists.expand_urls(place))
    if not shards:
        raise UserError(f"{place} names no shard; give the .tar files of webdataset: in quotes.")
    versions = ["" if _scheme(shard) in _pipes() else f"{_size(shard, 'shard')} bytes" for shard in shards]
    return [
        Block(f"{shard} {v}", partial(_shard, _absolute(shard), keys)) for shard, v in zip(shards, versions, strict=True)
    ]


def _scheme(address: str) -> str:
    """The first part of an address, such as s3 or pipe; "" for a path."""
    return address.partition(":")[0] if ":" in address else ""


def _pipes() -> set[str]:
    """The addresses that webdataset opens with a command."""
    return set(importlib.import_module("webdataset.gopen").gopen_schemes) - {"__default__", "file", ""}


def _shard(shard: str, keys: Keys) -> Iterator[dict[str, Any]]:
    """The samples of a shard."""
    library, tar = import_extra("webdataset", "webdataset"), importlib.import_module("webdataset.tariterators")
    of_files = keys.of_files
    with _readable(shard, tarfile.TarError):
        if _scheme(shard) in _pipes():
            opened = library.gopen(shard)
        else:
            fs, path = _file_system(shard)
            opened = fs.open(path)
        with opened as stream:
            for files in tar.group_by_keys(tar.tar_file_expander([{"url": shard, "stream": stream}])):
                yield _sample(f"{Path(shard).stem}/{files['__key__']}", keys, partial(_member, files, of_files))


def _member(files: Mapping[str, Any], of_files: Sequence[str], key: str) -> Any:
    """The file with this extension, as bytes or text, or an entry of a JSON file, EXTENSION.NAME; None without it."""
    if key.lower() in files:  # extensions are read in lower case
        return files[key.lower()] if key in of_files else files[key.lower()].decode("utf-8").strip()
    extension, _, name = key.rpartition(".")
    if (extension := extension.lower()) in files and extension.rpartition(".")[2] == "json":
        content = json.loads(files[extension])
        return content.get(name) if isinstance(content, dict) else None
    return None


# Tables of pairs


def pairs_blocks(place: str, keys: Keys, rows: int) -> list[Block]:
    """A CSV file with one row per sample, as `tvl_align.data.tvl.read_table` takes it: on disk, or at an address.

    Keys are columns; those of files have paths relative to the folder of the table, and labels are classes. Samples are
    named by the table and the number of their row. A row that cannot be used is a sample without modalities.
    """
    size = _size(place, "table")
    with _excerpt(place, 0, 0) as table:
        _check_keys(_columns(keys), read_header(table, _columns(keys)), place)
    blocks, number = [], 0
    for start, stop, count in _cuts(place, keys, rows):
        read = partial(_table_samples, _absolute(place), keys, start, stop, number)
        blocks.append(Block(f"{place} {size} bytes {start}-{stop}", read, count))
        number += count
    return blocks


def _columns(keys: Keys) -> list[str]:
    return [key.strip().lower() for key in keys.used]


def _cuts(place: str, keys: Keys, rows: int) -> Iterator[tuple[int, int, int]]:
    """(first byte, end, number of rows) of blocks of a table. Lines inside of quotes do not end a row."""
    position = 0
    fs, path = _file_system(place)
    with _readable(place, csv.Error), fs.open(path) as file:

        def lines() -> Iterator[str]:
            nonlocal position
            for line in file:
                position += len(line)
                yield line.decode("utf-8-sig")

        header = next(lines(), "")
        found = {d: {c.strip().lower() for c in next(csv.reader([header], delimiter=d), [])} for d in DELIMITERS}
        reader = csv.reader(lines(), delimiter=max(DELIMITERS, key=lambda d: len(found[d] & set(_columns(keys)))))
        while True:
            start = position
            count = sum(1 for cells in islice(reader, rows) if cells)
            if position == start:
                return
            yield start, position, count


@contextmanager
def _excerpt(place: str, start: int, stop: int) -> Iterator[Path]:
    """A table of the header of a table and of its bytes from `start` to `stop`, as a file."""
    fs, path = _file_system(place)
    with _readable(place), fs.open(path) as file:
        content = file.readline()
        file.seek(start)
        content += file.read(stop - start)
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / PurePosixPath(place).name
        table.write_bytes(content)
        yield table


def _table_samples(place: str, keys: Keys, start: int, stop: int, number: int) -> Iterator[dict[str, Any]]:
    """The samples of a part of a table, whose first row has this number."""
    folder, stem = place.rpartition("/")[0] or ".", PurePosixPath(place).stem
    of_files = [key.strip().lower() for key in keys.of_files]
    with _excerpt(place, start, stop) as table:
        found = read_table(table, _columns(keys), _columns(keys), of_files)

    def value(cells: Mapping[str, str], key: str) -> Any:
        cell = cells[key.strip().lower()] or None
        return _file_in(folder, cell) if cell is not None and key in keys.of_files else cell

    for i, cells in enumerate(found, number):
        name = f"{stem}/{i}"
        yield {"name": name} if isinstance(cells, str) else _sample(name, keys, partial(value, cells))


# TVL's folders


def tvl_blocks(place: str, keys: Keys, rows: int) -> list[Block]:
    """TVL's folder with `ssvtp/`, `hct/` or both, with its splits and groups. See `tvl_align.data.tvl.read_tvl`.

    Keys are vision, tactile, background, caption, and dataset for a label. Its tables are read here: a block has its rows
    with it.
    """
    folder = _folder(place, "tvl")
    _check_keys(keys.used, TVL_KEYS, place)
    data = read_tvl(folder, [name for name in ("ssvtp", "hct") if (folder / name).is_dir()] or ("ssvtp",))
    blocks = []
    for split in ("train", "val", "test"):
        of_split = data.split(split)
        for start in range(0, len(of_split), rows):
            some = of_split[start : start + rows]
            digest = hashlib.sha256(repr(some).encode()).hexdigest()[:16]
            read = partial(_tvl_samples, data.root.absolute(), keys, split, some)
            blocks.append(Block(f"{place} {split} {start}-{start + len(some)} {digest}", read, len(some)))
    return blocks


def _tvl_samples(root: Path, keys: Keys, split: str, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    def value(row: Row, key: str) -> Any:
        cell = getattr(row, key)
        return file_of(root, cell) if cell is not None and key in keys.of_files else cell

    for row in rows:
        yield _sample(row.name, keys, partial(value, row), group=row.group, split=split)


# Video files


def read_video(place: str, keys: Keys, every: int = 1) -> Source:
    """A folder whose sub-folders are the keys: photos in KEY/NAME.mp4, touch and further modalities in their own, texts and
    labels in KEY/NAME.txt.

    Videos of the same name were recorded together, at the same frame rate: frame i of each is a sample, up to the shortest.
    A name may lack any of them. Without --group_key a name is a group.
    """
    av, folder = import_extra("av", "video"), _folder(place, "video")
    of_pictures = keys.of_files
    _check_keys(keys.used, sorted(p.name for p in folder.iterdir() if p.is_dir()), folder)
    videos: dict[str, dict[str, Path]] = {}
    for key in of_pictures:
        for file in sorted((folder / key).iterdir()):
            if file.suffix.lower() in VIDEOS:
                videos.setdefault(file.stem, {})[key] = file
    if not videos:
        wanted = " or ".join(f"{folder / key}" for key in of_pictures) or "any folder"
        raise UserError(
            f"there is no video ({', '.join(VIDEOS)}) in {wanted}; name the folders by --vision_key, --tactile_key and "
            "--more_keys."
        )

    def samples() -> Iterator[dict[str, Any]]:
        for name, files in sorted(videos.items()):
            texts = {key: _text_file(folder / key / f"{name}.txt") for key in keys.used if key not in of_pictures}
            _check_rates(av, name, files)
            streams = [_frames(av, file, every) for file in files.values()]
            for i, frames in enumerate(zip(*streams, strict=False)):
                parts = texts | dict(zip(files, frames, strict=True))
                yield _sample(f"{name}/{i * every}", keys, parts.get, group=name)

    return Source(samples())


def _text_file(path: Path) -> str | None:
    with _readable(path):
        return path.read_text(encoding="utf-8").strip() if path.is_file() else None


def _check_rates(av: Any, name: str, files: Mapping[str, Path]) -> None:
    rates = {}
    for key, file in files.items():
        with _readable(file, av.error.FFmpegError), av.open(str(file)) as video:
            if not video.streams.video:
                raise ValueError("no video in it")
            rates[key] = float(video.streams.video[0].average_rate or 0)
    if rates and max(rates.values()) > (1 + RATE_TOLERANCE) * min(rates.values()):
        found = ", ".join(f"{key} has {rate:.2f}" for key, rate in rates.items())
        raise UserError(f"the videos of {name} differ in frames per second ({found}); write them at one rate.")


def _frames(av: Any, file: Path, every: int) -> Iterator[np.ndarray]:
    """Every so many frames of a video, each (H, W, 3) uint8."""
    with _readable(file, av.error.FFmpegError), av.open(str(file)) as video:
        for i, frame in enumerate(video.decode(video=0)):
            if i % every == 0:
                yield frame.to_ndarray(format="rgb24")


# LeRobot


def read_lerobot(place: str, keys: Keys, every: int = 1) -> Source:
    """A LeRobotDataset folder of version 2 or 3: meta/info.json, parquet files, and videos or pictures inside of parquet.

    Keys are features: of pictures, those of type image or video; of further modalities also numbers, such as forces, given
    as arrays. "task" is the sentence of a frame's task, the default of --sentence_key unless --text_key is given. Episodes
    are groups, and the splits are those of info.json where it names two or more.
    """
    folder = _folder(place, "lerobot")
    import_extra("pyarrow", "lerobot")
    table, av = importlib.import_module("pyarrow.parquet"), import_extra("av", "lerobot")
    if keys.text is None and keys.sentence is None:
        keys = replace(keys, sentence="task")
    info_file = folder / "meta/info.json"
    with _readable(info_file):
        info = json.loads(info_file.read_text(encoding="utf-8"))
        version, features, fps = str(info["codebase_version"]), dict(info["features"]), float(info["fps"])
        splits = {str(k): [int(x) for x in str(v).split(":")] for k, v in (info.get("splits") or {}).items()}
    if version[:3] not in ("v2.", "v3."):
        raise UserError(f"{folder} has the LeRobot version {version}; convert it to version 2 or 3.")
    _check_keys(keys.used, [*features, "task"], info_file)
    kinds = {key: str(features.get(key, {}).get("dtype")) for key in keys.of_files}
    further = {*keys.more.values()} - {keys.vision, keys.tactile}
    of_pictures = [key for key in keys.of_files if key not in further]
    if wrong := [key for key in of_pictures if kinds[key] not in ("image", "video")]:
        raise UserError(f"{wrong[0]} of {folder} is {kinds[wrong[0]]}, not pictures; name a feature of type image or video.")
    with _readable(folder / "meta"):
        episodes = (_episodes_v2 if version.startswith("v2.") else _episodes_v3)(folder, info, kinds, table)
        tasks = _tasks(folder, table)
    plain = [key for key in keys.used if key != "task" and kinds.get(key) != "video"]

    def samples() -> Iterator[dict[str, Any]]:
        for episode in episodes:
            columns = list(dict.fromkeys([*plain, "frame_index", "timestamp", "task_index"]))
            with _readable(episode.data):
                of_episode = [("episode_index", "=", episode.index)]
                found = table.read_table(episode.data, columns=columns, filters=of_episode, partitioning=None).to_pylist()
                rows = [row for row in found if row["frame_index"] % every == 0]
            times = [row["timestamp"] for row in rows]
            videos = {
                k: _frames_at(av, file, [start + t for t in times], fps) for k, (file, start) in episode.videos.items()
            }
            split = next((k for k, (a, b) in splits.items() if a <= episode.index < b), None) if len(splits) > 1 else None
            for row in rows:
                parts = {key: _plain(value) for key, value in row.items()} | {k: next(v) for k, v in videos.items()}
                parts["task"] = tasks.get(row["task_index"])
                known = {"group": f"episode {episode.index}", "split": split}
                name = f"episode_{episode.index:06d}/{row['frame_index']}"
                yield _sample(name, keys, parts.get, **known)

    return Source(samples(), sum(math.ceil(episode.length / every) for episode in episodes))


@dataclass(frozen=True)
class _Episode:
    """An episode of `length` frames. data: its parquet file. videos: {feature: its file, seconds at which it begins}."""

    index: int
    length: int
    data: Path
    videos: dict[str, tuple[Path, float]]


def _episodes_v2(folder: Path, info: Mapping[str, Any], kinds: Mapping[str, str], table: Any) -> list[_Episode]:
    """Version 2: a parquet file and a video for every episode."""
    found = []
    for line in (folder / "meta/episodes.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        index = int(entry["episode_index"])
        place = {"episode_chunk": index // int(info["chunks_size"]), "episode_index": index}
        data = _inside(folder, info["data_path"].format(**place))
        videos = {
            key: (_inside(folder, info["video_path"].format(video_key=key, **place)), 0.0)
            for key, kind in kinds.items()
            if kind == "video"
        }
        found.append(_Episode(index, int(entry["length"]), data, videos))
    return found


def _episodes_v3(folder: Path, info: Mapping[str, Any], kinds: Mapping[str, str], table: Any) -> list[_Episode]:
    """Version 3: several episodes in a parquet file and in a video; meta/episodes says which."""
    found, of_video = [], [key for key, kind in kinds.items() if kind == "video"]
    numbers = ("chunk_index", "file_index")
    columns = ["episode_index", "length", *(f"data/{k}" for k in numbers)]
    columns += [f"videos/{key}/{k}" for key in of_video for k in (*numbers, "from_timestamp")]
    for file in sorted((folder / "meta/episodes").rglob("*.parquet")):
        for entry in table.read_table(file, columns=columns, partitioning=None).to_pylist():
            place = {k: entry[f"data/{k}"] for k in numbers}
            videos = {}
            for key in of_video:
                at = {k: entry[f"videos/{key}/{k}"] for k in numbers}
                path = _inside(folder, info["video_path"].format(video_key=key, **at))
                videos[key] = path, float(entry[f"videos/{key}/from_timestamp"])
            data = _inside(folder, info["data_path"].format(**place))
            found.append(_Episode(int(entry["episode_index"]), int(entry["length"]), data, videos))
    return sorted(found, key=lambda episode: episode.index)


def _inside(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{name} is outside of the folder")
    if not path.is_file():
        raise FileNotFoundError(f"{name} is missing")
    return path


def _tasks(folder: Path, table: Any) -> dict[int, str]:
    """{task index: its sentence}, of meta/tasks.jsonl (version 2) or meta/tasks.parquet (version 3)."""
    if (folder / "meta/tasks.jsonl").is_file():
        lines = (folder / "meta/tasks.jsonl").read_text(encoding="utf-8").splitlines()
        return {int(entry["task_index"]): str(entry["task"]) for entry in map(json.loads, lines)}
    found = {}
    for entry in table.read_table(folder / "meta/tasks.parquet", partitioning=None).to_pylist():
        (task,) = (value for column, value in entry.items() if column != "task_index")
        found[int(entry["task_index"])] = str(task)
    return found


def _frames_at(av: Any, file: Path, times: Sequence[float], fps: float) -> Iterator[np.ndarray]:
    """The frames of a video at these increasing times in seconds, (H, W, 3) uint8 each, to half a frame."""
    with _readable(file, av.error.FFmpegError), av.open(str(file)) as video:
        stream = video.streams.video[0]
        if times:
            video.seek(max(0, int(times[0] / stream.time_base)), stream=stream)  # to the key frame before
        decoded = video.decode(stream)
        for time in times:
            frame = next((f for f in decoded if f.time is not None and f.time > time - 0.5 / fps), None)
            if frame is None or frame.time > time + 0.5 / fps:
                raise ValueError(f"no frame at {time:.3f} seconds")
            yield frame.to_ndarray(format="rgb24")


def _plain(value: Any) -> Any:
    """A value of a parquet row: a picture as its bytes, a list of one as its only element."""
    if isinstance(value, dict) and "bytes" in value:
        return value["bytes"]
    return value[0] if isinstance(value, list) and len(value) == 1 else value


BLOCKS: dict[str, Callable[[str, Keys, int], list[Block]]] = {
    "datasets": datasets_blocks,
    "webdataset": webdataset_blocks,
    "pairs": pairs_blocks,
    "tvl": tvl_blocks,
}
STREAMS: dict[str, Callable[[str, Keys, int], Source]] = {"lerobot": read_lerobot, "video": read_video}
