"""The precision of the encoders: fewer bits change features little, and neither their type, their norm nor the weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tvl_align.contract import Features
from tvl_align.encoders.own import load_encoders
from tvl_align.encoders.tvl import Stage1, Stage1Config, load_stage1
from tvl_align.system.console import UserError


@pytest.fixture(scope="module")
def stage1(stage1_checkpoint: Path) -> Stage1:
    return load_stage1(stage1_checkpoint)


@pytest.fixture(scope="module")
def batch(stage1: Stage1) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    images = {m: torch.randn(4, *stage1.input_shape(m), generator=g) for m in ("vision", "tactile")}
    return images | {"text": ["soft", "rough and hard", "smooth", "a very long description of a grooved surface"]}


def differences(one: Features, other: Features) -> list[float]:
    """1 - cosine similarity of the pooled features of all rows and modalities."""
    pairs = [(t.pooled, other.modalities[m].pooled) for m, t in one.modalities.items()]
    return torch.cat([1 - torch.cosine_similarity(a, b) for a, b in pairs]).tolist()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_features_are_float32_of_unit_norm_and_nearly_those_of_float32(
    precision: Any, stage1: Stage1, batch: dict[str, Any]
) -> None:
    fingerprint, expected = stage1.fingerprint(), stage1.encode(batch)
    found = stage1.encode(batch, precision)
    for m, t in found.modalities.items():
        assert t.tokens.dtype == t.pooled.dtype == torch.float32
        assert torch.allclose(t.pooled.norm(dim=1), torch.ones(4), atol=1e-6)
        assert torch.equal(t.mask, expected.modalities[m].mask)
        assert not torch.equal(t.tokens, expected.modalities[m].tokens)
    assert 0 < max(differences(found, expected)) < 1e-3
    assert stage1.fingerprint() == fingerprint
    assert all(torch.equal(t.tokens, expected.modalities[m].tokens) for m, t in stage1.encode(batch).modalities.items())


def test_the_option_is_the_default_and_auto_is_float32_on_a_cpu(stage1_checkpoint: Path, batch: dict[str, Any]) -> None:
    loaded = {p: load_encoders(Stage1Config(stage1_checkpoint, encode_precision=p)) for p in ("auto", "float32", "bf16")}
    assert {p: s.precision for p, s in loaded.items()} == {"auto": "float32", "float32": "float32", "bf16": "bf16"}
    assert load_encoders(Stage1Config(stage1_checkpoint)).encode_precision == "auto"
    features = loaded["bf16"].encode(batch)
    assert max(differences(features, loaded["float32"].encode(batch, "bf16"))) < 1e-6
    pooled = loaded["bf16"]
    pooled.features = "pooled"
    for t in pooled.encode(batch).modalities.values():
        assert torch.equal(t.tokens[:, 0], t.pooled)


def test_half_weights_follow_the_weights(stage1_checkpoint: Path, batch: dict[str, Any]) -> None:
    """They are a copy that is made once; `to` and the like, which change the weights, remove it."""
    stage1 = load_stage1(stage1_checkpoint)
    first = stage1.encode(batch, "fp16")
    assert stage1._half is stage1._half and not any("_half" in name for name in stage1.state_dict())
    with torch.no_grad():
        stage1.tactile_encoder.head.weight.mul_(-1)
        stage1.tactile_encoder.head.bias.mul_(-1)
    stage1.to("cpu")
    second = stage1.encode(batch, "fp16")
    assert torch.allclose(second.modalities["tactile"].pooled, -first.modalities["tactile"].pooled, atol=1e-3)


def test_a_surrounding_autocast_has_no_effect_on_half_weights(stage1: Stage1, batch: dict[str, Any]) -> None:
    expected = stage1.encode(batch, "fp16")
    with torch.autocast("cpu", torch.bfloat16):
        found = stage1.encode(batch, "fp16")
    assert all(torch.equal(t.pooled, expected.modalities[m].pooled) for m, t in found.modalities.items())


def test_another_precision_is_refused(stage1: Stage1, batch: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="the encoders have no precision 'int8'; give one of float32, bf16, fp16"):
        stage1.encode(batch, "int8")  # type: ignore[arg-type]
