"""Feature stores from arrays, and training, evaluation and comparison of every method on such a store."""

import json
import shlex
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from sklearn.datasets import load_digits

from benchmarks.jobs import run_settings
from tvl_align.evaluation.labels import read_labels
from tvl_align.evaluation.measure import EvaluateConfig, measure
from tvl_align.features.arrays import arrays_key, check_arrays, read_npz
from tvl_align.features.store import FeatureStore
from tvl_align.losses.contrastive import keys_of, positive_mask
from tvl_align.methods.registry import METHODS
from tvl_align.metrics.retrieval import retrieval
from tvl_align.system.console import UserError
from tvl_align.training.engine import fit


def digits() -> dict[str, np.ndarray]:
    """scikit-learn's handwritten digits as three modalities: disjoint pixel rows of different token number and width."""
    images, label = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8) / 16
    present = np.ones(len(images), bool)
    present[::7] = False
    return {
        "top": images[:, :3],
        "middle": images[:, 3:5].reshape(len(images), 16),
        "bottom": images[:, 5:].transpose(0, 2, 1),
        "middle.present": present,
        "label.digit": label,
        "owners.digit": np.array(["top", "middle", "bottom"]),
    }


@pytest.fixture(scope="module")
def npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("digits") / "digits.npz"
    np.savez(path, **digits())
    return path


def test_a_store_returns_the_arrays_it_was_written_from(npz: Path, tmp_path: Path) -> None:
    arrays = read_npz(npz)
    store = FeatureStore.from_arrays(arrays, tmp_path / "store")
    assert {m: (s.tokens, s.width) for m, s in store.specs.items()} == {"top": (3, 8), "middle": (1, 16), "bottom": (8, 3)}
    assert sum(len(s) for s in store.splits.values()) == len(arrays.names)
    for name, split in store.splits.items():
        rows = np.flatnonzero(arrays.split == name)
        assert list(split.names) == [arrays.names[row] for row in rows]
        read = split.read(torch.arange(len(split)))
        for m, written in arrays.modalities.items():
            present = written.present[rows]
            assert np.array_equal(read.modalities[m].present.numpy(), present)
            assert np.allclose(read.modalities[m].tokens.float().numpy()[present], written.tokens[rows][present], atol=1e-3)
            assert np.allclose(read.modalities[m].pooled.numpy()[present], written.pooled[rows][present])
    labels = read_labels(tmp_path / "store" / "labels.csv")
    assert labels.ownership["digit"] == ("top", "middle", "bottom")
    assert labels.of("digit", store.splits["test"].names).tolist() == [
        int(x) for x in arrays.labels["digit"][arrays.split == "test"]
    ]
    assert FeatureStore.from_arrays(arrays, tmp_path / "store").key == store.key
    with pytest.raises(UserError, match="already contains another store"):
        FeatureStore.from_arrays(read_npz(npz, seed=1), tmp_path / "store")


def test_groups_are_never_split_apart() -> None:
    groups = np.arange(200) // 8
    x = np.random.default_rng(0).standard_normal((200, 4))
    split = check_arrays({"a": x, "b": x}, groups=groups).split
    assert {str(s) for s in split} == {"train", "val", "test"}
    for group in range(25):
        assert len(set(split[groups == group])) == 1


GOOD = {"a": np.ones((6, 2, 3)), "b": np.ones((6, 4))}
GOOD30 = {"a": np.ones((30, 2)), "b": np.ones((30, 2))}
BAD = {
    "at least two": {"a": GOOD["a"]},
    "letters, digits": GOOD | {"a/b": GOOD["b"]},
    "'index' has a reserved name": GOOD | {"index": GOOD["b"]},
    "'train' has a reserved name": GOOD | {"train": GOOD["b"]},
    "would both be named a_b_c": {"a": GOOD["b"], "b_c": GOOD["b"], "a_b": GOOD["b"], "c": GOOD["b"]},
    "has 5 rows": GOOD | {"b": np.ones((5, 4))},
    "shape \\(rows, tokens, width\\)": GOOD | {"b": np.ones((6, 2, 2, 2))},
    "not \\(6, 4\\) <U1": GOOD | {"b": np.full((6, 4), "x")},
    "NaN or inf in row 2": GOOD | {"b": np.where(np.arange(6)[:, None] == 2, np.nan, GOOD["b"])},
    "half precision": GOOD | {"b": GOOD["b"] * 1e6},
    "belongs to no modality": GOOD | {"c.mask": np.ones((6, 2), bool)},
    "unknown suffix .weight": GOOD | {"a.weight": np.ones(6)},
    "a.mask has shape": GOOD | {"a.mask": np.ones((6, 3), bool)},
    "a.present must have one entry": GOOD | {"a.present": np.ones(4, bool)},
    "a.pooled must be finite": GOOD | {"a.pooled": np.ones(6)},
    "a.captions must have one entry": GOOD | {"a.captions": np.array(["x"] * 5)},
    "c.captions belongs to no modality": GOOD | {"c.captions": np.array(["x"] * 6)},
    "c.views belongs to no modality": GOOD | {"c.views": np.ones((6, 2, 3))},
    "a.views must be floats of shape \\(6, views, 2, 3\\), not \\(6, 2, 3\\)": GOOD | {"a.views": np.ones((6, 2, 3))},
    "b.views must be floats of shape \\(6, views, 1, 4\\) or \\(6, views, 4\\)": GOOD | {"b.views": np.ones((5, 2, 4))},
    "b.views must be floats": GOOD | {"b.views": np.full((6, 2, 4), "x")},
    "a has 2, b has 3; give the same": GOOD | {"a.views": np.ones((6, 2, 2, 3)), "b.views": np.ones((6, 3, 4))},
    "b.views has NaN or inf in row 4": GOOD
    | {"b.views": np.where(np.arange(6)[:, None, None] == 4, np.nan, np.ones((6, 2, 4)))},
    "b.views has values up to 1e\\+06": GOOD | {"b.views": np.full((6, 2, 4), 1e6)},
    "b.views_pooled needs b.views and b.pooled": GOOD | {"b.views_pooled": np.ones((6, 2, 4))},
    r"b.views_pooled must have the shape \(6, 2, 4\), not \(6, 2, 5\)": GOOD
    | {"b.views": np.ones((6, 2, 4)), "b.pooled": np.ones((6, 4)), "b.views_pooled": np.ones((6, 2, 5))},
    "b.pooled cannot be given with b.views": GOOD | {"b.views": np.ones((6, 2, 4)), "b.pooled": np.ones((6, 4))},
    "label.x is inf in row 3": GOOD30 | {"label.x": np.where(np.arange(30) == 3, np.inf, np.arange(30.0))},
    "label.x must have one entry": GOOD | {"label.x": np.ones(2)},
    "owners.y belongs to no label": GOOD | {"owners.y": np.array(["a"])},
    "has c, which is not a modality": GOOD | {"label.x": np.ones(6), "owners.x": np.array(["c"])},
    "split has 'dev'": GOOD | {"split": np.array(["dev"] * 6)},
    "names must be unique": GOOD | {"names": np.array(["same"] * 6)},
    "plain arrays": GOOD | {"b": np.array([object()] * 6, dtype=object)},
}


def with_views(rows: int = 300) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Arrays a (tokens, padded, sometimes absent), b (vectors) and c, and three views of a and b."""
    g = np.random.default_rng(0)
    arrays = {"a": g.standard_normal((rows, 4, 3)), "b": g.standard_normal((rows, 5)), "c": g.standard_normal((rows, 2))}
    views = {"a": g.standard_normal((rows, 3, 4, 3)), "b": g.standard_normal((rows, 3, 5)).astype(np.float16)}
    return arrays, views


def test_a_view_of_a_training_row_has_the_tokens_that_were_given(tmp_path: Path) -> None:
    arrays, views = with_views()
    split = np.array(["val", "train", "train", "train", "test"] * 60)
    present, mask = np.arange(300) % 7 != 0, np.ones((300, 4), bool)
    mask[::2, 2:] = False
    views["a"][~present], views["a"][split != "train"] = np.nan, np.inf  # not used
    options = {"split": split, "present": {"a": present}, "mask": {"a": mask}, "views": views}
    checked = check_arrays(arrays, **options)
    assert np.shares_memory(checked.modalities["a"].views, views["a"])  # not copied
    store = FeatureStore.from_arrays(checked, tmp_path / "store")
    train = store.splits["train"]
    assert {name: s.views for name, s in store.splits.items()} == {"train": 3, "val": 0, "test": 0}
    assert store.splits["val"].index["a"].shape == (60, 1)
    with pytest.raises(IndexError):
        store.splits["val"].read(torch.arange(3), torch.ones(3, dtype=torch.int64))
    rows = np.flatnonzero(split == "train")
    for view in range(4):
        read = train.read(torch.arange(len(train)), torch.full((len(train),), view)).modalities
        tokens = arrays["a"] if view == 0 else views["a"][:, view - 1]
        vectors = arrays["b"] if view == 0 else views["b"][:, view - 1]
        expected = np.where((mask & present[:, None])[rows][..., None], tokens[rows], 0)
        stored = read["a"].tokens.numpy()[present[rows]]
        assert np.array_equal(stored, expected[present[rows]].astype(np.float32).astype(np.float16))
        assert np.array_equal(read["b"].tokens[:, 0].numpy(), vectors[rows].astype(np.float16))
        assert np.array_equal(read["c"].tokens[:, 0].numpy(), arrays["c"][rows].astype(np.float16))
        assert np.array_equal(read["a"].present.numpy(), present[rows])
        assert np.array_equal(read["a"].mask.numpy(), (mask & present[:, None])[rows])
        mean = expected.sum(1)[present[rows]] / mask.sum(1)[rows][present[rows]][:, None]
        unit = mean / np.linalg.norm(mean, axis=1, keepdims=True)
        assert np.allclose(read["a"].pooled.numpy()[present[rows]], unit, atol=1e-5)
    assert (train.index["a"][~torch.from_numpy(present[rows])] == -1).all()
    assert len(train.tables["a"]["mask"]) == 4 * present[rows].sum()
    assert len(train.tables["c"]["mask"]) == len(rows)  # plain tokens are stored once
    views["b"][rows[-1], 2, 4] += 1
    assert check_arrays(arrays, **options).views == 3
    assert FeatureStore.from_arrays(check_arrays(arrays, **options), tmp_path / "other").key != store.key


def test_views_in_an_npz_file(tmp_path: Path) -> None:
    arrays, views = with_views(20)
    np.savez(tmp_path / "x.npz", **arrays, **{f"{m}.views": x for m, x in views.items()})
    read = read_npz(tmp_path / "x.npz")
    assert read.views == 3 and np.array_equal(read.modalities["a"].views, views["a"])


def test_stores_without_views_keep_their_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tvl_align.features.arrays.FORMAT", 2)
    eye = np.eye(8)
    checked = check_arrays({"a": eye, "b": eye[::-1]}, labels={"x": np.arange(8) % 2}, owners={"x": ["a"]})
    assert arrays_key(checked) == "92d72ad2d71fe72e"  # of the code before views existed


def test_numbers_are_labels(tmp_path: Path) -> None:
    x = np.ones((30, 2))
    depth = np.linspace(0, 1, 30) * np.pi
    depth[4] = np.nan
    labels = {"depth": depth, "few": np.arange(30) % 20 / 2, "many": np.arange(30), "text": np.arange(30).astype(str)}
    FeatureStore.from_arrays({"a": x, "b": x}, tmp_path, labels=labels, owners={"depth": ["a"], "few": ["a", "b"]})
    legend = json.loads((tmp_path / "labels.json").read_text())
    assert legend == {"factors": {"depth": {"ownership": ["a"], "kind": "number"}, "few": {"ownership": ["a", "b"]}}}
    rows = [line.split(",") for line in (tmp_path / "labels.csv").read_text().splitlines()]
    assert rows[0] == ["row", "depth", "few", "many", "text"]
    assert rows[2] == ["row1", "0.108331", "0.5", "1", "1"] and rows[5][1] == "" and rows[30][1] == "3.14159"
    numbers = check_arrays({"a": x, "b": x}, labels={"depth": depth})
    classes = check_arrays({"a": x, "b": x}, labels={"depth": numbers.labels["depth"]})
    assert arrays_key(numbers) != arrays_key(classes)


def test_groups_that_are_given_are_stored(tmp_path: Path) -> None:
    x, groups = np.eye(6), ["p", "q", "q", "p", "r", "r"]
    store = FeatureStore.from_arrays({"a": x, "b": x}, tmp_path / "1", groups=groups, split=["train"] * 6)
    assert store.splits["train"].groups.tolist() == [0, 1, 1, 0, 2, 2]
    other = FeatureStore.from_arrays({"a": x, "b": x}, tmp_path / "2", split=["train"] * 6)
    assert other.splits["train"].groups.tolist() == list(range(6)) and other.key != store.key


def perfect(store: FeatureStore, pair: tuple[str, str], split: str) -> float:
    """Acc@1 on a split of a model whose codes of the pair are what both tell: here the pooled features of the first."""
    source = store.splits[split]
    features = source.read(torch.arange(len(source)))
    keys = keys_of(pair, features.caption_keys, features.content_keys)
    codes = features.modalities[pair[0]].pooled
    return retrieval(codes, codes, torch.ones(len(source), dtype=torch.bool), keys).acc1


@pytest.mark.parametrize("name", ["text", "sentence"])
@pytest.mark.parametrize("given", ["strings", "numbers", "equal features"])
def test_five_sentences_in_100_rows_are_positives(name: str, given: str, tmp_path: Path) -> None:
    """Rows with equal captions, or with equal features without captions, are positives; a perfect model scores 100."""
    g = np.random.default_rng(0)
    which = np.arange(100) % 5
    noise = 0 if given == "equal features" else 1e-4  # two encodings of a sentence may differ in the last digit
    arrays = {name: np.eye(5)[which] + noise * g.standard_normal((100, 5)), "force": g.standard_normal((100, 3))}
    captions = {"strings": np.array(list("abcde"))[which], "numbers": which}.get(given)
    arrays |= {} if captions is None else {f"{name}.captions": captions}
    split = np.array(["train"] * 60 + ["test"] * 40)
    np.savez(tmp_path / "x.npz", **arrays, split=split)
    store = FeatureStore.from_arrays(read_npz(tmp_path / "x.npz"), tmp_path / "store")
    for part, rows in (("train", 60), ("test", 40)):
        assert perfect(store, (name, "force"), part) == 100
        read = store.splits[part].read(torch.arange(rows))
        keys = keys_of((name, "force"), read.caption_keys, read.content_keys)
        assert positive_mask(keys, keys).sum(1).tolist() == [rows // 5] * rows
        if name == "text":  # what has the same text is in caption_keys, as in every other store
            assert read.content_keys == {} and len(read.caption_keys.unique(dim=0)) == 5
        alone = keys_of(("force",), read.caption_keys, read.content_keys)
        assert alone is None
    plain = FeatureStore.from_arrays(
        {"other": arrays[name] + 1e-2 * g.standard_normal((100, 5)), "force": arrays["force"]},
        tmp_path / "plain",
        split=split,
    )
    assert plain.splits["train"].content_keys == {}


def test_captions_that_are_not_known_are_equal_to_none(tmp_path: Path) -> None:
    g = np.random.default_rng(0)
    arrays = {"a": g.standard_normal((6, 3)), "b": g.standard_normal((6, 3))}
    options = {"captions": {"a": ["x", "", "", "x", "y", "x"]}, "present": {"a": [1, 1, 1, 1, 1, 0]}, "split": ["train"] * 6}
    store = FeatureStore.from_arrays(arrays, tmp_path / "store", **options)
    keys = store.splits["train"].content_keys["a"].tolist()
    assert keys[0] == keys[3] and len(set(keys)) == 5
    assert store.manifest["splits"]["train"]["repeated"] == {"a": 1}
    options["captions"] = {"a": ["x", "", "", "z", "y", "x"]}
    assert FeatureStore.from_arrays(arrays, tmp_path / "other", **options).key != store.key
    (store.folder / "train" / "rows" / "content_keys" / "a.memmap").unlink()
    with pytest.raises(UserError, match="damaged"):
        FeatureStore(store.folder)


def test_copies_are_kept_on_one_side_of_the_split(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    g = np.random.default_rng(0)
    arrays = {"photo": g.standard_normal((200, 3)), "force": g.standard_normal((200, 3))}
    arrays["photo"][100:] = arrays["photo"][:100]
    checked = check_arrays(arrays)
    assert set(checked.split) == {"train", "val", "test"}
    assert (checked.split[100:] == checked.split[:100]).all()
    assert "100 rows repeat the photo of another row" in caplog.text
    assert "rows with equal photo are kept in one split, 100 groups" in caplog.text
    joined = check_arrays(arrays, groups=np.arange(200) // 2)
    for i in range(100):
        assert len({joined.split[j] for j in (i, i ^ 1, i + 100, (i ^ 1) + 100)}) == 1
    assert len(set(joined.groups)) == 50
    store = FeatureStore.from_arrays(checked, tmp_path / "store")
    for name, split in store.splits.items():
        rows = (checked.split == name).sum()
        assert store.manifest["splits"][name]["repeated"] == {"photo": rows // 2}
        assert (split.content_keys["photo"][: rows // 2] == split.content_keys["photo"][rows // 2 :]).all()
        assert len(split.groups.unique()) == rows // 2
    assert store.only(["force"]).splits["train"].content_keys == {}


def test_copies_on_both_sides_of_a_split_that_is_given_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    g = np.random.default_rng(0)
    arrays = {"photo": g.standard_normal((10, 3)), "force": g.standard_normal((10, 3))}
    arrays["photo"][7] = arrays["photo"][1]
    split = ["train"] * 5 + ["test"] * 5
    assert check_arrays(arrays, split=split).split.tolist() == split
    assert "2 rows have equal numbers in another split (photo)" in caplog.text


def test_few_sentences_do_not_join_groups(caplog: pytest.LogCaptureFixture) -> None:
    """They would leave as many groups as sentences. Without captions this is said, with the remedy."""
    force, which = np.random.default_rng(0).standard_normal((100, 3)), np.arange(100) % 5
    for name, options in (("text", {}), ("sentence", {"captions": {"sentence": which}})):
        checked = check_arrays({name: np.eye(5)[which], "force": force}, **options)
        assert np.bincount(np.unique(checked.split, return_inverse=True)[1]).tolist() == [10, 80, 10]
        assert checked.groups is None
    check_arrays({"sentence": np.eye(5)[which], "force": force})
    assert "kept in one split, 5 groups; give .captions of those that hold sentences or classes" in caplog.text


@pytest.mark.parametrize("message", BAD)
def test_bad_arrays_are_refused_in_one_sentence(message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "bad.npz", **{"split": np.array(["train"] * len(BAD[message]["a"]))} | BAD[message])
    with pytest.raises(UserError, match=message):
        read_npz(tmp_path / "bad.npz")


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04 torn"])
def test_other_files_than_npz_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"cannot be read as an \.npz"):
        read_npz(tmp_path / "bad.npz")


@pytest.mark.slow
def test_every_method_trains_is_measured_and_compared_on_it(npz: Path, tmp_path: Path) -> None:
    """With the commands, without a Stage-1 checkpoint, with rows that lack a modality."""

    def run(line: str) -> str:
        code, output = processes.tvl_align(shlex.split(line), tmp_path / "said")
        assert code == 0, output
        return output

    store = tmp_path / "store"
    assert "top, middle, bottom" in run(f"features import --npz {npz} --out {store}")
    small = f"--store {store} --register_token_dim 32 --num_heads 4 --epochs 2 --lr 2e-3 --warmup_epochs 1"
    small += f" --output_dir {tmp_path}/runs"
    for name in METHODS:
        output = run(f"train --method {name} --log_name {name} {small}")
        assert "bottom-top" in output
        run(f"evaluate {tmp_path}/runs/{name} --probe_rows 250 --probe_steps 40")
        results = json.loads((tmp_path / "runs" / name / "results.json").read_text())
        assert set(results["retrieval"]) == {"bottom_top", "middle_top", "bottom_middle"}
        assert results["retrieval"]["bottom_top"]["stage1_acc1"] is None  # pooled features of different width
        assert set(results["factors"]) == {"top", "middle", "bottom"}
    assert max(results["factors"]["top"]["digit"]["accuracy"]["stage1"].values()) > 40
    folders = " ".join(str(tmp_path / "runs" / name) for name in METHODS)
    run(f"compare {folders} --out {tmp_path}/page")
    assert "stage2_base" in (tmp_path / "page" / "report.md").read_text()


@pytest.mark.slow
def test_labels_are_probed_where_they_can_be(tmp_path: Path) -> None:
    """A factor with two owners is probed in these two. A factor without usable levels is named and left out."""
    arrays = {name: x[:400] for name, x in digits().items() if name != "owners.digit"}
    labels = {"digit": arrays.pop("label.digit")}
    views = {name: arrays[name] for name in ("top", "middle", "bottom")}
    FeatureStore.from_arrays(views, tmp_path / "store", labels=labels, owners={"digit": ["top", "middle"]})
    fit(run_settings(tmp_path / "store", tmp_path, 64, 16), METHODS["base"])
    run = tmp_path / "run"
    measure(EvaluateConfig(run))
    assert set(json.loads((run / "results.json").read_text())["factors"]) == {"top", "middle"}
    for levels in (lambda i: "same", lambda i: "", lambda i: "rare" if i % 100 == 0 else "common"):
        lines = ["row,thing", *(f"row{i},{levels(i)}" for i in range(400))]
        (tmp_path / "labels.csv").write_text("\n".join(lines))
        results = json.loads(measure(EvaluateConfig(run, labels=tmp_path / "labels.csv", probe_steps=20)).read_text())
        probed = [table["thing"] for table in results["factors"].values()]
        assert probed or set(results["left_out"]) == {"top", "middle", "bottom"}
        assert not any(entry["readable"] for entry in probed)
        assert not results["summary"]


def test_a_subset_of_a_store(npz: Path, tmp_path: Path) -> None:
    store = FeatureStore.from_arrays(read_npz(npz), tmp_path / "store").only(["bottom", "top"])
    assert list(store.specs) == ["bottom", "top"]
    assert set(store.splits["train"].read(torch.arange(3)).modalities) == {"bottom", "top"}
    with pytest.raises(UserError, match="has no modality 'smell'"):
        store.only(["smell"])
