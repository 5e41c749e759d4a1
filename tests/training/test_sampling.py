"""Order of rows, views, and the division of rows among processes."""

import pytest
import torch

from tvl_align.system.console import UserError
from tvl_align.training.sampling import balanced_weights, epoch_batches, epoch_views, shard_batches


def test_an_epoch_visits_rows_once_and_the_next_in_another_order() -> None:
    """The order depends on the epoch without a call of set_epoch."""
    first, again, second = (epoch_batches(20, 6, seed=0, epoch=e) for e in (0, 0, 1))
    assert first.shape == (3, 6)
    assert len(set(first.flatten().tolist())) == 18
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_two_processes_see_together_what_one_sees_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks take slices of the same draw."""
    alone = epoch_batches(40, 8, 0, 5), epoch_views(5, 8, 3, 0, 5)
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr("tvl_align.training.sampling.rank", lambda rank=rank: rank)
        monkeypatch.setattr("tvl_align.training.sampling.world_size", lambda: 2)
        parts.append((epoch_batches(40, 4, 0, 5), epoch_views(5, 4, 3, 0, 5)))
    for together, first, second in zip(alone, *parts, strict=True):
        assert torch.equal(together, torch.cat([first, second], dim=1))


def test_fewer_rows_than_a_batch() -> None:
    with pytest.raises(UserError, match="7 training rows are fewer than one batch of 8; give a smaller --batch_size"):
        epoch_batches(7, 8, 0, 0)


def test_importance_sampling_draws_each_data_set_equally() -> None:
    """The small data set makes up half of the drawn rows."""
    weights = balanced_weights(torch.tensor([1] * 100 + [0] * 900))
    drawn = epoch_batches(1000, 10, 0, 0, weights).flatten()
    assert 400 < int((drawn < 100).sum()) < 600
    assert len(set(drawn.tolist())) < 1000


def test_views_are_plain_and_augmented_alike() -> None:
    views = epoch_views(100, 50, 4, 0, 0)
    assert (torch.bincount(views.flatten(), minlength=5) > 850).all()
    assert not epoch_views(10, 5, 0, 0, 0).any()


def test_half_of_the_rows_are_plain_where_pictures_are_augmented() -> None:
    shares = torch.bincount(epoch_views(100, 50, 4, 0, 0, augmented=True).flatten(), minlength=5) / 5000
    assert shares.tolist() == pytest.approx([0.5, 0.125, 0.125, 0.125, 0.125], abs=0.02)
    assert not epoch_views(10, 5, 0, 0, 0, augmented=True).any()


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_shares_are_the_same_batches_on_any_number_of_processes(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tvl_align.training.sampling.world_size", lambda: processes)
    parts = []
    for rank in range(processes):
        monkeypatch.setattr("tvl_align.training.sampling.rank", lambda rank=rank: rank)
        parts.append(shard_batches(torch.arange(10), 4))
    batches = [row[row >= 0].tolist() for row in torch.cat(parts, dim=1)]
    assert batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_the_last_batch_can_be_kept() -> None:
    rows = epoch_batches(20, 6, 0, 0, drop_last=False)
    assert rows.shape == (4, 6)
    assert sorted(rows[rows >= 0].tolist()) == list(range(20))
    assert epoch_batches(7, 8, 0, 0, drop_last=False).shape == (1, 8)
