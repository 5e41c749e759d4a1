"""Checkpoints and weights: atomic writes, and no code is executed on loading."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tvl_align.system.checkpoint import load_checkpoint, load_weights, save_checkpoint, save_weights
from tvl_align.system.console import UserError


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    content = {"model": {"w": torch.arange(3)}, "epoch": 4, "best": {"acc1": 1.5}, "settings": {"a": [1, None, "x"]}}
    save_checkpoint(tmp_path / "c.pth", content)
    loaded = load_checkpoint(tmp_path / "c.pth")
    assert torch.equal(loaded.pop("model")["w"], torch.arange(3))
    assert loaded == {k: v for k, v in content.items() if k != "model"}
    assert [p.name for p in tmp_path.iterdir()] == ["c.pth"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    """A crash while writing does not damage the last checkpoint."""
    path = tmp_path / "c.pth"
    save_checkpoint(path, {"model": {}, "epoch": 1})
    with pytest.raises(Exception, match="pickle|local"):
        save_checkpoint(path, {"model": {}, "epoch": 2, "bad": lambda: None})
    assert load_checkpoint(path)["epoch"] == 1


def test_weights_are_written_once_and_read_under_all_names(tmp_path: Path) -> None:
    """Also views that share memory, transposed ones, and whole numbers."""
    w = torch.arange(6.0).view(2, 3)
    weights = {"a": w, "tied": w, "turned": w.T, "row": w[1], "fitted": torch.tensor(True), "none": torch.empty(0), "z": w}
    save_weights(tmp_path / "w.safetensors", weights)
    inside = load_file(tmp_path / "w.safetensors")
    assert inside.keys() == {"a", "turned", "row", "fitted", "none"}
    loaded = load_weights(tmp_path / "w.safetensors")
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) and loaded[name].dtype == weights[name].dtype for name in weights)
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_damaged_weights_are_refused_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    with pytest.raises(UserError, match=r"no such file of weights: .*w\.safetensors"):
        load_weights(path)
    save_weights(path, {"a": torch.ones(100)})
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:40], b"", b"\xff" * 100, b"PK\x03\x04" + whole):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="is not a checkpoint that can be loaded safely"):
            load_weights(path)
    for number in (torch.tensor([1, torch.nan]), torch.tensor([1, torch.inf]).to(torch.complex64)):
        save_weights(path, {"a": number})
        with pytest.raises(UserError, match="has NaN or inf in 'a'"):
            load_weights(path)
    save_weights(path, {"a": torch.tensor([1, torch.nan]).to(torch.float8_e4m3fn)})
    with pytest.raises(UserError, match="has NaN or inf in 'a'"):
        load_weights(path)


class Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, ("/tmp/tvl-align-checkpoint-bomb",))


def test_bad_files_are_refused_in_one_sentence(tmp_path: Path) -> None:
    torch.save({"model": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(UserError, match=r"bomb\.pth is not a checkpoint that can be loaded safely"):
        load_checkpoint(tmp_path / "bomb.pth")
    assert not Path("/tmp/tvl-align-checkpoint-bomb").exists()
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(UserError, match="is not a Stage-2 checkpoint"):
        load_checkpoint(tmp_path / "list.pth")
    with pytest.raises(UserError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "none.pth")
