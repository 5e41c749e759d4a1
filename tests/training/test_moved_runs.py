"""A run whose folder, data, Stage 1 or stores were moved: it finds them, takes new places, or names what differs."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tvl_align.encoders.tvl import Stage1, Stage1Config
from tvl_align.features import encode, identity
from tvl_align.features.identity import Identity
from tvl_align.features.inputs import DataConfig
from tvl_align.methods.mlp import MLP, MLPConfig
from tvl_align.system.console import UserError
from tvl_align.training.engine import fit
from tvl_align.training.optimisation import OptimConfig
from tvl_align.training.run import Places, load_run
from tvl_align.training.settings import RunConfig, Settings

CPU = torch.device("cpu")


def settings_in(root: Path, **data: Any) -> Settings[MLPConfig]:
    """A run of one epoch at root/O/run, with the data at root/W and Stage 1 at root/S."""
    return Settings(
        Stage1Config(root / "S/checkpoint.pth"),
        MLPConfig(register_token_dim=32, hidden=8),
        DataConfig(root / "W", views=1, num_workers=0, **data),
        OptimConfig(batch_size=16, epochs=1, warmup_epochs=0, lr=1e-3),
        RunConfig(root / "O", "run", device="cpu", method="mlp"),
    )


@pytest.fixture
def moved(once: Callable[..., Path], world: Path, stage1_checkpoint: Path, tmp_path: Path) -> Path:
    """The run of `settings_in`, trained in another place and moved to tmp_path with all it needs."""

    def make(root: Path) -> None:
        shutil.copytree(world, root / "W")
        shutil.copytree(stage1_checkpoint.parent, root / "S")
        fit(settings_in(root), MLP)

    for part in ("W", "S", "O"):  # new times, as `cp -r` and downloads give
        shutil.copytree(once("run to move", make) / part, tmp_path / part, copy_function=shutil.copyfile)
    return tmp_path


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders of stores that are encoded."""
    folders: list[Path] = []
    really = encode._encode

    def recorded(folder: Path, *rest: Any) -> None:
        folders.append(folder)
        really(folder, *rest)

    monkeypatch.setattr(encode, "_encode", recorded)
    return folders


def open_run(folder: Path, places: Places | None = None) -> tuple[Settings[Any], str | None]:
    settings, _, config = load_run(folder, None, places)
    inputs = settings.open_inputs(CPU, Identity(config["store"], config["features"]))
    return settings, inputs.identity.key


def test_a_run_that_moved_with_its_inputs_finds_them_beside_it(moved: Path, encoded: list[Path]) -> None:
    settings, _ = open_run(moved / "O/run")
    assert (settings.data.datasets_dir, settings.feature_dir) == (moved / "W", moved / "O/features")
    assert settings.stage1.stage1_checkpoint == moved / "S/checkpoint.pth"
    assert settings.folder == moved / "O/run"
    assert encoded == []


def test_inputs_that_moved_elsewhere_are_given_by_flags(moved: Path, encoded: list[Path]) -> None:
    for part in ("W", "S", "O/features"):
        (moved / part).rename(moved / f"new {part.rpartition('/')[2]}")
    places = Places(moved / "new W", moved / "new S/checkpoint.pth", feature_dir=moved / "new features")
    settings, _ = open_run(moved / "O/run", places)
    assert settings.data.datasets_dir == moved / "new W"
    assert encoded == []


def test_the_same_command_in_the_new_place_goes_on(moved: Path, encoded: list[Path]) -> None:
    settings = settings_in(moved)
    before = (moved / "O/run/metrics.jsonl").read_text()
    fit(settings, MLP)
    assert encoded == []
    assert (moved / "O/run/metrics.jsonl").read_text() == before


def test_stored_features_are_enough_where_data_and_stage_1_are_gone(moved: Path, encoded: list[Path]) -> None:
    shutil.rmtree(moved / "S")
    settings, _, config = load_run(moved / "O/run")
    settings = replace(settings, stage1=Stage1Config(moved / "S/checkpoint.pth"))
    inputs = settings.open_inputs(CPU, Identity(config["store"], config["features"]))
    assert (inputs.identity.key, inputs.samples, encoded) == (config["store"], {}, [])


def test_what_differs_is_named_before_anything_is_encoded(
    moved: Path, encoded: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    photo = next((moved / "W/ssvtp/images_rgb").glob("*.jpg"))
    content = photo.read_bytes()
    photo.write_bytes(content + b"\0")
    for act in (lambda: open_run(moved / "O/run"), lambda: fit(settings_in(moved), MLP)):
        with pytest.raises(UserError, match="because of the rows or images of (train|val|test); restore what differs"):
            act()
    photo.write_bytes(content)
    with pytest.raises(UserError, match=r"because of views|with other settings: --views 2 \(it has 1\)"):
        fit(replace(settings_in(moved), data=DataConfig(moved / "W", views=2, num_workers=0)), MLP)
    monkeypatch.setattr(Stage1, "fingerprint", lambda self: "0" * 64)
    with pytest.raises(UserError, match="because of the weights of the Stage-1 checkpoint; restore"):
        open_run(moved / "O/run")
    assert encoded == []


def test_other_versions_of_packages_use_the_stored_features(
    moved: Path, encoded: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    key = json.loads((moved / "O/run/config.json").read_text())["store"]
    versions = identity.package_versions(identity.FEATURE_PACKAGES)
    assert not {"tqdm", "accelerate", "tensordict"} & set(versions)
    monkeypatch.setattr(identity, "package_versions", lambda names: versions | {"timm": "99"})
    assert open_run(moved / "O/run")[1] == key
    assert f"timm 99 (it was {versions['timm']})" in caplog.text
    shutil.rmtree(moved / "O/features" / key)
    with pytest.raises(UserError, match=r"because of timm 99 \(it was "):
        open_run(moved / "O/run")
    assert encoded == []
