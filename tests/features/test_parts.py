"""Blocks that are encoded one by one become the store that a stream of all samples becomes."""

import io
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tvl_align.contract import Tokens
from tvl_align.data.sources import Block
from tvl_align.data.split import join_groups
from tvl_align.data.text import Sentence
from tvl_align.data.tvl import Tolerance
from tvl_align.encoders.tvl import Stage1, load_stage1
from tvl_align.features.parts import Task, Work, encode_blocks, in_process_group, linked
from tvl_align.features.store import FeatureStore, StoredSplit
from tvl_align.features.stream import encode_stream
from tvl_align.features.tables import Parts, read_rows
from tvl_align.system.console import UserError

ROWS = 30
WORDS = ("soft", "hard, cold", "rough")
Samples = list[dict[str, Any]]


@pytest.fixture(scope="module")
def stage1(stage1_checkpoint: Path) -> Stage1:
    return load_stage1(stage1_checkpoint)


def png(seed: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def samples(split: bool = True) -> Samples:
    """30 samples in 15 groups. Photos 20 and 2 are equal, as are 23 and 5; 4 has no touch image, and 7 and 14 no text."""
    rows: Samples = []
    for i in range(ROWS):
        row = {
            "name": f"s{i}",
            "vision": png(i - 18 if i in (20, 23) else i),
            "tactile": None if i == 4 else png(1000 + i),
            "text": WORDS[i % 3] if i % 7 or not i else None,
            "group": f"g{i // 2}",
            "labels": {"kind": ("felt", "steel", None)[i % 3], "force": None if i == 1 else i / 8},
        }
        rows.append(row | ({"split": ("train", "val", "test")[i // 2 % 3]} if split else {}))
    return rows


def blocks(rows: Samples, size: int) -> list[Block]:
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [Block(f"{size} {i}", partial(iter, part), len(part)) for i, part in enumerate(parts)]


def encode(rows: Samples, stage1: Stage1, out: Path, size: int = 8, **options: Any) -> FeatureStore:
    return encode_blocks(blocks(rows, size), stage1, lambda: stage1, out, quiet=True, **options)


def numbers(store: FeatureStore) -> dict[tuple[str, int, str], tuple[Tensor, Tensor, Tensor] | None]:
    """{(sample, view, modality): its tokens, mask and pooled features, None if it is absent}."""
    found: dict[tuple[str, int, str], tuple[Tensor, Tensor, Tensor] | None] = {}
    for split in store.splits.values():
        for view in range(split.views + 1):
            for i, name in enumerate(split.names):
                for m, t in split.read(torch.tensor([i]), torch.tensor([view])).modalities.items():
                    found[name, view, m] = (t.tokens[0].float(), t.mask[0], t.pooled[0]) if t.present[0] else None
    return found


def assert_same_features(found: FeatureStore, expected: FeatureStore) -> None:
    here, there = numbers(found), numbers(expected)
    assert here.keys() == there.keys() or found.splits["train"].views
    for key in here.keys() & there.keys():
        a, b = here[key], there[key]
        assert (a is None) == (b is None), key
        if a is not None and b is not None:
            assert torch.equal(a[1], b[1])
            assert (a[2] - b[2]).abs().max() < 1e-6
            assert torch.allclose(a[0], b[0], rtol=2e-3, atol=1e-5), key  # one unit of half precision


def same_classes(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a[:, None] == a[None], b[:, None] == b[None])


@pytest.mark.parametrize("views", [0, 2])
def test_the_store_is_that_of_the_stream(views: int, stage1: Stage1, tmp_path: Path) -> None:
    """The same rows, groups, positives, labels and features, in parts of which the last is smaller."""
    expected = encode_stream(samples(), stage1, tmp_path / "stream", views=views, seed=5, quiet=True)
    found = encode(samples(), stage1, tmp_path / "parts", views=views, seed=5)
    assert found.manifest["splits"] == expected.manifest["splits"]
    assert found.manifest["ingredients"] == expected.manifest["ingredients"]
    assert found.manifest["splits"]["val"]["repeated"] == {"vision": 1}
    assert found.manifest["parts"] == 4
    for file in ("labels.csv", "labels.json"):
        assert (found.folder / file).read_text() == (expected.folder / file).read_text()
    for name, split in expected.splits.items():
        other, rows = found.splits[name], torch.arange(len(split))
        assert list(other.names) == list(split.names)
        assert same_classes(other.groups[:], split.groups[:])
        a, b = other.read(rows), split.read(rows)
        assert same_classes(a.caption_keys[:, 0], b.caption_keys[:, 0])
        assert a.content_keys.keys() == b.content_keys.keys()
        assert all(same_classes(a.content_keys[m], b.content_keys[m]) for m in b.content_keys)
    assert_same_features(found, expected)


def test_splits_are_drawn_from_groups_that_copies_join(stage1: Stage1, tmp_path: Path) -> None:
    """Photos of groups 1 and 10, and of 2 and 11, are equal; they are in other parts."""
    expected = encode_stream(samples(split=False), stage1, tmp_path / "stream", quiet=True)
    found = encode(samples(split=False), stage1, tmp_path / "parts")
    side = {int(row[1:]): name for name, split in found.splits.items() for row in split.names}
    assert len(side) == ROWS and set(side.values()) == {"train", "val", "test"}
    assert all(side[i] == side[i + 1] for i in range(0, ROWS, 2)) and side[2] == side[20] and side[5] == side[23]
    groups = {row: int(split.groups[i]) for split in found.splits.values() for i, row in enumerate(split.names)}
    assert len(set(groups.values())) == 13 and groups["s2"] == groups["s21"] and groups["s4"] == groups["s22"]
    assert len(found.splits["train"]) in range(20, 27)
    assert_same_features(found, expected)
    assert encode(samples(split=False), stage1, tmp_path / "other", seed=1).key != found.key


def backwards(tasks: Sequence[Task], make: Callable[[], Work]) -> Iterator[int]:
    return in_process_group(tasks[::-1], make)


def test_neither_blocks_nor_their_order_change_the_key(stage1: Stage1, tmp_path: Path) -> None:
    found = encode(samples(), stage1, tmp_path / "a", 8)
    for out, size in (("b", 30), ("c", 7)):
        other = encode(samples(), stage1, tmp_path / out, size, engine=backwards)
        assert other.key == found.key
        assert_same_features(other, found)
    changed = samples()
    changed[11]["tactile"] = png(7)
    assert encode(changed, stage1, tmp_path / "d").key != found.key
    assert encode(samples(), stage1, tmp_path / "e", prompt="").key != found.key


def test_an_interrupted_encode_goes_on_with_the_missing_blocks(stage1: Stage1, tmp_path: Path) -> None:
    done: list[int] = []

    def stops(tasks: Sequence[Task], make: Callable[[], Work]) -> Iterator[int]:
        done.extend(i for i, _ in tasks)
        yield from in_process_group([tasks[0], tasks[2]], make)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode(samples(), stage1, tmp_path / "s", engine=stops)
    with pytest.raises(UserError, match="not a feature store"):
        FeatureStore(tmp_path / "s")
    for options, what in (({"prompt": ""}, "other encoders or options"), ({"size": 9}, "other samples")):
        with pytest.raises(UserError, match=f"has a part of an encode of {what}; give the same flags"):
            encode(samples(), stage1, tmp_path / "s", **options)
    (tmp_path / "s/parts/.000001-of-a-process-that-was-killed").mkdir()
    (tmp_path / "s/train").mkdir()  # of one that was killed while it joined the parts

    def counts(tasks: Sequence[Task], make: Callable[[], Work]) -> Iterator[int]:
        done.extend(i for i, _ in tasks)
        return in_process_group(tasks, make)

    found = encode(samples(), stage1, tmp_path / "s", engine=counts)
    assert done == [0, 1, 2, 3, 1, 3]
    assert found.key == encode(samples(), stage1, tmp_path / "whole").key
    assert not list((tmp_path / "s/parts").glob(".0*")) and not (tmp_path / "s/parts/.store").exists()
    with pytest.raises(UserError, match="is a feature store already"):
        encode(samples(), stage1, tmp_path / "s")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").touch()
    with pytest.raises(UserError, match="is not empty"):
        encode(samples(), stage1, tmp_path / "full")


def test_work_that_is_done_twice_is_kept_once(stage1: Stage1, tmp_path: Path) -> None:
    """As by a process that was taken for dead."""

    def twice(tasks: Sequence[Task], make: Callable[[], Work]) -> Iterator[int]:
        for i in in_process_group(tasks, make):
            make()(i, tasks[i][1])
            yield i

    found = encode(samples(), stage1, tmp_path / "s", engine=twice)
    assert sum(map(len, found.splits.values())) == ROWS


def test_other_encoders_in_a_worker_are_refused(stage1: Stage1, stage1_checkpoint: Path, tmp_path: Path) -> None:
    def other() -> Stage1:
        loaded = load_stage1(stage1_checkpoint)
        with torch.no_grad():
            next(loaded.parameters()).add_(1)
        return loaded

    with pytest.raises(UserError, match="have other weights; give it the same files"):
        encode_blocks(blocks(samples(), 8), stage1, other, tmp_path / "s", quiet=True)


def test_equal_inputs_of_a_part_are_stored_once(stage1: Stage1, tmp_path: Path) -> None:
    found = encode(samples(), stage1, tmp_path / "s", 15)
    sizes = {m: len(t["mask"]) for m, t in found.splits["train"].tables.items()}
    assert sizes == {"vision": 30, "tactile": 29, "text": 6}
    assert {m: len(t["mask"]) for m, t in encode(samples(), stage1, tmp_path / "t", 30).splits["val"].tables.items()} == {
        "vision": 28,
        "tactile": 29,
        "text": 3,
    }


def test_condensed_splits_have_their_own_rows_only(stage1: Stage1, tmp_path: Path) -> None:
    seen: dict[str, int] = {}

    def condense(name: str, tokens: Tokens) -> Tensor:
        seen[name] = seen.get(name, 0) + len(tokens.pooled)
        return tokens.pooled[:, :4] * 2

    found, expected = (
        encode(samples(), stage1, tmp_path / "parts"),
        encode_stream(samples(), stage1, tmp_path / "stream", quiet=True),
    )
    small = found.splits["val"].condensed(condense, torch.device("cpu"))
    assert seen == {"vision": 10, "tactile": 10, "text": 7}  # the parts of its rows have 7 distinct sentences
    rows = torch.tensor([3, 9, 0])
    assert isinstance(small, StoredSplit)
    for m, t in expected.splits["val"].read(rows).modalities.items():
        got = small.read(rows).modalities[m]
        assert torch.equal(got.present, t.present)
        assert torch.allclose(got.tokens[t.present][:, 0], t.pooled[t.present][:, :4] * 2, atol=1e-6)
    assert small.read(torch.tensor([-1])).modalities["vision"].present.tolist() == [False]


def test_bad_samples_of_all_parts_are_counted(stage1: Stage1, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = samples()
    rows[3]["vision"], rows[29]["tactile"] = b"no picture", b"none"
    rows[16] = {"name": "s16", "vision": png(1), "split": "train"}
    with caplog.at_level(logging.WARNING):
        found = encode(rows, stage1, tmp_path / "s", tolerance=Tolerance(max_skipped=0.1))
    assert "3 of 30 samples are bad, by reason: {'vision: not an image': 1" in caplog.text
    assert sum(map(len, found.splits.values())) == 29
    with pytest.raises(UserError, match=r"2 of 30 rows are bad, more than 5%.*s3.*raise --max_skipped"):
        encode(rows, stage1, tmp_path / "t")
    with pytest.raises(UserError, match="of s3: not an image, and --strict allows no bad row"):
        encode(rows, stage1, tmp_path / "u", tolerance=Tolerance(strict=True))


def test_a_part_may_have_no_samples(stage1: Stage1, tmp_path: Path) -> None:
    empty = Block("empty", partial(iter, Samples()), 0)
    found = encode_blocks([empty, *blocks(samples(), 20), empty], stage1, lambda: stage1, tmp_path / "s", quiet=True)
    assert found.key == encode(samples(), stage1, tmp_path / "t").key
    with pytest.raises(UserError, match="there are no samples"):
        encode_blocks([empty], stage1, lambda: stage1, tmp_path / "none", quiet=True)
    with pytest.raises(UserError, match="there are no samples"):
        encode_blocks([], stage1, lambda: stage1, tmp_path / "none", quiet=True)


def edited(row: int, **change: Any) -> Samples:
    rows = samples()
    rows[row] |= change
    return rows


WRONG = {
    "the name 's3' is given twice": edited(20, name="s3"),
    "some samples have a split and some have none": [r | {"split": None} if i > 23 else r for i, r in enumerate(samples())],
    "the label force is a number in some samples": [
        r | {"labels": {"kind": "x", "force": "weak"}} if i > 23 else r for i, r in enumerate(samples())
    ],
    "some samples have the label force and some": [
        r | {"labels": {"kind": "x"}} if i > 23 else r for i, r in enumerate(samples())
    ],
    "no sample has tactile; name its key": [r | {"tactile": None, "text": "soft"} for r in samples()],
}


@pytest.mark.parametrize("message", WRONG)
def test_parts_that_do_not_fit_are_one_sentence_and_no_store(message: str, stage1: Stage1, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        encode(WRONG[message], stage1, tmp_path / "s")
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
    assert not (tmp_path / "s/manifest.json").exists()


def test_a_damaged_part_is_refused(stage1: Stage1, tmp_path: Path) -> None:
    found = encode(samples(), stage1, tmp_path / "s")
    file = tmp_path / "s/parts/000002/tactile/tokens.memmap"
    whole, row = file.read_bytes(), 2 * found.specs["tactile"].tokens * found.specs["tactile"].width
    for content, message in ((whole[:-3], "not rows of"), (whole[:-row], "files of other numbers of rows")):
        file.write_bytes(content)
        with pytest.raises(UserError, match=f"{message}.*damaged, make it again") as caught:
            FeatureStore(tmp_path / "s")
        assert "000002" in str(caught.value)
    manifest = json.loads((tmp_path / "s/manifest.json").read_text())
    file.write_bytes(whole)
    for parts, message in ((10**12, "has 4 of 1000000000000 parts"), ("../x", "is not the manifest")):
        (tmp_path / "s/manifest.json").write_text(json.dumps(manifest | {"parts": parts}))
        with pytest.raises(UserError, match=message):
            FeatureStore(tmp_path / "s")


def test_rows_of_parts_are_those_of_one_table(tmp_path: Path) -> None:
    """In any order, cut to a length, with files that are empty or missing."""
    for dtype, shape in ((torch.float16, (5, 3)), (torch.bool, (4,)), (torch.float32, (2,))):
        whole = torch.randint(0, 2, (20, *shape)).to(dtype)
        for i, (start, stop) in enumerate(((0, 7), (7, 7), (8, 8), (7, 19), (19, 20))):
            if i != 2:
                (tmp_path / f"{i}").write_bytes(whole[start:stop].numpy().tobytes())
        table = Parts([tmp_path / f"{i}" for i in range(5)], dtype, *shape)
        rows = torch.tensor([19, 0, 7, 6, 7, 18])
        assert len(table) == 20 and torch.equal(read_rows(table, rows), whole[rows])
        assert torch.equal(read_rows(table, rows, 2), whole[rows, :2])
        assert read_rows(table, rows[:0]).shape == (0, *shape)
    (tmp_path / "3").write_bytes(b"")
    with pytest.raises(UserError, match="3 has become shorter; the store is damaged"):
        read_rows(table, rows)


def test_sentences_are_recorded(stage1: Stage1, tmp_path: Path) -> None:
    rows = [r | {"text": Sentence("A cup.")} for r in samples()]
    found = encode(rows, stage1, tmp_path / "s")
    assert found.manifest["ingredients"]["text"]["sentences"] is True


def test_links_are_those_of_join_groups() -> None:
    draw = np.random.default_rng(0)
    for rows in (1, 30, 300):
        ids, keys = draw.integers(0, max(1, rows // 2), rows), [draw.integers(0, 2 * rows, rows) for _ in range(2)]
        found = linked(ids, keys)
        names = np.array(join_groups([f"{i:06d}" for i in ids.tolist()], keys)).astype(int)
        assert np.array_equal(found, names)
    chain = np.arange(1000)
    assert (linked(chain, [chain // 2, (chain + 1) // 2]) == 0).all()
