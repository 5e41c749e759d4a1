"""Stores of other precisions than float32 have keys of their own, and a run keeps the precision of its features."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tvl_align.data.image_options import ImageOptions
from tvl_align.data.samples import Samples, TextOptions, make_samples
from tvl_align.data.tvl import read_tvl
from tvl_align.encoders.own import load_encoders
from tvl_align.encoders.tvl import PrecisionOption, Stage1Config
from tvl_align.features import encode
from tvl_align.features.encode import on_streams, open_or_encode
from tvl_align.features.identity import Identity, identify
from tvl_align.features.inputs import DataConfig, load_inputs
from tvl_align.system.console import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def samples(world: Path) -> dict[str, Samples]:
    return {"train": make_samples(read_tvl(world), ImageOptions(64, 64), TextOptions(), 0)["train"]}


@pytest.fixture(scope="module")
def identity(
    samples: dict[str, Samples], stage1_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[PrecisionOption], Identity]:
    folder = tmp_path_factory.mktemp("features")
    return lambda p: identify(load_encoders(Stage1Config(stage1_checkpoint, encode_precision=p)), samples, 0, folder)


def test_the_precision_is_in_the_key_unless_it_is_float32(identity: Callable[[PrecisionOption], Identity]) -> None:
    """Keys of float32 are those of stores that were written before there were other precisions."""
    found = {p: identity(p) for p in ("auto", "float32", "bf16", "fp16")}
    assert found["auto"] == found["float32"] and len({x.key for x in found.values()}) == 3
    before = dict(found["float32"].ingredients)
    assert set(before) == {"format", "encoders", "features", "images", "text", "views", "seed", "packages", "rows"}
    assert found["float32"].key == hashlib.sha256(json.dumps(before, sort_keys=True).encode()).hexdigest()[:16]
    assert found["bf16"].ingredients == before | {"precision": "bf16"}
    assert found["bf16"].differences(found["float32"]) == [("precision", "--encode_precision bf16 (it was float32)")]
    assert found["float32"].differences(found["fp16"]) == [("precision", "--encode_precision float32 (it was fp16)")]
    assert not found["bf16"].differences(found["bf16"])


def test_a_store_has_the_features_of_its_precision(
    samples: dict[str, Samples], stage1_checkpoint: Path, tmp_path: Path
) -> None:
    stage1 = load_encoders(Stage1Config(stage1_checkpoint, encode_precision="bf16"))
    split = open_or_encode(tmp_path, stage1, samples, 0, 0).splits["train"]
    rows = torch.arange(5)
    images = torch.stack([samples["train"][i, 0].images["tactile"] for i in rows.tolist()])
    stored = split.read(rows).float().modalities["tactile"].pooled
    by = {p: stage1.encode({"tactile": images}, p).modalities["tactile"].pooled for p in ("bf16", "float32")}
    error = {p: float((stored - x).abs().max()) for p, x in by.items()}
    assert error["bf16"] < 0.2 * error["float32"]


def test_a_run_keeps_the_precision_of_its_features(
    world: Path, stage1_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where it was trained on a GPU, whose default is bf16, and is used on a CPU; with and without its store."""
    data, frozen = DataConfig(world, views=1, num_workers=0), Stage1Config(stage1_checkpoint)
    trained = load_inputs(replace(frozen, encode_precision="bf16"), data, 0, tmp_path, CPU).identity
    assert trained.ingredients["precision"] == "bf16"
    assert load_inputs(frozen, data, 0, tmp_path, CPU, trained).identity.key == trained.key
    shutil.rmtree(tmp_path / str(trained.key))
    again = load_inputs(frozen, data, 0, tmp_path, CPU, trained)
    assert again.identity == trained and (tmp_path / str(trained.key) / "manifest.json").is_file()
    live = load_inputs(replace(frozen, encode_precision="bf16"), replace(data, views=0), 0, tmp_path, CPU)
    assert load_inputs(frozen, replace(data, views=0), 0, tmp_path, CPU, live.identity).identity == live.identity
    monkeypatch.setattr(encode, "_encode", lambda *x: pytest.fail("it encodes"))
    with pytest.raises(UserError, match=r"because of --encode_precision float32 \(it was bf16\); restore what differs"):
        load_inputs(replace(frozen, encode_precision="float32"), data, 0, tmp_path, CPU, trained)


def test_jobs_are_unchanged_on_a_cpu() -> None:
    jobs: list[Any] = [lambda: 1, lambda: 2]
    assert list(on_streams(jobs, CPU)) == jobs
