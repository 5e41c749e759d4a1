"""Stage-2 checkpoints: atomic writes, and no code is executed on loading."""

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch

from tvl_align.system.checkpoint import link_as, load_checkpoint, save_checkpoint
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


def test_the_best_is_kept_when_the_next_one_is_written(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    for epoch in range(3):
        save_checkpoint(path, {"model": {}, "epoch": epoch})
        if epoch < 2:
            link_as(path, "checkpoint-acc1.pth")
    assert load_checkpoint(tmp_path / "checkpoint-acc1.pth")["epoch"] == 1
    assert load_checkpoint(path)["epoch"] == 2


def no_links(*_: object) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


def test_without_links_the_best_is_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", no_links)
    path, best = tmp_path / "checkpoint.pth", tmp_path / "checkpoint-acc1.pth"
    for epoch in range(2):
        save_checkpoint(path, {"model": {}, "epoch": epoch})
        link_as(path, best.name)
        link_as(path, best.name)
        assert best.read_bytes() == path.read_bytes() and not best.samefile(path)
    save_checkpoint(path, {"model": {}, "epoch": 2})
    assert load_checkpoint(best)["epoch"] == 1
    assert {p.name for p in tmp_path.iterdir()} == {path.name, best.name}


def test_a_copy_that_does_not_fit_leaves_the_old_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, best = tmp_path / "checkpoint.pth", tmp_path / "checkpoint-acc1.pth"
    save_checkpoint(path, {"model": {}, "epoch": 0})
    link_as(path, best.name)
    save_checkpoint(path, {"model": {}, "epoch": 1})
    monkeypatch.setattr(os, "link", no_links)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(OSError, match="No space left"):
        link_as(path, best.name)
    assert load_checkpoint(best)["epoch"] == 0
    assert {p.name for p in tmp_path.iterdir()} == {path.name, best.name}


def test_a_link_made_twice_leaves_no_other_file(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "checkpoint.pth", {"model": {}})
    for _ in range(2):
        link_as(tmp_path / "checkpoint.pth", "checkpoint-acc1.pth")
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint.pth", "checkpoint-acc1.pth"}


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
