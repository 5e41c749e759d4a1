"""Stores written in chunks: equal to those of `from_arrays`, with the same checks, complete or not there."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import zarr

from tvl_align.cli.features import run
from tvl_align.contract import FeatureSpec
from tvl_align.features.arrays import check_arrays, read_npz
from tvl_align.features.store import FeatureStore
from tvl_align.system.console import UserError, reports_errors

ROWS = 60


def example() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Three modalities with every option: padding, absent rows, views, captions, repeated rows, labels, groups."""
    g = np.random.default_rng(0)
    arrays = {
        "touch": g.standard_normal((ROWS, 4, 3)),
        "sound": g.standard_normal((ROWS, 5)).astype(np.float32),
        "text": np.eye(6)[np.arange(ROWS) % 6] + 1e-3 * g.standard_normal((ROWS, 6)),
    }
    arrays["sound"][31] = arrays["sound"][2]
    mask, present = np.ones((ROWS, 4), bool), np.arange(ROWS) % 7 != 0
    mask[::2, 2:] = False
    options: dict[str, Any] = {
        "mask": {"touch": mask},
        "present": {"sound": present},
        "pooled": {"text": g.standard_normal((ROWS, 2))},
        "views": {"touch": g.standard_normal((ROWS, 3, 4, 3)), "sound": g.standard_normal((ROWS, 3, 5)).astype(np.float32)},
        "captions": {"text": np.array(list("abcdef"))[np.arange(ROWS) % 6]},
        "labels": {"depth": np.linspace(0, 1, ROWS), "kind": np.array(["a", "nan", "b"] * 20)},
        "groups": np.arange(ROWS) // 4,
        "names": [f"n{i}" for i in range(ROWS)],
        "split": ["train"] * 32 + ["val"] * 8 + ["test"] * 20,
    }
    return arrays, options


def part(x: Any, rows: slice) -> Any:
    return {k: part(v, rows) for k, v in x.items()} if isinstance(x, dict) else x[rows]


def write(out: Path, arrays: dict[str, Any], options: dict[str, Any], size: int, **about: Any) -> FeatureStore:
    with FeatureStore.writer(out, **about) as writer:
        for start in range(0, len(next(iter(arrays.values()))), size):
            rows = slice(start, start + size)
            writer.add(part(arrays, rows), **part(options, rows))
    return FeatureStore(out)


def files(folder: Path) -> dict[str, bytes]:
    """The content of every file of a store but the manifest and what tensordict notes beside the tables."""
    found = {p.relative_to(folder): p for p in folder.rglob("*") if p.is_file() and p.suffix != ".json"}
    return {str(name): path.read_bytes() for name, path in found.items()} | {
        p.name: p.read_bytes() for p in folder.glob("labels.json")
    }


@pytest.mark.parametrize("size", [ROWS, 7])
@pytest.mark.parametrize("split", ["given", "drawn"])
def test_a_store_written_in_chunks_is_that_of_all_rows_together(size: int, split: str, tmp_path: Path) -> None:
    arrays, options = example()
    if split == "drawn":
        del options["split"]
    about = {"owners": {"kind": ["touch", "text"]}, "seed": 3}
    whole = FeatureStore.from_arrays(arrays, tmp_path / "whole", **options, **about)
    chunked = write(tmp_path / "chunked", arrays, options, size, **about)
    assert chunked.key == whole.key and chunked.specs == whole.specs
    assert chunked.manifest["splits"] == whole.manifest["splits"]
    assert chunked.manifest["splits"]["train"]["views"] == 3 and set(chunked.splits) == {"train", "val", "test"}
    assert files(tmp_path / "chunked") == files(tmp_path / "whole")
    assert {p.name for p in (tmp_path / "chunked").iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}
    assert write(tmp_path / "whole", arrays, options, size, **about).key == whole.key  # only opened
    with pytest.raises(UserError, match="already contains another store"):
        write(tmp_path / "whole", arrays, options, size, **about | {"owners": {"kind": ["touch"]}})
    assert FeatureStore(tmp_path / "whole").key == whole.key
    assert {p.name for p in (tmp_path / "chunked").iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}


def test_a_value_stands_for_all_rows_of_a_chunk(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((6, 4))
    with FeatureStore.writer(tmp_path / "store") as writer:
        writer.add({"a": x, "b": x[:, :2]}, split="train", groups="press 1", labels={"object": "cup"})
        writer.add({"a": x + 1, "b": x[:, :2] + 1}, split="test", groups="press 2", labels={"object": "pen"})
    store = FeatureStore(tmp_path / "store")
    assert {name: list(split.names) for name, split in store.splits.items()} == {
        "train": [f"row{i}" for i in range(6)],
        "test": [f"row{i}" for i in range(6, 12)],
    }
    assert store.splits["test"].groups.tolist() == [0] * 6
    assert (store.folder / "labels.csv").read_text().split()[1:] == [
        f"row{i},{'cup' if i < 6 else 'pen'}" for i in range(12)
    ]


def test_sentences_of_other_lengths_are_padded(tmp_path: Path) -> None:
    g = np.random.default_rng(0)
    chunks = [g.standard_normal((4, length, 2)) for length in (3, 5, 1)]
    force = g.standard_normal((12, 2))
    with FeatureStore.writer(tmp_path / "store", {"text": FeatureSpec(2, 5, 2), "force": FeatureSpec(2, 1, 2)}) as writer:
        for i, chunk in enumerate(chunks):
            writer.add({"text": chunk, "force": force[4 * i : 4 * i + 4]}, split="train")
    read = FeatureStore(tmp_path / "store").splits["train"].read(torch.arange(12)).modalities["text"]
    assert read.mask.sum(1).tolist() == [3] * 4 + [5] * 4 + [1] * 4
    for i, chunk in enumerate(chunks):
        assert np.array_equal(read.tokens[4 * i : 4 * i + 4, : chunk.shape[1]].numpy(), chunk.astype(np.float16))
    with FeatureStore.writer(tmp_path / "other") as writer:
        writer.add({"text": chunks[0], "force": force[:4]}, split="train")
        with pytest.raises(
            UserError, match=r"text has FeatureSpec\(width=2, tokens=5.*specs with the largest number of tokens"
        ):
            writer.add({"text": chunks[1], "force": force[4:8]}, split="train")


def test_a_modality_that_a_chunk_lacks_is_absent_in_its_rows(tmp_path: Path) -> None:
    arrays, options = example()
    del options["names"]
    rows = [slice(0, 20), slice(20, 40), slice(40, 60)]
    with FeatureStore.writer(tmp_path / "store", {m: FeatureSpec(*s) for m, s in SPECS.items()}) as writer:
        for i, at in enumerate(rows):
            chunk, given = part(arrays, at), part(options, at)
            if i != 1:
                del chunk["touch"], given["mask"]["touch"], given["views"]["touch"]
            writer.add(chunk, **given)
    gone = np.ones(ROWS, bool)
    gone[20:40] = False
    options["present"]["touch"] = ~gone
    whole = FeatureStore.from_arrays(arrays, tmp_path / "whole", **options)
    assert FeatureStore(tmp_path / "store").key == whole.key
    assert files(tmp_path / "store") == files(tmp_path / "whole")


SPECS = {"touch": (3, 4, 3), "sound": (5, 1, 5), "text": (6, 1, 2)}
G = np.random.default_rng(0)
A, B = G.standard_normal((6, 4)), G.standard_normal((6, 2, 3))
BAD: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "the modality 'c'; the store has a, b": ({"a": A, "c": B}, {}),
    "a chunk has no modality": ({}, {}),
    "b has 5 rows and the first modality 6": ({"a": A, "b": B[:5]}, {}),
    r"b has NaN or inf in row 8 \(1 of 6 rows\)": ({"a": A, "b": np.where(np.arange(6)[:, None, None] == 2, np.nan, B)}, {}),
    "beyond the range of half precision": ({"a": A * 1e6, "b": B}, {}),
    r"a has FeatureSpec\(width=3,.*\(width=4": ({"a": A[:, :3], "b": B}, {}),
    "the name 'n1' is given twice": ({"a": A, "b": B}, {"names": ["n1", *"vwxyz"]}),
    "the name 'w' is given twice": ({"a": A, "b": B}, {"names": list("vwwxyz")}),
    "split has 'dev'": ({"a": A, "b": B}, {"split": "dev"}),
    "groups is given for some chunks only": ({"a": A, "b": B}, {"groups": "x"}),
    "label.y is given for some chunks only": ({"a": A, "b": B}, {"labels": {"x": 1, "y": 2}}),
    "a.captions is given for some chunks only": ({"a": A, "b": B}, {"captions": {"a": list("abcdef")}}),
    "a.pooled is given for some chunks only": ({"a": A, "b": B}, {"pooled": {"a": A}}),
    "b.mask belongs to no modality": ({"a": A}, {"mask": {"b": np.ones((6, 2), bool)}}),
    "label.x must have one entry": ({"a": A, "b": B}, {"labels": {"x": [1, 2]}}),
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_chunk_is_refused_and_leaves_nothing(message: str, tmp_path: Path) -> None:
    """Who catches the error may go on: nothing of the chunk was added."""
    good: dict[str, Any] = {"split": "train", "labels": {"x": 0}}
    arrays, options = BAD[message]
    options = good | {"names": [f"m{i}" for i in range(6)]} | options

    def bad() -> None:
        with FeatureStore.writer(tmp_path / "bad") as writer:
            writer.add({"a": A, "b": B}, **good, names=[f"n{i}" for i in range(6)])
            writer.add(arrays, **options)

    with pytest.raises(UserError, match=message) as caught:
        bad()
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "bad").iterdir()) == []
    with FeatureStore.writer(tmp_path / "good") as writer:
        writer.add({"a": A, "b": B}, **good, names=[f"n{i}" for i in range(6)])
        with pytest.raises(UserError):
            writer.add(arrays, **options)
        writer.add({"a": A + 1, "b": B + 1}, **good, names=list("uvwxyz"))
    twice = {"a": np.concatenate([A, A + 1]), "b": np.concatenate([B, B + 1])}
    names = [f"n{i}" for i in range(6)] + list("uvwxyz")
    whole = check_arrays(twice, split=["train"] * 12, labels={"x": [0] * 12}, names=names)
    assert FeatureStore.from_arrays(whole, tmp_path / "good").splits["train"].names[11] == "z"  # only opened: the same key


def test_what_all_rows_decide_is_decided_at_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for scale, remedy in ((1e-7, r"multiply it by 1e\+07"), (1e-60, r"multiply it by 1e\+60")):
        with pytest.raises(UserError, match=f"a has values up to .*{remedy}"):
            write(tmp_path / "store", {"a": A * scale, "b": B}, {}, 2)
    assert list((tmp_path / "store").iterdir()) == []
    steps = np.repeat(np.arange(3.0), 2)[:, None] + 1e-5 * A  # equal to 1e-5 within each chunk, and different over all rows
    write(tmp_path / "steps", {"a": steps, "b": B}, {}, 2)
    assert not caplog.records
    write(
        tmp_path / "constant",
        {"a": np.ones((6, 2)), "text": B},
        {"split": ["train"] * 3 + ["test"] * 3, "groups": [1] * 6},
        2,
    )
    assert "a is the same in all of its 6 rows" in caplog.text
    assert "1 of 1 groups are in more than one split" in caplog.text
    assert "6 rows have equal numbers in another split (a)" in caplog.text
    with pytest.raises(UserError, match="has no rows; add a chunk"), FeatureStore.writer(tmp_path / "empty"):
        pass


def test_differences_are_looked_for_in_a_sample_of_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tvl_align.features.arrays.SAMPLE_ROWS", 8)
    with FeatureStore.writer(tmp_path / "store") as writer:
        for start in range(0, 100, 3):
            x = np.arange(start, start + 3.0)[:, None]
            writer.add({"a": x, "b": -x}, split="train")
        differences = writer.modalities["a"].differences
        assert [int(x[0, 0]) for x in differences.sample] == list(range(0, 102, 16))
        assert differences.rows == 102 and not differences.constant


KILLED = """
import os, sys, numpy as np
from pathlib import Path
from tvl_align.features.store import FeatureStore
x = np.random.default_rng(0).standard_normal((6, 4))
with FeatureStore.writer(Path(sys.argv[1])) as writer:
    writer.add({"a": x, "b": -x})
    os.kill(os.getpid(), 9)
"""


def test_a_writer_that_is_killed_leaves_no_store_and_may_be_run_again(tmp_path: Path) -> None:
    out = tmp_path / "store"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    assert subprocess.run([sys.executable, "-c", KILLED, str(out)], env=environment).returncode == -9
    assert not (out / "manifest.json").exists() and list(out.iterdir())
    with pytest.raises(UserError, match="not a feature store"):
        FeatureStore(out)
    store = write(out, {"a": A, "b": B}, {}, 4)
    assert sum(len(split) for split in store.splits.values()) == 6
    assert not [p for p in out.iterdir() if p.name.startswith(".")]


def test_two_writers_and_other_content_are_kept_apart(tmp_path: Path) -> None:
    with FeatureStore.writer(tmp_path / "store") as writer:
        writer.add({"a": A, "b": B})
        with pytest.raises(UserError, match="another process writes to"), FeatureStore.writer(tmp_path / "store"):
            pass
    assert FeatureStore(tmp_path / "store").specs["b"] == FeatureSpec(3, 2, 3)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="is not empty"), FeatureStore.writer(tmp_path / "other"):
        pass
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["thesis.tex"]


def in_file(arrays: dict[str, Any], options: dict[str, Any]) -> dict[str, np.ndarray]:
    """Arrays by their names in a file."""
    found = dict(arrays)
    for what, value in options.items():
        if what == "labels":
            found |= {f"label.{k}": np.asarray(v) for k, v in value.items()}
        elif isinstance(value, dict):
            found |= {f"{k}.{what}": np.asarray(v) for k, v in value.items()}
        else:
            found[what] = np.asarray(value)
    return found | {"owners.kind": np.array(["touch", "text"])}


def save(path: Path, content: dict[str, np.ndarray]) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **content)
    elif path.suffix == ".zarr":
        group = zarr.open_group(path, mode="w")
        for name, x in content.items():
            texts = x.astype(np.dtypes.StringDType()) if x.dtype.kind == "U" else x
            group.create_array(name, data=texts, chunks=tuple(max(1, n // 3) for n in x.shape))
    else:
        with h5py.File(path, "w") as file:
            for name, x in content.items():
                texts = x.dtype.kind == "U"
                file.create_dataset(
                    name, data=x.astype(object) if texts else x, dtype=h5py.string_dtype() if texts else None
                )
    return path


@pytest.mark.parametrize("suffix", [".npz", ".h5", ".hdf5", ".zarr"])
def test_files_of_every_kind_give_the_same_store(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("tvl_align.features.arrays.CHUNK_BYTES", 8000)  # a few chunks
    content = dict(sorted(in_file(*example()).items()))  # as HDF5 does
    content["names"] = np.array([f"gr\u00f6\u00dfe {i}" for i in range(ROWS)])
    expected = FeatureStore.from_arrays(read_npz(save(tmp_path / "x.npz", content)), tmp_path / "expected")
    path = save(tmp_path / f"features{suffix}", content)
    for flag in ("--npz", "--file"):
        run(["import", flag, str(path), "--out", str(tmp_path / flag)])
        assert capsys.readouterr().out == f"sound, text, touch: 32 train, 8 val, 20 test rows\n{tmp_path / flag}\n"
        store = FeatureStore(tmp_path / flag)
        assert store.key == expected.key and store.splits["train"].names[3] == "gr\u00f6\u00dfe 3"
        assert files(store.folder) == files(expected.folder)


@pytest.mark.parametrize("suffix", [".npz", ".h5", ".zarr"])
@pytest.mark.parametrize("content", ["nothing", "text", "cut"])
def test_files_of_another_kind_are_refused(content: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x{suffix}"
    if content == "text":
        path.write_text("a,b")
    elif content == "cut" and suffix != ".zarr":
        save(path, {"a": A, "b": B})
        path.write_bytes(path.read_bytes()[:-200])
    elif content == "cut":
        save(path, {"a": A, "b": B})
        next(p for p in path.rglob("zarr.json") if p.parent != path).write_text("{")
    with pytest.raises(UserError, match="cannot be read as an? .* of plain arrays .*; write it with") as caught:
        FeatureStore.from_file(path, tmp_path / "store")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "store" / "manifest.json").exists()


@pytest.mark.parametrize("suffix", [".npz", ".h5", ".zarr"])
def test_bad_arrays_of_a_file_are_refused(suffix: str, tmp_path: Path) -> None:
    bad: dict[str, dict[str, Any]] = {
        r"b has the shape \(5, 2, 3\), and a 6 rows": {"a": A, "b": B[:5]},
        r"label.x has the shape \(2,\), and a 6 rows": {"a": A, "b": B, "label.x": np.ones(2)},
        r"names has the shape \(1,\)": {"a": A, "b": B, "names": np.arange(1)},
        "two or more modalities, got a": {"a": A},
        "unknown suffix .weight": {"a": A, "b": B, "a.weight": np.ones(6)},
        "b.captions has the shape|b.mask has the shape": {"a": A, "b": B, "b.mask": np.ones((5, 2), bool)},
    }
    for i, (message, content) in enumerate(bad.items()):
        path = save(tmp_path / f"{i}{suffix}", content)
        with pytest.raises(UserError, match=message):
            FeatureStore.from_file(path, tmp_path / "store")


def test_groups_and_files_that_unpack_to_far_more_are_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "group.h5", "w") as file:
        file["touch/tokens"] = A
    with h5py.File(tmp_path / "bomb.h5", "w") as file:
        for name in ("a", "b"):
            file.create_dataset(name, (10**6, 10**4), "f4", chunks=(100, 100))
    zarr.open_group(tmp_path / "group.zarr", mode="w").create_group("touch")
    for name in ("a", "b"):
        zarr.open_group(tmp_path / "bomb.zarr", mode="a").create_array(name, shape=(10**6, 10**4), dtype="f4")
    for name, message in (("group", "touch is a group"), ("bomb", "it unpacks to 80000000000 bytes")):
        for suffix in (".h5", ".zarr"):
            with pytest.raises(UserError, match=message):
                FeatureStore.from_file(tmp_path / f"{name}{suffix}", tmp_path / "store")


@pytest.mark.parametrize("codec", ["filter", "compressor", "second filter"])
def test_pickled_objects_in_a_zarr_folder_are_refused_and_not_loaded(
    codec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("numcodecs.pickles.ALLOW_UNSAFE_PICKLE_DECODE", True, raising=False)  # as in older versions
    mark, pickled = tmp_path / "executed", {"id": "pickle", "protocol": 4}
    zarr.open_group(tmp_path / "x.zarr", mode="w", zarr_format=2)
    array = {"zarr_format": 2, "shape": [6], "chunks": [6], "fill_value": 0, "order": "C"}
    array |= {"dtype": "|O" if codec == "second filter" else "<f8", "compressor": pickled if codec == "compressor" else None}
    array |= {"filters": {"filter": [pickled], "second filter": [{"id": "vlen-utf8"}, pickled]}.get(codec)}
    for name in ("a", "b", "names"):
        (tmp_path / "x.zarr" / name).mkdir()
        (tmp_path / "x.zarr" / name / ".zarray").write_text(json.dumps(array))
        (tmp_path / "x.zarr" / name / "0").write_bytes(f"cos\nsystem\n(S'touch {mark}'\ntR.".encode())
    with pytest.raises(UserError, match="cannot be read as a zarr folder .*pickle"):
        FeatureStore.from_file(tmp_path / "x.zarr", tmp_path / "store")
    assert not mark.exists()


def test_an_import_reads_no_modality_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tvl_align.features.arrays.CHUNK_BYTES", 1000)
    monkeypatch.setattr("tvl_align.features.arrays.ROWS_AT_ONCE", 10)
    content = in_file(*example())
    path = save(tmp_path / "x.h5", content)
    sizes = []
    read = h5py.Dataset.__getitem__

    def counted(dataset: Any, at: Any, *rest: Any) -> Any:
        found = read(dataset, at, *rest)
        if dataset.name in ("/touch", "/sound", "/text", "/touch.views"):
            sizes.append(len(found))
        return found

    monkeypatch.setattr(h5py.Dataset, "__getitem__", counted)
    FeatureStore.from_file(path, tmp_path / "store")
    assert sum(sizes) == 4 * ROWS and max(sizes) <= 10


@pytest.mark.parametrize(("suffix", "package"), [(".h5", "h5py"), (".zarr", "zarr")])
def test_a_missing_package_is_named_with_its_extra(
    suffix: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as ended:
        reports_errors(run)(["import", "--file", str(tmp_path / f"x{suffix}"), "--out", str(tmp_path / "store")])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said == f"error: {package} is not installed; run pip install 'tvl-align[arrays]'.\n"
