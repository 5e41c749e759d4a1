"""Critics' loss and encoders' penalty equal plain loops, and measure dependence."""

import math

import numpy as np
import pytest
import torch

from tvl_align.losses.independence import independence
from tvl_align.methods.base import Critics

NAMES = ("vision", "tactile", "text")
Named = dict[str, torch.Tensor]


def inputs(seed: int, rows: int = 7, critics: int = 2, width: int = 3) -> tuple[Named, Named, Named, Named, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    codes = {m: torch.randn(rows, width, generator=g) for m in NAMES}
    guesses = {m: torch.randn(rows, 2, critics, width, generator=g) for m in NAMES}
    valid, present = ({m: torch.rand(rows, generator=g) > 0.3 for m in NAMES} for _ in range(2))
    return codes, guesses, valid, present, torch.randint(0, 3, (rows, 2), generator=g)


def slow(
    codes: Named, guesses: Named, valid: Named, present: Named, keys: torch.Tensor, contents: Named
) -> tuple[float, float]:
    """One row, one critic and one candidate at a time."""
    losses, penalties = [], []
    for m in guesses:
        for o in codes:
            if o == m:
                continue
            candidates = [j for j in range(len(keys)) if present[o][j]]
            unit = {j: codes[o][j].numpy() / np.linalg.norm(codes[o][j].numpy()) for j in candidates}
            rows = [i for i in range(len(keys)) if valid[m][i] and present[m][i] and present[o][i]]
            if not rows:
                continue
            loss = penalty = 0.0
            for i in rows:
                same = [
                    j
                    for j in candidates
                    if j == i
                    or (o == "text" and bool((keys[i] == keys[j]).any()))
                    or (o in contents and bool(contents[o][i] == contents[o][j]))
                ]
                for guess, answer in zip(*guesses[m][i].numpy(), strict=True):
                    weights = {j: math.exp(guess @ unit[j]) for j in candidates}
                    loss -= sum(math.log(weights[j] / sum(weights.values())) for j in same) / len(same)
                    weights = {j: math.exp(answer @ unit[j]) for j in candidates}
                    for j in candidates:
                        p = weights[j] / sum(weights.values())
                        penalty += p * math.log(p * len(candidates))
            losses.append(loss / len(rows) / guesses[m].shape[2])
            penalties.append(penalty / len(rows) / guesses[m].shape[2])
    return float(np.mean(losses or [0.0])), float(np.mean(penalties or [0.0]))


@pytest.mark.parametrize("seed", range(8))
def test_both_terms_equal_plain_loops(seed: int) -> None:
    """With absent rows, rows without a complementary code, equal captions and equal pictures."""
    given = inputs(seed, rows=3 + seed)
    for contents in ({}, {"vision": torch.arange(3 + seed) // 2}):
        found = [float(x) for x in independence(*given, contents)]
        assert found == pytest.approx(slow(*given, contents), rel=1e-4, abs=1e-5)


def test_a_batch_without_a_modality_has_finite_gradients() -> None:
    codes, guesses, valid, present, keys = inputs(0)
    present["text"] = torch.zeros(7, dtype=torch.bool)
    codes["text"] = torch.full((7, 3), 1e6)
    expected = slow(codes, guesses, valid, present, keys, {})
    for x in guesses.values():
        x.requires_grad_()
    terms = independence(codes, guesses, valid, present, keys)
    assert [x.item() for x in terms] == pytest.approx(expected, rel=1e-4)
    sum(terms).backward()
    assert all(x.grad.isfinite().all() for x in guesses.values())
    none = {m: torch.zeros(7, dtype=torch.bool) for m in NAMES}
    assert [x.item() for x in independence(codes, guesses, valid, none, keys)] == [0, 0]


def test_the_extremes_of_the_penalty() -> None:
    """Answers that prefer no row cost nothing; certain ones cost the logarithm of the number of rows."""
    codes, guesses, *_, keys = inputs(0, width=7)
    everyone = {m: torch.ones(7, dtype=torch.bool) for m in NAMES}
    codes = {m: torch.eye(7) for m in NAMES}
    nothing = {m: torch.cat([x[:, :1], torch.zeros(7, 1, 2, 7)], dim=1) for m, x in guesses.items()}
    assert float(independence(codes, nothing, everyone, everyone, keys)[1]) == pytest.approx(0, abs=1e-6)
    certain = {m: 100 * torch.eye(7)[:, None, None].expand(7, 2, 2, 7) for m in NAMES}
    critic, penalty = independence(codes, certain, everyone, everyone, torch.arange(7)[:, None])
    assert float(penalty) == pytest.approx(math.log(7), abs=1e-4)
    assert float(critic) == pytest.approx(0, abs=1e-4)


def trained(dependent: bool) -> tuple[float, float, float]:
    """Critics' loss before and after 60 steps and the penalty, on new rows, where the unique code is the shared one or is
    independent of it."""
    torch.manual_seed(0)
    critics, names = Critics(2, 4, 4, 2), ("a", "b")
    optimizer = torch.optim.Adam(critics.parameters(), lr=3e-3)

    def terms(rows: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
        shared = torch.randn(rows, 4)
        unique = {m: shared if dependent else torch.randn(rows, 4) for m in names}
        everyone = {m: torch.ones(rows, dtype=torch.bool) for m in names}
        found = critics(torch.stack([unique[m] for m in names]))
        guesses = {m: x.movedim(2, 0) for m, x in zip(names, found.unbind(1), strict=True)}
        return independence(dict.fromkeys(names, shared), guesses, everyone, everyone, torch.arange(rows)[:, None])

    before = terms()[0].item()
    for _ in range(60):
        optimizer.zero_grad()
        loss = terms()[0]
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        after, penalty = terms()
    return before, float(after), float(penalty)


def test_critics_gain_from_a_dependent_code_only() -> None:
    before, after, penalty = trained(dependent=True)
    assert before == pytest.approx(math.log(64), abs=0.1)
    assert before - after > 1 and penalty > 1
    before, after, penalty = trained(dependent=False)
    assert before - after < 0.05 and penalty < 0.1
