"""Read pairs of one's own: a table with one row per sample -> rows of training, validation and test.

A sample has two or more of a photo, a touch image, a text, and files of further modalities (depth, sound ...), whose columns
are named; the other columns are named or found by their header. Tables may have all that `tvl_align.data.tvl` accepts:
semicolons or tabs, an index column, capitals, words for "no value".
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from tvl_align.data.split import file_keys, grouped_split
from tvl_align.data.text import Sentence
from tvl_align.data.tvl import (
    PAIRS,
    VAL_FRACTION,
    Row,
    Tolerance,
    TVLData,
    caption_of,
    check_dropped,
    file_of,
    joined_groups,
    read_header,
    read_table,
    usable,
)
from tvl_align.system.console import UserError

NAMES = {  # of columns that are found without being named, the first of a line that is there
    "photo": ("photo", "vision", "image", "rgb", "photo_path", "vision_path", "image_path", "url"),
    "touch": ("touch", "tactile", "touch_path", "tactile_path"),
    "earlier_touch": (),
    "touch_background": (),
    "caption": ("caption", "adjectives"),
    "sentence": ("sentence", "text", "description"),
    "group": ("group",),
    "split": ("split",),
}
SPLITS = {  # {cell: split}
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
TEST_FRACTION = 0.1  # of the rows, where the table names no test rows
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Columns:
    """Columns of a table; None: found by their names, or absent.

    photo, touch: paths relative to the data folder. caption: adjectives, separated by commas. sentence: a text that is used
    as it is; where it is empty the caption is used. group: rows of a group are never split apart. split: train, val or test.
    labels: factors that probes predict. more: {further modality: column of its files}. earlier_touch: paths of touch images
    of the same contact, some frames before. touch_background: paths of touch images without contact. These two are not found
    by their names.
    """

    photo: str | None = None
    touch: str | None = None
    caption: str | None = None
    sentence: str | None = None
    group: str | None = None
    split: str | None = None
    labels: tuple[str, ...] = ()
    more: Mapping[str, str] = field(default_factory=dict)
    earlier_touch: str | None = None
    touch_background: str | None = None


def read_pairs(
    path: Path, root: Path, columns: Columns | None = None, seed: int = 0, tolerance: Tolerance | None = None
) -> TVLData:
    """Read the rows of the table `path`, whose files lie in the folder `root`.

    Rows are split as the table says. Where it names no test rows, 10% are drawn for it, and then 10% of the others for
    validation where it names no validation rows. Both are drawn with `seed`, whole groups at a time. Groups with a picture
    in common are joined. Rows of a group that is in the test split too are removed from training and validation, those of a
    group that is in the validation split from training. Raises UserError for a table without two modalities, and as
    `read_tvl` for bad rows.
    """
    if not root.is_dir():
        raise UserError(f"no such folder: {root}; --datasets_dir must contain the files of {path}.")
    columns, cells = _read(path, columns or Columns())
    data = TVLData(root, [], [], [])
    named: dict[str, list[Row | str]] = {"train": [], "val": [], "test": []}
    for row in cells:
        split = "train" if isinstance(row, str) or columns.split is None else SPLITS.get(row[columns.split].lower())
        if isinstance(row, str):
            named["train"].append(row)
        elif split is None:
            named["train"].append("the split is not train, val or test")
        else:
            named[split].append(_row(row, columns))
    rows = {name: sorted(usable(split, data), key=repr) for name, split in named.items()}
    every = [row for split in rows.values() for row in split]
    paths = sorted({path for row in every for path in row.files.values()})
    data.pictures = file_keys({p: file_of(root, p) for p in paths})
    joined = iter(joined_groups(every, data.pictures))
    rows = {name: [next(joined) for _ in split] for name, split in rows.items()}
    data.train, data.val, data.test = (_without(rows, name, data) for name in ("train", "val", "test"))
    drawn = [name for name in ("test", "val") if not data.split(name)]
    if "test" in drawn:
        data.train, data.test = grouped_split(data.train, TEST_FRACTION, seed)
    if "val" in drawn:
        data.train, data.val = grouped_split(data.train, VAL_FRACTION, seed)
    for name in drawn:
        log.warning("%s names no %s rows; %d of %d rows are drawn", path, name, len(data.split(name)), len(every))
    check_dropped(data, path, tolerance or Tolerance())
    return data


def pair_labels(path: Path, columns: Columns) -> tuple[list[str], list[dict[str, str]]]:
    """The label columns of a table as the header and the rows of a label file: `row`, the name of a sample, then labels."""
    columns, cells = _read(path, columns)
    rows = [(_row(row, columns), row) for row in cells if not isinstance(row, str)]
    return ["row", *columns.labels], [{"row": r.name} | {c: row[c] for c in columns.labels} for r, row in rows if r.name]


def _read(path: Path, columns: Columns) -> tuple[Columns, list[dict[str, str] | str]]:
    """The columns that a table has, and its rows as `read_table` gives them."""
    if not path.is_file():
        raise UserError(f"no such table: {path}; --pairs takes a CSV file with one row per sample.")
    labels = tuple(label.strip().lower() for label in columns.labels)
    more = {modality: column.strip().lower() for modality, column in columns.more.items()}
    given = {name: column.strip().lower() for name in NAMES if (column := getattr(columns, name)) is not None}
    labelled = (label for label in labels if label not in NAMES["group"])  # groups may be labels too
    taken = {*given.values(), *more.values(), *labelled}
    names = {name: (given[name],) if name in given else [c for c in NAMES[name] if c not in taken] for name in NAMES}
    header = read_header(path, [*labels, *more.values(), *(c for some in names.values() for c in some)])
    found = {name: given.get(name) or next((c for c in some if c in header), None) for name, some in names.items()}
    columns = Columns(**found, labels=labels, more=more)
    used = [*(c for c in found.values() if c is not None), *more.values()]
    twice = next((c for c in used if used.count(c) > 1), None)
    if twice is not None:
        raise UserError(f"the column {twice!r} of {path} is used twice; give every --..._column another one.")
    of_files = [c for c in (columns.photo, columns.touch, *more.values()) if c is not None]
    if len(of_files) + bool(columns.caption or columns.sentence) < 2:
        raise UserError(
            f"{path} needs columns of two of photos, touch images and texts (its header: {', '.join(header) or 'empty'}); "
            "name them with --photo_column, --touch_column, --caption_column or --sentence_column, or further modalities "
            "with --more_columns."
        )
    used = [*used, *labels]
    beside_touch = [c for c in (columns.earlier_touch, columns.touch_background) if c is not None]
    return columns, read_table(path, used, used, [*of_files, *beside_touch])


def _row(cells: dict[str, str], columns: Columns) -> Row:
    def cell(column: str | None) -> str:
        return cells[column] if column is not None else ""

    of_files = columns.photo, columns.touch, columns.touch_background, columns.earlier_touch
    photo, touch, background, earlier = (str(PurePosixPath(cell(c))) if cell(c) else None for c in of_files)
    more = {m: str(PurePosixPath(cell(c))) for m, c in sorted(columns.more.items()) if cell(c)}
    text = Sentence(cell(columns.sentence)) if cell(columns.sentence) else caption_of(cell(columns.caption))
    row = Row(PAIRS, photo, touch, background, text, cell(columns.group), more=more, earlier=earlier)
    return row if row.group else replace(row, group=row.name)


def _without(rows: dict[str, list[Row]], name: str, data: TVLData) -> list[Row]:
    """The rows of a given split without those whose group is in a split after it; these are counted."""
    later = list(rows)[list(rows).index(name) + 1 :]
    taken = {row.group: split for split in reversed(later) for row in rows[split]}
    for row in rows[name]:
        if row.group in taken:
            data.dropped[f"{name} row of a group that has {taken[row.group]} rows"] += 1
    return [row for row in rows[name] if row.group not in taken]
