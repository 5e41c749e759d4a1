"""The evaluation of a real, tiny run: which rows each part sees, and what results.json holds."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tvl_align.contract import Features, Output, Reconstruction
from tvl_align.encoders.tvl import Stage1Config
from tvl_align.evaluation import measure as module
from tvl_align.evaluation.factors import Rows
from tvl_align.evaluation.labels import Labels
from tvl_align.evaluation.measure import EvaluateConfig, Meanings, measure
from tvl_align.evaluation.split_tokens import all_rows, compute_tokens, stage1_features
from tvl_align.features.arrays import Arrays, check_arrays
from tvl_align.features.identity import Identity
from tvl_align.features.inputs import DataConfig
from tvl_align.features.store import FeatureStore
from tvl_align.features.subset import ShuffledPairs
from tvl_align.losses.contrastive import positive_mask
from tvl_align.methods.base import BASE
from tvl_align.methods.closed import CLOSED, ClosedConfig
from tvl_align.system.console import UserError
from tvl_align.training.engine import fit
from tvl_align.training.optimisation import OptimConfig
from tvl_align.training.run import Places, load_run
from tvl_align.training.settings import RunConfig, Settings


def test_the_floor_has_closed_forms_and_the_probes_rows_of_their_own(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The untrained model is calibrated, once, on training rows, with which the probe rows share no group."""
    settings, _, config = load_run(run, None)
    splits = settings.open_inputs(torch.device("cpu"), Identity(config["store"], config["features"])).splits
    assert {"train", "val", "test", "probe"} <= splits.keys()
    groups = {name: set(split.groups.tolist()) for name, split in splits.items()}
    assert groups["probe"] and not groups["probe"] & groups["train"]
    names = [name for split in splits.values() for name in split.names]
    assert len(set(names)) == len(names)

    train = stage1_features(splits["train"], all_rows(splits["train"]), torch.device("cpu"))
    seen: list[tuple[object, Tensor]] = []
    built: list[object] = []
    make = module.build_model

    def building(*args: Any) -> Any:
        model = make(*args)

        def calibrate(batches: Callable[[], Iterator[Features]]) -> None:
            seen.append((model, torch.cat([features.modalities["vision"].pooled for features in batches()])))

        monkeypatch.setattr(model, "calibrate", calibrate)
        built.append(model)
        return model

    probed: list[list[str]] = []
    init = module.FactorProbes.__init__

    def recorded(self: Any, labels: Labels, probe: Any, test: Any, *rest: Any) -> None:
        probed.append(list(probe.names))
        assert list(test.names) == list(splits["test"].names)
        seed, steps, ceiling = rest  # ceilings are read with training rows too: the features are frozen
        assert (seed, steps) == (settings.run.seed, 1)
        assert list(ceiling.names) == [*probe.names, *splits["train"].names]
        both = torch.cat([x.modalities["vision"].pooled for x in (probe.frozen, train)])
        assert torch.equal(ceiling.frozen.modalities["vision"].pooled, both)
        init(self, labels, probe, test, *rest)

    monkeypatch.setattr(module, "build_model", building)
    monkeypatch.setattr(module.FactorProbes, "__init__", recorded)
    results = json.loads(measure(EvaluateConfig(run, probe_steps=1, device="cpu")).read_text())
    assert [model for model, _ in seen] == built[1:] and len(built) == 2
    assert torch.equal(seen[0][1], train.modalities["vision"].pooled)
    assert sorted(probed[0]) == sorted(splits["probe"].names)
    assert results["repeated"] == {}  # no picture of this data set is there twice
    assert results["probe_rows"] == {"split": "probe", "rows": len(splits["probe"])}
    assert results["groups"] == len(groups["test"])
    assert json.dumps(results, allow_nan=False)
    assert set(results["retrieval"]) == {"tactile_vision", "text_vision", "tactile_text"}
    assert all(n["low"] <= n["acc1"] <= n["high"] for n in results["retrieval"].values())
    assert all(p["low"] <= p["acc1"] <= p["high"] for p in results["prefix"])
    assert "added" not in results["prefix"][0]
    for before, p in pairwise(results["prefix"]):
        assert p["added"] == p["acc1"] - before["acc1"]
        assert p["added_low"] <= p["added"] <= p["added_high"]
        assert p["reconstruction_low"] <= p["reconstruction"] <= p["reconstruction_high"]
        assert p["reconstruction_added"] == p["reconstruction"] - before["reconstruction"]
        assert p["reconstruction_added_low"] <= p["reconstruction_added"] <= p["reconstruction_added_high"]
    last = results["prefix"][-1]  # the complementary register, which no partner is found by
    assert last["added"] == last["added_low"] == last["added_high"] == 0
    for entry in results["label_free"].values():
        assert all(read["low"] <= max(read["linear"], read["mlp"]) <= read["high"] for read in entry.values())
    factors = {f for table in (*results["factors"].values(), *results["left_out"].values()) for f in table}
    assert {"hue", "texture", "shape"} <= factors


def planted_arrays() -> Arrays:
    """Two modalities of one token of 6 numbers: the sign of a class that both share, of one of its own, and noise."""
    g = np.random.default_rng(0)
    counts = {"train": 2400, "val": 40, "test": 400}
    rows = sum(counts.values())
    classes = {name: g.integers(0, 2, rows) for name in ("shared", "of_a", "of_b")}
    tokens = {
        m: np.stack([*(2.0 * classes[c] - 1 for c in ("shared", f"of_{m}")), *g.standard_normal((4, rows))], axis=1)[:, None]
        for m in "ab"
    }
    owners = {"shared": ["a", "b"], "of_a": ["a"], "of_b": ["b"]}
    return check_arrays(tokens, labels=classes, owners=owners, split=np.repeat(list(counts), list(counts.values())))


@pytest.mark.parametrize("swapped", [False, True])
def test_planted_leaks_are_found_from_the_tokens_to_the_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swapped: bool
) -> None:
    """Complementary tokens hold what is shared as a faint product of units, overlapping ones what is unique as a variance.

    Linear probes see neither, and nothing is retained; with the groups exchanged, it is retention, and no leak.
    """
    FeatureStore.from_arrays(planted_arrays(), tmp_path / "store")
    settings = Settings(
        Stage1Config(None),
        ClosedConfig(components=4, register_token_dim=8),
        DataConfig(store=tmp_path / "store"),
        OptimConfig(batch_size=64, epochs=1, warmup_epochs=0, lr=1e-3),
        RunConfig(tmp_path, "run", method="closed", device="cpu"),
    )
    fit(settings, CLOSED)

    def planted_tokens(model: Any, source: Any, rows: Tensor, device: Any, k: int | None = None) -> Any:
        made = compute_tokens(model, source, rows, device, k)
        for m, frozen in stage1_features(source, rows, device).modalities.items():
            shared, own, x, y, z, noise = frozen.tokens[:, 0].float().unbind(1)
            product = torch.stack([0.1 * x.abs() * y.sign() * shared, 0.1 * y, noise], dim=1)[:, None]
            variance = torch.stack([z * torch.where(own > 0, 2.0, 0.3), y, noise], dim=1)[:, None]
            made.complementary[m], made.overlapping[m] = (variance, product) if swapped else (product, variance)
        return made

    monkeypatch.setattr(module, "compute_tokens", planted_tokens)
    results = json.loads(measure(EvaluateConfig(settings.folder, probe_steps=200, device="cpu")).read_text())
    found = results["summary"]
    seen, hidden = ("retention", "leak") if swapped else ("leak", "retention")
    for name, least in ((f"shared_{seen}", 75), (f"unique_{seen}", 45)):
        assert min(found[name][reading] for reading in ("score", "untrained", "half")) > least
        assert found[name]["linear"] < 30  # of 400 rows
    assert max(found[f"shared_{hidden}"]["score"], found[f"unique_{hidden}"]["score"]) < 30
    assert found["joint_unique_retention"]["score"] > 40  # from all tokens at once, wherever it is


def labels_of(levels: Tensor, **fields: Any) -> Labels:
    values = {f"r{i}": {"hue": h, "size": s} for i, (h, s) in enumerate(levels.tolist()) if h >= 0}
    owners = {"hue": ("vision", "text"), "size": ("vision", "tactile")}
    return replace(Labels({"hue": ["a", "b"], "size": ["x", "y"]}, values, owners), **fields)


def test_ceilings_are_read_with_some_evenly_spaced_training_rows(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a run on shuffled pairs: there the rows keep the labels that belong to their features."""
    settings, _, config = load_run(run, None)
    splits, cpu = (
        settings.open_inputs(torch.device("cpu"), Identity(config["store"], config["features"])).splits,
        torch.device("cpu"),
    )
    probe = Rows(list(splits["probe"].names)[:6], stage1_features(splits["probe"], torch.arange(6), cpu))
    monkeypatch.setattr(module, "CEILING_ROWS", 10)
    count = len(splits["train"])
    at = [i * count // 4 for i in range(4)]
    frozen = stage1_features(splits["train"], torch.tensor(at), cpu)
    for train in (splits["train"], ShuffledPairs(splits["train"], ["vision", "tactile", "text"], seed=1)):
        rows = module._ceiling_rows(train, probe, cpu)
        assert list(rows.names) == [*probe.names, *(splits["train"].names[i] for i in at)]
        for m in ("vision", "tactile"):
            assert torch.equal(rows.frozen.modalities[m].pooled[6:], frozen.modalities[m].pooled)
    monkeypatch.setattr(module, "CEILING_ROWS", 5)
    assert module._ceiling_rows(splits["train"], probe, cpu) is probe


@pytest.mark.parametrize("mode", ["nested", "independent"])
def test_tokens_of_a_prefix_are_those_that_are_computed(run: Path, mode: str) -> None:
    """Those of causal registers are taken from the tokens of all registers, others are computed again."""
    cpu = torch.device("cpu")
    settings, method, config = load_run(run, None)
    inputs = settings.open_inputs(cpu, Identity(config["store"], config["features"]))
    model = module.build_model(
        method, replace(settings.knobs, nested_dropout_mode=mode, num_cross_attn_layers=2), inputs.specs
    )
    with torch.no_grad():
        for parameter in model.parameters():  # so that registers act on each other
            parameter.normal_(std=0.3)
    source, rows = inputs.splits["test"], torch.arange(8)
    every = compute_tokens(model, source, rows, cpu)
    assert module._first(module._lengths(model)[-1], model, source, rows, cpu, every) is every
    for k in range(1, module._overlapping(every) + 1):
        found, computed = (
            module._first_overlapping(k, model, source, rows, cpu, every),
            compute_tokens(model, source, rows, cpu, k),
        )
        for m, tokens in computed.overlapping.items():
            assert torch.allclose(found[m], tokens, atol=1e-4)
            assert tokens[:, :k].abs().sum() > 0 and not tokens[:, k:].any()


def test_errors_of_rebuilding_are_those_of_a_plain_loop(run: Path) -> None:
    """Sentences of different lengths: the error is a mean over tokens, not over rows; absent rows count nowhere."""
    cpu = torch.device("cpu")
    settings, method, config = load_run(run, None)
    inputs = settings.open_inputs(cpu, Identity(config["store"], config["features"]))
    source, rows = inputs.splits["test"], torch.arange(9)
    rebuilt = {m: [([1.0, 3.0, 50.0], 2), ([2.0, 0.0, 50.0], 1), ([7.0, 5.0, 0.5], 3)] * 3 for m in inputs.specs}

    class Rebuilding(torch.nn.Module):
        """The model of the run, with the errors of `rebuilt` for the tokens of rows."""

        def __init__(self) -> None:
            super().__init__()
            self.model = module.build_model(method, settings.knobs, inputs.specs)
            self.registers = self.model.registers

        def forward(self, features: Features, **options: Any) -> Output:
            of = {m: [parts[i] for i in range(len(features))] for m, parts in rebuilt.items()}
            errors = {m: torch.tensor([error for error, _ in parts]) for m, parts in of.items()}
            masks = {m: torch.arange(3) < torch.tensor([[count] for _, count in parts]) for m, parts in of.items()}
            return replace(
                self.model(features, **options), reconstruction={m: Reconstruction(errors[m], masks[m]) for m in errors}
            )

    found = compute_tokens(Rebuilding(), source, rows, cpu)
    weights = torch.ones(2, 9)
    weights[1, :] = torch.tensor([1.0, 3.0, 0.0] * 3)
    for m in inputs.specs:
        error = found.reconstruction(weights)[m]
        assert error.value == pytest.approx(100 * (1 + 3 + 2 + 7 + 5 + 0.5) / 6)
        assert error.samples.tolist() == pytest.approx([error.value, 100 * (1 + 3 + 3 * 2) / (2 + 3)])


def test_captions_of_equal_levels_mean_the_same() -> None:
    """Rows without a level have a meaning of their own; without text_factors the caption keys count."""
    levels, names = torch.tensor([[0, 0], [1, 0], [0, 1], [-1, -1], [-1, -1]]), [f"r{i}" for i in range(5)]
    keys = torch.arange(5)[:, None]
    meanings = Meanings(labels_of(levels, text_factors=("hue",)), names, keys)
    found = meanings.of("text", "vision")
    assert found is not None
    equal = found == found.T
    expected = torch.eye(5, dtype=torch.bool)
    expected[0, 2] = expected[2, 0] = True
    assert torch.equal(equal, expected)
    assert meanings.of("tactile", "vision") is None
    plain = Meanings(labels_of(levels), names, keys).of("text", "vision")
    assert plain is not None and torch.equal(plain, keys)


def test_rows_with_the_same_picture_are_positives_in_pairs_with_it() -> None:
    """With labels and without; what a caption means counts in pairs with text only."""
    levels, names = torch.tensor([[0, 0], [0, 1], [1, 1]]), ["r0", "r1", "r2"]
    contents = {"tactile": torch.tensor([7, 8, 7])}
    for labels, equal in ((labels_of(levels, text_factors=("hue",)), [(0, 1)]), (None, [])):
        meanings = Meanings(labels, names, torch.arange(3)[:, None], contents)
        for pair, expected in (
            (("text", "tactile"), [*equal, (0, 2)]),
            (("text", "vision"), equal),
            (("vision", "tactile"), [(0, 2)]),
        ):
            keys = meanings.of(*pair)
            assert keys is not None
            positive = positive_mask(keys, keys)
            assert [(i, j) for i in range(3) for j in range(i + 1, 3) if positive[i, j]] == expected
    assert Meanings(None, names, torch.arange(3)[:, None], {}).of("vision", "tactile") is None


def test_the_oracle_knows_the_factors_that_both_own() -> None:
    """Of 4 rows, size tells touch and photo apart in pairs; the hue, which only photo and text own, does not help."""
    levels, names = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]]), [f"r{i}" for i in range(4)]
    meanings = Meanings(labels_of(levels), names, torch.arange(4)[:, None])
    every = torch.ones(4, dtype=torch.bool)
    assert meanings.oracle("tactile", "vision", every) == (pytest.approx(50), pytest.approx(100))
    assert meanings.oracle("tactile", "text", every) is None
    assert meanings.oracle("tactile", "vision", torch.tensor([True, False, True, False])) == (100, 100)
    assert meanings.oracle("tactile", "vision", ~every) is None
    assert Meanings(None, names, torch.arange(4)[:, None]).oracle("tactile", "vision", every) is None


def test_a_run_of_another_major_version_is_refused(run: Path, tmp_path: Path) -> None:
    """Its weights could load and mean something else. A minor version is the same model."""
    config = json.loads((run / "config.json").read_text())
    now = BASE.implementation.version
    minor = f"{now.partition('.')[0]}.99"
    for version in (minor, "4.1"):
        config["implementation"]["version"] = version
        (tmp_path / "config.json").write_text(json.dumps(config))
        if version == minor:
            load_run(tmp_path, None)
    with pytest.raises(UserError, match=rf"is a run of version 4.1 of stage2_base, and this is {now}; train again, or use"):
        load_run(tmp_path, None)


def test_probes_are_not_fitted_and_tested_on_the_same_rows(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_probe_rows(folder: Path, method: str | None, places: Places) -> Any:
        settings, *rest = load_run(folder, method, places)
        return replace(settings, data=replace(settings.data, probe_rows=0)), *rest

    monkeypatch.setattr(module, "load_run", without_probe_rows)
    with pytest.raises(UserError, match="set no probe rows aside"):
        measure(EvaluateConfig(run, split="val"))
