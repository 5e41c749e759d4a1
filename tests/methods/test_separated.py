"""Separated models: the noise of the bottleneck, and the closed forms on synthetic data with known ground truth."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tvl_align.contract import Features
from tvl_align.evaluation.probes import linear_probe
from tvl_align.methods.registry import METHODS
from tvl_align.methods.separated import LinearDecoder, SeparatedConfig, SeparatedModel
from tvl_align.methods.separation import Separation, fit_separations, least_squares
from tvl_align.training.checks import SPECS, random_features

ROWS = 6000


def test_least_squares_is_numpys_on_centred_data() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(200, 5, generator=g) + 3, torch.randn(200, 2, generator=g) - 1
    expected = np.linalg.lstsq((x - x.mean(0)).numpy(), (y - y.mean(0)).numpy(), rcond=None)[0]
    assert torch.allclose(least_squares(x, y), torch.from_numpy(expected), atol=3e-3)


def synthetic() -> tuple[dict[str, Tensor], dict[str, Tensor], np.ndarray, dict[str, np.ndarray]]:
    """Two modalities: units, complementary tokens, shared classes, unique classes.

    The units contain a shared class as two bits with independent noise, so one contrast of the class is not linear in them.
    They also leak the unique class of the modality. The complementary tokens contain both classes.
    """
    rng = np.random.default_rng(0)
    shared = rng.integers(4, size=ROWS)
    source = np.stack([shared // 2 * 2 - 1, shared % 2 * 2 - 1, *rng.standard_normal((2, ROWS))], axis=1)
    units, comp, unique = {}, {}, {}
    for name in ("a", "b"):
        unique[name] = rng.integers(4, size=ROWS)
        own = np.eye(4)[unique[name]]
        units[name] = source + 0.3 * rng.standard_normal((ROWS, 4)) + 0.6 * own @ rng.standard_normal((4, 4))
        comp[name] = np.concatenate([np.eye(4)[shared], own], axis=1) @ rng.standard_normal((8, 8))
        comp[name] += 0.3 * rng.standard_normal((ROWS, 8))
    as_tensors = [{m: torch.tensor(x).float() for m, x in group.items()} for group in (units, comp)]
    return as_tensors[0], as_tensors[1], shared, unique


def probe(x: Tensor, labels: np.ndarray) -> float:
    half = ROWS // 2
    return linear_probe(x[:half], labels[:half], x[half:], labels[half:])


def test_separation_removes_the_other_kind_of_information() -> None:
    torch.manual_seed(0)
    units, comp, shared, unique = synthetic()
    separations = nn.ModuleDict({m: Separation(4, 0, 8) for m in units})
    unfitted = separations["a"](units["a"], comp["a"])
    assert torch.equal(unfitted[0], units["a"])
    assert torch.equal(unfitted[1], comp["a"])
    fit_separations(dict(separations.items()), units, comp)
    for m in units:
        cleaned, rest = separations[m](units[m], comp[m])
        assert probe(comp[m], shared) > 90
        assert probe(rest, shared) < 40  # chance is 25
        assert probe(rest, unique[m]) > 90
        assert probe(units[m], unique[m]) > 45
        assert probe(cleaned, unique[m]) < 35
        squares = torch.cat([units[m], units[m].square()], 1), torch.cat([cleaned, cleaned.square()], 1)
        assert probe(squares[1], shared) >= probe(squares[0], shared) - 1


def test_two_stage_least_squares_keeps_unique_information() -> None:
    """An ordinary regression on leaky, noisy units removes unique information and leaves shared information.

    The test uses one bit of the shared class, which is linear in the units.
    """
    units, comp, shared, unique = synthetic()
    first_stage = (units["b"] - units["b"].mean(0)) @ least_squares(units["b"], units["a"])
    ordinary, two_stage = (
        comp["a"] - (units["a"] - units["a"].mean(0)) @ slope
        for slope in (least_squares(units["a"], comp["a"]), least_squares(first_stage, comp["a"]))
    )
    bit = shared // 2
    assert probe(two_stage, unique["a"]) > 98 > probe(ordinary, unique["a"])
    assert probe(two_stage, bit) < 55 < probe(ordinary, bit)


def two_passes(noise: float, training: bool) -> tuple[SeparatedModel, Tensor]:
    """A model, and the difference of the overlapping tokens (B, No, D) of all modalities between two passes with different
    seeds."""
    torch.manual_seed(0)
    model = SeparatedModel(SPECS, SeparatedConfig(register_token_dim=64, num_heads=4, noise=noise)).train(training)
    features = random_features(200)
    kept = torch.ones(200, len(model.registers), dtype=torch.bool)
    tokens = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        with torch.no_grad():
            tokens.append(torch.cat(list(model(features, kept=kept, joint=False).overlapping_tokens.values())))
    return model, tokens[0] - tokens[1]


def test_training_adds_noise_of_the_given_standard_deviation_to_the_learnt_units() -> None:
    noise = SeparatedConfig().noise
    model, difference = two_passes(noise, training=True)
    units = torch.einsum("bnd,nrd->bnr", difference, model.basis[:, : model.learnt])
    assert units.std().item() == pytest.approx(2**0.5 * noise, rel=0.1)


def test_evaluation_and_zero_noise_are_deterministic() -> None:
    assert not two_passes(SeparatedConfig().noise, training=False)[1].any()
    assert not two_passes(0.0, training=True)[1].any()


def test_calibration_does_not_depend_on_the_batches_and_is_reverted_for_the_decoder() -> None:
    method = METHODS["base"]
    torch.manual_seed(0)
    model = method.model(method.knobs(register_token_dim=32, num_heads=4), SPECS).eval()
    features = random_features(600)

    def calibrated(size: int) -> Tensor:
        def batches() -> list[Features]:
            return [features.map(lambda t, i=i: t[i : i + size]) for i in range(0, len(features), size)]

        with torch.no_grad():
            model.calibrate(batches)
            return torch.cat(list(model(features)["complementary_tokens"].values()))

    decoded: dict[str, list[Tensor]] = {m: [] for m in SPECS}
    for m, decoder in model.decoders.items():
        decoder.register_forward_hook(lambda _, __, tokens, m=m: decoded[m].append(tokens))
    with torch.no_grad():
        before = model(features)
    whole = calibrated(600)
    assert torch.allclose(whole, calibrated(70), atol=1e-2)
    assert (whole - torch.cat(list(before["complementary_tokens"].values()))).abs().max() > 0.1
    for first, *_, last in decoded.values():
        assert float((last - first).std()) < 0.5 * float(first.std())


def test_too_few_complete_rows_give_a_warning_and_no_fit(caplog: pytest.LogCaptureFixture) -> None:
    method = METHODS["base"]
    model = method.model(method.knobs(register_token_dim=32, num_heads=4), SPECS).eval()
    without_text = random_features(5)
    without_text.modalities["text"].present[:] = False
    for features in (random_features(1), without_text, without_text.only(["vision", "tactile"])):
        caplog.clear()
        with torch.no_grad():
            model.calibrate(lambda features=features: [features])
        assert not any(s.to_comp.any() for s in model.separations.values())
        assert not model.projection.fitted
        assert "fewer than 2 training rows have all of vision, tactile, text" in caplog.text


def test_a_shorter_sequence_is_decoded_as_the_prefix_of_a_longer_one() -> None:
    torch.manual_seed(0)
    decoder, memory = LinearDecoder(SPECS["text"], 40), torch.randn(3, 40)
    longest = SPECS["text"].tokens
    assert torch.allclose(decoder(memory, longest), decoder.map(memory).view(3, longest, SPECS["text"].width), atol=1e-6)
    assert torch.allclose(decoder(memory, 2), decoder(memory, longest)[:, :2], atol=1e-6)
