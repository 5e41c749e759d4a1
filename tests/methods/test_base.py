"""The base model and its loss by themselves."""

import math
from dataclasses import replace

import pytest
import torch

from tvl_align.contract import Features, Output, Tokens
from tvl_align.encoders.tvl import Stage1, load_stage1
from tvl_align.losses import alignment as alignment_module
from tvl_align.losses.alignment import pair_name
from tvl_align.methods.base import Stage2Loss, TVLStage2
from tvl_align.registers.pooling import pooled_overlapping
from tvl_align.system.console import UserError
from tvl_align.training.checks import SPECS, random_features


def model(**changes: object) -> TVLStage2:
    torch.manual_seed(0)
    return TVLStage2(SPECS, **({"register_token_dim": 32, "num_heads": 4} | changes))


def test_documented_defaults_give_a_finite_loss_and_gradients() -> None:
    """Trap 11: 4 registers of which 3 overlap, in their first step."""
    net = model()
    numbers = Stage2Loss()(net.train()(random_features(6)))
    numbers["total_loss"].backward()
    assert math.isfinite(numbers["total_loss"].item())
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in net.parameters())


def test_the_documented_formula() -> None:
    output = model().train()(random_features(6))
    numbers = Stage2Loss(complementary_reg_weight=0.3, preservation_weight=0.0)(output)
    pairs = [numbers[f"{p}_loss"] for p in ("tactile_vision", "tactile_text", "text_vision")]
    assert torch.allclose(numbers["overlapping_loss"], torch.stack(pairs).mean())
    assert torch.allclose(numbers["total_loss"], numbers["overlapping_loss"] + 0.3 * numbers["complementary_reg"])
    weighed = Stage2Loss(complementary_reg_weight=0.3, preservation_weight=2.0)(output)
    assert torch.allclose(weighed["total_loss"], numbers["total_loss"] + 2 * weighed["preservation"])


def test_a_disabled_pair_is_not_in_the_average() -> None:
    """Trap 12."""
    output = model().train()(random_features(6))
    some = Stage2Loss(disable_vision_text_loss=True)(output)
    every = Stage2Loss()(output)
    expected = (every["tactile_vision_loss"] + every["tactile_text_loss"]) / 2
    assert "text_vision_loss" not in some
    assert torch.allclose(some["overlapping_loss"], expected)
    one = Stage2Loss(disable_vision_text_loss=True, disable_tactile_text_loss=True)(output)
    assert torch.allclose(one["overlapping_loss"], every["tactile_vision_loss"])
    with pytest.raises(UserError, match="no pair to align"):
        Stage2Loss(["vision", "text"], disable_vision_text_loss=True)


def test_a_pair_without_a_row_is_not_in_the_average() -> None:
    features = random_features(4)
    text = features.modalities["text"]
    none = Tokens(text.tokens, text.mask, text.pooled, torch.zeros(4, dtype=torch.bool))
    numbers = Stage2Loss()(
        model().train()(Features(features.modalities | {"text": none}, features.caption_keys, features.rows))
    )
    assert torch.allclose(numbers["overlapping_loss"], numbers["tactile_vision_loss"])
    assert torch.isfinite(numbers["total_loss"])


def test_the_temperature_is_clamped() -> None:
    """Trap 12: at 100, as in CLIP."""
    net = model()
    with torch.no_grad():
        net.logit_scale.fill_(50.0)
    assert net.eval()(random_features(2))["logit_scale"].item() == pytest.approx(100)


def test_complementary_tokens_get_no_alignment_and_overlapping_ones_no_preservation() -> None:
    """Each group of tokens hears only its own part of the loss."""
    output: Output = model().train()(random_features(5), kept=torch.ones(5, 4, dtype=torch.bool))
    groups = {kind: list(output[f"{kind}_tokens"].values()) for kind in ("overlapping", "complementary")}
    numbers = Stage2Loss()(output)
    for part, deaf in (
        ("overlapping_loss", "complementary"),
        ("preservation", "overlapping"),
        ("complementary_reg", "overlapping"),
    ):
        grads = torch.autograd.grad(numbers[part], groups[deaf], retain_graph=True, allow_unused=True)
        assert all(g is None or not g.any() for g in grads), (part, deaf)


def test_pooling_uses_kept_overlapping_tokens_only() -> None:
    """Trap 14: a dropped register is not averaged in as a zero."""
    kept = torch.tensor([[True, False, False, False], [True, True, False, True], [True, True, True, False]])
    output = model().eval()(random_features(3), kept=kept)
    loss = Stage2Loss()(output)["overlapping_loss"]
    by_hand = {m: torch.stack([z[i, : i + 1].mean(0) for i in range(3)]) for m, z in output.overlapping_tokens.items()}
    for m, pooled in pooled_overlapping(output).items():
        assert torch.allclose(pooled, torch.nn.functional.normalize(by_hand[m], dim=-1), atol=1e-6)
    single = replace(output, overlapping_tokens={m: z[:, None] for m, z in by_hand.items()}, nested_dropout_mask=None)
    assert torch.allclose(Stage2Loss()(single)["overlapping_loss"], loss, atol=1e-5)


def test_registers_must_outnumber_overlapping_tokens() -> None:
    with pytest.raises(UserError, match="4 registers cannot hold 4 overlapping tokens"):
        model(num_overlapping_tokens=4)
    with pytest.raises(UserError, match="cannot hold 0"):
        model(num_overlapping_tokens=0)


def test_shared_weights_are_one_set_of_blocks() -> None:
    apart, tied = model(preservation=False), model(share_weights=True, preservation=False)
    assert len(tied.stacks) == 1
    assert sum(p.numel() for p in tied.stacks.parameters()) * 3 == sum(p.numel() for p in apart.stacks.parameters())


def test_raw_inputs_and_their_features_give_the_same(stage1_checkpoint: object) -> None:
    """`forward` on images and text tokens is `forward` on what the frozen encoders make of them."""
    stage1: Stage1 = load_stage1(stage1_checkpoint)
    net = TVLStage2(stage1, register_token_dim=32, num_heads=4).eval()
    batch = {
        "vision": torch.rand(2, 3, 64, 64),
        "tactile": torch.rand(2, 3, 64, 64),
        "text": stage1.tokenize(["soft.", "soft and smooth."]),
    }
    raw, stored = net(batch), net(stage1.encode(batch))
    for name in ("vision", "tactile", "text"):
        assert torch.equal(raw["overlapping_tokens"][name], stored["overlapping_tokens"][name])
    assert not any("stage1" in key or "clip" in key for key in net.state_dict())
    assert not any(p is q for p in net.parameters() for q in stage1.parameters())
    part = net({"vision": batch["vision"], "tactile": batch["tactile"]})
    assert set(part["overlapping_tokens"]) == {"vision", "tactile"}
    with pytest.raises(UserError, match="built for stored features"):
        model()(batch)


def test_pair_names_do_not_depend_on_the_order() -> None:
    assert pair_name("vision", "tactile") == pair_name("tactile", "vision") == "tactile_vision"


def test_alignment_gathers_everything_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once per step, whatever the number of modalities and pairs; flags and keys come back as they were."""
    calls = []

    def counted(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        return x

    monkeypatch.setattr(alignment_module, "gather_with_grad", counted)
    features = random_features(6)
    keys = torch.tensor([[2**62, 1], [0, 2], [-5, 3], [7, 4], [7, 5], [2**33 + 1, 6]])
    output = model().train()(Features(features.modalities, keys, features.rows))
    Stage2Loss()(output)
    assert len(calls) == 1
    pooled = {m: z.mean(1) for m, z in output["overlapping_tokens"].items()}
    numbers, present, back = alignment_module._joined(pooled, output)
    assert torch.equal(back, keys)
    assert present.all()
    assert torch.equal(numbers, torch.stack(list(pooled.values()), dim=1))
    single = {m: z[:1, :5] for m, z in pooled.items()}  # one row at an odd place: a view would not be aligned
    present = {m: there[:1] for m, there in output["present"].items()}
    one_row = replace(output, present=present, caption_keys=keys[:1])
    assert torch.equal(alignment_module._joined(single, one_row)[2], keys[:1])
