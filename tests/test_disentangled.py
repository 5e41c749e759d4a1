"""The closed forms of the disentangled variant, on made-up data whose truth is known."""

import numpy as np
import torch

from experiments.stage2.methods import METHODS
from experiments.stage2.test_modules import SPECS, random_features
from experiments.stage2.variants.disentangled import Eraser, Moments, shared_projection
from tvl_align.contract import Features
from tvl_align.evaluation import linear_probe


def test_moments_are_those_of_numpy_however_the_rows_are_cut() -> None:
    rows = torch.randn(90, 5) * torch.tensor([1.0, 2, 3, 4, 5]) + 3
    for size in (90, 7):
        moments = Moments(5)
        for part in rows.split(size):
            moments.add(part)
        assert torch.allclose(moments.mean, rows.mean(0), atol=1e-5)
        assert torch.allclose(moments.covariance, torch.from_numpy(np.cov(rows.numpy().T, bias=True)).float(), atol=1e-3)


def test_projection_keeps_what_the_other_modality_answers() -> None:
    """Two units share a source with the other modality, two do not; then all four are mixed."""
    g = torch.Generator().manual_seed(0)
    source, own, theirs = (torch.randn(20_000, 2, generator=g) for _ in range(3))
    mixing = torch.randn(4, 4, generator=g) + 2 * torch.eye(4)
    mine = torch.cat([source, own], dim=1) @ mixing
    other = torch.cat([source + 0.3 * theirs, theirs], dim=1)
    moments = Moments(8)
    moments.add(torch.cat([mine, other], dim=1))
    own_units = torch.arange(8) < 4
    projection = shared_projection(moments.covariance, own_units, threshold=0.3)
    assert torch.linalg.matrix_rank(projection, atol=1e-3) == 2
    assert torch.allclose(projection @ projection, projection, atol=1e-3)
    left = (mine @ projection.T - (mine @ projection.T).mean(0)).numpy()
    for column, readable in ((source, True), (own, False)):
        fitted = np.linalg.lstsq(left, column.numpy(), rcond=1e-3)[0]
        explained = 1 - (column.numpy() - left @ fitted).var() / column.numpy().var()
        assert (explained > 0.95) if readable else (explained < 0.01), explained
    assert not shared_projection(moments.covariance, own_units, threshold=1.1).any()


def test_what_is_erased_no_linear_probe_reads_and_the_rest_stays() -> None:
    """A class that is a non-linear function of the shared units leaves the complementary tokens; an unrelated one stays."""
    rng = np.random.default_rng(0)

    def made(rows: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray, np.ndarray]:
        units = rng.standard_normal((rows, 4))
        shared = (np.abs(units[:, 0]) > 0.67).astype(int) * 2 + (units[:, 1] > 0)
        unique = rng.integers(4, size=rows)
        codes = np.concatenate([np.eye(4)[shared], np.eye(4)[unique]], axis=1) @ rng.permutation(np.eye(8))
        comp = codes + 0.3 * rng.standard_normal((rows, 8))
        return torch.tensor(units).float(), torch.tensor(comp).float(), shared, unique

    torch.manual_seed(0)
    eraser = Eraser(4, 8)
    units, comp, shared, unique = made(6000)
    eraser.moments.restart()
    eraser.moments.add(torch.cat([eraser.features(units), comp], dim=1))
    eraser.solve()
    erased = eraser(units, comp, learn=False)
    half = slice(0, 3000), slice(3000, 6000)

    def read(x: torch.Tensor, labels: np.ndarray) -> float:
        return linear_probe(x[half[0]], labels[half[0]], x[half[1]], labels[half[1]])

    assert read(comp, shared) > 90
    assert read(erased, shared) < 50
    assert read(erased, unique) > 90


def test_calibration_does_not_depend_on_the_batches() -> None:
    method = METHODS["disentangled"]
    torch.manual_seed(0)
    model = method.model(method.knobs(register_token_dim=32, num_heads=4, threshold=0.0), SPECS).eval()
    features = random_features(600)

    def calibrated(size: int) -> torch.Tensor:
        def batches() -> list[Features]:
            return [features.map(lambda t, i=i: t[i : i + size]) for i in range(0, len(features), size)]

        with torch.no_grad():
            model.calibrate(batches)
            return torch.cat(list(model(features)["complementary_tokens"].values()))

    before = torch.cat(list(model(features)["complementary_tokens"].values())).detach()
    whole = calibrated(600)
    assert torch.allclose(whole, calibrated(70), atol=1e-2)
    assert (whole - before).abs().max() > 0.1
