"""The targets of the small Stage 1: which tokens the predictions depend on, and how."""

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tvl_align.encoders.tvl import read_checkpoint
from tvl_align.synthetic.pretrain import (
    BANDS,
    ORIENTATIONS,
    Heads,
    Losses,
    PretrainConfig,
    PretrainPrecision,
    Spectrum,
    TokenTargets,
    WordTargets,
    _losses,
    pretrain,
)
from tvl_align.training.optimisation import backward_side_by_side


def targets(heads: Heads, channels: int = 3) -> TokenTargets:
    torch.manual_seed(0)
    return TokenTargets(192, 64, channels, heads).eval()


def predictions(module: TokenTargets, tokens: torch.Tensor) -> torch.Tensor:
    return torch.cat([module.pixels(module.decoder(tokens)[:, 1:]), module.bands(module.decoder(tokens)[:, 1:])], dim=-1)


@pytest.mark.parametrize("heads", ["nonlinear", "linear"])
@torch.no_grad()
def test_only_nonlinear_heads_mix_tokens_and_bend(heads: Heads) -> None:
    module, tokens = targets(heads), torch.randn(2, 17, 192)
    predicted = predictions(module, tokens)
    assert predicted.shape == (2, 16, 3 * 16**2 + 48 * 3)
    other = tokens.clone()
    other[:, 5] += torch.randn(192)
    changed = (predictions(module, other) - predicted).abs().amax((0, 2)) > 1e-5
    assert changed.tolist() == [heads == "nonlinear" or i == 4 for i in range(16)]
    mean = (tokens + other) / 2
    bent = (predictions(module, mean) - (predicted + predictions(module, other)) / 2).abs().max() > 1e-4
    assert bent == (heads == "nonlinear")


@torch.no_grad()
def test_nonlinear_heads_know_positions() -> None:
    module, tokens = targets("nonlinear"), torch.randn(1, 17, 192)
    turned = predictions(module, tokens[:, [0, *range(16, 0, -1)]]).flip(1)
    assert (turned - predictions(module, tokens)).abs().max() > 1e-3


@pytest.mark.parametrize("channels", [1, 3])
def test_the_errors_fall_and_every_weight_is_trained(channels: int) -> None:
    module = targets("nonlinear", channels).train()
    tokens, images = torch.randn(8, 17, 192), torch.rand(8, 3, 64, 64)
    power = Spectrum(64)(images[:, :channels])
    optimizer = torch.optim.Adam(module.parameters(), 3e-3)
    errors = []
    for _ in range(60):
        pixels, spectrum = module(tokens, images, power)
        errors.append((pixels.item(), spectrum.item()))
        optimizer.zero_grad()
        (pixels + spectrum).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
        optimizer.step()
    assert errors[-1][0] < 0.7 * errors[0][0]
    assert errors[-1][1] < 0.8 * errors[0][1]


def test_words_are_read_from_the_end_token_alone() -> None:
    """Cross-entropy in nats, summed over the vocabulary; the mask says where a sentence ends."""
    torch.manual_seed(0)
    ids = torch.tensor([[49406, 7, 9, 49407, 0], [49406, 8, 49407, 0, 0]])
    module = WordTargets(16, ids)
    assert module.vocabulary.tolist() == [0, 7, 8, 9, 49406, 49407]
    tokens, mask = torch.randn(2, 4, 16), torch.arange(4) < torch.tensor([[4], [3]])
    has = torch.tensor([[1, 1, 0, 1, 1, 1], [1, 0, 1, 0, 1, 1]], dtype=torch.bool)
    probability = module.head(torch.stack([tokens[0, 3], tokens[1, 2]])).sigmoid()
    by_hand = -torch.where(has, probability, 1 - probability).log().sum() / 2
    assert torch.allclose(module(tokens, mask, ids), by_hand, atol=1e-5)
    tokens[1, 3] += 1  # past the end
    assert torch.allclose(module(tokens, mask, ids), by_hand, atol=1e-5)


def test_the_heads_are_those_of_the_config(
    world: Path, stage1_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[TokenTargets] = []

    class Recorded(TokenTargets):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr("tvl_align.synthetic.pretrain.TokenTargets", Recorded)
    config = PretrainConfig(world, tmp_path, epochs=1, batch_size=32, num_workers=0, heads="linear")
    state, args = read_checkpoint(pretrain(config, quiet=True))
    before, default = read_checkpoint(stage1_checkpoint)
    assert [type(module.decoder) for module in made] == [nn.Identity, nn.Identity]
    assert (args.heads, default.heads) == ("linear", "nonlinear")
    assert state.keys() == before.keys()


def first_step(
    world: Path, folder: Path, precision: PretrainPrecision, monkeypatch: pytest.MonkeyPatch
) -> tuple[tuple[Any, ...], Losses]:
    """The arguments of the losses of the first step, and these losses."""
    found: list[tuple[tuple[Any, ...], Losses]] = []

    def recorded(*args: Any) -> Losses:
        found.append((copy.deepcopy(args) if not found else (), _losses(*args)))
        return found[-1][1]

    with monkeypatch.context() as patch:
        patch.setattr("tvl_align.synthetic.pretrain._losses", recorded)
        config = PretrainConfig(world, folder, epochs=1, batch_size=32, num_workers=0, precision=precision)
        pretrain(config, quiet=True)
    return found[0]


def test_gradients_are_the_slope_of_the_weighted_losses(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoders are backpropagated side by side, from copies of their features; the slope along the gradient is its norm."""
    weights = {"pixels": 2.0, "spectrum": 0.5, "words": 0.1}
    args, _ = first_step(world, tmp_path, "float32", monkeypatch)
    parameters = [p for module in args[:2] for p in module.parameters()]
    losses = _losses(*args[:-2], random.Random(0), False)
    backward_side_by_side(losses.values["contrastive"], losses.parts(weights))
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
    norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    totals = []
    with torch.no_grad():
        for sign in (1, -2):
            for p, g in zip(parameters, gradients, strict=True):
                p.add_(g / norm, alpha=sign * 2e-3)
            values = _losses(*args[:-2], random.Random(0), False).values
            totals.append(values["contrastive"] + sum(weights[name] * values[name] for name in weights))
    assert float((totals[0] - totals[1]) / 4e-3) == pytest.approx(float(norm), rel=0.03)


def test_the_same_config_gives_the_same_weights(world: Path, stage1_checkpoint: Path, tmp_path: Path) -> None:
    """Encoders in threads of their own draw nothing at random and add to no sum of each other."""
    again = pretrain(PretrainConfig(world, tmp_path, epochs=1, batch_size=32, num_workers=0), quiet=True)
    (first, _), (second, _) = read_checkpoint(stage1_checkpoint), read_checkpoint(again)
    clips = [torch.load(path.parent / "clip.pt") for path in (stage1_checkpoint, again)]
    for one, other in ((first, second), clips):
        assert one.keys() == other.keys()
        assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_bf16_changes_no_loss_by_a_percent(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [first_step(world, tmp_path, p, monkeypatch) for p in ("float32", "bf16")]
    assert [args[-1] for args, _ in steps] == [False, True]
    full, half = (torch.stack(list(losses.values.values())) for _, losses in steps)
    assert list(steps[0][1].values) == ["contrastive", "pixels", "spectrum", "words"]
    assert torch.allclose(half, full, rtol=0.01), (half, full)
    assert half.dtype == torch.float32 and not (half == full).any()


@pytest.mark.parametrize("native", [True, False])
def test_auto_computes_in_bf16_where_the_processor_does(
    world: Path, tmp_path: Path, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx2": True, "avx512_bf16": native}, raising=False)
    assert first_step(world, tmp_path, "auto", monkeypatch)[0][-1] is native


@pytest.mark.parametrize(("turned", "direction"), [(False, 0), (True, ORIENTATIONS // 2)])
def test_a_grating_has_its_power_in_its_band_and_direction(turned: bool, direction: int) -> None:
    """4 cycles in a window of 32 pixels, along a row or a column; the bands end at 1.4 x 1.45^k cycles."""
    grating = (2 * torch.pi * 4 * torch.arange(64) / 32).cos().expand(64, 64)
    power = Spectrum(64)((grating.T if turned else grating)[None, None])
    assert power.shape == (1, 16, BANDS * ORIENTATIONS)
    inside = power.view(4, 4, -1)[1:3, 1:3].flatten(0, 1)  # at the border a window sees the mirrored image
    assert set(inside.argmax(1).tolist()) == {2 * ORIENTATIONS + direction}


def test_the_power_is_standardised_over_the_batch() -> None:
    module, tokens, images = targets("nonlinear"), torch.randn(4, 17, 192), torch.rand(4, 3, 64, 64)
    power = Spectrum(64)(images)
    error, scaled = (module(tokens, images, x)[1] for x in (power, 3 * power + 2))
    assert scaled.item() == pytest.approx(error.item(), rel=0.02)  # 0.001 is added to the standard deviation
