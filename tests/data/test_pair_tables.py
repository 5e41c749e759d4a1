"""The reader of one's own table of pairs."""

import csv
import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tvl_align.data.pairs import Columns, pair_labels, read_pairs
from tvl_align.data.text import Sentence, adjectives
from tvl_align.data.tvl import Row, Tolerance, TVLData
from tvl_align.system.console import UserError

ROWS = 40


def write(path: Path, header: str, lines: list[str]) -> Path:
    path.write_text("\n".join([header, *lines]))
    return path


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """40 rows of 20 objects; every file differs."""
    (tmp_path / "shots/left").mkdir(parents=True)
    lines = []
    for i in range(ROWS):
        for name in (f"shots/{i}.png", f"shots/left/{i}.png"):
            (tmp_path / name).write_bytes(name.encode())
        lines.append(f'shots/{i}.png,shots/left/{i}.png,"soft, word{i}.",object {i // 2},{i % 3}')
    return write(tmp_path / "pairs.csv", "photo,touch,caption,group,force", lines)


def everything(data: TVLData) -> list[Row]:
    return [*data.train, *data.val, *data.test]


def test_columns_are_found_and_test_and_validation_are_drawn_by_group(table: Path) -> None:
    data = read_pairs(table, table.parent)
    assert (len(data.train), len(data.val), len(data.test)) == (32, 4, 4)
    groups = [{row.group for row in data.split(name)} for name in ("train", "val", "test")]
    assert [len(g) for g in groups] == [16, 2, 2] and len(set.union(*groups)) == 20
    row = next(row for row in everything(data) if row.vision == "shots/7.png")
    assert row == Row("pairs", "shots/7.png", "shots/left/7.png", None, "soft, word7.", "object 3")
    assert data.train == read_pairs(table, table.parent).train
    assert {row.group for row in read_pairs(table, table.parent, seed=1).test} != groups[2]
    assert len(data.pictures) == 2 * ROWS and not data.dropped


def test_drawn_splits_are_said(table: Path, caplog: pytest.LogCaptureFixture) -> None:
    read_pairs(table, table.parent)
    assert [r.getMessage() for r in caplog.records] == [
        f"{table} names no {name} rows; 4 of 40 rows are drawn" for name in ("test", "val")
    ]


def test_columns_that_are_named_and_files_of_another_folder(table: Path, tmp_path: Path) -> None:
    """A column that is named for one thing is found for no other; without groups every row is its own."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    text = table.read_text().replace("photo,touch,caption,group,force", "Touch,photo,Words,who,text")
    (folder / "own.csv").write_text(text)
    data = read_pairs(folder / "own.csv", tmp_path, Columns(photo="touch", touch="PHOTO", caption="words", labels=("text",)))
    row = next(row for row in everything(data) if row.vision == "shots/7.png")
    assert row == Row("pairs", "shots/7.png", "shots/left/7.png", None, "soft, word7.", "shots/7.png")
    assert not data.dropped


def test_sentences_are_kept_as_they_are(table: Path) -> None:
    """A sentence comes before the caption; where it is empty, or a word for no value, the caption is used."""
    lines = ['shots/0.png,shots/left/0.png,"A soft, ""woolly"" Hat. ",soft', "shots/1.png,shots/left/1.png,n/a,hard"]
    lines += ["shots/2.png,,,", "shots/3.png,shots/left/3.png,-,None"]
    path = write(table.parent / "sentences.csv", "photo,touch,sentence,caption", lines)
    data = read_pairs(path, table.parent, tolerance=Tolerance(max_skipped=0.5))
    captions = {row.vision: row.caption for row in everything(data)}
    assert captions == {"shots/0.png": 'A soft, "woolly" Hat.', "shots/1.png": "hard", "shots/3.png": None}
    assert isinstance(captions["shots/0.png"], Sentence) and not isinstance(captions["shots/1.png"], Sentence)
    assert data.dropped == {"fewer than two modalities": 1}


def test_two_modalities_are_enough(table: Path) -> None:
    path = write(table.parent / "touch.csv", "tactile,text", [f"shots/left/{i}.png,word {i}" for i in range(ROWS)])
    rows = everything(read_pairs(path, table.parent))
    assert {row.name for row in rows} == {f"shots/left/{i}.png" for i in range(ROWS)}
    assert {row.vision for row in rows} == {None}


def tabs(text: str) -> str:
    return "\n".join("\t".join(cells) for cells in csv.reader(io.StringIO(text)))


@pytest.mark.parametrize(
    "change",
    [
        lambda text: re.sub(r",(?! )", ";", text),
        tabs,
        lambda text: "\ufeff" + text,
        lambda text: "\n".join(f"{i - 1 if i else ''},{line}" for i, line in enumerate(text.splitlines())),
        lambda text: text.replace("photo,touch,caption,group", " Photo,TOUCH,Caption,Group"),
        lambda text: text.replace("/", "\\"),
        lambda text: text.replace("shots", "./shots"),
        lambda text: text.replace("\n", "\r\n"),
    ],
    ids=["semicolons", "tabs", "BOM", "pandas index", "capitals", "backslashes", "dots", "CRLF"],
)
def test_tables_of_other_systems_have_the_same_pairs(table: Path, change: Callable[[str], str]) -> None:
    def rows() -> list[tuple[str | None, str | None, list[str], str]]:
        read = read_pairs(table, table.parent)
        assert not read.dropped
        return [(r.vision, r.tactile, adjectives(r.caption or ""), r.group) for r in everything(read)]

    before = rows()
    table.write_bytes(change(table.read_text()).encode())
    assert rows() == before


def split_table(table: Path, splits: list[str]) -> Path:
    lines = [f"shots/{i}.png,shots/left/{i}.png,object {i // 2},{split}" for i, split in enumerate(splits)]
    return write(table.parent / "split.csv", "photo,touch,group,split", lines)


def test_a_given_split_is_kept_and_what_it_lacks_is_drawn(table: Path) -> None:
    path = split_table(table, ["Train", "training", "val", "dev", "Test", "test"])
    data = read_pairs(path, table.parent)
    names = [[row.vision for row in data.split(name)] for name in ("train", "val", "test")]
    assert names == [[f"shots/{i}.png" for i in pair] for pair in ((0, 1), (2, 3), (4, 5))]
    data = read_pairs(split_table(table, ["train"] * 36 + ["test"] * 4), table.parent)
    assert (len(data.train), len(data.val)) == (32, 4)
    assert {row.group for row in data.test} == {"object 18", "object 19"}
    assert not {row.group for row in data.train} & {row.group for row in data.val}


def test_groups_and_copies_are_on_one_side_of_a_given_split(table: Path) -> None:
    """A group with test rows has no others. Groups with the same picture are one."""
    path = split_table(table, ["train", "test", *["train"] * 8, "val", "train", *["val"] * 6, *["test"] * 6])
    (table.parent / "shots/left/2.png").write_bytes((table.parent / "shots/left/20.png").read_bytes())
    data = read_pairs(path, table.parent, tolerance=Tolerance(max_skipped=1))
    assert data.dropped == {"train row of a group that has test rows": 3, "train row of a group that has val rows": 1}
    assert [row.vision for row in data.train] == [f"shots/{i}.png" for i in range(4, 10)]
    groups = [{row.group for row in data.split(name)} for name in ("train", "val", "test")]
    assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]
    with pytest.raises(UserError, match=r"4 of 24 rows are bad, more than 5% .*train row of a group that has test rows"):
        read_pairs(path, table.parent)


def test_copies_of_pictures_are_one_group_in_a_drawn_split(table: Path) -> None:
    for i in range(1, 10):
        (table.parent / f"shots/{2 * i}.png").write_bytes(b"the same")
    for seed in range(4):
        data = read_pairs(table, table.parent, seed=seed)
        sides = {name for name in ("train", "val", "test") for row in data.split(name) if row.group == "object 1"}
        assert len(sides) == 1
        assert sum(row.group == "object 1" for row in everything(data)) == 18


def test_bad_rows_of_a_table_are_dropped_with_a_reason(table: Path) -> None:
    lines = table.read_text().splitlines()
    lines[1] = lines[1].replace("shots/0.png", "../secret.png")
    lines[2] = lines[2].replace("shots/left/1.png", "/etc/passwd")
    lines[3] = lines[3].replace("shots/2.png", "shots/none.png")
    lines[4] += ",more"
    lines[5] = lines[6]
    table.write_text("\n".join(lines))
    data = read_pairs(table, table.parent, tolerance=Tolerance(max_skipped=0.2))
    assert data.dropped == {
        "vision path is outside the data folder": 1,
        "tactile path is outside the data folder": 1,
        "vision file is missing": 1,
        "more cells than columns; a caption with commas needs quotes": 1,
        "duplicate of another row": 1,
    }
    assert len(everything(data)) == ROWS - 5
    with pytest.raises(UserError, match=r"pairs\.csv has 4 bad rows, most often"):
        read_pairs(table, table.parent)
    bad = split_table(table, [*["train"] * 10, "holdout"])
    assert read_pairs(bad, table.parent, tolerance=Tolerance(max_skipped=0.1)).dropped == {
        "the split is not train, val or test": 1
    }


@pytest.mark.parametrize(
    ("header", "columns", "message"),
    [
        ("a,b,caption", Columns(), r"needs columns of two of photos, touch images and texts \(its header: a, b, caption\)"),
        ("photo,b", Columns(touch="B2"), r"has no column 'b2' \(its header: photo, b\); add the column"),
        ("photo,touch,b", Columns(labels=("c",)), "has no column 'c'"),
        ("photo,touch,Touch", Columns(), "has 2 columns named 'touch'; keep one of them"),
        ("photo,touch", Columns(photo="touch", touch="touch"), "the column 'touch' of .* is used twice"),
        ("", Columns(), r"\(its header: empty\)"),
        ("photo,touch", Columns(), "has no usable training row"),
    ],
)
def test_tables_without_pairs_are_refused_in_one_sentence(
    header: str, columns: Columns, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as error:
        read_pairs(write(tmp_path / "pairs.csv", header, []), tmp_path, columns)
    assert str(error.value).count(". ") == 0


def test_tables_and_folders_that_are_not_there_are_refused(table: Path) -> None:
    with pytest.raises(UserError, match=r"no such table: .*none\.csv; --pairs takes a CSV file"):
        read_pairs(table.with_name("none.csv"), table.parent)
    with pytest.raises(UserError, match=r"no such folder: nowhere; --datasets_dir must contain the files of"):
        read_pairs(table, Path("nowhere"))
    table.write_bytes(b"photo,touch\n\xff,\xfe\n")
    with pytest.raises(UserError, match="is not a UTF-8 CSV file"):
        read_pairs(table, table.parent)


def test_labels_are_those_of_the_rows(table: Path) -> None:
    header, rows = pair_labels(table, Columns(labels=("Force", "group")))
    assert header == ["row", "force", "group"]
    assert rows[7] == {"row": "shots/7.png", "force": "1", "group": "object 3"}
    data = read_pairs(table, table.parent, Columns(labels=("Force", "group")))
    assert {row["row"] for row in rows} == {row.name for row in everything(data)}
    assert len({row.group for row in everything(data)}) == 20
