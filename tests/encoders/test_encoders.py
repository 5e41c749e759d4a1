"""The Stage-1 encoders and their checkpoints: strict loading, no code execution, no gradients."""

import argparse
import pickle
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F

from tvl_align.encoders.small import SMALL_CLIP, register_small_clip
from tvl_align.encoders.tvl import Stage1, load_stage1, touch_model_name
from tvl_align.system.console import UserError


def edited(source: Path, out: Path, **changes: Any) -> Path:
    """A copy of a checkpoint with changed entries, and of the CLIP weights beside it."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(source, weights_only=True)
    out.mkdir(exist_ok=True)
    (out / "clip.pt").write_bytes((source.parent / "clip.pt").read_bytes())
    torch.save(content | changes, out / "checkpoint.pth")
    return out / "checkpoint.pth"


def content_of(path: Path) -> dict[str, Any]:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


def test_shapes_and_norms(stage1_checkpoint: Path) -> None:
    stage1 = load_stage1(stage1_checkpoint)
    ids = stage1.tokenize(["soft.", "soft, patterned, lined, and fabric."])
    read = stage1.encode({"vision": torch.rand(2, 3, 64, 64), "tactile": torch.rand(2, 3, 64, 64), "text": ids}).modalities
    assert {m: tuple(t.tokens.shape[::2]) for m, t in read.items()} == {
        "vision": (2, 192),
        "tactile": (2, 192),
        "text": (2, 128),
    }
    assert read["vision"].tokens.shape[1] == read["tactile"].tokens.shape[1] == 17
    for tokens in read.values():
        assert torch.allclose(tokens.pooled.norm(dim=-1), torch.ones(2), atol=1e-5)
    assert read["text"].mask.sum(1).tolist() == [(ids[i].argmax() + 1).item() for i in range(2)]
    assert torch.allclose(read["text"].pooled, stage1.clip.encode_text(ids, normalize=True), atol=1e-5)


def test_pooled_features_are_those_of_the_libraries(stage1_checkpoint: Path) -> None:
    stage1, images = load_stage1(stage1_checkpoint), torch.rand(3, 3, 64, 64)
    read = stage1.encode({"vision": images, "tactile": images}).modalities
    assert torch.allclose(read["vision"].pooled, stage1.clip.encode_image(images, normalize=True), atol=1e-5)
    assert torch.allclose(read["tactile"].pooled, F.normalize(stage1.tactile_encoder(images), dim=-1), atol=1e-5)
    alone = stage1.encode({"vision": images[:1], "tactile": images[:1]}).modalities
    for modality in ("vision", "tactile"):  # rows of a batch do not affect each other
        assert torch.allclose(alone[modality].tokens, read[modality].tokens[:1], atol=1e-5)


def test_the_documented_openclip_and_timm_models_are_supported() -> None:
    """Feature shapes of an OpenCLIP ViT, and of a ViT and a ResNet for touch, with random weights."""
    register_small_clip()
    plain = open_clip.create_model("ViT-B-32", load_weights=False)
    for name, width in (("vit_tiny_patch16_224", 192), ("resnet18", 512)):
        touch = timm.create_model(name, num_classes=512, global_pool="avg")
        stage1 = Stage1(plain, open_clip.get_tokenizer("ViT-B-32"), touch).freeze()
        assert {m: (s.tokens, s.width, s.pooled_width) for m, s in stage1.specs.items()} == {
            "vision": (17, 768, 512),
            "tactile": (17, width, 512),
            "text": (77, 512, 512),
        }


def test_nothing_is_said_of_random_weights(stage1_checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_stage1(stage1_checkpoint)
    assert not caplog.messages


def test_frozen_encoders_stay_frozen(stage1_checkpoint: Path) -> None:
    stage1 = load_stage1(stage1_checkpoint)
    stage1.train()
    assert not any(module.training for module in stage1.modules())
    assert not any(p.requires_grad for p in stage1.parameters())
    assert not stage1.encode({"vision": torch.rand(1, 3, 64, 64)}).modalities["vision"].tokens.requires_grad


def test_missing_and_unexpected_keys_are_named(stage1_checkpoint: Path, tmp_path: Path) -> None:
    """A touch encoder with random weights must never be used."""
    model = content_of(stage1_checkpoint)["model"]
    norm = {k: v for k, v in model.items() if "fc_norm" not in k}
    with pytest.raises(UserError, match=r"missing keys: tactile_encoder\.fc_norm\.bias, tactile_encoder\.fc_norm\.weight"):
        load_stage1(edited(stage1_checkpoint, tmp_path / "a", model=norm))
    renamed = norm | {"tactile_encoder.norm.weight": torch.ones(192), "tactile_encoder.norm.bias": torch.ones(192)}
    with pytest.raises(UserError, match=r"unexpected keys: tactile_encoder\.norm\.bias"):
        load_stage1(edited(stage1_checkpoint, tmp_path / "b", model=renamed))
    with pytest.raises(UserError, match=r"missing keys: logit_scale, tactile_encoder"):
        load_stage1(edited(stage1_checkpoint, tmp_path / "c", model={}))
    wrong = model | {"tactile_encoder.head.weight": torch.ones(7, 192)}
    with pytest.raises(UserError, match=r"wrong shapes: tactile_encoder\.head\.weight \(7, 192\), needs \(128, 192\)"):
        load_stage1(edited(stage1_checkpoint, tmp_path / "d", model=wrong))


def test_another_touch_model_is_an_error(stage1_checkpoint: Path) -> None:
    with pytest.raises(UserError, match="has the touch model vit_tiny_patch16_224, not vit_base_patch16_224"):
        load_stage1(stage1_checkpoint, tactile_model="vit_base")
    with pytest.raises(UserError, match="unknown touch model 'vit_giant'"):
        load_stage1(stage1_checkpoint, tactile_model="vit_giant")
    assert touch_model_name("resnet18") == "resnet18"


def test_a_missing_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such checkpoint: .*nothing\.pth; give --stage1_checkpoint"):
        load_stage1(tmp_path / "nothing.pth")


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("/tmp/tvl-align-bomb"),))


def test_nothing_in_a_checkpoint_is_executed(stage1_checkpoint: Path, tmp_path: Path) -> None:
    """argparse.Namespace is the only class that is loaded."""
    assert isinstance(content_of(stage1_checkpoint)["args"], argparse.Namespace)
    Path("/tmp/tvl-align-bomb").unlink(missing_ok=True)
    for name, write in (("zip", torch.save), ("pickle", lambda x, p: p.write_bytes(pickle.dumps(x)))):
        path = tmp_path / f"{name}.pth"
        write({"model": {}, "args": Bomb()}, path)
        with pytest.raises(UserError, match="cannot|can be loaded safely"):
            load_stage1(path)
        assert not Path("/tmp/tvl-align-bomb").exists()
    (tmp_path / "noise.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="is not a checkpoint that can be loaded safely"):
        load_stage1(tmp_path / "noise.pth")


def test_unavailable_clip_weights_are_an_error(stage1_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no CLIP weights 'nonsense' for ViT-B-32 .*--clip_pretrain_data also takes a file"):
        load_stage1(stage1_checkpoint, clip_vision_model="ViT-B-32", clip_pretrain_data="nonsense")
    with pytest.raises(UserError, match="unknown OpenCLIP model 'ViT-Z'"):
        load_stage1(stage1_checkpoint, clip_vision_model="ViT-Z")
    torch.save({"a": torch.ones(1)}, tmp_path / "clip.pt")
    with pytest.raises(UserError, match=r"clip\.pt does not fit TVL-small .*local weight file"):
        load_stage1(stage1_checkpoint, clip_pretrain_data=str(tmp_path / "clip.pt"))


def test_clip_arguments_default_to_the_checkpoint(stage1_checkpoint: Path) -> None:
    args = content_of(stage1_checkpoint)["args"]
    assert (args.clip_vision_model, args.clip_pretrain_data) == (SMALL_CLIP, "clip.pt")
    path = stage1_checkpoint.parent / "clip.pt"
    explicit = load_stage1(stage1_checkpoint, clip_vision_model=SMALL_CLIP, clip_pretrain_data=str(path))
    assert explicit.fingerprint() == load_stage1(stage1_checkpoint).fingerprint()


def test_the_fingerprint_depends_on_every_weight(stage1_checkpoint: Path) -> None:
    stage1 = load_stage1(stage1_checkpoint)
    before = stage1.fingerprint()
    stage1.clip.text_projection[0, 0] += 1e-3
    assert stage1.fingerprint() != before
    assert load_stage1(stage1_checkpoint, features="pooled").fingerprint() != before


def test_common_latent_space(stage1_checkpoint: Path, tmp_path: Path) -> None:
    """Modality heads are loaded from the checkpoint and applied to the pooled features."""
    content = content_of(stage1_checkpoint)
    model = {k: v for k, v in content["model"].items() if not k.startswith("tactile_encoder.head.")}
    model |= {
        f"modality_heads.{m}.weight": torch.randn(32, w) for m, w in (("vision", 128), ("text", 128), ("tactile", 192))
    }
    path = edited(stage1_checkpoint, tmp_path / "latent", model=model)
    read = load_stage1(path, common_latent_dim=32).encode({"tactile": torch.rand(2, 3, 64, 64)}).modalities["tactile"]
    assert read.pooled.shape == (2, 32)
    assert torch.allclose(read.pooled.norm(dim=-1), torch.ones(2), atol=1e-5)
    with pytest.raises(UserError, match=r"unexpected keys: modality_heads\.tactile\.weight"):
        load_stage1(path)
