"""Alignment equals plain loops, with several positives of each kind."""

from itertools import combinations

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F

from tvl_align.contract import Features, Output, Tokens
from tvl_align.losses import alignment as module
from tvl_align.losses.alignment import alignment, pair_name

NAMES = ("vision", "tactile", "text")


def batch(
    seed: int, rows: int = 9, repeated: tuple[str, ...] = ("vision", "tactile")
) -> tuple[dict[str, torch.Tensor], Output]:
    """Pooled vectors and an output of few captions and contents; content keys come with the input features."""
    g = torch.Generator().manual_seed(seed)
    pooled = {m: F.normalize(torch.randn(rows, 5, generator=g), dim=-1) for m in NAMES}
    present = {m: torch.rand(rows, generator=g) > 0.2 for m in NAMES}
    keys = {m: torch.randint(-4, 2**40, (4,), generator=g)[torch.randint(4, (rows,), generator=g)] for m in repeated}
    captions = torch.randint(5, (rows, 2), generator=g)
    empty = {m: Tokens(torch.empty(rows, 0, 1), torch.empty(rows, 0), torch.empty(rows, 0), present[m]) for m in NAMES}
    features = Features(empty, captions, torch.arange(rows), keys)
    return pooled, Output({}, {}, {}, torch.tensor(6.0), present, captions, features=features)


@pytest.mark.parametrize("repeated", [(), ("vision",), ("vision", "tactile"), ("text", "tactile")])
@pytest.mark.parametrize("seed", range(3))
def test_the_loss_of_every_pair_equals_the_reference(
    seed: int, repeated: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    pooled, output = batch(seed, repeated=repeated)
    contents = {m: keys.numpy() for m, keys in output.content_keys.items()}
    assert set(contents) == set(repeated)
    for piece in (2**20, 200):  # in one piece, and in pieces that are computed again
        monkeypatch.setattr(module, "PIECE", piece)
        found = alignment(pooled, output, list(combinations(NAMES, 2)))
        for pair in combinations(NAMES, 2):
            good = reference.positives(pair, output.caption_keys.numpy(), contents)
            valid = (output.present[pair[0]] & output.present[pair[1]]).numpy()
            a, b = (pooled[m].numpy() for m in pair)
            both = (reference.info_nce(x, y, 6.0, good, valid) for x, y in ((a, b), (b, a)))
            expected = sum(both) / 2 / max(1, valid.sum())
            assert float(found[f"{pair_name(*pair)}_loss"]) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_row_twice_is_no_negative_of_itself() -> None:
    """Perfect codes of rows that are all there twice have the loss of the rows once, plus log 2, and no wrong hit."""
    x = torch.eye(6)
    rows, present = torch.arange(6), {m: torch.ones(12, dtype=torch.bool) for m in ("vision", "tactile")}
    keys = {"vision": rows.repeat(2)}
    once = Output({}, {}, {}, torch.tensor(20.0), {m: p[:6] for m, p in present.items()}, rows[:, None])
    twice = Output({}, {}, {}, torch.tensor(20.0), present, torch.arange(12)[:, None], content_keys=keys)
    pairs = [("vision", "tactile")]
    one = alignment({"vision": x, "tactile": x}, once, pairs)
    two = alignment({m: x.repeat(2, 1) for m in ("vision", "tactile")}, twice, pairs)
    assert float(two["overlapping_loss"]) == pytest.approx(float(one["overlapping_loss"]) + np.log(2), abs=1e-5)
    assert float(two["average_acc1"]) == 100
