"""The benchmark on data of others, on random arrays in place of a clone."""

import json
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import away
from benchmarks.away import THEIR_METRICS, AwayConfig, Representations
from tvl_align.features.arrays import Arrays, check_arrays
from tvl_align.system.console import UserError


def arrays(data: Path, seed: int) -> Arrays:
    """Two modalities of 120 training and 40 test rows that share two numbers."""
    draw = torch.Generator().manual_seed(seed)
    shared = torch.randn(200, 2, generator=draw)
    sides = {m: torch.cat([shared, torch.randn(200, 6, generator=draw)], dim=1)[:, None] for m in ("touch", "depth")}
    labels = {"side": ["left" if x > 0 else "right" for x in shared[:, 0]]}
    return check_arrays(sides, labels=labels, owners={"side": ["touch", "depth"]}, seed=seed)


@pytest.mark.slow
def test_every_method_has_the_same_number_of_steps_and_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(away.READERS, "ur5", arrays)
    (page,) = away.away(AwayConfig(tmp_path, tmp_path / "out", ("ur5",), ("closed", "mlp"), seeds=(0,), steps=14, jobs=1))
    assert page.is_file()
    runs = {m: tmp_path / "out" / "ur5" / "runs" / f"{m}-0" for m in ("closed", "mlp")}
    epochs = {m: len((run / "metrics.jsonl").read_text().splitlines()) for m, run in runs.items()}
    rows = json.loads((runs["mlp"] / "config.json").read_text())["rows"]["train"]
    assert epochs["closed"] == epochs["mlp"] == round(14 / (rows // max(8, rows // 8)))
    control = json.loads((tmp_path / "out" / "ur5" / "runs" / "closed-0-shuffled-pairs" / "results.json").read_text())
    assert control["run"]["settings"]["data"]["shuffle_pairs"] and ", shuffled pairs" in page.read_text()
    results = json.loads((runs["mlp"] / "results.json").read_text())
    assert results["factors"]["touch"]["side"]["chance"] >= 50


def test_what_two_of_three_modalities_share_is_unique_to_the_pair_with_the_third() -> None:
    """Codes that hold exactly what each set of modalities shares have no distance to RePercENT's ideal."""
    draw = np.random.default_rng(0)
    sets = [frozenset(s) for s in ((1,), (2,), (3,), (1, 2), (1, 3), (2, 3), (1, 2, 3))]
    latents = {s: draw.normal(size=(6000, 2)) for s in sets}
    over = {f"x{i}": np.hstack([latents[s] * (i in s) for s in sets if len(s) > 1]) for i in (1, 2, 3)}
    comp = {f"x{i}": latents[frozenset((i,))] for i in (1, 2, 3)}
    labels = {}
    for i, j in permutations((1, 2, 3), 2):
        for name, chosen in (
            (f"u_{i}{j}", [i in s and j not in s for s in sets]),
            (f"s_{i}{j}", [{i, j} <= s for s in sets]),
        ):
            latent = np.hstack([latents[s] for s, one in zip(sets, chosen, strict=True) if one])
            labels[name] = (latent @ draw.normal(size=latent.shape[1]) > 0).astype(int)
    turn = np.linalg.qr(draw.normal(size=(8, 8)))[0]
    x = Representations({m: code @ turn for m, code in over.items()}, comp, labels, np.arange(6000) < 4000)
    assert THEIR_METRICS["repercent"](x)["distance"] < 2


def test_bad_options_are_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="unknown data set 'tactile'; --datasets takes tactip, tactip_edge, tactip_efficientnet, ur5"
    ):
        AwayConfig(tmp_path, datasets=("tactile",))
    with pytest.raises(UserError, match="--steps 0 is out of range"):
        AwayConfig(tmp_path, steps=0)
