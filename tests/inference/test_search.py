"""Search against its slow twin: all scores, one sort. Saved indexes, faiss, and folders of pictures."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tvl_align.inference import search
from tvl_align.inference.search import Index, find_pictures
from tvl_align.system.console import UserError


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def named(rows: int) -> list[str]:
    return [f"row {i}" for i in range(rows)]


def make(vectors: Tensor, made_by: str = "run a") -> Index:
    return Index.build(vectors, named(len(vectors)), made_by=made_by, modality="vision")


def twin(vectors: Tensor, queries: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """All cosine similarities, sorted one query at a time by (score, row)."""
    x, q = (t.numpy().astype(np.float64) for t in (vectors, queries))
    scores = (q / np.linalg.norm(q, axis=1, keepdims=True)) @ (x / np.linalg.norm(x, axis=1, keepdims=True)).T
    order = np.array([sorted(range(len(x)), key=lambda row, s=s: (-s[row], row))[:k] for s in scores])
    return np.take_along_axis(scores, order, axis=1), order


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 3 groups, so small that tests have many of them."""
    monkeypatch.setattr(search, "ROWS", 192)
    monkeypatch.setattr(search, "QUERIES", 3)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("rows", "queries", "k"), [(1, 1, 1), (5, 1, 9), (64, 3, 5), (300, 7, 1), (777, 10, 70), (193, 2, 193), (500, 4, 2)]
)
def test_search_finds_what_a_full_sort_finds(rows: int, queries: int, k: int) -> None:
    vectors, asked = draw(rows, 12), draw(queries, 12, seed=1)
    found = make(7.0 * vectors).search(asked, k)
    scores, order = twin(vectors, asked, k)
    assert found.rows.tolist() == order.tolist()
    np.testing.assert_allclose(found.scores.numpy(), scores, atol=1e-6)
    assert found.names == [[f"row {row}" for row in of] for of in order]
    assert found.scores.dtype == torch.float32 and found.rows.shape == (queries, min(k, rows))


@given(st.integers(1, 450), st.integers(1, 8), st.integers(1, 12), st.integers(0, 10**6))
def test_equal_scores_are_in_the_order_of_rows(rows: int, queries: int, k: int, seed: int) -> None:
    """Vectors of +-1/4 have scores that are exact in any order of summation, and many of them are equal, or 0."""
    vectors, asked = (torch.where(draw(n, 16, seed=seed + i) > 0, 0.25, -0.25) for i, n in enumerate((rows, queries)))
    vectors[:, 3:] = 0.25  # 8 different vectors
    asked[:, 8:] = -0.25
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "ROWS", 192)
        patch.setattr(search, "QUERIES", 3)
        found = make(vectors).search(asked, k)
    scores, order = twin(vectors, asked, k)
    assert found.rows.tolist() == order.tolist()
    assert found.scores.tolist() == scores.tolist()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("queries", [1, 2, 7])
def test_copies_of_a_row_tie_wherever_they_lie(queries: int) -> None:
    """Also in the last, incomplete block, where a matrix product could add up in another order."""
    vectors, copies = draw(401, 24), [3, 63, 64, 100, 191, 192, 300, 384, 400]
    vectors[copies] = vectors[3].clone()
    found = make(vectors).search(vectors[3:4] + 0.01 * draw(queries, 24, seed=2), len(copies))
    assert found.rows.tolist() == [copies] * queries
    assert all(len(set(scores)) == 1 for scores in found.scores.tolist())


def test_keys_sort_as_scores_and_then_as_rows_backwards() -> None:
    scores = torch.tensor([float("-inf"), -1.0, -0.5, -1e-40, 0.0, 1e-40, 0.5, 1.0])
    keys = search._keys(scores.repeat_interleave(2), torch.tensor([2**32 - 1, 0]).repeat(8))
    assert (keys.diff() > 0).all()
    back, rows = search._scores_and_rows(keys)
    assert back.equal(scores.repeat_interleave(2)) and rows.tolist() == [2**32 - 1, 0] * 8
    zeros = search._keys(torch.tensor([-0.0, 0.0]), torch.tensor([1, 1]))
    assert zeros[0] == zeros[1]


def test_memory_grows_neither_with_rows_nor_with_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor of a search has a block of scores, or the results."""
    monkeypatch.setattr(search, "ROWS", 192)
    monkeypatch.setattr(search, "QUERIES", 4)
    index, sizes = make(draw(1000, 2)), []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out._base is None:
                sizes.append(out.numel())
            return out

    with Sizes():
        index.search(draw(80, 2, seed=1), 3)
    assert 4 * 192 <= max(sizes) <= 4 * (192 + 3)


def test_the_vectors_are_kept_with_unit_norm() -> None:
    vectors = torch.tensor([[3e30, 4e30], [3e-30, 4e-30]])
    assert make(vectors).vectors.allclose(torch.tensor([[0.6, 0.8]] * 2))
    assert make(vectors.double()).vectors.dtype == torch.float32
    found = make(torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)).search(torch.tensor([[0.0, 1e30]]), 1)
    assert found.rows.tolist() == [[1]] and found.scores.tolist() == [[1.0]] and not found.scores.requires_grad


def test_chunks_and_added_rows_are_one_gallery() -> None:
    vectors, asked = draw(10, 4), draw(3, 4, seed=1)
    whole = make(vectors)
    parts = Index.build(iter(vectors[:7].split(3)), [Path(f"row {i}") for i in range(7)], "run a", "vision")
    parts.add(vectors[7:], named(10)[7:])
    assert parts.vectors.equal(whole.vectors) and parts.names == whole.names and len(parts) == 10
    assert parts.search(asked, 10).names == whole.search(asked, 10).names


def test_no_queries_find_nothing() -> None:
    found = make(draw(4, 3)).search(torch.empty(0, 3), 2)
    assert found.scores.shape == found.rows.shape == (0, 2) and found.names == []


NAN = torch.tensor([[1.0, 0.0], [float("nan"), 0.0]])


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: make(NAN), "the vector of row 1 has numbers that are not finite; leave it out"),
        (lambda: make(NAN.nan_to_num(float("inf"))), "the vector of row 1 has numbers that are not finite"),
        (lambda: make(NAN.nan_to_num(0.0)), "the vector of row 1 is zero; leave it out"),
        (lambda: make(torch.empty(0, 2)), "an index needs rows"),
        (lambda: Index.build(draw(3, 2), named(2), "a", "vision"), "3 vectors have 2 names; give one name to each"),
        (lambda: Index.build(iter(draw(3, 2).split(1)), named(4), "a", "vision"), "3 vectors have 4 names"),
        (lambda: make(draw(3)), r"vectors have shape \(3,\), not \(rows, width\)"),
        (lambda: make(draw(3, 2)).add(draw(1, 3), ["x"]), r"vectors have shape \(1, 3\), not \(rows, 2\)"),
        (lambda: make(draw(3, 2)).search(draw(1, 3), 1), r"queries have shape \(1, 3\), not \(rows, 2\)"),
        (lambda: make(draw(3, 2)).search(draw(2), 1), r"queries have shape \(2,\), not \(rows, 2\)"),
        (lambda: make(draw(3, 2)).search(NAN, 1), "query 1 has numbers that are not finite"),
        (lambda: make(draw(3, 2)).search(torch.zeros(1, 2), 1), "query 0 is zero"),
        (lambda: make(draw(3, 2)).search(draw(1, 2), 0), "k is 0; ask for 1 result or more"),
    ],
)
def test_what_cannot_be_compared_is_refused(act: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        act()
    assert "\n" not in str(caught.value)


def test_a_bad_row_after_the_first_block_is_named(small_blocks: None) -> None:
    vectors = draw(400, 2)
    vectors[250] = 0
    with pytest.raises(UserError, match="the vector of row 250 is zero"):
        make(vectors)


@pytest.mark.usefixtures("small_blocks")
def test_a_saved_index_finds_the_same(tmp_path: Path) -> None:
    vectors, asked = draw(430, 5), draw(4, 5, seed=1)
    names = ["", "größe/日本.png", "line\nbreak", *named(430)[3:]]
    index = Index.build(vectors, names, "run a", "tactile")
    index.save(tmp_path / "index")
    loaded = Index.load(tmp_path / "index", made_by="run a")
    assert (loaded.made_by, loaded.modality, list(loaded.names)) == ("run a", "tactile", names)
    before, after = index.search(asked, 430), loaded.search(asked, 430)
    assert after.scores.equal(before.scores) and after.rows.equal(before.rows) and after.names == before.names
    assert loaded.search(asked, 430).scores.equal(before.scores)  # also when its pages have been released


def test_a_loaded_index_grows_and_replaces_itself(tmp_path: Path) -> None:
    make(draw(5, 3)).save(tmp_path)
    index = Index.load(tmp_path)
    index.add(draw(2, 3, seed=1), ["x", "y"])
    index.save(tmp_path)
    again = Index.load(tmp_path)
    assert list(again.names) == [*named(5), "x", "y"]
    assert F.normalize(torch.cat([draw(5, 3), draw(2, 3, seed=1)])).allclose(again.vectors)
    assert len(list(tmp_path.glob("*/vectors.memmap"))) == 1  # the old ones are gone


@pytest.mark.parametrize("fails_at", ["atomic_file", "write_atomically"])
def test_a_save_that_fails_leaves_the_old_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: str) -> None:
    make(draw(5, 3)).save(tmp_path)

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(search, fails_at, full)
    with pytest.raises(OSError, match="no space left"):
        make(draw(9, 3)).save(tmp_path)
    assert len(Index.load(tmp_path)) == 5
    assert not (tmp_path / "new.tmp").exists()


def test_an_index_of_other_registers_is_refused(tmp_path: Path) -> None:
    make(draw(5, 3), made_by="run a").save(tmp_path)
    with pytest.raises(UserError, match="was made by registers run a, not by run b; build the index again") as caught:
        Index.load(tmp_path, made_by="run b")
    assert "\n" not in str(caught.value)
    assert Index.load(tmp_path).made_by == "run a"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rows": "5"}, "rows is '5'"),
        ({"rows": True}, "rows is True"),
        ({"rows": 0}, "it has 0 rows of width 3"),
        ({"rows": 6}, "expected 72 bytes"),
        ({"made_by": None}, "made_by is None"),
        ({"format": 2}, "its format is 2, not 1"),
        ({"content": "../../../etc/passwd"}, "'../../../etc/passwd' is no SHA-256"),
        ({"content": "0" * 64}, "vectors.memmap is missing"),
        ({"approximate": "0" * 64}, "approximate.faiss is missing"),
        ({"code": "import os"}, "unexpected keyword argument 'code'"),
        ({"width": ...}, "missing 1 required positional argument: 'width'"),
    ],
)
def test_other_manifests_are_refused(tmp_path: Path, changes: dict[str, object], reason: str) -> None:
    make(draw(5, 3)).save(tmp_path)
    path = tmp_path / "manifest.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
    with pytest.raises(UserError, match=reason) as caught:
        Index.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_of_something_else_is_left_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a search index"):
        Index.load(tmp_path)
    for text in ("[1]", '{"format": 3, "key": "0"}', "{", "", "[" * 10**5):
        (tmp_path / "manifest.json").write_text(text)
        for act in (lambda: Index.load(tmp_path), lambda: make(draw(5, 3)).save(tmp_path)):
            with pytest.raises(UserError, match="not that of a search index"):
                act()
        assert (tmp_path / "manifest.json").read_text() == text


@pytest.mark.parametrize("name", ["vectors.memmap", "names.memmap", "name_ends.memmap"])
@pytest.mark.parametrize("damage", ["bit", "end", "gone"])
def test_a_damaged_index_is_refused(tmp_path: Path, name: str, damage: str) -> None:
    make(draw(5, 3)).save(tmp_path)
    file = next(tmp_path.glob(f"*/{name}"))
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(content[:-1] if damage == "end" else bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(UserError, match="the index is damaged, build it again") as caught:
        Index.load(tmp_path)
    assert "\n" not in str(caught.value)
    make(draw(5, 3)).save(tmp_path)
    assert len(Index.load(tmp_path)) == 5


def clusters(rows: int, seed: int) -> Tensor:
    """Vectors around 40 centres."""
    centres = draw(40, 16, seed=99)
    return centres[torch.arange(rows) % 40] + 0.5 * draw(rows, 16, seed=seed)


def test_an_approximate_search_finds_most_neighbours_in_clusters(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    index, asked = make(clusters(4000, 0)), clusters(50, 1)
    exact = index.search(asked, 5)
    found = index.search(asked, 5, approximate=True)
    assert (found.rows[:, :, None] == exact.rows[:, None]).any(2).float().mean() > 0.95
    assert (found.scores.diff(dim=1) <= 0).all()
    np.testing.assert_allclose(  # scores are those of the rows
        found.scores, (index.vectors[found.rows] * F.normalize(asked)[:, None]).sum(-1), atol=1e-6
    )
    index.save(tmp_path, approximate=True)
    loaded = Index.load(tmp_path)
    assert loaded.search(asked, 5, approximate=True).rows.equal(found.rows)
    loaded.add(asked[:1], ["new"])
    assert loaded.search(asked[:1], 1, approximate=True).names == [["new"]]
    make(clusters(4000, 0)).save(tmp_path)  # the same content keeps its approximate index
    assert len(json.loads((tmp_path / "manifest.json").read_text())["approximate"]) == 64
    assert Index.load(tmp_path).search(asked, 5, approximate=True).rows.equal(found.rows)


def test_copies_found_by_an_approximate_search_are_in_the_order_of_rows() -> None:
    pytest.importorskip("faiss")
    index = make(draw(60, 8).repeat(5, 1))
    assert index.search(draw(60, 8), 5, approximate=True).rows.equal(torch.arange(300).view(5, 60).T)


def test_an_approximate_search_reads_a_part_of_the_gallery(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random directions have no clusters, so that most neighbours lie in lists that are not read."""
    pytest.importorskip("faiss")
    index, asked = make(draw(20_000, 32)), draw(20, 32, seed=1)
    recall = (index.search(asked, 5, approximate=True).rows[:, :, None] == index.search(asked, 5).rows[:, None]).any(2)
    assert 0.05 < recall.float().mean() < 0.9
    monkeypatch.setattr(Index, "_nearest", None)  # never called where the lists hold k rows
    index.search(asked, 5, approximate=True)


@pytest.mark.parametrize("rows", [1, 30, 500])
def test_where_the_lists_hold_too_few_rows_an_approximate_search_is_exact(rows: int) -> None:
    pytest.importorskip("faiss")
    index, asked = make(draw(rows, 4)), draw(6, 4, seed=1)
    assert index.search(asked, rows, approximate=True).rows.equal(index.search(asked, rows).rows)
    assert index.search(torch.empty(0, 4), 1, approximate=True).names == []


@pytest.mark.parametrize("content", [b"", b"IxFI garbage", None])
def test_a_faiss_file_of_other_vectors_is_refused(tmp_path: Path, content: bytes | None) -> None:
    pytest.importorskip("faiss")
    make(draw(50, 3)).save(tmp_path / "a", approximate=True)
    make(draw(60, 3)).save(tmp_path / "b", approximate=True)
    file, other = (next((tmp_path / name).glob("*/approximate.faiss")) for name in "ab")
    file.write_bytes(other.read_bytes() if content is None else content)
    with pytest.raises(UserError, match="the index is damaged"):
        Index.load(tmp_path / "a")
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text()) | {"approximate": search._digest([file])}
    (tmp_path / "a" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="approximate.faiss does not fit its index .*; save the index again") as caught:
        Index.load(tmp_path / "a").search(draw(1, 3), 1, approximate=True)
    assert "\n" not in str(caught.value)


def test_without_faiss_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    index = make(draw(5, 3))
    for act in (lambda: index.search(draw(1, 3), 1, approximate=True), lambda: index.save(tmp_path, approximate=True)):
        with pytest.raises(UserError, match=r"pip install 'tvl-align\[search\]', or search exactly") as caught:
            act()
        assert "\n" not in str(caught.value)
    assert index.search(index.vectors[2:3], 1).rows.tolist() == [[2]]


def test_pictures_are_found_by_suffix_in_the_order_of_their_paths(tmp_path: Path) -> None:
    names = [
        "b/2.PNG",
        "b/1.jpeg",
        "a.tif",
        "c/d/e.webp",
        "z.Jpg",
        "b/notes.txt",
        "labels.csv",
        ".hidden/1.png",
        "b/._1.png",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "link").symlink_to(tmp_path)
    found = [path.relative_to(tmp_path).as_posix() for path in find_pictures(tmp_path)]
    assert found == ["a.tif", "b/1.jpeg", "b/2.PNG", "c/d/e.webp", "z.Jpg"]
    relative = Path(os.path.relpath(tmp_path))
    assert find_pictures(relative)[0] == relative / "a.tif"


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    for path, message in (
        (tmp_path, "has no pictures; give a folder with .bmp"),
        (tmp_path / "a.txt", "is not a folder"),
        (tmp_path / "b", "is not a folder"),
    ):
        with pytest.raises(UserError, match=message):
            find_pictures(path)
