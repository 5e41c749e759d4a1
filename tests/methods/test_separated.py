"""The closed forms of separated models, on made-up data whose truth is known."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tvl_align.contract import Features
from tvl_align.evaluation.probes import linear_probe
from tvl_align.methods.registry import METHODS
from tvl_align.methods.separated import LinearDecoder
from tvl_align.methods.separation import Separation, fit_separations, least_squares
from tvl_align.training.checks import SPECS, random_features

ROWS = 6000


def test_least_squares_is_numpys_on_centred_data() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(200, 5, generator=g) + 3, torch.randn(200, 2, generator=g) - 1
    expected = np.linalg.lstsq((x - x.mean(0)).numpy(), (y - y.mean(0)).numpy(), rcond=None)[0]
    assert torch.allclose(least_squares(x, y), torch.from_numpy(expected), atol=3e-3)


def made() -> tuple[dict[str, Tensor], dict[str, Tensor], np.ndarray, dict[str, np.ndarray]]:
    """Two modalities. Both see a shared class as two bits, with noise of their own (so its third contrast is their product,
    not linear); the units also leak the modality's unique class, and the complementary tokens hold both classes."""
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


def read(x: Tensor, labels: np.ndarray) -> float:
    half = ROWS // 2
    return linear_probe(x[:half], labels[:half], x[half:], labels[half:])


def test_separation_takes_shared_and_unique_apart() -> None:
    torch.manual_seed(0)
    units, comp, shared, unique = made()
    separations = nn.ModuleDict({m: Separation(4, 0, 8) for m in units})
    untouched = separations["a"](units["a"], comp["a"])
    assert torch.equal(untouched[0], units["a"])
    assert torch.equal(untouched[1], comp["a"])
    fit_separations(dict(separations.items()), units, comp)
    for m in units:
        cleaned, rest = separations[m](units[m], comp[m])
        assert read(comp[m], shared) > 90
        assert read(rest, shared) < 40  # chance is 25
        assert read(rest, unique[m]) > 90
        assert read(units[m], unique[m]) > 45
        assert read(cleaned, unique[m]) < 35
        squares = torch.cat([units[m], units[m].square()], 1), torch.cat([cleaned, cleaned.square()], 1)
        assert read(squares[1], shared) >= read(squares[0], shared) - 1


def test_other_modalities_as_instruments_spare_what_is_unique() -> None:
    """A plain regression of complementary tokens on their own leaky units takes unique information away, and as the units
    are noisy it still leaves something shared; a bit of the class is linear in the units."""
    units, comp, shared, unique = made()
    through_the_other = least_squares(units["b"], units["a"])
    told = (units["b"] - units["b"].mean(0)) @ through_the_other
    plain, two_stage = (
        comp["a"] - (units["a"] - units["a"].mean(0)) @ slope
        for slope in (least_squares(units["a"], comp["a"]), least_squares(told, comp["a"]))
    )
    bit = shared // 2
    assert read(two_stage, unique["a"]) > 98 > read(plain, unique["a"])
    assert read(two_stage, bit) < 55 < read(plain, bit)


def test_calibration_does_not_depend_on_the_batches_and_is_undone_for_the_decoder() -> None:
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

    rebuilt: dict[str, list[Tensor]] = {m: [] for m in SPECS}
    for m, decoder in model.decoders.items():
        decoder.register_forward_hook(lambda _, __, tokens, m=m: rebuilt[m].append(tokens))
    with torch.no_grad():
        before = model(features)
    whole = calibrated(600)
    assert torch.allclose(whole, calibrated(70), atol=1e-2)
    assert (whole - torch.cat(list(before["complementary_tokens"].values()))).abs().max() > 0.1
    for first, *_, last in rebuilt.values():
        assert float((last - first).std()) < 0.5 * float(first.std())


def test_too_few_rows_with_every_modality_are_said_and_nothing_is_fitted(caplog: pytest.LogCaptureFixture) -> None:
    method = METHODS["base"]
    model = method.model(method.knobs(register_token_dim=32, num_heads=4), SPECS).eval()
    lacking = random_features(5)
    lacking.modalities["text"].present[:] = False
    for features in (random_features(1), lacking, lacking.only(["vision", "tactile"])):
        caplog.clear()
        with torch.no_grad():
            model.calibrate(lambda features=features: [features])
        assert not any(s.to_comp.any() for s in model.separations.values())
        assert not model.projection.fitted
        assert "no training rows have all of vision, tactile, text" in caplog.text


def test_a_shorter_sequence_is_rebuilt_as_the_beginning_of_a_longer_one() -> None:
    torch.manual_seed(0)
    decoder, memory = LinearDecoder(SPECS["text"], 40), torch.randn(3, 40)
    longest = SPECS["text"].tokens
    assert torch.allclose(decoder(memory, longest), decoder.map(memory).view(3, longest, SPECS["text"].width), atol=1e-6)
    assert torch.allclose(decoder(memory, 2), decoder(memory, longest)[:, :2], atol=1e-6)
