"""Sharing a run: what is written, what the card says, and that nothing from a stranger is trusted."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from tvl_align.cli.export import run as command
from tvl_align.encoders.tvl import Stage1Config
from tvl_align.evaluation.measure import EvaluateConfig, measure
from tvl_align.features.inputs import DataConfig
from tvl_align.features.store import FeatureStore
from tvl_align.inference.export import FORMAT, SYNTHETIC, UNKNOWN, ExportConfig, _name, export, model_of, read_export
from tvl_align.methods.mlp import MLP, MLPConfig
from tvl_align.system.checkpoint import load_checkpoint, save_checkpoint
from tvl_align.system.console import UserError
from tvl_align.training.engine import fit
from tvl_align.training.optimisation import OptimConfig
from tvl_align.training.run import Places, load_run, specs_of
from tvl_align.training.settings import RunConfig, Settings

FILES = {"model.safetensors", "config.json", "README.md"}


@pytest.fixture(scope="session")
def evaluated(run: Path) -> Path:
    """The run with a results.json of checkpoint-acc1.pth."""
    measure(EvaluateConfig(run, checkpoint="checkpoint-acc1.pth", probe_rows=24, probe_steps=5, device="cpu"))
    return run


@pytest.fixture
def mine(run: Path, tmp_path: Path) -> Path:
    """A copy of the run without results; data and Stage 1 stay where they are."""
    shutil.copytree(run, tmp_path / "runs/mine", ignore=shutil.ignore_patterns("results.json", "*tfevents*"))
    return tmp_path / "runs/mine"


def changed_json(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content) or content))


def front_and_text(out: Path) -> tuple[dict[str, Any], list[str]]:
    card = ModelCard((out / "README.md").read_text())
    return card.data.to_dict(), card.text.strip().splitlines()


def test_weights_and_settings_come_back(mine: Path, tmp_path: Path) -> None:
    """The same numbers, without optimizer, under the same names; settings and shapes build the same model."""
    out = export(ExportConfig(mine, tmp_path / "out", "checkpoint.pth"))
    assert {p.name for p in out.iterdir()} == FILES
    settings, method, config, weights = read_export(out)
    saved = load_checkpoint(mine / "checkpoint.pth")["model"]
    assert weights.keys() == saved.keys() == load_file(out / "model.safetensors").keys()
    assert all(torch.equal(weights[name], saved[name]) for name in saved)
    of_run, own_method, recorded = load_run(mine)
    assert (settings.knobs, settings.optim, method) == (of_run.knobs, of_run.optim, own_method)
    assert config["specs"] == recorded["specs"] and config["features"] == recorded["features"]
    assert (config["store"], config["implementation"]) == (recorded["store"], recorded["implementation"])
    assert config["checkpoint"] == {"name": "checkpoint.pth", "epoch": 1, "step": 0} and config["format"] == FORMAT
    model = model_of(method, settings.knobs, specs_of(settings, config), weights, out)
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    assert (out / "model.safetensors").stat().st_size < 0.6 * (mine / "checkpoint.pth").stat().st_size


def test_no_place_of_the_machine_is_in_an_export(mine: Path, tmp_path: Path, world: Path) -> None:
    line = f"tvl-align train --datasets_dir {world} --stage1_checkpoint=/home/me/s/one.pth --log_dir ../x/logs --lr 1e-3"
    changed_json(mine / "config.json", lambda c: c | {"command": line, "folder": "/home/me/work"})
    out = export(ExportConfig(mine, tmp_path / "out"))
    config = json.loads((out / "config.json").read_text())
    assert (
        config["command"]
        == f"tvl-align train --datasets_dir {world.name} --stage1_checkpoint=one.pth --log_dir logs --lr 1e-3"
    )
    assert config["settings"]["data"]["datasets_dir"] == world.name
    assert config["settings"]["stage1"]["stage1_checkpoint"] == "checkpoint.pth"
    for name in ("config.json", "README.md"):
        text = (out / name).read_text()
        assert str(tmp_path) not in text and str(world.parent) not in text and "/home" not in text, name
        assert not re.search(r'["=\s`](/|~/)\w', text), name


def test_the_card_says_what_is_synthetic_and_what_was_not_evaluated(mine: Path, tmp_path: Path, world: Path) -> None:
    out = export(ExportConfig(mine, tmp_path / "out"))
    front, text = front_and_text(out)
    assert text[0] == SYNTHETIC
    assert {"library_name": "tvl-align", "license": "unknown"}.items() <= front.items()
    assert {"register-tokens", "tactile", "synthetic-data"} <= set(front["tags"])
    said = "\n".join(text)
    fingerprint = json.loads((mine / "config.json").read_text())["features"]["encoders"]
    assert "These weights were not evaluated." in said and "Acc@1" not in said
    assert "No licence was given" in said and "Nothing was measured on real touch" in said and fingerprint in said
    assert 'registers = tvl_align.load("out", stage1_checkpoint="checkpoint.pth")' in said
    assert 'registers.embed(vision=["photo.jpg"], tactile=["touch.png"], text=["soft, woven"])' in said
    shutil.copytree(world, tmp_path / "other", ignore=shutil.ignore_patterns("factors.json"))
    places = Places(datasets_dir=tmp_path / "other")
    front, text = front_and_text(export(ExportConfig(mine, tmp_path / "two", licence="CC-BY-4.0", places=places)))
    assert text[0] == UNKNOWN and "synthetic-data" not in front["tags"] and front["license"] == "cc-by-4.0"
    assert "The weights: cc-by-4.0." in text and "unless the data above are it" in "\n".join(text)


def test_the_card_has_the_numbers_of_these_weights_only(evaluated: Path, mine: Path, tmp_path: Path) -> None:
    """Results of another checkpoint, of another epoch or of other settings are none of these weights."""
    results = json.loads((evaluated / "results.json").read_text())
    results["retrieval"]["tactile_vision"] |= {"acc1": 12.34, "low": 9.96, "high": 15.0, "acc5": 40.0, "chance1": 4.17}
    results["summary"] = {"unique_leak": {"score": 12.4, "low": -3.6, "high": 30.2}}

    def card(name: str, content: dict[str, Any], checkpoint: str | None = None) -> str:
        (mine / "results.json").write_text(json.dumps(content))
        return (export(ExportConfig(mine, tmp_path / name, checkpoint)) / "README.md").read_text()

    said = card("a", results)
    assert json.loads((tmp_path / "a/config.json").read_text())["checkpoint"]["name"] == "checkpoint-acc1.pth"
    assert "| tactile-vision | 12.3 [10.0, 15.0] | 40.0 | 4.17 |" in said
    assert "| unique leak | 12 [-4, 30] |" in said and "not evaluated" not in said
    assert f"Measured on {results['gallery']} test rows ({results['groups']} independent groups)" in said
    assert "12.3 [10.0" in card("b", results | {"progress": {"epoch": 1, "step": 0}}, "checkpoint.pth")
    changed = json.loads(json.dumps(results))
    changed["run"]["settings"]["optim"]["epochs"] = 2
    other_epoch = results | {"progress": {"epoch": 2, "step": 0}}
    unknown = {name: value for name, value in results.items() if name != "progress"}  # as earlier versions wrote them
    for n, (content, checkpoint) in enumerate([(unknown, "checkpoint.pth"), (other_epoch, None), (changed, None)]):
        said = card(f"c{n}", content, checkpoint)
        assert "These weights were not evaluated." in said and "12.3" not in said
    with pytest.raises(UserError, match=r"results\.json was not written by this version \(KeyError: 'gallery'\)"):
        card("d", {name: value for name, value in results.items() if name != "gallery"})
    assert not (tmp_path / "d").exists()


def test_what_is_in_the_way_is_not_overwritten(mine: Path, tmp_path: Path) -> None:
    out = tmp_path / "new/out"
    export(ExportConfig(mine, out))
    (out / "README.md").write_text("an older card")
    export(ExportConfig(mine, out, licence="mit"))  # an earlier export of the same run is replaced
    assert 'license: "mit"' in (out / "README.md").read_text()
    assert [p.name for p in out.parent.iterdir()] == ["out"] and {p.name for p in out.iterdir()} == FILES
    (out / "notes.txt").write_text("mine")
    file, empty = tmp_path / "file", tmp_path / "empty"
    file.write_text("x")
    for taken in (out, file, mine):
        with pytest.raises(UserError, match="exists and is not an earlier export of this run; give --out another folder"):
            export(ExportConfig(mine, taken))
    (out / "notes.txt").unlink()
    changed_json(out / "config.json", lambda c: c["settings"]["run"].update(log_name="another"))
    with pytest.raises(UserError, match="not an earlier export of this run"):
        export(ExportConfig(mine, out))
    empty.mkdir()
    export(ExportConfig(mine, empty))
    assert {p.name for p in empty.iterdir()} == FILES


def test_a_write_that_fails_leaves_the_earlier_export(mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = export(ExportConfig(mine, tmp_path / "e/out"))
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tvl_align.inference.export.write_atomically", full)
    with pytest.raises(OSError, match="No space left"):
        export(ExportConfig(mine, out, licence="mit"))
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_what_cannot_be_exported_is_one_sentence(mine: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run folder"):
        export(ExportConfig(tmp_path, tmp_path / "out"))
    with pytest.raises(UserError, match="no such checkpoint: .*none.pth"):
        export(ExportConfig(mine, tmp_path / "out", "none.pth"))
    with pytest.raises(UserError, match="--licence 'my own' is no SPDX identifier; give one such as mit"):
        ExportConfig(mine, tmp_path / "out", licence="my own")
    best = load_checkpoint(mine / "checkpoint-acc1.pth")
    best["model"].pop("registers")
    save_checkpoint(mine / "checkpoint-acc1.pth", best)
    with pytest.raises(
        UserError, match=r"acc1\.pth do not fit the settings beside it \(.*registers.*\); give those of one run"
    ):
        export(ExportConfig(mine, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_run_of_an_earlier_version_is_exported_from_its_store(mine: Path, tmp_path: Path, run: Path) -> None:
    changed_json(mine / "config.json", lambda c: {k: v for k, v in c.items() if k != "specs"})
    with pytest.raises(UserError, match="an earlier version and its feature store .* is gone; run its train command again"):
        export(ExportConfig(mine, tmp_path / "out", places=Places(feature_dir=tmp_path / "nowhere")))
    out = export(ExportConfig(mine, tmp_path / "out", places=Places(feature_dir=run.parent / "features")))
    assert json.loads((out / "config.json").read_text())["specs"] == json.loads((run / "config.json").read_text())["specs"]


def test_a_run_on_features_of_ones_own(tmp_path: Path) -> None:
    """No Stage 1 is needed; names of modalities are shown as text."""
    g = np.random.default_rng(0)
    arrays = {m: g.normal(size=(60, 3, 8)).astype(np.float32) for m in ("left", "right")}
    split = np.array(["train"] * 40 + ["val"] * 10 + ["test"] * 10)
    store = FeatureStore.from_arrays(arrays, tmp_path / "store", split=split)
    (tmp_path / "factors.json").write_text('{"synthetic": true}')
    settings = Settings(
        knobs=MLPConfig(register_token_dim=16, hidden=8),
        stage1=Stage1Config(),
        data=DataConfig(datasets_dir=tmp_path, store=store.folder),
        optim=OptimConfig(batch_size=16, epochs=1, warmup_epochs=0, lr=1e-3),
        run=RunConfig(tmp_path / "runs", "own", device="cpu", method="mlp"),
    )
    out = export(ExportConfig(fit(settings, MLP), tmp_path / "out"))
    front, text = front_and_text(out)
    said = "\n".join(text)
    assert text[0] == UNKNOWN and set(front["tags"]) >= {"left", "right"}
    assert 'registers = tvl_align.load("out")' in said
    assert 'out = registers.embed_features({"left": left, "right": right})' in said
    assert "It takes arrays of these shapes: left (B, 3, 8), right (B, 3, 8)." in said
    loaded, _, config, _ = read_export(out)
    assert loaded.knobs == settings.knobs and config["specs"] == {m: asdict(s) for m, s in store.specs.items()}


TOY = """raise SystemExit("the module of a stranger was imported")"""


def test_no_module_is_imported_because_a_file_names_it(mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = export(ExportConfig(mine, tmp_path / "out"))
    for folder in (out, tmp_path):
        (folder / "foreign_method.py").write_text(TOY)
    changed_json(out / "config.json", lambda c: c["settings"]["run"].update(method="foreign_method:TOY"))
    for here in (tmp_path, out):
        monkeypatch.chdir(here)
        with pytest.raises(
            UserError, match=r"of the method 'foreign_method:TOY', and nothing is imported .* --method \(method=\)"
        ):
            read_export(out)
    assert "foreign_method" not in sys.modules
    assert read_export(out, "base")[1].implementation.experiment_id == "stage2_base"
    with pytest.raises(UserError, match="is a run of stage2_base, but mlp is"):
        read_export(out, "mlp")


def test_encoders_that_are_modules_are_left_out_of_the_settings(exported: Path, tmp_path: Path) -> None:
    out = shutil.copytree(exported, tmp_path / "out")
    given = {"vision_encoder": "evil.module:NAME", "tactile_encoder": "timm:vit_tiny_patch16_224", "text_encoder": "x"}
    changed_json(out / "config.json", lambda c: c["settings"]["stage1"].update(given))
    stage1 = read_export(out)[0].stage1
    assert (stage1.vision_encoder, stage1.text_encoder) == (None, None)
    assert stage1.tactile_encoder == "timm:vit_tiny_patch16_224"


@pytest.mark.parametrize(
    ("text", "alone", "in_command"),
    [
        ("/a/b.pth", "b.pth", "b.pth"),
        ("--data=/a/b c", "--data=b c", "--data=b c"),
        ("timm:vit:/a/b.pth", "timm:vit:b.pth", "timm:vit:b.pth"),
        ("~/b", "b", "b"),
        ("../a/b", "b", "b"),
        ("a/b", "a/b", "b"),
        ("--data=a/b", "--data=a/b", "--data=b"),
        ("hf:org/name", "hf:org/name", "hf:org/name"),
        ("env://", "env://", "env://"),
        ("mine.module:TOY", "mine.module:TOY", "mine.module:TOY"),
        ("This image gives", "This image gives", "This image gives"),
    ],
)
def test_places_become_names(text: str, alone: str, in_command: str) -> None:
    assert (_name(text), _name(text, relative=True)) == (alone, in_command)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c.update(format=FORMAT + 1),
            rf"has format {FORMAT + 1}, and tvl-align .* reads exports of format {FORMAT}",
        ),
        (lambda c: c.pop("format"), "has no format"),
        (lambda c: c.update(format=["1"] * 99), "has format .*; use the one that wrote it"),
        (lambda c: c.update(specs={"vision": {"width": -1, "tokens": 1, "pooled_width": 1}}), "has the shapes .*-1"),
        (lambda c: c.update(specs={"vision": {"width": 2**40, "tokens": 1, "pooled_width": 1}}), "whole numbers from 1 to"),
        (lambda c: c.update(specs={"vision": {"width": True, "tokens": 1, "pooled_width": 1}}), "has the shapes"),
        (lambda c: c.update(specs={"vision": 3}), "has the shapes"),
        (lambda c: c.pop("specs"), "has the shapes"),
        (lambda c: c.update(settings=3), "is not the config.json of a run"),
        (lambda c: c["settings"].pop("knobs"), "has invalid settings"),
        (lambda c: c["settings"]["knobs"].update(num_heads="x"), "has invalid settings"),
        (lambda c: c["settings"]["knobs"].update(evil=1), "unknown option 'evil'"),
        (lambda c: c["settings"]["run"].update(method={"a": 1}), "and nothing is imported because a file names it"),
        (lambda c: c["settings"]["run"].update(log_name="../../x"), "is no folder inside"),
        (lambda c: c["implementation"].update(experiment_id="other"), "is a run of other"),
        (lambda c: c["implementation"].update(version="0.1"), "is a run of version 0.1"),
        (lambda c: c.update(features=[1]), "has a malformed store or features"),
        (lambda c: c.update(store={}), "has a malformed store or features"),
        (lambda c: c["settings"]["optim"].update(lr=float("nan")), "NaN is no number of JSON"),
    ],
)
def test_a_malformed_config_is_refused_in_one_sentence(
    exported: Path, tmp_path: Path, change: Callable[[Any], Any], message: str
) -> None:
    shutil.copytree(exported, tmp_path / "out")
    changed_json(tmp_path / "out/config.json", lambda c: change(c) and None)
    with pytest.raises(UserError, match=message) as error:
        read_export(tmp_path / "out")
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


@pytest.fixture(scope="session")
def exported(once: Any, run: Path) -> Path:
    return once("exported", lambda folder: export(ExportConfig(run, folder)))


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff\xfe", b"[" * 100_000, b'{"format": 1' + b"0" * 5000 + b"}"])
def test_a_damaged_config_is_refused_in_one_sentence(exported: Path, tmp_path: Path, content: bytes) -> None:
    shutil.copytree(exported, tmp_path / "out")
    (tmp_path / "out/config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json is damaged \(.*\); copy or write it again") as error:
        read_export(tmp_path / "out")
    assert "\n" not in str(error.value)
    (tmp_path / "out/config.json").unlink()
    with pytest.raises(UserError, match=r"is not an exported run \(no config\.json\)"):
        read_export(tmp_path / "out")


def test_damaged_and_foreign_weights_are_refused_in_one_sentence(exported: Path, tmp_path: Path) -> None:
    out = shutil.copytree(exported, tmp_path / "out")
    path, whole = out / "model.safetensors", (exported / "model.safetensors").read_bytes()
    weights = load_file(exported / "model.safetensors")  # maps the file, so not the one that is overwritten
    settings, method, config, _ = read_export(out)

    def load() -> None:
        read = read_export(out)[3]
        model_of(method, settings.knobs, specs_of(settings, config), read, out)

    load()
    for content in (whole[:-4], whole[:100], b"", b"\x80\x04K\x01."):
        path.write_bytes(content)
        with pytest.raises(UserError, match="is not a checkpoint that can be loaded safely"):
            load()
    name = "registers"
    for other, message in (
        (weights | {name: weights[name] * torch.nan}, "has NaN or inf in 'registers'"),
        (weights | {name: torch.zeros(2, 2)}, r"do not fit the settings beside it \(.*registers"),
        (weights | {name: weights[name].long()}, r"do not fit .*registers is torch.int64, not torch.float32"),
        (weights | {"more": torch.zeros(1)}, "do not fit .*more"),
        ({k: w for k, w in weights.items() if k != name}, "do not fit .*registers"),
    ):
        save_file(other, path)
        with pytest.raises(UserError, match=message):
            load()
    path.unlink()
    with pytest.raises(UserError, match="no such file of weights"):
        load()


def test_stage_1_is_looked_for_in_the_folder_or_given(exported: Path, stage1_checkpoint: Path) -> None:
    assert read_export(exported)[0].stage1.stage1_checkpoint == exported.resolve() / "checkpoint.pth"
    assert read_export(exported, places=Places(stage1_checkpoint=stage1_checkpoint))[0].stage1.stage1_checkpoint == (
        stage1_checkpoint
    )


def test_the_command_prints_the_folder(mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command([str(mine), "--out", str(tmp_path / "out"), "--checkpoint", "checkpoint-acc5.pth", "--licence", "mit"])
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["checkpoint"]["name"] == "checkpoint-acc5.pth"
