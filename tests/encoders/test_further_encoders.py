"""Encoders of further modalities: pictures, or inputs that the encoder makes itself."""

from pathlib import Path
from typing import Any

import own_encoders
import pytest
import timm
import torch

from tvl_align.config import from_plain, parse, to_plain
from tvl_align.encoders.names import TAKEN, by_modality
from tvl_align.encoders.own import load_encoder, load_encoders
from tvl_align.encoders.tvl import Stage1Config
from tvl_align.system.console import UserError

VIT = "vit_tiny_patch16_224"
MORE = ("depth=own_encoders:Colours", "force=own_encoders:Curves")


def test_inputs_and_features_are_those_of_each_encoder() -> None:
    stage1 = load_encoders(Stage1Config(more_encoders=MORE), ("force", "depth"))
    assert stage1.clip is None and list(stage1.further) == ["force", "depth"]
    assert {m: (s.tokens, s.width, s.pooled_width) for m, s in stage1.specs.items()} == {
        "force": (3, 4, 12),
        "depth": (4, 3, 12),
    }
    assert (stage1.input_shape("force"), stage1.input_shape("depth")) == ((12,), (3, 8, 8))
    assert stage1.takes_pictures("depth") and not stage1.takes_pictures("force")
    assert stage1.picture_norm("depth") == ((0.5,) * 3, (0.25,) * 3) and stage1.picture_norm("force") is None
    curves = torch.arange(24.0).view(2, 12)
    read = stage1.encode({"force": curves, "depth": torch.ones(2, 3, 8, 8)}).modalities
    assert torch.equal(read["force"].tokens.flatten(1), curves) and (read["depth"].tokens == 1).all()
    assert not any(p.requires_grad for p in stage1.parameters())
    for wrong, message in (
        (
            {"force": torch.ones(2, 13)},
            r"the force inputs have the shape \(2, 13\), but the encoder takes \(B, 12\); use its",
        ),
        ({"force": torch.ones(2, 12).int()}, "the force inputs are torch.int32; give a float tensor, as its transform does"),
        ({"depth": torch.ones(2, 3, 9, 9)}, r"the depth images have the shape \(2, 3, 9, 9\)"),
    ):
        with pytest.raises(UserError, match=message):
            stage1.encode(wrong)


def test_any_model_of_pictures_encodes_a_further_modality(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(timm.create_model(VIT, img_size=32).state_dict(), tmp_path / "vit.pth")
    name = f"timm:{VIT}:{tmp_path / 'vit.pth'}"
    images = torch.rand(2, 3, 32, 32)
    thermal, vision = (load_encoder(name, m).encode(images)[0] for m in ("thermal", "vision"))
    assert torch.equal(thermal, vision)
    with pytest.raises(UserError, match=r"--more_encoders depth=st:x: st encodes text only; give an encoder of depth"):
        load_encoder("st:x", "depth")
    with pytest.raises(UserError, match=r"--more_encoders depth=timm:none cannot be loaded .*; give a name of timm"):
        load_encoder("timm:none", "depth")


def test_the_fingerprint_knows_shape_and_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def fingerprint(**changes: Any) -> str:
        for name, value in changes.items():
            monkeypatch.setattr(own_encoders.Curves, name, value, raising=False)
        return load_encoders(Stage1Config(more_encoders=MORE), ("depth", "force")).fingerprint()

    first = fingerprint()
    assert fingerprint() == first and fingerprint(name="2") != first
    assert load_encoders(Stage1Config(more_encoders=MORE[::-1]), ("depth", "force")).fingerprint() == fingerprint()


def test_options_are_kept_with_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vit.pth").touch()
    monkeypatch.chdir(tmp_path)
    config = parse(Stage1Config, ["--more_encoders", f"depth=timm:{VIT}:vit.pth", "force=mine:vit.pth"])
    assert config.more_encoders == (f"depth=timm:{VIT}:{tmp_path.resolve() / 'vit.pth'}", "force=mine:vit.pth")
    assert config.encoder_of("depth") == config.more_encoders[0].removeprefix("depth=")
    assert config.encoder_of("sound") is None and config.encoder_of("vision") is None
    assert from_plain(Stage1Config, to_plain(config)) == config


WRONG: dict[str, dict[str, Any]] = {
    "has no shape": {"shape": property()},
    "shape must be whole numbers above 0": {"shape": (0, 3)},
    "cannot encode an input: unflatten": {"shape": (13,)},
    "tokens must be floats": {"encode": lambda self, x: (x, x > 0, x)},
}


@pytest.mark.parametrize("sentence", WRONG)
def test_an_encoder_that_does_not_keep_to_the_protocol_is_refused(sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = type("Wrong", (own_encoders.Curves,), WRONG[sentence])
    monkeypatch.setattr(own_encoders, "Wrong", wrong, raising=False)
    with pytest.raises(UserError, match=f"--more_encoders force=own_encoders:Wrong:? {sentence}") as caught:
        load_encoder("own_encoders:Wrong", "force")
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [*TAKEN, "index", "caption_keys", "train", "2d", "a.b", ""])
def test_names_that_no_further_modality_has(name: str) -> None:
    with pytest.raises(UserError, match="--more|modality"):
        by_modality("more", [f"{name}=x"])
    assert by_modality("more", ["depth=a=b", "depth=c"]) == {"depth": ["a=b", "c"]}
