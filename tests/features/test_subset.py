"""Probe rows set aside, shuffled pairs, and condensed features."""

from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch

from tvl_align.contract import Features, Stage2Model, Tokens
from tvl_align.features.store import MAX_CONDENSED, FeatureSource, FeatureStore
from tvl_align.features.subset import RowSubset, ShuffledPairs, set_probe_rows_aside
from tvl_align.methods.base import BASE
from tvl_align.methods.closed import CLOSED
from tvl_align.methods.mlp import MLP
from tvl_align.system.workers import read_ahead
from tvl_align.training.engine import calibrate

CPU, ROWS = torch.device("cpu"), 120


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """120 training rows in 30 groups: texts of several lengths, tactile rows that are absent, and two views."""
    g = np.random.default_rng(0)
    shared = g.standard_normal((ROWS, 1, 3))
    arrays = {m: g.standard_normal((ROWS, t, w)) for m, t, w in (("vision", 6, 8), ("tactile", 5, 6), ("text", 9, 5))}
    arrays = {m: x + shared @ g.standard_normal((3, x.shape[2])) for m, x in arrays.items()}
    mask = np.arange(9) < g.integers(2, 10, (ROWS, 1))
    views = {"vision": g.standard_normal((ROWS, 2, 6, 8))}
    arrays["tactile"][100:] = arrays["tactile"][:20]  # copies, here in the same groups
    groups = g.permutation(ROWS)
    groups[100:] = groups[:20]
    return FeatureStore.from_arrays(
        arrays,
        tmp_path_factory.mktemp("subset") / "store",
        mask={"text": mask},
        present={"tactile": np.arange(ROWS) % 7 != 3},
        groups=[f"g{i // 4}" for i in groups],
        split=["train"] * ROWS,
        views=views,
    )


def read(source: FeatureSource, rows: torch.Tensor, view: int = 0) -> Features:
    return next(source.batches([rows], [torch.full_like(rows, view)], CPU))


def equal(one: Tokens, other: Tokens) -> bool:
    """Equal where present, without padding."""
    length = min(one.tokens.shape[1], other.tokens.shape[1])
    at = one.present
    return (
        torch.equal(at, other.present)
        and torch.equal(one.mask[:, :length], other.mask[:, :length])
        and int(one.mask.sum()) == int(other.mask.sum())
        and torch.equal(
            one.tokens[at][:, :length][one.mask[at][:, :length]], other.tokens[at][:, :length][one.mask[at][:, :length]]
        )
        and torch.equal(one.pooled[at], other.pooled[at])
    )


def test_groups_are_never_split_and_at_most_a_quarter_is_set_aside(store: FeatureStore) -> None:
    source = store.splits["train"]
    for wanted, least, most in ((10, 7, 10), (1000, 27, 30), (0, 0, 0)):
        train, probe = set_probe_rows_aside(source, wanted, 0)
        assert least <= len(probe) <= most
        assert sorted([*train.rows.tolist(), *probe.rows.tolist()]) == list(range(ROWS))
        assert not set(train.groups.tolist()) & set(probe.groups.tolist())


def test_a_group_that_is_too_large_does_not_keep_the_others_out(store: FeatureStore) -> None:
    source = RowSubset(store.splits["train"], torch.arange(ROWS))
    source.groups = torch.cat([torch.zeros(ROWS - 20, dtype=torch.int64), torch.arange(1, 21)])
    for seed in range(30):  # some of them draw the large group first
        assert len(set_probe_rows_aside(source, 10, seed)[1]) == 10


def test_the_probe_rows_depend_on_the_seed_only(store: FeatureStore) -> None:
    source = store.splits["train"]
    first, again, other = (set_probe_rows_aside(source, 20, seed)[1].rows for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_names_data_sets_and_features_follow_their_rows(store: FeatureStore) -> None:
    source = store.splits["train"]
    subset = set_probe_rows_aside(source, 20, 0)[1]
    assert list(subset.names) == [source.names[row] for row in subset.rows.tolist()]
    assert subset.names[1:3] == [source.names[row] for row in subset.rows[1:3].tolist()]
    assert subset.names[-1] == source.names[int(subset.rows[-1])]
    with pytest.raises(IndexError):
        subset.names[len(subset)]
    assert torch.equal(subset.datasets, source.datasets[subset.rows])
    assert torch.equal(subset.groups, source.groups[subset.rows])
    assert subset.views == source.views == 2
    rows = torch.tensor([4, -1, 0])
    part, whole = read(subset, rows, 1), read(source, torch.tensor([int(subset.rows[4]), -1, int(subset.rows[0])]), 1)
    assert torch.equal(part.rows, rows)
    assert torch.equal(part.caption_keys, whole.caption_keys)
    assert torch.equal(part.content_keys["tactile"], whole.content_keys["tactile"])
    assert torch.equal(subset.content_keys["tactile"], source.content_keys["tactile"][subset.rows])
    for m, tokens in part.modalities.items():
        assert equal(tokens, whole.modalities[m])
        assert not tokens.present[1]


def test_shuffled_pairs_are_those_of_the_stated_permutation(store: FeatureStore) -> None:
    source = store.splits["train"]
    shuffled, again = (ShuffledPairs(source, ["vision", "tactile", "text"], 3) for _ in range(2))
    assert torch.equal(shuffled.orders["vision"], torch.arange(ROWS))
    for m in ("tactile", "text"):
        assert torch.equal(shuffled.orders[m].sort().values, torch.arange(ROWS))
        assert torch.equal(shuffled.orders[m], again.orders[m])
        assert (shuffled.orders[m] == torch.arange(ROWS)).float().mean() < 0.05
    assert not torch.equal(shuffled.orders["tactile"], shuffled.orders["text"])
    rows = torch.tensor([5, 80, -1, 3])
    found = read(shuffled, rows, 1)
    assert torch.equal(found.rows, rows)
    for m, order in shuffled.orders.items():
        paired = read(source, torch.where(rows >= 0, order[rows], -1), 1)
        assert equal(found.modalities[m], paired.modalities[m])
        if m == "text":
            assert torch.equal(found.caption_keys, paired.caption_keys)
        if m == "tactile":
            assert torch.equal(found.content_keys["tactile"], paired.content_keys["tactile"])
            assert torch.equal(shuffled.content_keys["tactile"][rows[rows >= 0]], paired.content_keys["tactile"][rows >= 0])
    assert not any(tokens.present[2] for tokens in found.modalities.values())
    assert len(shuffled) == ROWS and shuffled.names[7] == source.names[7]


def test_several_batches_of_shuffled_pairs_are_read_in_order(store: FeatureStore) -> None:
    shuffled = ShuffledPairs(store.splits["train"], ["vision", "tactile", "text"], 3)
    rows, views = list(torch.arange(12).split(5)), [torch.full((n,), v) for n, v in ((5, 0), (5, 2), (2, 1))]
    for row, view, batch in zip(rows, views, shuffled.batches(rows, views, CPU), strict=True):
        assert torch.equal(batch.rows, row)
        assert all(equal(t, read(shuffled, row, int(view[0])).modalities[m]) for m, t in batch.modalities.items())


def test_batches_for_a_gpu_are_in_order_and_of_one_shape(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """By threads, ahead of the step; a device that only says that it is a GPU stands for one."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(Features, "to", lambda features, device: features)
    gpu = cast(torch.device, SimpleNamespace(type="cuda"))
    rows = list(torch.randperm(100, generator=torch.Generator().manual_seed(0)).split(4))
    views = [torch.full((len(row),), i % 2) for i, row in enumerate(rows)]
    source = store.splits["train"]
    lengths = set()
    on_gpu = read_ahead(source.batches(rows, views, gpu))
    for found, expected in zip(on_gpu, source.batches(rows, views, CPU), strict=True):
        assert torch.equal(found.rows, expected.rows)
        for m, tokens in expected.modalities.items():
            assert equal(found.modalities[m], tokens)
            assert found.modalities[m].mask.sum() == tokens.mask.sum()
        lengths |= {(found.modalities["text"].tokens.shape[1], expected.modalities["text"].tokens.shape[1])}
    assert {gpu for gpu, _ in lengths} == {9}
    assert len({cpu for _, cpu in lengths}) > 1


def sources(store: FeatureStore) -> dict[str, FeatureSource]:
    source = store.splits["train"]
    subset = set_probe_rows_aside(source, 30, 0)[0]
    pairs = ["vision", "tactile", "text"]
    return {
        "stored": source,
        "subset": subset,
        "shuffled": ShuffledPairs(source, pairs, 1),
        "shuffled subset": ShuffledPairs(subset, pairs, 1),
    }


@pytest.mark.parametrize("kind", ["stored", "subset", "shuffled", "shuffled subset"])
@pytest.mark.parametrize("method", [BASE, CLOSED, MLP], ids=["base", "closed", "mlp"])
def test_condensed_features_give_the_same_output_and_loss(store: FeatureStore, method: object, kind: str) -> None:
    """With absent modalities, a row that has none, a view, and texts of several lengths."""
    source = sources(store)[kind]
    torch.manual_seed(0)
    knobs = method.knobs(register_token_dim=64, num_heads=4, components=20)
    model, loss = method.model(knobs, store.specs), method.loss(knobs, list(store.specs))
    calibrate(model, source, CPU)
    small = source.condensed(model.condense, CPU)
    assert small is not source and len(small) == len(source) and small.names[5] == source.names[5]
    rows = torch.tensor([0, 3, 50, -1, 17, 24])
    for view in (0, 2):
        one, other = read(source, rows, view), read(small, rows, view)
        assert all(t.condensed and t.tokens.shape[1] == 1 and t.pooled.shape[1] == 0 for t in other.modalities.values())
        assert torch.equal(one.caption_keys, other.caption_keys) and torch.equal(one.rows, other.rows)
        plain, condensed = model.eval()(one), model.eval()(other)
        for m, present in plain.present.items():
            assert torch.equal(present, condensed.present[m])
            for group in ("overlapping_tokens", "complementary_tokens"):
                assert torch.allclose(plain[group][m][present], condensed[group][m][present], atol=1e-5)
            if m in plain.reconstruction:
                parts = [x.reconstruction[m].error[present] for x in (plain, condensed)]
                assert torch.allclose(*parts, atol=1e-5)
        some = torch.stack(list(plain.present.values())).any(0)
        assert torch.allclose(plain.register_tokens[some], condensed.register_tokens[some], atol=1e-5)
        for name, value in loss(plain).items():
            assert torch.allclose(value, loss(condensed)[name], atol=1e-5), name


def test_a_split_is_not_condensed_if_that_is_impossible(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    source = store.splits["train"]
    assert source.condensed(lambda name, tokens: Stage2Model.condense(None, name, tokens), CPU) is source

    def mean(name: str, tokens: Tokens) -> torch.Tensor:
        return tokens.pooled

    assert MAX_CONDENSED > 10**9
    assert source.condensed(mean, CPU) is not source
    monkeypatch.setattr("tvl_align.features.store.MAX_CONDENSED", 100)
    assert source.condensed(mean, CPU) is source
    subset = RowSubset(source, torch.tensor([3, 5])).condensed(mean, CPU)
    assert torch.equal(
        read(subset, torch.tensor([1])).modalities["vision"].tokens,
        read(source, torch.tensor([5])).modalities["vision"].tokens,
    )
