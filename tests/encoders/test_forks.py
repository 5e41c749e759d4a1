"""Stage-1 checkpoints as other trainers write them: read like TVL's own, or refused by name, and nothing in them runs."""

import argparse
import datetime
import io
import logging
import pathlib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tvl_align.encoders.small import SMALL_CLIP
from tvl_align.encoders.tvl import create_touch_encoder, load_stage1, read_checkpoint
from tvl_align.system.console import UserError

Save = Callable[..., Path]
Weights = dict[str, torch.Tensor]


@pytest.fixture
def content(stage1_checkpoint: Path) -> dict[str, Any]:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(stage1_checkpoint, weights_only=True)


@pytest.fixture
def save(stage1_checkpoint: Path, tmp_path: Path) -> Save:
    """save(content): the path of a checkpoint with that content, and the CLIP weights beside it."""
    (tmp_path / "clip.pt").symlink_to(stage1_checkpoint.parent / "clip.pt")

    def saved(content: Any) -> Path:
        torch.save(content, tmp_path / "fork.pth")
        return tmp_path / "fork.pth"

    return saved


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "tvl_align.encoders.tvl"]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("part", ["", "tactile_encoder."])
def test_prefixes_of_wrappers_are_removed_and_said(
    prefix: str, part: str, content: dict[str, Any], save: Save, stage1_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """DataParallel and torch.compile put them before all weights, of the model or of the touch encoder only."""
    wrapped = {
        part + prefix + name.removeprefix(part) if name.startswith(part) else name: w for name, w in content["model"].items()
    }
    stage1 = load_stage1(save(content | {"model": wrapped}))
    assert stage1.fingerprint() == load_stage1(stage1_checkpoint).fingerprint()
    assert len(lines(caplog)) == 1
    assert all(part + wrapper in lines(caplog)[0] for wrapper in ("module.", "_orig_mod.") if wrapper in prefix)


def test_prefixes_that_are_not_common_stay(content: dict[str, Any], save: Save, caplog: pytest.LogCaptureFixture) -> None:
    """`tactile_encoder.` before all weights is the name of the encoder. One weight without the prefix keeps it in all."""
    touch = {name: w for name, w in content["model"].items() if name.startswith("tactile_encoder.")}
    assert read_checkpoint(save({"model": touch}))[0].keys() == touch.keys()
    mixed = {f"module.{name}": w for name, w in touch.items()} | {"logit_scale": torch.ones(())}
    assert read_checkpoint(save({"model": mixed}))[0].keys() == mixed.keys()
    assert not lines(caplog)


def test_args_saved_as_a_dict_are_used(content: dict[str, Any], save: Save, stage1_checkpoint: Path) -> None:
    """Ignored, they would be replaced by the defaults, and ViT-L-14 would be downloaded."""
    stage1 = load_stage1(save(content | {"args": vars(content["args"])}))
    assert stage1.fingerprint() == load_stage1(stage1_checkpoint).fingerprint()
    with pytest.raises(UserError, match=r"has the argument common_latent_dim = 'many'; it must be of type int"):
        load_stage1(save(content | {"args": vars(content["args"]) | {"common_latent_dim": "many"}}))


HARMLESS = {
    "rate": (np.float64(1e-3), 1e-3),
    "half": (np.float16(0.5), 0.5),
    "count": (np.int32(-7), -7),
    "flag": (np.bool_(True), True),
    "word": (np.str_("touch"), "touch"),
    "where": (pathlib.PosixPath("/out/run"), "/out/run"),
    "windows": (pathlib.PureWindowsPath("C:/out"), "C:\\out"),
    "device": (torch.device("cuda", 1), torch.device("cuda", 1)),
    "dtype": (torch.bfloat16, torch.bfloat16),
    "inner": (argparse.Namespace(a=[1, None]), argparse.Namespace(a=[1, None])),
}


@pytest.mark.parametrize("core", ["numpy._core", "numpy.core"])
def test_harmless_classes_in_args_are_read_as_plain_values(core: str, save: Save) -> None:
    """Also under the name that numpy 1 writes."""
    path = save({"model": {}, "args": argparse.Namespace(**{name: value for name, (value, _) in HARMLESS.items()})})
    replace_in_pickle(path, b"numpy._core.multiarray", f"{core}.multiarray".encode())
    args = vars(read_checkpoint(path)[1])
    assert args == {name: plain for name, (_, plain) in HARMLESS.items()}
    assert all(type(args[name]) is type(plain) for name, (_, plain) in HARMLESS.items())


def test_numbers_of_another_byte_order_are_read(save: Save) -> None:
    path = save({"model": {}, "args": {"x": np.int32(258)}})
    replace_in_pickle(
        path, b"X\x01\x00\x00\x00<", b"X\x01\x00\x00\x00>"
    )  # the mark of the order, in front of the same bytes
    assert read_checkpoint(path)[1].x == 0x02010000


def replace_in_pickle(path: Path, old: bytes, new: bytes) -> None:
    """Replace bytes in the pickle of a file written by torch.save."""
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive:
        parts = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data.replace(old, new) if name.endswith("data.pkl") else data)


class Settings:
    """A class of a fork."""


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("/tmp/tvl-align-fork-bomb"),))


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Settings(), f"{__name__}.Settings"),
        (datetime.date(2024, 1, 1), "datetime.date"),
        (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        (np.zeros(2), r"numpy\._?core\.multiarray\._reconstruct"),
        (Bomb(), "getattr"),
    ],
)
def test_other_classes_are_refused_by_name(value: Any, name: str, save: Save) -> None:
    Path("/tmp/tvl-align-fork-bomb").unlink(missing_ok=True)
    for content in ({"model": {}, "args": argparse.Namespace(x=value)}, {"model": value}):
        with pytest.raises(UserError, match=rf"can be loaded safely \(it holds {name}; save it with tensors"):
            read_checkpoint(save(content))
    assert not Path("/tmp/tvl-align-fork-bomb").exists()


def test_numpy_objects_are_refused(save: Save) -> None:
    """A scalar of dtype object would hold any object."""
    path = save({"model": {}, "args": {"x": np.float64(1.0)}})
    replace_in_pickle(path, b"f8", b"O8")
    with pytest.raises(UserError, match="is not a checkpoint that can be loaded safely"):
        read_checkpoint(path)


def test_half_precision_with_its_counters_is_read(content: dict[str, Any], save: Save, stage1_checkpoint: Path) -> None:
    """BatchNorm counts batches; in half precision the count is a float, and infinite above 65,504."""
    counters = [name for name in content["model"] if name.endswith("num_batches_tracked")]
    assert counters
    whole, images = load_stage1(stage1_checkpoint), torch.rand(2, 3, 64, 64)
    half = load_stage1(save(content | {"model": {name: w.half() for name, w in content["model"].items()}}))
    assert [half.state_dict()[name] for name in counters] == [whole.state_dict()[name] for name in counters]
    features, expected = (stage1.encode({"tactile": images}).modalities["tactile"].pooled for stage1 in (half, whole))
    assert torch.allclose(features, expected, atol=1e-3)
    many = content["model"] | {name: torch.tensor(torch.inf) for name in counters}
    assert load_stage1(save(content | {"model": many})).state_dict()[counters[0]] == 0
    whole_numbers = content["model"] | {
        name: w.long() for name, w in content["model"].items() if name.endswith("head.weight")
    }
    with pytest.raises(UserError, match=r"wrong dtypes: tactile_encoder\.head\.weight torch\.int64"):
        load_stage1(save(content | {"model": whole_numbers}))


def test_state_dict_optimizer_and_scaler(content: dict[str, Any], save: Save, stage1_checkpoint: Path) -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    optimizer.param_groups[0]["params"][0].grad = torch.ones(1)
    optimizer.step()
    rest = {"args": content["args"], "optimizer": optimizer.state_dict(), "scaler": {"scale": 2.0**16}, "epoch": 7}
    expected = load_stage1(stage1_checkpoint).fingerprint()
    for name in ("model", "state_dict"):
        assert load_stage1(save(rest | {name: content["model"]})).fingerprint() == expected
    with pytest.raises(UserError, match="has no weights, alone or as an entry 'model' or 'state_dict'"):
        load_stage1(save(rest))


def test_weights_alone_and_safetensors(stage1_checkpoint: Path, save: Save, tmp_path: Path) -> None:
    """A touch encoder of TVL's own size as weights alone, and CLIP weights, both also as safetensors."""
    touch = create_touch_encoder("vit_tiny_patch16_224", 128, {})
    weights: Weights = {f"tactile_encoder.{name}": w for name, w in touch.state_dict().items()}
    weights["logit_scale"] = torch.tensor(3.0)
    clip = torch.load(stage1_checkpoint.parent / "clip.pt", weights_only=True)
    save_file({name: w.contiguous().clone() for name, w in clip.items()}, tmp_path / "clip.safetensors")
    save_file(weights, tmp_path / "touch.safetensors")
    prints = {
        load_stage1(path, clip_vision_model=SMALL_CLIP, clip_pretrain_data=clip_weights).fingerprint()
        for path in (save(weights), tmp_path / "touch.safetensors")
        for clip_weights in ("clip.pt", "clip.safetensors")
    }
    assert len(prints) == 1
    stage1 = load_stage1(tmp_path / "touch.safetensors", clip_vision_model=SMALL_CLIP, clip_pretrain_data="clip.pt")
    assert torch.equal(stage1.tactile_encoder.state_dict()["pos_embed"], touch.state_dict()["pos_embed"])
    (tmp_path / "noise.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(UserError, match=r"noise\.safetensors is not a checkpoint that can be loaded safely"):
        load_stage1(tmp_path / "noise.safetensors")


def test_a_further_head_is_ignored_unless_it_is_part_of_the_encoders(
    content: dict[str, Any], save: Save, stage1_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    more = {"modality_heads.audio.weight": torch.zeros(4, 4), "proj_head.0.weight": torch.full((4, 4), torch.nan)}
    stage1 = load_stage1(save(content | {"model": content["model"] | more}))
    assert stage1.fingerprint() == load_stage1(stage1_checkpoint).fingerprint()
    assert [line.partition(": ")[2] for line in lines(caplog)] == [
        "ignored weights that are no part of the encoders: modality_heads.audio.weight, proj_head.0.weight"
    ]
    for name in ("tactile_encoder.adapter.weight", "modality_heads.tactile.weight", "clip.logit_scale"):
        with pytest.raises(UserError, match=f"unexpected keys: {name};"):
            load_stage1(save(content | {"model": content["model"] | {name: torch.zeros(4, 4)}}))
    lost = {name: w for name, w in content["model"].items() if name != "logit_scale"}
    with pytest.raises(UserError, match=r"missing keys: logit_scale; unexpected keys: modality_heads\.audio\.weight, proj"):
        load_stage1(save(content | {"model": lost | more}))


def test_what_is_said_is_a_warning(content: dict[str, Any], save: Save, caplog: pytest.LogCaptureFixture) -> None:
    """Commands print warnings, and nothing below."""
    load_stage1(save(content | {"model": content["model"] | {"proj_head.bias": torch.zeros(4)}}))
    assert [r.levelno for r in caplog.records if r.name == "tvl_align.encoders.tvl"] == [logging.WARNING]
