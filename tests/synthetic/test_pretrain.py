"""The targets of the small Stage 1: which tokens the predictions depend on, and how."""

import copy
import random
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import nn

from tvl_align.encoders.small import SMALL_CLIP, register_small_clip
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
from tvl_align.system.runtime import seed_everything
from tvl_align.training.optimisation import backward_together


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


def test_every_encoder_gets_the_slope_of_the_weighted_losses(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slope along the gradient of an encoder and of its heads is the norm of this gradient, which is not 0."""
    weights = {"pixels": 2.0, "spectrum": 0.5, "words": 0.1}
    args, _ = first_step(world, tmp_path, "float32", monkeypatch)
    stage1, heads = args[:2]
    encoders = {"vision": stage1.clip.visual, "tactile": stage1.tactile_encoder, "text": stage1.clip.transformer}
    losses = _losses(*args[:-2], random.Random(0), False)
    backward_together(losses.values["contrastive"], losses.parts(weights))
    for modality, encoder in encoders.items():
        parameters = [p for p in (*encoder.parameters(), *heads[modality].parameters()) if p.grad is not None]
        norm = torch.stack([p.grad.square().sum() for p in parameters if p.grad is not None]).sum().sqrt()
        assert norm > 1e-3, modality
        totals = []
        with torch.no_grad():
            for step in (1, -2, 1):
                for p in parameters:
                    p.add_(p.grad / norm, alpha=step * 2e-3)
                values = _losses(*args[:-2], random.Random(0), False).values
                totals.append(values["contrastive"] + sum(weights[name] * values[name] for name in weights))
        assert float((totals[0] - totals[1]) / 4e-3) == pytest.approx(float(norm), rel=0.05), modality


def test_every_encoder_is_trained_and_of_the_words_only_those_that_were_read(stage1_checkpoint: Path) -> None:
    register_small_clip()
    seed_everything(0)
    clip = open_clip.create_model(SMALL_CLIP, load_weights=False)
    start, end = clip.state_dict(), torch.load(stage1_checkpoint.parent / "clip.pt")
    prompt, other = open_clip.get_tokenizer(SMALL_CLIP)(["image", "elephant"])[:, 1]  # every other sentence has the prompt
    name = "token_embedding.weight"
    assert (end[name][prompt] - start[name][prompt]).abs().max() > 1e-4
    assert torch.equal(end[name][other], start[name][other])
    for part in ("visual.", "transformer."):
        assert any((end[n] - start[n]).abs().max() > 1e-4 for n in start if n.startswith(part) and n.endswith("weight"))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_same_config_gives_the_same_weights(world: Path, tmp_path: Path, precision: PretrainPrecision) -> None:
    """Encoders in threads of their own draw nothing at random and add to no sum of each other."""
    before, paths = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        for name in ("one", "other"):
            config = PretrainConfig(world, tmp_path / name, epochs=1, batch_size=32, num_workers=0, precision=precision)
            paths.append(pretrain(config, quiet=True))
    finally:
        torch.set_num_threads(before)
    (first, _), (second, _) = (read_checkpoint(path) for path in paths)
    clips = [torch.load(path.parent / "clip.pt") for path in paths]
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


def test_spectra_are_float32_under_autocast() -> None:
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    target = Spectrum(64)
    with torch.autocast("cpu", torch.bfloat16):
        under = target(images)
    assert torch.equal(under, target(images))
