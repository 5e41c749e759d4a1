"""TVLStage2 and Stage2Loss in a loop of one's own: the documented output, raw batches, autocast, devices."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tvl_align.contract import MODALITIES, Method, Output
from tvl_align.encoders.tvl import Stage1, load_stage1
from tvl_align.losses import register_loss
from tvl_align.losses.register_loss import complete_output
from tvl_align.methods.base import Stage2Loss, TVLStage2
from tvl_align.methods.registry import METHODS
from tvl_align.registers.pooling import pooled_overlapping
from tvl_align.system.console import UserError
from tvl_align.training.checks import SPECS, build, random_features

ROWS = 6


def documented(rows: int = ROWS) -> dict[str, Any]:
    """The documented entries of an output, and nothing else: 3 overlapping tokens, one of them dropped, and 1 other."""
    g = torch.Generator().manual_seed(0)
    over = {m: torch.randn(rows, 3, 8, generator=g) for m in MODALITIES}
    kept = torch.tensor([True, True, False, True]).expand(rows, 4)
    return {
        "overlapping_tokens": {m: z * kept[:, :3, None] for m, z in over.items()},
        "complementary_tokens": {m: torch.randn(rows, 1, 8, generator=g) for m in MODALITIES},
        "register_tokens": torch.randn(rows, 4, 8, generator=g),
        "stage1_features": {m: torch.randn(rows, 5, generator=g) for m in MODALITIES},
        "nested_dropout_mask": kept,
        "logit_scale": torch.tensor(10.0),
    }


def by_hand(entries: dict[str, Any], scale: float) -> float:
    """Mean over the three pairs of CLIP's loss between means of the two kept overlapping tokens."""
    pooled = [F.normalize(z[:, :2].mean(1), dim=-1) for z in entries["overlapping_tokens"].values()]
    pairs = [(pooled[0], pooled[1]), (pooled[0], pooled[2]), (pooled[1], pooled[2])]
    own = torch.arange(len(pooled[0]))
    return float(sum(F.cross_entropy(scale * x @ y.T, own) + F.cross_entropy(scale * y @ x.T, own) for x, y in pairs) / 6)


@pytest.fixture(scope="module")
def stage1(stage1_checkpoint: Path) -> Stage1:
    return load_stage1(stage1_checkpoint)


def net(stage1: Any = SPECS) -> TVLStage2:
    torch.manual_seed(0)
    return TVLStage2(stage1, register_token_dim=32, num_heads=4)


def raw(stage1: Stage1) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    pictures = {m: torch.randn(3, 3, 64, 64, generator=g) for m in ("vision", "tactile")}
    return {**pictures, "text": stage1.tokenize(["soft", "hard", "soft"])}


def test_the_documented_output_is_enough_for_the_loss() -> None:
    """All captions differ, nothing is absent, and without a logit_scale it is 1 / 0.07."""
    entries = documented()
    complementary = sum(z.norm(dim=-1).mean() for z in entries["complementary_tokens"].values()) / 3
    numbers = Stage2Loss()(entries)
    assert float(numbers["overlapping_loss"]) == pytest.approx(by_hand(entries, 10.0), rel=1e-5)
    assert float(numbers["complementary_reg"]) == pytest.approx(float(complementary), rel=1e-5)
    assert float(numbers["total_loss"]) == pytest.approx(by_hand(entries, 10.0) + 0.01 * float(complementary), rel=1e-5)
    as_output = Stage2Loss()(Output(**entries))
    assert as_output.keys() == numbers.keys() and all(torch.equal(as_output[k], numbers[k]) for k in numbers)
    without = {k: v for k, v in entries.items() if k != "logit_scale"}
    for same in (without, Output(**without), without | {"logit_scale": 1 / 0.07}):
        assert float(Stage2Loss()(same)["overlapping_loss"]) == pytest.approx(by_hand(entries, 1 / 0.07), rel=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_every_loss_takes_the_documented_output(name: str) -> None:
    assert torch.isfinite(build(METHODS[name])[1](documented())["total_loss"])


def test_more_entries_of_a_mapping_are_used() -> None:
    entries = documented()
    captions = torch.tensor([0, 0, 1, 2, 3, 4])[:, None]
    present = {"tactile": torch.tensor([False] + [True] * (ROWS - 1))}
    output = complete_output(entries | {"caption_keys": captions, "present": present, "mine": 3, "reconstruction": None})
    assert torch.equal(output.caption_keys, captions) and output.extras == {"mine": 3}
    assert output.present["vision"].all() and not output.present["tactile"][0]
    groups = ("overlapping_tokens", "complementary_tokens")
    rest = {group: {m: z[1:] for m, z in entries[group].items()} for group in groups} | {"nested_dropout_mask": None}
    pair = Stage2Loss(["vision", "tactile"])
    numbers = pair(entries | {"present": present, "nested_dropout_mask": None})
    assert torch.allclose(numbers["tactile_vision_loss"], pair(entries | rest)["tactile_vision_loss"])


def test_captions_differ_on_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    here = complete_output(documented()).caption_keys
    monkeypatch.setattr(register_loss, "rank", lambda: 3)
    assert len(torch.cat([here, complete_output(documented()).caption_keys]).unique()) == 2 * ROWS


def test_what_is_no_output_is_refused() -> None:
    entries = documented()
    with pytest.raises(UserError, match="given a Tensor; give it a model's Output, or a dict like it"):
        Stage2Loss()(torch.zeros(3))
    with pytest.raises(UserError, match="has no overlapping_tokens and no complementary_tokens, only register_tokens"):
        Stage2Loss()({"register_tokens": entries["register_tokens"]})
    with pytest.raises(UserError, match="overlapping tokens of no modality"):
        Stage2Loss()(entries | {"overlapping_tokens": {}})


def test_one_modality_is_refused_by_the_loss() -> None:
    output = net()(random_features(4).only(["vision"]))
    with pytest.raises(UserError, match=r"only vision, so none of the pairs to align \(tactile_vision, text_vision, "):
        Stage2Loss()(output)


def test_the_encoders_follow_the_model_to_a_device_and_keep_their_type(stage1_checkpoint: Path) -> None:
    model = net(load_stage1(stage1_checkpoint))
    assert model.stage1_model is not None
    assert not any("clip" in name or "tactile_encoder" in name for name in model.state_dict())
    assert len(list(model.parameters())) == len(list(net().parameters()))
    model.to(torch.bfloat16)
    assert model.registers.dtype == torch.bfloat16 and model.stage1_model.logit_scale.dtype == torch.float32
    model.to("meta")
    assert {p.device.type for p in model.stage1_model.parameters()} == {"meta"}


def test_images_of_another_size_or_type_are_refused(stage1: Stage1) -> None:
    model, batch = net(stage1), raw(stage1)
    with pytest.raises(
        UserError, match=r"vision images have the shape \(3, 3, 100, 80\), .* takes \(B, 3, 64, 64\); resize"
    ):
        model(batch | {"vision": torch.zeros(3, 3, 100, 80)})
    with pytest.raises(UserError, match=r"tactile images have the shape \(3, 64, 64\)"):
        model(batch | {"tactile": torch.zeros(3, 64, 64)})
    with pytest.raises(UserError, match=r"vision images are torch\.uint8; .* scaled to \[0, 1\] and normalised"):
        model(batch | {"vision": torch.zeros(3, 3, 64, 64, dtype=torch.uint8)})
    with pytest.raises(UserError, match="vision images are list; give a float tensor"):
        model(batch | {"vision": [1, 2, 3]})
    with pytest.raises(UserError, match=r"differ in their rows, {'vision': 3, 'tactile': 2, 'text': 3}"):
        model(batch | {"tactile": batch["tactile"][:2]})
    double = stage1.encode(batch | {"vision": batch["vision"].double()}).modalities["vision"]
    assert torch.equal(double.pooled, stage1.encode(batch).modalities["vision"].pooled)


@pytest.mark.parametrize("name", METHODS)
def test_an_empty_batch_and_cast_weights_are_refused(name: str) -> None:
    model, features = build(METHODS[name])[0], random_features(ROWS)
    with pytest.raises(UserError, match=r"the batch has no rows; leave it out\."):
        model(features.map(lambda t: t[:0]))
    with pytest.raises(UserError, match=r"are bfloat16; keep them float32 and wrap .* torch\.autocast"):
        model.bfloat16()(features)


def test_sentences_are_tokenised(stage1: Stage1) -> None:
    """Equal sentences have equal caption keys, in other batches too."""
    batch = raw(stage1)
    ids, sentences = (stage1.encode(batch | {"text": t}) for t in (batch["text"], ["soft", "hard", "soft"]))
    assert torch.equal(ids.modalities["text"].tokens, sentences.modalities["text"].tokens)
    assert torch.equal(ids.caption_keys, sentences.caption_keys)
    soft, hard, again = sentences.caption_keys[:, 0].tolist()
    assert soft == again != hard
    assert stage1.encode({"text": ["rough", "smooth", "hard"]}).caption_keys[2, 0] == hard
    with pytest.raises(UserError, match=r"the text is 'soft'; give a list of sentences"):
        stage1.encode({"text": "soft"})


def test_raw_batches_need_encoders(stage1: Stage1) -> None:
    with pytest.raises(UserError, match=r"build it with a Stage-1 model: TVLStage2\(stage1, \.\.\.\)"):
        net()(raw(stage1))
    with torch.autocast("cpu", torch.bfloat16):
        numbers = Stage2Loss()(net(stage1)(raw(stage1)))
    assert torch.isfinite(numbers["total_loss"])


def losses(method: Method, training: bool) -> tuple[float, dict[str, Tensor]]:
    """The loss in float32, and all numbers of the loss with model and loss under bf16 autocast."""
    model, loss = build(method)
    features = random_features(12)
    model.train(training)
    torch.manual_seed(0)
    plain = float(loss(model(features))["total_loss"].detach())
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(features)
        numbers = loss(output)
    numbers["total_loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert torch.equal(loss(output)["total_loss"], numbers["total_loss"])  # the loss does not depend on autocast
    return plain, numbers


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_autocast_changes_the_loss_by_less_than_1_percent(name: str, training: bool) -> None:
    plain, numbers = losses(METHODS[name], training)
    assert float(numbers["total_loss"].detach()) == pytest.approx(plain, rel=0.01)
    assert all(value.dtype == torch.float32 for value in numbers.values())


def test_closed_forms_are_float32_under_autocast() -> None:
    """They were fitted on float32 components."""
    model, features = net().eval(), random_features(4)
    expected = model.codes.read_all(features)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.codes.read_all(features)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    for i, (m, tokens) in enumerate(features.modalities.items()):
        read = model.codes.read(m, tokens)[0]
        assert torch.equal(expected[0][i, :, : read.shape[1]], read) and not expected[0][i, :, read.shape[1] :].any()


def test_scores_are_of_float32_vectors() -> None:
    """Vectors normalised in bf16 have lengths that differ from 1 by up to 0.4%."""
    entries = documented()
    halved = {m: z.bfloat16() for m, z in entries["overlapping_tokens"].items()}
    with torch.autocast("cpu", torch.bfloat16):
        pooled = pooled_overlapping(Output(**entries | {"overlapping_tokens": halved}))
    assert all(z.dtype == torch.float32 for z in pooled.values())
    assert all(torch.allclose(z.norm(dim=-1), torch.ones(ROWS), atol=1e-6) for z in pooled.values())
