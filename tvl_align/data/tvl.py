"""Read a TVL data folder (Fu et al. 2024, arXiv:2402.13232): `ssvtp/` and `hct/` -> rows of training, validation and test.

Columns of CSV files are found by their header. Rows are sorted, so that the order of files on disk does not matter. Rows
that cannot be used are dropped and counted by reason. A caption or modality that a row lacks is None; it is masked later.
"""

import csv
import json
import logging
import math
import os
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

import numpy as np

from tvl_align.data.split import file_keys, grouped_split, join_groups, row_keys
from tvl_align.data.text import adjectives, is_absent
from tvl_align.system.console import UserError

DATASETS = ("ssvtp", "hct")
PAIRS = "pairs"  # the data set of rows of one's own table
PICTURES = ("vision", "tactile")  # the modalities whose images have views: they are cropped and augmented
CROP_FRACTION = math.sqrt(2) * 0.18  # side of the crop / longer side of the photo
VAL_FRACTION = 0.1
NOT_CONTACT_CAPTION = "background"
COLUMNS = ("url", "tactile", "tactile_background", "caption")
DELIMITERS = (",", ";", "\t")
IN_TEST = "training row is in the official test split"
DUPLICATE = "duplicate of another row"
EXPECTED = (IN_TEST, DUPLICATE)  # reasons that do not count as bad rows
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """One sample.

    vision, tactile, background: POSIX paths relative to the data folder, None if the row has no such image. background: the
    touch image without contact. caption: adjectives, separated by commas, or a `Sentence`. group: rows of a group are never
    split apart. contact: whether the sensor touches something. more: {further modality: path of its file}, sorted by name.
    earlier: the touch image of some frames before `tactile`, of the same contact.
    """

    dataset: str
    vision: str | None
    tactile: str | None
    background: str | None
    caption: str | None
    group: str
    contact: bool = True
    more: Mapping[str, str] = field(default_factory=dict, hash=False)
    earlier: str | None = None

    def __repr__(self) -> str:
        """With `more` and `earlier` only where there are any: stores are identified by it, also those from before them."""
        later = ("more", "earlier")
        shown = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.name not in later or getattr(self, f.name)]
        return f"Row({', '.join(shown)})"

    @property
    def name(self) -> str:
        """The identifier of the row in feature stores and label files: the path of its first file, see `files`."""
        return next(iter(self.files.values()), "")

    @property
    def files(self) -> dict[str, str]:
        """{modality: path} of the files that the row has: photo, touch image, then those of further modalities."""
        paths = {"vision": self.vision, "tactile": self.tactile, **self.more}
        return {modality: path for modality, path in paths.items() if path}

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities that the row has."""
        return (*self.files, *(("text",) if self.caption is not None else ()))


@dataclass
class TVLData:
    """The rows of a data folder by split. dropped: number of dropped rows by reason. pictures: {path: key}, equal for files
    of equal bytes.
    """

    root: Path
    train: list[Row]
    val: list[Row]
    test: list[Row]
    dropped: Counter[str] = field(default_factory=Counter)
    pictures: dict[str, int] = field(default_factory=dict)

    def split(self, name: str) -> list[Row]:
        """The rows of "train", "val" or "test"."""
        return {"train": self.train, "val": self.val, "test": self.test}[name]


def locate(folder: Path, dataset: str) -> Path:
    """The folder of a data set: `folder/dataset`, or `folder/dataset/dataset` if it was unpacked one level too deep."""
    outer, inner = folder / dataset, folder / dataset / dataset
    direct = (outer / "train.csv").is_file() or any(sub != inner for sub in _data_folders(outer))
    if _is_dataset(inner) and not direct:
        log.warning("using %s: the data are one level deeper than expected", inner)
        return inner
    return outer


def _is_dataset(folder: Path) -> bool:
    return (folder / "train.csv").is_file() or any(_data_folders(folder))


def _data_folders(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        for sub in sorted(folder.iterdir()):
            if (sub / "contact.json").is_file() or (sub / "train.csv").is_file() or (sub / "test.csv").is_file():
                yield sub


def file_of(root: Path, path: str) -> Path:
    """The file of a row's path. Names in tables are UTF-8, also where the locale decodes names of files as ASCII."""
    return root / os.fsdecode(path.encode("utf-8", "surrogateescape"))


def name_of(path: Path) -> str:
    """The inverse of `file_of`: the name of a file as tables write it, whatever the locale."""
    return os.fsencode(path.as_posix()).decode("utf-8", "surrogateescape")


def find_root(datasets_dir: Path, datasets: Sequence[str]) -> Path:
    """The folder that contains `ssvtp/` and `hct/`: the given folder, its only such sub-folder, or its parent.

    Raises UserError if there is none.
    """
    if not datasets_dir.is_dir():
        raise UserError(f"no such folder: {datasets_dir}; --datasets_dir must contain {' and '.join(datasets)}.")
    if any((datasets_dir / name).is_dir() for name in datasets):
        return datasets_dir
    deeper = [d for d in sorted(datasets_dir.iterdir()) if any((d / name).is_dir() for name in datasets)]
    if len(deeper) == 1:
        log.warning("using %s: the data are one level deeper than expected", deeper[0])
        return deeper[0]
    if datasets_dir.name in datasets and _is_dataset(datasets_dir):
        log.warning("using %s: --datasets_dir is the folder of a single data set", datasets_dir.parent)
        return datasets_dir.parent
    found = ", ".join(sorted(p.name for p in datasets_dir.iterdir() if p.is_dir())) or "nothing"
    wanted = " or ".join(f"{name}/" for name in datasets)
    raise UserError(f"{datasets_dir} has no {wanted} (found: {found}); point --datasets_dir at the folder above them.")


@dataclass(frozen=True)
class Tolerance:
    """How many bad rows are accepted. strict: none. Otherwise at most the fraction `max_skipped` of the rows is skipped."""

    strict: bool = False
    max_skipped: float = 0.05

    def check(self, bad: int, total: int, reason: str) -> None:
        """Raise UserError if `bad` of `total` rows are too many."""
        if bad and self.strict:
            raise UserError(f"{reason}, and --strict allows no bad row; fix the row or leave out --strict.")
        if bad > self.max_skipped * total:
            raise UserError(
                f"{bad} of {total} rows are bad, more than {self.max_skipped:.0%} (for example: {reason}); fix the data or "
                "raise --max_skipped."
            )


def read_tvl(
    datasets_dir: Path | str,
    datasets: Sequence[str] = DATASETS,
    seed: int = 0,
    use_not_contact: bool = False,
    percent_not_contact: float = 0.1,
    tolerance: Tolerance | None = None,
) -> TVLData:
    """Read the rows of a TVL data folder.

    Training and validation are split by group (10% of the rows validate). Then, with `use_not_contact`, not-in-contact rows
    are added to training only: at most the fraction `percent_not_contact` (0.1 = 10%) of the training rows. Rows of the
    official test split are removed from training and validation. Raises UserError if the folder, a data set or a required
    column is missing, or if more rows are bad than `tolerance` accepts.
    """
    unknown = [name for name in datasets if name not in DATASETS]
    if unknown:
        raise UserError(f"unknown data set {unknown[0]!r}: --datasets takes {' and '.join(DATASETS)}.")
    root = find_root(Path(datasets_dir), datasets)
    data = TVLData(root, [], [], [])
    train_val: list[Row] = []
    not_contact: list[Row] = []
    for dataset in datasets:
        if not (root / dataset).is_dir():
            raise UserError(f"{root} has no {dataset}/; add the folder or leave {dataset} out of --datasets.")
        folder = locate(root, dataset)
        if dataset == "ssvtp":
            train_val += usable(_read_ssvtp(root, folder, "train"), data)
            data.test += usable(_read_ssvtp(root, folder, "test"), data)
            continue
        if not any(_data_folders(folder)):
            raise UserError(f"{folder} has no sub-folder with a contact.json or train.csv; check that it is HCT's folder.")
        for sub in _data_folders(folder):
            train_val += usable(_read_hct(root, sub, "train"), data)
            data.test += usable(_read_hct(root, sub, "test"), data)
            not_contact += usable(_read_not_contact(root, sub), data) if use_not_contact else []
    for rows in (train_val, data.test, not_contact):
        rows.sort(key=lambda row: (row.dataset, row.name, row.tactile or "", row.caption or ""))
    paths = {path for row in (*train_val, *data.test, *not_contact) for path in row.files.values()}
    data.pictures = file_keys({path: file_of(root, path) for path in sorted(paths)})
    test_names = {row.name for row in data.test}
    kept = [row for row in train_val if row.name not in test_names]
    data.dropped[IN_TEST] += len(train_val) - len(kept)
    data.train, data.val = grouped_split(joined_groups(kept, data.pictures), VAL_FRACTION, seed)
    not_contact = [row for row in not_contact if row.name not in test_names]
    count = min(len(not_contact), int(len(data.train) * percent_not_contact))
    data.train += sorted(random.Random(seed).sample(not_contact, count), key=lambda row: row.name)
    check_dropped(data, root, tolerance or Tolerance())
    return data


def check_dropped(data: TVLData, source: Path, tolerance: Tolerance) -> None:
    """Log the dropped rows by reason. Raises UserError if they are too many or if no training row is left.

    source: the data folder or the table, for messages.
    """
    data.dropped = Counter({reason: n for reason, n in sorted(data.dropped.items()) if n})
    for reason, n in data.dropped.items():
        log.warning("dropped %d rows: %s", n, reason)
    bad = Counter({reason: n for reason, n in data.dropped.items() if reason not in EXPECTED})
    if bad:
        total = len(data.train) + len(data.val) + len(data.test) + bad.total()
        reason, _ = bad.most_common(1)[0]
        tolerance.check(bad.total(), total, f"{source} has {bad.total()} bad rows, most often: {reason}")
    if not data.train:
        raise UserError(f"{source} has no usable training row; fix the reasons that are logged above.")


def joined_groups(rows: Sequence[Row], pictures: Mapping[str, int]) -> list[Row]:
    """The rows, with the groups joined that have a picture, or a file of a further modality, in common."""
    groups = join_groups([row.group for row in rows], content_keys(rows, pictures).values())
    return [replace(row, group=group) for row, group in zip(rows, groups, strict=True)]


def content_keys(rows: Sequence[Row], pictures: Mapping[str, int]) -> dict[str, np.ndarray]:
    """{modality: (N,) int64} for every modality with files: rows with the same key have files of the same bytes.

    pictures: {path: key}, see `TVLData`.
    """
    names = dict.fromkeys((*PICTURES, *sorted({m for row in rows for m in row.more})))
    return {m: row_keys(pictures.get(row.files.get(m, "")) for row in rows) for m in names}


def usable(rows: Iterable[Row | str], data: TVLData) -> list[Row]:
    """The rows that can be used. The others are counted in `data.dropped`; a string in `rows` is the reason of a bad row."""
    kept: list[Row] = []
    seen: set[Row] = set()
    for row in rows:
        reason = row if isinstance(row, str) else _reject_reason(row, data.root)
        if reason is None and row in seen:
            reason = DUPLICATE
        if reason is None:
            assert isinstance(row, Row)
            seen.add(row)
            kept.append(row)
        else:
            data.dropped[reason] += 1
    return kept


def _reject_reason(row: Row, root: Path) -> str | None:
    if len(row.modalities) < 2:
        return "fewer than two modalities"
    for kind, path in (row.files | {"background": row.background, "earlier touch": row.earlier}).items():
        if path is not None and (PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts):
            return f"{kind} path is outside the data folder"
    for modality, path in (row.files | ({"earlier touch": row.earlier} if row.earlier else {})).items():
        if "\0" in path:
            return f"{modality} path contains a NUL character"
        try:
            exists = file_of(root, path).is_file()
        except OSError:  # no permission, name too long
            return f"{modality} file cannot be accessed"
        if not exists:
            return f"{modality} file is missing"
    return None


def read_table(
    path: Path, required: Sequence[str], single: Sequence[str] = COLUMNS, paths: Sequence[str] = COLUMNS[:3]
) -> list[dict[str, str] | str]:
    """The rows of a CSV file as {column: cell}, or the reason why a row cannot be used.

    Cells are separated by commas, semicolons or tabs, whichever gives the required columns; their names may be in capitals
    and are returned in lower case. single: columns that may be there once only. paths: columns of paths, which may have
    backslashes. Raises UserError if a required column is missing or a single one is twice, or if the file is not UTF-8 CSV.
    """
    with _opened_table(path) as file:
        delimiter, header = _header(file, required)
        for column in required:
            if column not in header:
                found = ", ".join(header) or "empty"
                raise UserError(f"{path} has no column {column!r} (its header: {found}); add the column.")
        for column in single:
            if header.count(column) > 1:
                raise UserError(f"{path} has {header.count(column)} columns named {column!r}; keep one of them.")
        reader = csv.DictReader(file, header, delimiter=delimiter)
        next(reader)
        return [_cells(row, paths) for row in reader]


def read_header(path: Path, known: Sequence[str]) -> list[str]:
    """The columns of a CSV file in lower case, separated as gives most of the `known` ones; see `read_table`."""
    with _opened_table(path) as file:
        return _header(file, known)[1]


@contextmanager
def _opened_table(path: Path) -> Iterator[TextIO]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            yield file
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a UTF-8 CSV file ({error}); save it as UTF-8.") from error


def _header(file: TextIO, known: Sequence[str]) -> tuple[str, list[str]]:
    """The delimiter that gives most of the known columns, and the columns. The file is left at its beginning."""
    line = file.readline()
    file.seek(0)
    headers = {d: [c.strip().lower() for c in next(csv.reader([line], delimiter=d), [])] for d in DELIMITERS}
    delimiter = max(DELIMITERS, key=lambda d: len(set(known) & set(headers[d])))
    return delimiter, headers[delimiter]


def _cells(row: dict[str | None, Any], paths: Sequence[str]) -> dict[str, str] | str:
    """A CSV row as {column: cell}, "" for a cell that says "no value"; or the reason why it cannot be used.

    Empty cells after the last column do not count.
    """
    if any(cell.strip() for cell in row.pop(None, [])):
        return "more cells than columns; a caption with commas needs quotes"
    if None in row.values():
        return "fewer cells than columns"
    cells = {str(k): "" if is_absent(v) else v.strip() for k, v in row.items()}
    return cells | {k: cells[k].replace("\\", "/") for k in paths if k in cells}  # paths as Windows writes them


def caption_of(text: str | None) -> str | None:
    """The caption in a cell, None if it has no adjective."""
    return text if text and adjectives(text) else None


def _read_ssvtp(root: Path, folder: Path, split: str) -> Iterator[Row | str]:
    path = folder / f"{split}.csv"
    if not path.is_file():
        if split == "train":
            raise UserError(f"{path} is missing; add SSVTP's train.csv with the columns url, tactile, caption.")
        return
    prefix = name_of(folder.relative_to(root))
    for cells in read_table(path, ["url"]):
        if isinstance(cells, str):
            yield cells
            continue
        url = cells["url"]
        number = re.fullmatch(r"image_(\d+)_rgb", PurePosixPath(url).stem)
        if number is None:
            yield "SSVTP photo is not named image_<N>_rgb"
            continue
        # Derived from the file name only: a folder of the path may contain "rgb" too.
        derived = f"images_tac/image_{number[1]}_tac{PurePosixPath(url).suffix}"
        tactile = cells.get("tactile", derived)
        caption = cells.get("caption") or _first_line(folder / "text" / f"labels_{number[1]}.txt")
        group = f"ssvtp/{int(number[1])}"
        yield Row("ssvtp", _join(prefix, url), _join(prefix, tactile), None, caption_of(caption), group)


def _first_line(path: Path) -> str | None:
    if not path.is_file():
        return None
    try:
        with path.open(encoding="utf-8") as file:
            return file.readline().strip()
    except UnicodeDecodeError:
        log.warning("%s is not UTF-8; its row has no caption", path)
        return None


def _join(prefix: str, relative: str) -> str | None:
    """The path below the data folder, None for a cell that says "no value"."""
    if is_absent(relative):
        return None
    if PurePosixPath(relative).is_absolute():
        return relative  # _reject_reason drops the row
    return f"{prefix}/{PurePosixPath(relative)}"


def _read_hct(root: Path, folder: Path, split: str) -> Iterator[Row | str]:
    path = folder / f"{split}.csv"
    if path.is_file():
        for cells in read_table(path, ["url", "tactile"]):
            if isinstance(cells, str):
                yield cells
                continue
            yield _hct_row(
                root, folder, cells["url"], cells["tactile"], cells.get("tactile_background"), cells.get("caption")
            )
    elif split == "train" and (folder / "contact.json").is_file():
        for vision, tactile, background in _read_pairs(folder / "contact.json"):
            yield _hct_row(root, folder, vision, tactile, background, None)


def _read_not_contact(root: Path, folder: Path) -> Iterator[Row | str]:
    path = folder / "not_contact.json"
    if path.is_file():
        for vision, tactile, background in _read_pairs(path):
            yield _hct_row(root, folder, vision, tactile, background, NOT_CONTACT_CAPTION, contact=False)


def _hct_row(
    root: Path,
    folder: Path,
    vision: str,
    tactile: str,
    background: str | None,
    caption: str | None,
    contact: bool = True,
) -> Row:
    prefix = name_of(folder.relative_to(root))
    trajectory = PurePosixPath(vision or tactile).parts[:1]
    group = "/".join(["hct", name_of(Path(folder.name)), *trajectory])
    paths = _join(prefix, vision), _join(prefix, tactile), _join(prefix, background or "")
    return Row("hct", *paths, caption_of(caption), group, contact)


def _read_pairs(path: Path) -> list[tuple[str, str, str]]:
    """Read `contact.json` or `not_contact.json`, parallel lists of paths -> (vision, tactile, background) triples.

    Raises UserError if the lists are missing or differ in length.
    """
    try:
        lists = json.loads(path.read_text(encoding="utf-8"))
        vision, tactile = lists["vision"], lists["tactile"]
        background = lists.get("background") or [""] * len(vision)
        if not all(isinstance(x, list) for x in (vision, tactile, background)):
            raise TypeError("not lists")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} must contain the lists vision and tactile ({error!r}).") from error
    if not len(vision) == len(tactile) == len(background):
        sizes = f"{len(vision)} vision, {len(tactile)} tactile, {len(background)} background"
        raise UserError(f"{path} has lists of different lengths ({sizes}); they must be parallel.")
    paths = ([str(path).replace("\\", "/") for path in column] for column in (vision, tactile, background))
    return list(zip(*paths, strict=True))


def background_file(root: Path, row: Row) -> Path | None:
    """The touch image without contact that is subtracted from the row's touch image.

    The row's own background, else the nearest `digit_background.png` in a parent folder, else None.
    """
    if row.background and file_of(root, row.background).is_file():
        return file_of(root, row.background)
    if row.tactile:
        for parent in file_of(root, row.tactile).parents:
            if (parent / "digit_background.png").is_file():
                return parent / "digit_background.png"
            if parent == root:
                break
    return None


def is_synthetic(root: Path) -> bool:
    """Whether a data folder is a synthetic world: its factors.json says so."""
    try:
        return json.loads((root / "factors.json").read_text(encoding="utf-8"))["synthetic"] is True
    except (OSError, ValueError, KeyError, TypeError):
        return False
