"""Runs with further modalities (depth, force ...) in use: pairs of any modalities, then embedding, search and export."""

import importlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from tvl_align.encoders.own import load_encoders
from tvl_align.encoders.tvl import Stage1Config
from tvl_align.evaluation.measure import EvaluateConfig, measure
from tvl_align.features.inputs import DataConfig
from tvl_align.inference.export import ExportConfig, export
from tvl_align.inference.registers import Registers, load
from tvl_align.methods.mlp import MLP, MLPConfig
from tvl_align.system.console import UserError
from tvl_align.training.engine import fit
from tvl_align.training.optimisation import OptimConfig
from tvl_align.training.run import changed_options
from tvl_align.training.settings import RunConfig, Settings

ROWS = 60


@pytest.fixture(scope="session")
def mine(once: Any) -> Path:
    """depth/, force/ and photo/ with files of the same names, a table of them, and weights of a ViT."""

    def make(folder: Path) -> None:
        draw = np.random.default_rng(0)
        for kind in ("depth", "force", "photo"):
            (folder / kind).mkdir(parents=True)
        lines = ["photo,depth,force"]
        for i in range(ROWS):
            Image.fromarray(draw.integers(0, 256, (20, 30, 3), np.uint8)).save(folder / f"photo/{i}.png")
            Image.fromarray(draw.integers(0, 2**12, (20, 30), np.uint16)).save(folder / f"depth/{i}.png")
            np.save(folder / f"force/{i}.npy", draw.normal(size=12))
            lines.append(f"photo/{i}.png,depth/{i}.png,force/{i}.npy")
        (folder / "pairs.csv").write_text("\n".join(lines))
        torch.manual_seed(0)
        torch.save(timm.create_model("vit_tiny_patch16_224", img_size=32).state_dict(), folder / "vit.pth")

    return once("further", make)


def encoders(mine: Path) -> Stage1Config:
    more = (f"depth=timm:vit_tiny_patch16_224:{mine / 'vit.pth'}", "force=own_encoders:Curves")
    return Stage1Config(more_encoders=more)


def train(frozen: Stage1Config, data: DataConfig, out: Path) -> None:
    knobs, optim = MLPConfig(register_token_dim=32, hidden=8), OptimConfig(batch_size=16, epochs=1, warmup_epochs=0)
    fit(Settings(frozen, knobs, data, optim, RunConfig(out, "run", device="cpu", method="mlp")), MLP)


@pytest.fixture(scope="session")
def alone(once: Any, mine: Path) -> Path:
    """A run on depth and force alone."""

    def make(folder: Path) -> None:
        data = DataConfig(
            pairs=mine / "pairs.csv",
            more_columns=("depth=depth", "force=force"),
            active_modality_names=("depth", "force"),
            num_workers=0,
            views=1,
        )
        train(encoders(mine), data, folder)

    return once("further run", make) / "run"


@pytest.fixture(scope="session")
def loaded(alone: Path) -> Registers:
    return load(alone, device="cpu")


def test_files_get_the_tokens_of_their_rows(loaded: Registers, mine: Path) -> None:
    test = loaded.open_store().splits["test"]
    expected = loaded.embed_split(test).pooled
    stems = [Path(name).stem for name in test.names]
    files = {"depth": [mine / f"depth/{s}.png" for s in stems], "force": [str(mine / f"force/{s}.npy") for s in stems]}
    out = loaded.embed(**files)
    assert list(out.pooled) == ["depth", "force"]
    for m in files:
        assert torch.allclose(out.pooled[m], expected[m], atol=1e-3) and out.pooled[m].std(0).max() > 1e-2
    arrays = [np.load(path) for path in files["force"]]
    assert torch.equal(loaded.embed(force=arrays).pooled["force"], out.pooled["force"])
    assert torch.allclose(loaded.embed(force=arrays[0]).pooled["force"], out.pooled["force"][:1], atol=1e-5)
    assert loaded.image_options.more_bits == {"depth": 12}
    some = loaded.embed(depth=[files["depth"][0], None], force=[None, arrays[1]])
    assert some.present["depth"].tolist() == [True, False] and not some.pooled["force"][0].any()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"vision": ["a.png"]}, "this run has no modality 'vision'; it has depth, force"),
        ({"sound": ["a.wav"]}, "this run has no modality 'sound'"),
        ({"depth": ["none.png"]}, r"item 0 of depth \(none.png\) cannot be used: the file is missing; leave it out"),
        ({"force": ["none.npy"]}, r"item 0 of force \(none.npy\) cannot be used: FileNotFoundError: "),
        ({"force": [np.zeros(13)]}, r"item 0 of force \(ndarray\) cannot be used: its transform gives .* \(13,\), not"),
        ({"depth": ["a", "b"], "force": [np.zeros(12)]}, "the modalities differ in their rows"),
    ],
)
def test_bad_items_are_one_sentence(loaded: Registers, given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        loaded.embed(**given)


def test_a_run_on_two_further_modalities_is_measured(alone: Path) -> None:
    results = json.loads(measure(EvaluateConfig(alone, probe_steps=2, device="cpu")).read_text())
    assert list(results["retrieval"]) == ["depth_force"] and results["gallery"] == ROWS // 10


def test_an_earlier_run_has_the_options_of_today(alone: Path) -> None:
    """Options that it does not know have not changed."""
    settings = json.loads((alone / "config.json").read_text())["settings"]
    before = {group: dict(options) for group, options in settings.items()}
    for group, name in (("stage1", "more_encoders"), ("data", "more_columns")):
        del before[group][name]
        settings[group][name] = None
    assert changed_options(before, settings) == []
    moved = settings | {"stage1": settings["stage1"] | {"more_encoders": ["depth=timm:vit:/elsewhere/vit.pth"]}}
    assert changed_options(settings, moved) == []  # a place; the store knows the weights


def command(name: str, *arguments: str | Path) -> None:
    importlib.import_module(f"tvl_align.cli.{name}").run([str(a) for a in arguments])


def test_embed_pairs_the_files_of_folders(alone: Path, loaded: Registers, mine: Path, tmp_path: Path) -> None:
    for kind, names in (("depth", ("a.png", "b.png")), ("force", ("b.npy", "c.npy"))):
        (tmp_path / kind).mkdir()
        for i, name in enumerate(names):
            (tmp_path / kind / name).write_bytes((mine / f"{kind}/{i}{name[1:]}").read_bytes())
    more = f"depth={tmp_path / 'depth'}", f"force={tmp_path / 'force'}"
    command("embed", alone, "--more", *more, "--out", tmp_path / "x.npz", "--device", "cpu")
    out = np.load(tmp_path / "x.npz")
    assert out["names"].tolist() == ["a", "b", "c"]
    assert out["depth.present"].tolist() == [True, True, False] and out["force.present"].tolist() == [False, True, True]
    expected = loaded.embed(force=mine / "force/1.npy").pooled["force"][0]
    assert np.allclose(out["force.pooled"][2], expected, atol=1e-5)
    with pytest.raises(UserError, match="--more depth= is a folder and --more force= is not"):
        command("embed", alone, "--more", more[0], "force=a.npy", "--out", tmp_path / "y.npz", "--device", "cpu")
    assert not (tmp_path / "y.npz").exists()


def test_search_goes_both_ways(
    alone: Path, loaded: Registers, mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for query, gallery, suffix, other in (("depth", "force", "png", "npy"), ("force", "depth", "npy", "png")):
        file = mine / f"{query}/7.{suffix}"
        arguments = ["--more", f"{query}={file}", "--gallery", mine / gallery, "--gallery_modality", gallery]
        command("search", alone, *arguments, "--top", "3", "--json", "--device", "cpu", "--index", tmp_path / gallery)
        (result,) = json.loads(capsys.readouterr().out)
        files = sorted((mine / gallery).iterdir())
        scores = loaded.embed(**{gallery: files}).pooled[gallery] @ loaded.embed(**{query: file}).pooled[query][0]
        best = scores.topk(3)
        assert [hit["score"] for hit in result["found"]] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert result["found"][0]["name"].endswith(other)
    for arguments, said in (
        (["--more", f"depth={file}", "--gallery", mine], "this run has no modality 'vision'; give --gallery_modality"),
        (["--more", "depth=a", "force=b", "--gallery", mine], "give queries of one other modality"),
        (["--more", "depth", "--gallery", mine], "--more 'depth' names no modality and value"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            command("search", alone, *arguments, "--device", "cpu")


def test_an_export_embeds_with_encoders_that_are_given(alone: Path, loaded: Registers, mine: Path, tmp_path: Path) -> None:
    """It has the names of encoders; a module is not imported because a file names it."""
    export(ExportConfig(alone, tmp_path / "shared"))
    text = (tmp_path / "shared/config.json").read_text()
    assert str(mine) not in text and '"force=own_encoders:Curves"' in text
    card = (tmp_path / "shared/README.md").read_text()
    assert 'registers.embed(depth=["a file of depth"], force=["a file of force"])' in card and "own_encoders:Curves" in card
    files = {"depth": mine / "depth/3.png", "force": mine / "force/3.npy"}
    with pytest.raises(UserError, match="gives no encoder of force, as nothing is imported because a file names it"):
        load(tmp_path / "shared", device="cpu").embed(**files)
    given = load(tmp_path / "shared", stage1=load_encoders(encoders(mine), ("depth", "force")), device="cpu")
    expected = loaded.embed(**files).pooled
    assert all(torch.allclose(x, expected[m], atol=1e-6) for m, x in given.embed(**files).pooled.items())


def test_a_further_modality_beside_those_of_tvl(mine: Path, stage1_checkpoint: Path, tmp_path: Path) -> None:
    """A photo encoder of TVL and a force encoder; and another encoder than that of the run is refused."""
    data = DataConfig(
        pairs=mine / "pairs.csv",
        more_columns=("force=force",),
        active_modality_names=("vision", "force"),
        num_workers=0,
        views=0,
        probe_rows=0,
    )
    frozen = Stage1Config(stage1_checkpoint, more_encoders=("force=own_encoders:Curves",))
    train(frozen, data, tmp_path)
    out = load(tmp_path / "run", device="cpu").embed(vision=[mine / "photo/1.png"], force=[mine / "force/1.npy"])
    assert out.pooled["vision"].shape == out.pooled["force"].shape == (1, 32)
    other = Stage1Config(stage1_checkpoint, more_encoders=("force=own_encoders:OtherCurves",))
    with pytest.raises(UserError, match="was trained with"):
        load(tmp_path / "run", stage1=load_encoders(other, tuple(out.pooled)), device="cpu").embed(
            force=[mine / "force/1.npy"]
        )
