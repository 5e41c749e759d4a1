"""Narrow codes: their tokens, noise and quantisation, and the closed forms that methods start at."""

from collections.abc import Iterator
from inspect import signature
from typing import Any

import pytest
import torch

from tvl_align.contract import Features, FeatureSpec, Method, Tokens
from tvl_align.methods.base import BASE, Stage2Config, Stage2Loss, TVLStage2, quantise
from tvl_align.methods.closed import CLOSED
from tvl_align.methods.codes import CodeConfig, Codes, dropped
from tvl_align.methods.mlp import MLP
from tvl_align.registers.pooling import pooled_overlapping
from tvl_align.system.console import UserError
from tvl_align.system.distributed import joint_noise
from tvl_align.training.checks import SPECS, random_features

SMALL = {"register_token_dim": 64, "num_heads": 4, "components": 20}


def codes(**changes: Any) -> Codes:
    torch.manual_seed(0)
    return Codes(SPECS, CodeConfig(**{"register_token_dim": 128} | changes))


def correlated(rows: int = 400, seed: int = 0, absent: bool = True) -> Features:
    """Tokens with 3 variables that all modalities share and 3 of their own each; some rows lack touch."""
    g = torch.Generator().manual_seed(seed)
    shared, modalities = torch.randn(rows, 3, generator=g), {}
    for i, (m, spec) in enumerate(SPECS.items()):
        fixed = torch.Generator().manual_seed(i)
        x = torch.cat([shared, torch.randn(rows, 3, generator=g)], dim=1)
        signal = x @ torch.randn(6, spec.tokens * spec.width, generator=fixed)
        tokens = (signal + torch.randn(rows, spec.tokens * spec.width, generator=g)).view(rows, spec.tokens, spec.width)
        present = torch.rand(rows, generator=g) > 0.2 if m == "tactile" and absent else torch.ones(rows, dtype=torch.bool)
        pooled = torch.nn.functional.normalize(tokens.mean(1)[:, : spec.pooled_width], dim=-1)
        pooled = torch.nn.functional.pad(pooled, (0, spec.pooled_width - pooled.shape[1]))
        modalities[m] = Tokens(tokens, torch.ones(rows, spec.tokens, dtype=torch.bool), pooled, present)
    return Features(modalities, torch.arange(rows)[:, None], torch.arange(rows))


def calibrated(method: Method, features: Features, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = method.model(method.knobs(**SMALL | changes), SPECS).eval()

    def batches() -> Iterator[Features]:
        for at in torch.arange(len(features)).split(150):
            yield features.map(lambda t, at=at: t[at])

    model.calibrate(batches)
    return model


@pytest.mark.parametrize(
    ("dim", "counts", "comp"), [(256, [12, 6, 6], 12), (128, [12, 6, 6], 12), (30, [11, 5, 5], 7), (4, [1, 1, 1], 1)]
)
def test_tokens_span_orthogonal_subspaces(dim: int, counts: list[int], comp: int) -> None:
    """Units are read back from the tokens exactly, half of them from the first; if the width is small, tokens have fewer."""
    c, total = codes(register_token_dim=dim), sum(counts)
    assert c.counts == counts and c.comp_counts == [comp]
    assert c.over.shape == (3, total, dim) and c.comp.shape == (1, comp, dim)
    whole = torch.cat([c.over.sum(0), c.comp.sum(0)])
    assert torch.allclose(whole @ whole.T, torch.eye(len(whole)), atol=1e-5)
    units = torch.randn(5, total)
    tokens = Codes.tokens(units, c.over)
    assert torch.allclose(Codes.units(tokens, c.over), units, atol=1e-5)
    assert Codes.units(tokens.roll(1, 1), c.over).abs().max() < 1e-5  # a token holds nothing in the basis of another
    start = counts[0]
    second = sum(units[3, i] * c.over[1, i] for i in range(start, start + counts[1]))
    assert torch.allclose(tokens[3, 1], second, atol=1e-5)
    assert torch.allclose(tokens.sum(1).square().sum(1), units.square().sum(1), rtol=1e-4)


@pytest.mark.parametrize(
    ("units", "overlapping", "expected"),
    [
        (24, 3, [12, 6, 6]),
        (25, 3, [13, 6, 6]),
        (24, 1, [24]),
        (24, 5, [12, 3, 3, 3, 3]),
        (2, 3, [1, 1, 1]),
        (24, 2, [12, 12]),
    ],
)
def test_the_first_token_holds_half_of_the_units(units: int, overlapping: int, expected: list[int]) -> None:
    c = codes(units=units, num_overlapping_tokens=overlapping, num_register_tokens=overlapping + 1, register_token_dim=300)
    assert c.counts == expected


@pytest.mark.parametrize("levels", [3, 5, 9])
def test_quantised_values_are_in_the_grid_with_the_gradient_of_tanh(levels: int) -> None:
    x = torch.linspace(-4, 4, 201, requires_grad=True)
    found = quantise(x, levels)
    grid = torch.linspace(-1, 1, levels)
    distance = (found.detach()[:, None] - grid).abs()
    assert distance.min(1).values.max() < 1e-6
    assert len(distance.argmin(1).unique()) == levels
    nearest = (torch.tanh(x.detach())[:, None] - grid).abs().min(1).values
    assert torch.allclose((found - torch.tanh(x)).abs().detach(), nearest, atol=1e-6)
    found.sum().backward()
    assert torch.allclose(x.grad, 1 - torch.tanh(x.detach()).square(), atol=1e-6)


def test_noise_has_the_given_standard_deviation_in_training_only() -> None:
    c, x = codes(noise=0.3), torch.zeros(200, 500)
    added = c.train().noisy(x)
    assert float(added.std()) == pytest.approx(0.3, rel=0.02)
    assert abs(float(added.mean())) < 0.005
    assert torch.equal(c.eval().noisy(x), x)
    assert torch.equal(codes(noise=0.0).train().noisy(x), x)
    assert joint_noise(x).shape == x.shape


def test_input_dropout_keeps_the_expected_value_in_training_only() -> None:
    thinned = dropped(torch.ones(200, 500), 0.4)
    assert thinned.unique().tolist() == pytest.approx([0, 1 / 0.6])
    assert float((thinned == 0).float().mean()) == pytest.approx(0.4, abs=0.01)
    model = calibrated(BASE, correlated(), noise=0.0, input_dropout=0.9)
    features, kept = random_features(4), torch.ones(4, 4, dtype=torch.bool)
    plain, noisy = model.eval()(features, kept=kept), model.train()(features, kept=kept)
    assert not torch.allclose(plain.overlapping_tokens["vision"], noisy.overlapping_tokens["vision"], atol=1e-2)
    assert torch.allclose(plain.complementary_tokens["vision"], noisy.complementary_tokens["vision"], atol=1e-5)
    model.trunk.dropout = 0.0
    assert torch.allclose(
        plain.overlapping_tokens["vision"], model(features, kept=kept).overlapping_tokens["vision"], atol=1e-5
    )
    with pytest.raises(UserError, match=r"--input_dropout 1.0 is out of range"):
        Stage2Config(input_dropout=1.0)


@pytest.mark.parametrize("method", [BASE, CLOSED, MLP], ids=["base", "closed", "mlp"])
def test_training_is_noisy_and_evaluation_deterministic(method: Method) -> None:
    features = random_features(4)
    model = calibrated(method, correlated(), noise=0.3)
    kept = torch.ones(4, 4, dtype=torch.bool)

    def over(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return model(features, kept=kept)["overlapping_tokens"]["vision"]

    assert torch.equal(over(0), over(1))
    model.train()
    assert torch.equal(over(0), over(0)) and not torch.allclose(over(0), over(1), atol=1e-3)


def test_complementary_codes_of_the_base_start_at_the_closed_form() -> None:
    """Their linear part gives the units of `closed` with the same components, up to what the registers and the grid add."""
    data, fresh = correlated(), correlated(seed=1, absent=False)
    base, closed = calibrated(BASE, data), calibrated(CLOSED, data, complementary_units=12, noise=0.0)
    base.comp_narrow.weight.data.zero_()  # no contribution of the registers
    one, other = base(fresh), closed(fresh)
    for m in SPECS:
        comp = [Codes.units(x.complementary_tokens[m], net.codes.comp) for x, net in ((one, base), (other, closed))]
        grid = quantise(comp[1], base.knobs.levels)
        assert (comp[0] - grid).abs().mean() < 0.01  # a value next to a border may round to the other side
        assert comp[0].abs().mean() > 0.3


def test_closed_forms_pair_rows_without_training() -> None:
    """The shared variables alone name the row of another modality among 200 new ones."""
    fresh = correlated(200, seed=3, absent=False)
    pooled = pooled_overlapping(calibrated(CLOSED, correlated())(fresh))
    nearest = (pooled["vision"] @ pooled["text"].T).argmax(1)
    assert (nearest == torch.arange(200)).float().mean() > 0.2  # chance 0.005


def test_the_closed_decoder_rebuilds_what_the_codes_hold() -> None:
    data, fresh = correlated(), correlated(seed=1, absent=False)
    output = calibrated(CLOSED, data)(fresh)
    for m, reconstruction in output.reconstruction.items():
        scores, rest = calibrated(CLOSED, data).codes.read(m, fresh.modalities[m])
        nothing = calibrated(CLOSED, data).codes.principal.squared_error(m, scores, torch.zeros(len(scores), 20), rest)
        assert reconstruction.error.mean() < 0.5 * nothing.mean()
        assert (reconstruction.error[:, 0] >= rest - 1e-6).all()


def test_without_complete_rows_nothing_is_calibrated_but_the_components(caplog: pytest.LogCaptureFixture) -> None:
    data = correlated(40)
    text = data.modalities["text"]
    data.modalities["text"] = Tokens(text.tokens, text.mask, text.pooled, torch.arange(40) < 1)
    base = calibrated(BASE, data)
    assert "fewer than 2 training rows have all of vision, tactile, text" in caplog.text
    assert bool(base.codes.principal.fitted)
    assert all(x.isfinite().all() for x in base(data).overlapping_tokens.values())
    calibrated(CLOSED, data)


def test_the_mlp_has_no_complementary_information() -> None:
    output = calibrated(MLP, correlated())(random_features(5))
    assert not any(z.any() for z in output.complementary_tokens.values())
    assert not output.reconstruction


def test_the_joint_tokens_of_direct_models_are_the_mean_of_the_present_ones() -> None:
    data = correlated(30)
    output = calibrated(CLOSED, correlated())(data)
    parts = {m: torch.cat([output.overlapping_tokens[m], output.complementary_tokens[m]], dim=1) for m in SPECS}
    for row in range(30):
        expected = torch.stack([z[row] for m, z in parts.items() if output.present[m][row]]).mean(0)
        assert torch.allclose(output.register_tokens[row], expected, atol=1e-5)


def test_narrow_modalities_have_fewer_components_than_units() -> None:
    """The maps are padded with zeros."""
    specs = {"a": FeatureSpec(2, 1, 2), "b": FeatureSpec(3, 1, 3)}
    torch.manual_seed(0)
    x = torch.randn(100, 1, 3)
    everyone = torch.ones(100, 1, dtype=torch.bool)
    data = Features(
        {
            "a": Tokens(x[..., :2], everyone, x[:, 0, :2], everyone[:, 0]),
            "b": Tokens(x, everyone, x[:, 0], everyone[:, 0]),
        },
        torch.arange(100)[:, None],
        torch.arange(100),
    )
    for method in (BASE, CLOSED):
        model = method.model(method.knobs(register_token_dim=128, num_heads=4), specs)
        model.calibrate(lambda: [data])
        output = model.eval()(data)
        assert all(z.isfinite().all() for z in output.overlapping_tokens.values())


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("components", 0, "--components 0"),
        ("units", 0, "--units 0"),
        ("complementary_units", -1, "--complementary_units -1"),
        ("noise", -0.1, "--noise -0.1"),
        ("num_keys", 0, "--num_keys 0"),
        ("trunk_width", 0, "--trunk_width 0"),
        ("trunk_layers", -1, "--trunk_layers -1"),
        ("levels", 4, "--levels 4"),
        ("levels", 1, "--levels 1"),
    ],
)
def test_impossible_options_are_refused_in_one_sentence(option: str, value: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Stage2Config(**{option: value})


def test_the_constructors_have_the_defaults_of_the_options() -> None:
    for callable_ in (TVLStage2, Stage2Loss):
        for name, parameter in signature(callable_).parameters.items():
            if name in vars(Stage2Config()):
                assert parameter.default == getattr(Stage2Config(), name), name


def test_closed_variates_have_no_mean_on_the_rows_that_have_everything() -> None:
    features = correlated()
    model = CLOSED.model(CLOSED.knobs(**SMALL), SPECS).eval()
    model.calibrate(lambda: [features])
    complete = torch.stack([t.present for t in features.modalities.values()]).all(0)
    for tokens in model(features).overlapping_tokens.values():
        assert tokens[complete].mean(0).abs().max() < 1e-4 < tokens[complete].std(0).max()
