"""Blocks of a source: read on their own, in any process, they are the samples of the source."""

import io
import pickle
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image

from tvl_align.data.sources import Block, Keys, open_blocks, open_source
from tvl_align.data.text import Sentence
from tvl_align.data.tvl import read_tvl
from tvl_align.system.console import UserError

COLUMNS = Keys("image", "touch", text="words", group="object", labels=("force",))
SHARDS = Keys("photo.png", "touch.png", sentence="txt", labels=("json.force",))
PAIRS = Keys("Photo", "touch", sentence="what", group="object", split="side", labels=("force",))


def png(i: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), 10 * i, np.uint8)).save(file, "PNG")
    return file.getvalue()


def write(folder: str, name: str, content: bytes) -> None:
    """Write a file to a folder on disk or at an address."""
    fs, path = fsspec.core.url_to_fs(folder)
    fs.makedirs(path, exist_ok=True)
    with fs.open(f"{path}/{name}", "wb") as file:
        file.write(content)


def write_parquet(folder: str) -> None:
    """Two files of 6 rows, in row groups of 2."""
    datasets = pytest.importorskip("datasets", reason="needs the extra datasets")
    for k, split in enumerate(("train", "test")):
        rows = range(6 * k, 6 * k + 6)
        table = {
            "image": [{"bytes": png(i), "path": None} for i in rows],
            "touch": [png(i + 1) for i in rows],
            "words": [["soft", "warm"] for _ in rows],
            "object": [i // 2 for i in rows],
            "force": [i / 4 for i in rows],
        }
        file = io.BytesIO()
        datasets.Dataset.from_dict(table).cast_column("image", datasets.Image()).to_parquet(file, batch_size=2)
        write(folder, f"{split}-00000-of-00001.parquet", file.getvalue())


def write_shards(folder: str) -> None:
    webdataset = pytest.importorskip("webdataset", reason="needs the extra webdataset")
    for shard in range(2):
        file = io.BytesIO()
        with webdataset.TarWriter(file) as tar:
            for i in range(3):
                files = {"photo.png": png(i), "touch.png": png(i + 1), "txt": "A cup.", "json": {"force": i / 2}}
                tar.write({"__key__": f"{i:03d}", **files})
        write(folder, f"s-{shard}.tar", file.getvalue())


def write_table(folder: str) -> None:
    """7 rows; cells with line breaks, a delimiter that is not a comma, and a row that cannot be used."""
    lines = ["Photo;touch;what;object;side;force"]
    for i in range(7):
        write(f"{folder}/p", f"{i}.png", png(i))
        write(f"{folder}/t", f"{i}.png", png(i + 1))
        lines.append(f'p/{i}.png;t\\{i}.png;"A cup,\n5"" wide; {i}.";{i // 2};train;{i / 2}')
    lines[3] = "p/2.png;t/2.png"
    lines[5] = "nan;t/4.png;;2;train;"
    write(folder, "table.csv", ("\ufeff" + "\r\n".join(lines) + "\r\n").encode())


SOURCES: dict[str, tuple[Callable[[str], None], str, Keys, list[int]]] = {  # rows of blocks of 3
    "datasets": (write_parquet, "", COLUMNS, [4, 2, 4, 2]),
    "webdataset": (write_shards, "/s-{0..1}.tar", SHARDS, [3, 3]),
    "pairs": (write_table, "/table.csv", PAIRS, [3, 3, 1]),
}


def plain(value: Any) -> Any:
    """A sample with the bytes of its files."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return value.read_bytes() if isinstance(value, Path) else value


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("address", ["", "file://", "memory://"])
def test_blocks_are_the_source(kind: str, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, name, keys, sizes = SOURCES[kind]
    folder = f"{address}{tmp_path}/d"
    make(folder)
    blocks: list[Block] = pickle.loads(pickle.dumps(open_blocks(f"{kind}:{folder}{name}", keys, 3)))
    monkeypatch.chdir("/")
    read = [[plain(sample) for sample in block.read()] for block in blocks]
    assert [len(samples) for samples in read] == sizes and len({block.name for block in blocks}) == len(blocks)
    assert all(block.total in (None, len(samples)) for block, samples in zip(blocks, read, strict=True))
    source = open_source(f"{kind}:{folder}{name}", keys)
    assert list(chain.from_iterable(read)) == [plain(sample) for sample in source.samples]
    assert source.total in (None, sum(sizes))
    samples = list(chain.from_iterable(read))
    assert len({s["name"] for s in samples}) == len(samples)
    whole = samples[7] if kind == "datasets" else samples[1]
    assert (whole["vision"], whole["tactile"]) == (png(1), png(2))
    if kind == "datasets":  # files are read in the order of their names
        assert whole["text"] == "soft, warm" and [s["split"] for s in samples] == ["test"] * 6 + ["train"] * 6


def test_places_may_be_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_table(f"{tmp_path}/d")
    monkeypatch.chdir(tmp_path)
    blocks = open_blocks("pairs:d/table.csv", PAIRS, 3)
    monkeypatch.chdir("/")
    assert plain(next(blocks[0].read()))["vision"] == png(0)


def test_rows_of_a_table(tmp_path: Path) -> None:
    write_table(f"{tmp_path}/d")
    samples = list(open_source(f"pairs:{tmp_path}/d/table.csv", PAIRS).samples)
    assert [s["name"] for s in samples] == [f"table/{i}" for i in range(7)]
    assert samples[2] == {"name": "table/2"}
    assert samples[1]["text"] == 'A cup,\n5" wide; 1.' and isinstance(samples[1]["text"], Sentence)
    assert samples[1] | {"text": None} == {
        "name": "table/1",
        "vision": tmp_path / "d/p/1.png",
        "tactile": tmp_path / "d/t/1.png",
        "text": None,
        "group": "0",
        "split": "train",
        "labels": {"force": "0.5"},
    }
    assert samples[4]["vision"] is None and samples[4]["text"] is None and samples[4]["labels"] == {"force": None}


def test_files_outside_of_the_folder_of_a_table_are_refused(tmp_path: Path) -> None:
    for path in ("../p.png", "/etc/hosts"):
        (tmp_path / "t.csv").write_text(f"a,b\n{path},x.png\n")
        with pytest.raises(UserError, match=f"{path} is outside of {tmp_path}"):
            list(open_source(f"pairs:{tmp_path}/t.csv", Keys("a", "b")).samples)


def test_a_file_that_is_missing_at_an_address_is_a_missing_file(tmp_path: Path) -> None:
    write("memory://gone", "t.csv", b"a,b\nnone.png,none.png\n")
    (sample,) = open_source("pairs:memory://gone/t.csv", Keys("a", "b")).samples
    assert sample["vision"] == Path("none.png") and not sample["vision"].exists()


def test_tvls_folders(world: Path) -> None:
    """With its splits, names and groups."""
    data = read_tvl(world)
    keys = Keys("vision", "tactile", text="caption", labels=("dataset",))
    blocks = pickle.loads(pickle.dumps(open_blocks(f"tvl:{world}", keys, 50)))
    samples = [sample for block in blocks for sample in block.read()]
    rows = [(row, split) for split in ("train", "val", "test") for row in data.split(split)]
    assert len(rows) == len(samples) == 120
    assert [block.total for block in blocks] == [50, len(data.train) - 50, len(data.val), 24]
    for sample, (row, split) in zip(samples, rows, strict=True):
        assert (sample["name"], sample["group"], sample["split"]) == (row.name, row.group, split)
        assert sample["vision"] == data.root.absolute() / str(row.vision) and sample["text"] == row.caption
        assert sample["labels"] == {"dataset": row.dataset}


WRONG = {
    "lerobot:r": "lerobot is read by one process; leave out --ray and torchrun, or write r as webdataset or parquet shards",
    "video:v": "video is read by one process",
    "pairs:none.csv": "no such table: none.csv",
    "pairs:t.csv": "t.csv has no 'touch'; it has image, b",
    "tvl:none": "no such folder: none",
    "webdataset:none-{0..1}.tar": "no such shard: none-0.tar",
    "webdataset:nowhere://none.tar": "nowhere://none.tar is an address that cannot be opened .*; install what it needs",
    "datasets:memory://none": "memory://none has no dataset",
}


@pytest.mark.parametrize("name", WRONG)
def test_what_has_no_blocks_is_one_sentence(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("webdataset", "datasets"):
        if name.startswith(package):
            pytest.importorskip(package, reason=f"needs the extra {package}")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.csv").write_text("image,b\n1,2\n")
    with pytest.raises(UserError, match=WRONG[name]) as caught:
        open_blocks(name, Keys("image", "touch"), 10)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
