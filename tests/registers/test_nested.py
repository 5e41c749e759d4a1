"""Nested dropout: exact marginal probabilities, and the kept registers are a prefix."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from tvl_align.registers.nested import draw_kept, drop_probabilities, prefix


def test_documented_probabilities() -> None:
    assert [round(100 * p) for p in drop_probabilities(4, 0.5).tolist()] == [0, 17, 33, 50]


@given(st.integers(1, 9), st.floats(0, 1), st.integers(0, 2**31))
def test_kept_registers_are_a_prefix(registers: int, rate: float, seed: int) -> None:
    kept = draw_kept(32, registers, rate, "nested", torch.Generator().manual_seed(seed)).int()
    assert (kept.diff(dim=1) <= 0).all()
    assert registers == 1 or kept[:, 0].all()


def test_marginal_probabilities_in_both_modes() -> None:
    for mode in ("nested", "independent"):
        kept = draw_kept(200_000, 4, 0.5, mode, torch.Generator().manual_seed(0))
        assert torch.allclose(1 - kept.double().mean(0), drop_probabilities(4, 0.5), atol=0.005)


def test_independent_mode_leaves_gaps_and_is_seeded() -> None:
    draws = [draw_kept(500, 4, 0.5, "independent", torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert (draws[0].int().diff(dim=1) > 0).any()
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_prefix() -> None:
    assert prefix(2, 4, 3).tolist() == [[True, True, True, False]] * 2
