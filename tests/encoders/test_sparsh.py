"""Sparsh's encoders of two touch frames, written in the names of its checkpoints, against a slow twin."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sparsh_files import PATCH, WIDTH, sparsh_weights
from torch import Tensor

from tvl_align.encoders.own import load_encoder
from tvl_align.encoders.tvl import Stage1
from tvl_align.system.console import UserError

Weights = dict[str, Tensor]


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm(w: Weights, name: str, x: Tensor) -> Tensor:
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    return x * w[f"{name}.weight"] + w[f"{name}.bias"]


def twin(w: Weights, frames: Tensor) -> Tensor:
    """Frames (B, 6, 224, 224) -> the normalised patches (B, 14, 14, W). One head; everything is spelt out."""
    side = 224 // PATCH
    kernel = w["patch_embed.proj.weight"].flatten(1)
    rows = []
    for y in range(side):
        for x in range(side):
            patch = frames[:, :, y * PATCH : (y + 1) * PATCH, x * PATCH : (x + 1) * PATCH].flatten(1)
            places = []
            for axis, at in enumerate((y, x)):
                angles = at * w["pos_embed.frequency_bands"][axis]
                places += [angles.sin(), angles.cos()]
            rows.append(patch @ kernel.T + w["patch_embed.proj.bias"] + torch.cat(places))
    tokens = torch.stack(rows, dim=1)
    registers = w.get("register_tokens", torch.zeros(1, 0, WIDTH))
    tokens = torch.cat([registers.expand(len(frames), -1, -1), tokens], dim=1)
    for i in range(2):
        q, k, v = linear(w, f"blocks.{i}.attn.qkv", norm(w, f"blocks.{i}.norm1", tokens)).chunk(3, dim=-1)
        mixed = (q @ k.transpose(1, 2) / math.sqrt(WIDTH)).softmax(-1) @ v
        tokens = tokens + linear(w, f"blocks.{i}.attn.proj", mixed) * w.get(f"blocks.{i}.ls1.gamma", 1)
        hidden = F.gelu(linear(w, f"blocks.{i}.mlp.fc1", norm(w, f"blocks.{i}.norm2", tokens)))
        tokens = tokens + linear(w, f"blocks.{i}.mlp.fc2", hidden) * w.get(f"blocks.{i}.ls2.gamma", 1)
    return norm(w, "norm", tokens[:, registers.shape[1] :]).view(len(frames), side, side, WIDTH)


CHECKPOINTS = {  # by method: what its encoder is like, and what else is in its file
    "dino": (
        sparsh_weights("teacher_encoder.backbone."),
        sparsh_weights("student_encoder.backbone.", seed=1) | {"teacher_encoder.dino_head.mlp.0.weight": torch.ones(3)},
    ),
    "ijepa": (sparsh_weights("target_encoder.backbone.", 0), sparsh_weights("context_encoder.backbone.", 0, seed=1)),
    "mae": (sparsh_weights("encoder.", 0), {"decoder.mask_token": torch.ones(3)}),
    "alone, without layer scale": (sparsh_weights("", 2, scaled=False), {}),
}


@pytest.mark.parametrize("method", CHECKPOINTS)
def test_an_encoder_is_that_of_its_slow_twin(method: str, tmp_path: Path) -> None:
    own, others = CHECKPOINTS[method]
    file = tmp_path / ("sparsh.safetensors" if method == "mae" else "sparsh.ckpt")
    if method == "mae":
        save_file(own | others, file)
    else:
        torch.save({"model": own | others, "epoch": 3}, file)
    place = next(iter(own)).removesuffix("patch_embed.proj.weight")
    weights = {name.removeprefix(place): value for name, value in own.items()}
    encoder, frames = load_encoder(f"sparsh:{file}", "tactile"), torch.rand(2, 6, 224, 224)
    assert (encoder.size, encoder.frames, encoder.mean, encoder.std) == (224, 2, (0, 0, 0), (1, 1, 1))
    tokens, mask, pooled = encoder.encode(frames)
    patches = twin(weights, frames)
    grid = F.adaptive_avg_pool2d(patches.permute(0, 3, 1, 2), 4).flatten(2).transpose(1, 2)
    assert tokens.shape == (2, 17, WIDTH) and mask.all()
    assert torch.allclose(tokens[:, 0], patches.mean((1, 2)), atol=1e-4)
    assert torch.allclose(tokens[:, 1:], grid, atol=1e-4)
    assert torch.allclose(pooled, F.normalize(patches.mean((1, 2)), dim=-1), atol=1e-5)
    swapped = encoder.encode(frames.flip(1))[2]
    assert (pooled - swapped).abs().max() > 1e-3  # the order of the frames counts


def test_differences_are_shifted_to_the_range_of_pictures_and_cut(tmp_path: Path) -> None:
    torch.save({"model": sparsh_weights()}, tmp_path / "sparsh.pth")
    encoder = load_encoder(f"sparsh:{tmp_path / 'sparsh.pth'}", "tactile")
    difference = torch.rand(1, 6, 224, 224) * 2 - 1
    stage1 = Stage1(None, None, None, modalities=("tactile",), own={"tactile": encoder}).freeze()
    assert stage1.touch_frames == 2 and stage1.input_shape("tactile") == (6, 224, 224)
    mean, std = stage1.picture_norm("tactile", subtracted=True)
    assert stage1.picture_norm("tactile") == ((0, 0, 0), (1, 1, 1)) and (mean, std) == ((-0.5,) * 3, (1.0,) * 3)
    given = (difference - mean[0]) / std[0]
    expected = encoder.encode((difference + 0.5).clamp(0, 1))[2]
    assert torch.equal(stage1.encode({"tactile": given}).modalities["tactile"].pooled, expected)


def refused(name: str) -> dict[str, Tensor]:
    good = sparsh_weights("encoder.", 0)
    video = torch.zeros(WIDTH, 3, 2, PATCH, PATCH)
    return {
        "a missing weight": {k: v for k, v in good.items() if k != "encoder.blocks.1.attn.proj.bias"},
        "another weight": good | {"encoder.blocks.1.attn.gate": torch.zeros(3)},
        "another shape": good | {"encoder.norm.weight": torch.zeros(3)},
        "one frame": good | {"encoder.patch_embed.proj.weight": torch.zeros(WIDTH, 3, PATCH, PATCH)},
        "four frames": good | {"encoder.patch_embed.proj.weight": video},
        "learnt places": {k: v for k, v in good.items() if "frequency" not in k} | {"encoder.pos_embed": torch.zeros(3)},
        "a decoder": {"model_task.probe.weight": torch.zeros(3)},
        "not finite": good | {"encoder.norm.bias": torch.full((WIDTH,), torch.nan)},
    }[name]


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("a missing weight", r"does not fit these encoders, missing keys: blocks\.1\.attn\.proj\.bias; give"),
        ("another weight", r"unexpected keys: blocks\.1\.attn\.gate"),
        ("another shape", r"wrong shapes: norm\.weight \(3,\), needs \(64,\)"),
        ("one frame", "is no encoder of two touch frames; give a DINO, DINOv2, MAE or I-JEPA of Sparsh"),
        ("four frames", r"is no encoder of two touch frames \(a V-JEPA of Sparsh takes four\); give a DINO"),
        ("learnt places", "is no encoder of two touch frames; give"),
        ("a decoder", "is no checkpoint of Sparsh, it has no patch_embed.proj.weight; give that of an encoder"),
        ("not finite", r"has NaN or inf in 'norm\.bias'"),
    ],
)
def test_another_file_is_refused_in_a_sentence(name: str, error: str, tmp_path: Path) -> None:
    torch.save({"model": refused(name)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=error) as raised:
        load_encoder(f"sparsh:{tmp_path / 'other.pth'}", "tactile")
    assert "\n" not in str(raised.value)


def test_it_is_an_encoder_of_touch_from_a_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sparsh encodes tactile only; give an encoder of vision"):
        load_encoder("sparsh:x.pth", "vision")
    with pytest.raises(UserError, match="there is no file .*x.pth"):
        load_encoder(f"sparsh:{tmp_path / 'x.pth'}", "tactile")
