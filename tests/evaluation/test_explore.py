"""explore.npz against slow twins: what each row finds, which finds are right, where registers look, and the maps."""

import json
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tvl_align.contract import Features, Tokens
from tvl_align.data.tvl import Row
from tvl_align.evaluation import explore, factors
from tvl_align.evaluation.explore import AXES, FINDS, _contents, by_direction, nearest, single_registers, token_maps
from tvl_align.evaluation.explore_file import NAME, Exploration
from tvl_align.evaluation.measure import EvaluateConfig, measure
from tvl_align.evaluation.split_tokens import SplitTokens
from tvl_align.evaluation.uncertainty import group_weights
from tvl_align.metrics.retrieval import retrieval
from tvl_align.system.console import UserError

ROWS, WIDTH = 40, 6


def vectors(seed: int, width: int = WIDTH, rows: int = ROWS) -> Tensor:
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def ranking(x: Tensor, y: Tensor, valid: Tensor, contents: Tensor, row: int) -> list[int]:
    """The valid rows of y, nearest to a row of x first, without later rows of a content that was there before."""
    shown: dict[int, int] = {}
    for other in range(len(y)):
        if valid[other]:
            shown.setdefault(int(contents[other]), other)
    return sorted(shown.values(), key=lambda other: -float(x[row] @ y[other]))


@pytest.mark.parametrize("keyed", [False, True])
def test_finds_are_the_head_of_a_ranking(keyed: bool) -> None:
    """Rows 0 and 20 of y are equal in content, 1 and 21, ...; with keys, rows of one of five classes are positives."""
    x, y = vectors(0), vectors(1)
    valid = torch.rand(ROWS, generator=torch.Generator().manual_seed(2)) > 0.2
    contents, classes = torch.arange(ROWS) % 20, (torch.arange(ROWS) * 7 // 3) % 5
    found = nearest(x, y, valid, classes[:, None] if keyed else None, contents, chunk=7)
    assert set(found.rows[~valid].ravel()) == {-1} and set(found.rank[~valid]) == {-1}
    for row in valid.nonzero().squeeze(1).tolist():
        positive = {j for j in range(ROWS) if valid[j] and (classes[j] == classes[row] if keyed else j == row)}
        expected = ranking(x, y, valid, contents, row)
        assert found.rows[row].tolist() == expected[:FINDS]
        assert found.scores[row] == pytest.approx([float(x[row] @ y[j]) for j in expected[:FINDS]], abs=1e-3)
        right = {int(contents[j]) for j in positive}
        assert found.right[row].tolist() == [int(contents[j]) in right for j in expected[:FINDS]]
        assert found.answers[row] == len(right)
        best = max(float(x[row] @ y[j]) for j in positive)
        assert found.rank[row] == sum(float(x[row] @ y[j]) > best for j in range(ROWS) if valid[j] and j not in positive)


def test_a_short_gallery_leaves_places_empty() -> None:
    found = nearest(vectors(0), vectors(1), torch.arange(ROWS) < 3, None, torch.arange(ROWS))
    assert sorted(found.rows[0, :3]) == [0, 1, 2]
    assert set(found.rows[0, 3:]) == {-1} and not found.right[0, 3:].any()


def test_ties_count_against_the_query_as_in_retrieval() -> None:
    x = torch.ones(ROWS, 2) / 2**0.5
    valid = torch.ones(ROWS, dtype=torch.bool)
    assert set(nearest(x, x, valid, None, torch.arange(ROWS)).rank) == {ROWS - 1}
    assert retrieval(x, x, valid).acc1 == 0


def test_equal_sentences_are_one_find_and_equal_pictures_too() -> None:
    rows = [Row("ssvtp", f"{i}.jpg", None, None, caption, "") for i, caption in enumerate(("soft", "hard", "soft", None))]
    source: Any = SimpleNamespace(content_keys={"vision": torch.tensor([4, 5, 5, 6])}, __len__=None)
    source = type("Source", (), {"content_keys": source.content_keys, "__len__": lambda self: 4})()
    samples: Any = SimpleNamespace(rows=rows)
    found = _contents(source, samples, ["vision", "tactile", "text"])
    assert found["vision"].tolist() == [4, 5, 5, 6]
    assert found["tactile"].tolist() == [0, 1, 2, 3]
    assert found["text"][0] == found["text"][2] != found["text"][1]


def made(present: Tensor) -> tuple[SplitTokens, Features]:
    """Tokens of modalities one and two, and frozen features; two is absent in some rows."""
    both = {"one": torch.ones(ROWS, dtype=torch.bool), "two": present}
    overlapping = {m: torch.randn(ROWS, 2, 4, generator=torch.Generator().manual_seed(i)) for i, m in enumerate(both)}
    pooled = {m: F.normalize(x.mean(1), dim=1) for m, x in overlapping.items()}
    complementary = {m: x[:, :1] ** 2 for m, x in overlapping.items()}
    tokens = SplitTokens(overlapping, complementary, pooled, both, torch.zeros(ROWS, 1), 1.0, {})
    frozen = {m: Tokens(torch.zeros(ROWS, 1, 1), torch.ones(ROWS, 1).bool(), vectors(9, 3), both[m]) for m in both}
    return tokens, Features(frozen, torch.zeros(ROWS, 1), torch.arange(ROWS))


def test_maps_are_principal_components() -> None:
    """Of the complementary tokens by numpy; pooled tokens of all modalities share their axes; absent rows have no place."""
    tokens, frozen = made(torch.arange(ROWS) % 3 > 0)
    maps, variance = token_maps(tokens, frozen)
    assert set(maps) == {
        f"{group}.{m}" for group in ("pooled", "overlapping", "complementary", "frozen") for m in ("one", "two")
    }
    x = tokens.complementary["two"].flatten(1)[tokens.present["two"]].numpy()
    values, axes = np.linalg.eigh(np.cov(x.T, bias=True))
    expected = (x - x.mean(0)) @ axes[:, ::-1]
    at = maps["complementary.two"].astype(float)
    assert np.isnan(at[~tokens.present["two"].numpy()]).all()
    assert np.abs(at[tokens.present["two"].numpy()]) == pytest.approx(np.abs(expected), abs=0.02)
    assert variance["complementary.two"] == pytest.approx(values[::-1] / values.sum(), abs=1e-4)
    assert maps["overlapping.one"].shape == (ROWS, AXES)
    both = torch.cat([tokens.pooled["one"], tokens.pooled["two"][tokens.present["two"]]])
    middle = np.concatenate([maps["pooled.one"], maps["pooled.two"][tokens.present["two"].numpy()]]).astype(float).mean(0)
    assert middle == pytest.approx(0, abs=2e-3)  # the mean of both is at the origin, that of one is not
    assert np.abs(maps["pooled.one"].astype(float).mean(0)).max() > 0.02
    assert variance["pooled.one"].sum() == pytest.approx(1, abs=1e-4) and both.shape[1] == len(variance["pooled.one"])


def test_single_registers_are_overlapping_ones_first() -> None:
    tokens, _ = made(torch.ones(ROWS, dtype=torch.bool))
    groups = single_registers(tokens, tokens)
    assert list(groups) == ["register_1", "register_2", "register_3"]
    assert torch.equal(groups["register_2"].probe["two"], tokens.overlapping["two"][:, 1:2])
    assert torch.equal(groups["register_3"].test["one"], tokens.complementary["one"])


@pytest.fixture(scope="module")
def explored(run: Path) -> tuple[Exploration, dict[str, Any]]:
    """The tiny run, evaluated: what explore.npz and results.json say."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factors, "MIN_ROWS", 2)  # it has few probe rows
        results = json.loads(measure(EvaluateConfig(run, probe_steps=1, device="cpu")).read_text())
    return Exploration.load(run), results


def test_an_evaluation_writes_what_can_be_explored(explored: tuple[Exploration, dict[str, Any]]) -> None:
    found, results = explored
    assert found.modalities.tolist() == ["vision", "tactile", "text"]
    assert found.lengths.tolist() == [1, 2, 3] and found.overlapping == 3
    assert found.finds.shape == (3, 6, results["gallery"], FINDS)
    assert [[*d] for d in found.directions.tolist()] == [[0, 1], [0, 2], [1, 0], [1, 2], [2, 0], [2, 1]]
    assert not np.array_equal(found.finds[0], found.finds[2])  # fewer registers find other rows
    for m in found.modalities:
        assert found.attention[m].shape[:2] == (results["gallery"], 4)
        assert found.attention[m].astype(float).sum(-1) == pytest.approx(1, abs=5e-3)
    assert found.attention["vision"].shape[2] == 17
    assert set(found.files) == {"vision", "tactile"} and found.files["vision"].tolist() == found.names.tolist()
    assert set(found.datasets) <= {"hct", "ssvtp"} and all(found.captions)
    assert found.levels["hue"][found.labels["hue"][0]]
    assert found.owners["hue"].tolist() == ["vision", "text"]
    alone = [e["accuracy"] for table in results["factors"].values() for e in table.values()]
    assert alone and all({f"register_{n}" for n in (1, 2, 3, 4)} <= a.keys() for a in alone)
    assert all(set(a["register_1"]) == {"linear"} for a in alone)


def test_attention_of_many_registers_is_measured_in_some_rows(explored: Any, run: Path, monkeypatch: Any) -> None:
    """Of those rows it is the same, up to rounding, as batches differ."""
    monkeypatch.setattr(explore, "LOOKS", 16 * len(explored[0]) // 3)
    measure(EvaluateConfig(run, probe_steps=1, device="cpu"))
    some = Exploration.load(run)
    assert (explored[0].look_step, some.look_step) == (1, 3)
    seen = some.attention["tactile"]
    assert seen[::3].astype(float) == pytest.approx(explored[0].attention["tactile"][::3].astype(float), abs=2e-3)
    assert not seen[1::3].any() and not seen[2::3].any()


def test_prefixes_and_directions_agree_with_retrieval(explored: tuple[Exploration, dict[str, Any]]) -> None:
    """The mean of both directions is the Acc@1 of the pair, with all registers and with fewer."""
    found, results = explored
    names = found.modalities.tolist()
    for pair, numbers in results["retrieval"].items():
        a, b = pair.split("_")
        both = [n for n in results["directions"] if {n["query"], n["gallery"]} == {a, b} and n["dataset"] is None]
        assert np.mean([n["acc1"] for n in both]) == pytest.approx(numbers["acc1"], abs=1e-4)
        assert np.mean([n["acc5"] for n in both]) == pytest.approx(numbers["acc5"], abs=1e-4)
        assert np.mean([n["stage1_acc1"] for n in both]) == pytest.approx(numbers["stage1_acc1"], abs=1e-4)
        assert both[0]["chance1"] == pytest.approx(numbers["chance1"], abs=1e-4)
        for k, length in enumerate(found.lengths):
            ways = [d for d, (i, j) in enumerate(found.directions) if {names[i], names[j]} == {a, b}]
            hits = np.mean([found.rank[k, d] == 0 for d in ways])
            assert 100 * hits == pytest.approx(results["prefix"][length - 1]["pairs"][pair], abs=1e-4)


def test_numbers_of_a_data_set_are_those_of_its_queries(explored: tuple[Exploration, dict[str, Any]]) -> None:
    found, _ = explored
    datasets = np.array(["a", "b", "b"] * (len(found) // 3))
    stage1 = {m: vectors(i, rows=len(found)) for i, m in enumerate(found.modalities.tolist())}
    weights = group_weights(torch.arange(len(found)), seed=0)
    results = by_direction(replace(found, datasets=datasets), stage1, lambda *_: None, weights)
    first = {n["dataset"]: n for n in results[:3]}
    hits = 100 * (found.rank[-1, 0] == 0)
    assert list(first) == [None, "a", "b"]
    for dataset, n in first.items():
        chosen = np.ones(len(found), bool) if dataset is None else datasets == dataset
        assert n["rows"] == chosen.sum()
        assert n["acc1"] == pytest.approx(hits[chosen].mean(), abs=1e-4)
        assert n["low"] <= n["acc1"] <= n["high"]
    assert (
        by_direction(found, stage1 | {"text": vectors(5, 3, len(found))}, lambda *_: None, weights)[-1]["stage1_acc1"]
        is None
    )


def test_the_file_holds_everything_and_says_when_it_does_not(explored: Any, tmp_path: Path) -> None:
    found: Exploration = explored[0]
    with pytest.raises(UserError, match="has no explore.npz; run tvl-align evaluate"):
        Exploration.load(tmp_path)
    found.save(tmp_path)
    again = Exploration.load(tmp_path)
    for f in fields(Exploration):
        one, other = getattr(found, f.name), getattr(again, f.name)
        pairs = [(one[key], other[key]) for key in one] if isinstance(one, dict) else [(one, other)]
        assert all(np.array_equal(a, b, equal_nan=a.dtype.kind == "f") and a.dtype == b.dtype for a, b in pairs), f.name
    whole = (tmp_path / NAME).read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"not a zip"):
        (tmp_path / NAME).write_bytes(damaged)
        with pytest.raises(UserError, match="run tvl-align evaluate"):
            Exploration.load(tmp_path)
    np.savez(tmp_path / NAME, other=np.zeros(2))
    with pytest.raises(UserError, match="other entries than this version writes"):
        Exploration.load(tmp_path)
