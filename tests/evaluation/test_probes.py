"""Probes find what features contain, of whatever form, and nothing else; the test rows have no part in the fit."""

import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tvl_align.evaluation import probes as module
from tvl_align.evaluation.probes import Components, Probed, ProbeKind, Problem, Target, accuracy, bits, fit_probes, r2
from tvl_align.system.console import UserError

ROWS, TEST = 1500, 1000
ERROR = 100 * (0.25 / TEST) ** 0.5  # standard error in percentage points of an accuracy of 50%


def fit(
    kind: ProbeKind, train: Sequence[Tensor], targets: Sequence[Target], test: Sequence[Tensor], seed: int = 0
) -> list[Probed]:
    """The predictions of one kind of probe for one problem."""
    return fit_probes([Problem(train, targets, test)], (kind,), seed)[0][kind]


def planted(kind: str, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features (rows, 6) and a binary class (rows,) that is written into them in the given way."""
    draw = torch.Generator().manual_seed(seed)
    x, y = torch.randn(rows, 6, generator=draw), torch.randint(2, (rows,), generator=draw)
    sign = 2.0 * y - 1
    if kind == "sign":
        x[:, 2] = x[:, 2].abs() * sign
    elif kind == "product":
        x[:, 2] = x[:, 2].abs() * x[:, 3].sign() * sign
    elif kind == "variance":
        x[:, 2] *= torch.where(y == 1, 2.0, 0.3)
    elif kind == "faint":
        x[:, 2] = 1e-3 * x[:, 2].abs() * sign
    elif kind == "rotated and faint":
        x[:, 2] = 1e-3 * x[:, 2].abs() * sign
        x = x @ torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))[0]
    return x, y


def read(kind: str, probe: ProbeKind, rows: int = ROWS) -> float:
    """Accuracy in percent of a probe of planted features."""
    (x, y), (x_test, y_test) = planted(kind, rows, 1), planted(kind, TEST, 2)
    (probed,) = fit(probe, (x,), (Target(y, 2),), (x_test,))
    return 100 * float(accuracy(probed, y_test).mean())


@pytest.mark.parametrize(
    ("kind", "linear", "mlp"),
    [
        ("sign", (95, 100), (95, 100)),
        ("product", (40, 60), (90, 100)),
        ("variance", (50 - 4 * ERROR, 50 + 4 * ERROR), (75, 100)),
        ("faint", (95, 100), (0, 100)),
        ("rotated and faint", (95, 100), (0, 100)),
        ("independent", (50 - 3 * ERROR, 50 + 3 * ERROR), (50 - 3 * ERROR, 50 + 3 * ERROR)),
    ],
)
def test_a_planted_class_is_read(kind: str, linear: tuple[float, float], mlp: tuple[float, float]) -> None:
    for probe, (low, high) in (("linear", linear), ("mlp", mlp)):
        assert low <= read(kind, probe) <= high, probe  # type: ignore[arg-type]


def test_a_class_in_one_token_of_many() -> None:
    """The class is in one of 6 tokens, told by a marker; in all others there is a decoy. The mean token hides it."""

    def tokens(rows: int, seed: int) -> tuple[Tensor, Tensor]:
        draw = torch.Generator().manual_seed(seed)
        x = 0.3 * torch.randn(rows, 6, 12, generator=draw)
        y, at = torch.randint(4, (rows,), generator=draw), torch.randint(6, (rows,), generator=draw)
        codes = torch.randint(4, (rows, 6), generator=draw)
        codes[torch.arange(rows), at] = y
        x[:, :, :4] += 2 * torch.eye(4)[codes]
        x[torch.arange(rows), at, 4:8] += 3
        return x, y

    (x, y), (x_test, y_test) = tokens(1500, 0), tokens(300, 1)
    masks = [torch.ones(t.shape[:2], dtype=torch.bool) for t in (x, x_test)]
    first, again = (fit("attentive", (x, masks[0]), (Target(y, 4),), (x_test, masks[1]), 1)[0] for _ in range(2))
    assert torch.equal(first.output, again.output)
    assert float(accuracy(first, y_test).mean()) > 0.9
    (linear,) = fit("linear", (x.mean(1),), (Target(y, 4),), (x_test.mean(1),))
    assert float(accuracy(linear, y_test).mean()) < 0.75


def test_tokens_that_are_masked_are_not_read() -> None:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(700, 3, 8, generator=draw), torch.randint(2, (700,), generator=draw)
    x[:, 1, 0] = 5 * (2.0 * y - 1)
    mask = torch.tensor([True, False, True]).expand(700, 3)
    for hidden, low, high in ((mask, 0.4, 0.6), (torch.ones_like(mask), 0.9, 1.0)):
        (probed,) = fit("attentive", (x[:400], hidden[:400]), (Target(y[:400], 2),), (x[400:], hidden[400:]))
        assert low <= float(accuracy(probed, y[400:]).mean()) <= high


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_other_test_rows_do_not_change_a_prediction(kind: ProbeKind) -> None:
    """Nor does anything about them: rows of garbage, a scale, or their number."""
    (x, y), (x_test, _) = planted("sign", 300, 1), planted("sign", 50, 2)
    garbage = 1e4 * torch.randn(2000, 6, generator=torch.Generator().manual_seed(3))
    (alone,), among = (fit(kind, (x,), (Target(y, 2),), (t,)) for t in (x_test, torch.cat([x_test, garbage])))
    assert torch.allclose(alone.output, among[0].output[:50], atol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_probe_is_the_same_alone_or_with_other_targets_known_or_not(kind: ProbeKind) -> None:
    """Unknown labels have no part in the fit, and results repeat for a seed."""
    (x, y), (x_test, y_test) = planted("sign", 600, 1), planted("sign", 300, 2)
    half = torch.where(torch.arange(600) % 2 == 0, y, -1)
    found = fit(kind, (x,), (Target(half, 2), Target(torch.full((600, 2), math.nan))), (x_test,))
    assert float(accuracy(found[0], y_test).mean()) > 0.93
    again = fit(kind, (x,), (Target(half, 2), Target(torch.full((600, 2), math.nan))), (x_test,))
    assert torch.equal(found[0].output, again[0].output)
    assert not torch.equal(found[0].output, fit(kind, (x,), (Target(half, 2),), (x_test,), seed=1)[0].output)


@pytest.mark.parametrize("kind", ["linear", "mlp", "attentive"])
def test_a_problem_is_fitted_alike_alone_and_among_others(kind: ProbeKind) -> None:
    """Also when the others, which have nothing to read, stop early."""

    def problem(of: str, seed: int) -> Problem:
        (x, y), (x_test, _) = planted(of, 500, seed), planted(of, 100, seed + 1)
        sides = (x,), (x_test,)
        if kind == "attentive":
            sides = tuple((t.view(len(t), 2, 3), torch.ones(len(t), 2, dtype=torch.bool)) for (t,) in sides)  # type: ignore[assignment]
        return Problem(sides[0], (Target(y, 2),), sides[1])

    problems = [problem(of, 10 * i) for i, of in enumerate(("independent", "sign", "independent", "product"))]
    together = fit_probes(problems, (kind,), max_steps=120)
    for one, among in zip(problems, together, strict=True):
        (alone,) = fit_probes([one], (kind,), max_steps=120)
        assert torch.allclose(among[kind][0].output, alone[kind][0].output, atol=1e-2)
    assert not torch.allclose(together[0][kind][0].output, together[2][kind][0].output, atol=0.1)


def test_losses_of_padded_problems_are_those_of_each_target() -> None:
    """Two problems with 50 and 30 rows, on their held-out fifths; one label and one number are unknown."""
    draw = torch.Generator().manual_seed(0)
    x, classes = torch.randn(50, 4, generator=draw), torch.randint(3, (50,), generator=draw)
    numbers = torch.randn(30, 2, generator=draw)
    classes[7], numbers[5, 1] = -1, torch.nan
    problems = [
        Problem((x,), [Target(classes, 3)], (x,)),
        Problem((x[:30],), [Target(numbers), Target(classes[:30], 5)], (x,)),
    ]
    batch = module._Batch(problems, seed=0)
    outputs = torch.randn(2, 10, *batch.shape, generator=draw)
    found = batch._losses(outputs, batch.held_labels, batch.held_numbers, torch.arange(2))
    first, second = batch.held[0], batch.held[1][:6]
    error = (outputs[1, :6, 0, :2] - numbers[second]).square()
    expected = [
        [F.cross_entropy(outputs[0, :, 0, :3], classes[first], ignore_index=-1), 0.0],
        [error[error.isfinite()].mean(), F.cross_entropy(outputs[1, :6, 1], classes[second], ignore_index=-1)],
    ]
    assert torch.allclose(found, torch.tensor(expected), atol=1e-5)
    assert batch.shape == (2, 5)


def test_problems_of_other_sizes_are_fitted_together() -> None:
    """Fewer rows, components, classes and targets than another problem has: what is padded is never read."""
    (x, y), (x_test, y_test) = planted("sign", 900, 1), planted("sign", 300, 2)
    shifted = torch.cat([y[:, None] * 3.0 - 1, y[:, None] * 1.0], dim=1)
    small = Problem((x[:200].clone(),), (Target(y[:200], 2),), (x_test,))
    small.train[0][:, 0] = small.test[0][:, 0] = 0.0
    large = Problem((x,), (Target(torch.full((900,), -1), 7), Target(shifted), Target(2 * y, 3)), (x_test.clone(),))
    for kind in ("linear", "mlp"):
        first, second = (found[kind] for found in fit_probes([small, large], (kind,)))
        assert [p.output.shape for p in (*first, *second)] == [(300, 2), (300, 7), (300, 2), (300, 3)]
        assert float(accuracy(first[0], y_test).mean()) > 0.9
        assert float(accuracy(second[2], 2 * y_test).mean()) > 0.95
        assert r2(second[1], torch.stack([y_test * 3.0 - 1, y_test * 1.0], dim=1), shifted.mean(0)) > 0.6


@pytest.mark.parametrize("sizes", [[1, 2, 3, 4] * 40, [100] * 4 + [600], [5] * 20 + [900], [1] * 4 + [996], [10] * 10])
def test_rows_of_a_group_are_held_out_together(sizes: list[int]) -> None:
    """A probe of copies with random labels would else find them among its held-out rows, and stop late.

    A tenth to a fifth of the rows is held out; where small groups do not make up a tenth, rows are drawn one by one.
    """
    draw, rows = torch.Generator().manual_seed(0), sum(sizes)
    groups = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))[torch.randperm(rows, generator=draw)]
    target = Target(torch.zeros(rows, dtype=torch.int64), 2)
    problem = Problem((torch.zeros(rows, 2),), (target,), (torch.zeros(4, 2),), groups)
    for seed in range(4):
        held, fitted = module._hold_out(problem, seed)
        assert sorted(torch.cat([held, fitted]).tolist()) == list(range(rows))
        assert rows // 10 <= len(held) <= rows // 5
        if sum(n for n in sizes if n <= rows // 5) >= 0.3 * rows:
            assert not set(groups[held].tolist()) & set(groups[fitted].tolist())


def test_a_target_that_one_group_tells_is_known_in_held_out_rows() -> None:
    """Else the first step of its probe would be the best."""
    groups = torch.arange(40).repeat_interleave(10)
    labels = torch.where(groups == 7, torch.arange(400) % 2, -1)
    problem = Problem((torch.zeros(400, 2),), (Target(labels, 2),), (torch.zeros(4, 2),), groups)
    held = [module._hold_out(problem, seed)[0] for seed in range(8)]
    whole = [len(set(groups[rows].tolist())) == 8 for rows in held]
    assert all((labels[rows] >= 0).any() for rows, of_groups in zip(held, whole, strict=True) if of_groups)
    assert not all(whole)


def test_predictions_that_are_not_finite_are_no_success() -> None:
    values = torch.tensor([[1.0], [torch.nan], [3.0]])
    assert r2(Probed("mlp", torch.tensor([[1.0], [5.0], [3.0]]), 0.0), values, torch.zeros(1)) == 1
    assert not r2(Probed("mlp", torch.full((3, 1), torch.nan), 0.0), values, torch.zeros(1)) > -1


def test_frozen_features_are_read_as_they_are_too() -> None:
    """Two directions of large variance tell the class by their product; whitened, they drown in 300 others of noise."""

    def features(rows: int, seed: int) -> tuple[Tensor, Tensor]:
        draw = torch.Generator().manual_seed(seed)
        x, y = torch.randn(rows, 302, generator=draw), torch.randint(2, (rows,), generator=draw)
        x[:, 0] = x[:, 0].abs() * x[:, 1].sign() * (2.0 * y - 1)
        x[:, :2] *= 30
        return x, y

    (x, y), (x_test, y_test) = features(1500, 1), features(500, 2)
    found = {}
    for frozen in (False, True):
        problem = Problem((x,), (Target(y, 2),), (x_test,), frozen=frozen)
        (probed,) = fit_probes([problem], ("mlp",))[0]["mlp"]
        found[frozen] = float(accuracy(probed, y_test).mean())
    assert found[True] > 0.85
    assert found[False] < found[True] - 0.02


def test_numbers_are_read() -> None:
    """y = |x|: of a quadratic kind, so no linear probe finds it."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1500, 3, generator=draw)
    y = (x[:, :1].abs() - 0.8) / 0.6
    for kind, low, high in (("linear", -0.05, 0.05), ("mlp", 0.9, 1.0)):
        (probed,) = fit(kind, (x[:1000],), (Target(y[:1000]),), (x[1000:],))  # type: ignore[arg-type]
        assert low <= r2(probed, y[1000:], y[:1000].mean(0)) <= high, kind


def test_constant_features_do_not_change_a_probe() -> None:
    """Neither zeros, with standard deviation 0, nor a constant whose standard deviation is a rounding error."""
    (x, y), (x_test, y_test) = planted("sign", 400, 1), planted("sign", 300, 2)
    constant = torch.tensor([0.0, 0.1, 1000.1])
    more, more_test = (torch.cat([part, constant.expand(len(part), 3)], dim=1) for part in (x, x_test))
    scores = [
        100 * float(accuracy(fit("linear", (a,), (Target(y, 2),), (b,))[0], y_test).mean())
        for a, b in ((x, x_test), (more, more_test))
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1.5)


def test_few_units_in_wide_tokens_have_no_components_of_rounding_errors() -> None:
    """Whitened, hundreds of such components would drown a product of two faint units."""
    basis = torch.linalg.qr(torch.randn(768, 8, generator=torch.Generator().manual_seed(3)))[0]
    (x, y), (x_test, y_test) = planted("product", ROWS, 1), planted("product", TEST, 2)
    faint = torch.tensor([1.0, 1.0, 0.01, 0.01, 1.0, 1.0])
    wide, wide_test = (5 + (part * faint) @ basis[:, :6].T for part in (x, x_test))
    components = Components(wide)
    assert len(components.std) == 6
    found = components(wide)
    assert torch.allclose(found.T @ found / ROWS, torch.eye(6), atol=1e-2)
    (probed,) = fit("mlp", (wide,), (Target(y, 2),), (wide_test,))
    assert 100 * float(accuracy(probed, y_test).mean()) > 90


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_features_that_are_not_finite_are_refused(kind: ProbeKind, value: float) -> None:
    x, y = planted("sign", 60, 1)
    x[:, 3] = value
    with pytest.raises(UserError, match="NaN, inf"):
        fit(kind, (x,), (Target(y, 2),), (x[:4],))


def test_bits_of_hand_made_predictions() -> None:
    """Logits of a quarter and three quarters: 2 bits where the rare class is right, log2(4/3) where the other is."""
    made = Probed("linear", torch.tensor([[0.0, math.log(3)]] * 2), 0.0)
    assert bits(made, torch.tensor([0, 1])).tolist() == pytest.approx([2.0, math.log2(4 / 3)])
    assert accuracy(made, torch.tensor([0, 1])).tolist() == [0, 1]
