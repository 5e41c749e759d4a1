"""The documented commands, in real processes from the documented folders, on a small synthetic data set."""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import processes
import pytest
import torch

from tvl_align.cli.main import COMMANDS, main
from tvl_align.features.store import FeatureStore
from tvl_align.methods.registry import METHODS
from tvl_align.system.checkpoint import load_checkpoint

ROOT = Path(__file__).parents[1]
STAGE2 = ROOT / "experiments" / "stage2"
TRAIN = ROOT / "docs" / "train.md"
BIN = Path(sys.executable).parent
MEANWHILE = {"OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}


def run(command: str, folder: Path = ROOT, expect: int = 0) -> str:
    """Run a command line and return its output."""
    parts = shlex.split(command)
    env = os.environ | MEANWHILE
    while "=" in parts[0] and not parts[0].startswith("-"):
        name, value = parts.pop(0).split("=", 1)
        env[name] = value
    code, said = processes.run(parts, cwd=folder, env=env, stderr=subprocess.PIPE)
    assert code == expect, f"{command}\nexit code {code}\n{said}"
    return said


def documented(heading: str, page: Path) -> str:
    """The first fenced command after a heading of a page, on one line."""
    text = page.read_text()
    block = re.search(rf"{re.escape(heading)}.*?```bash\n(.*?)```", text, re.S)
    assert block is not None, heading
    return " ".join(block[1].replace("\\\n", " ").split())


def filled(command: str, world: Path, checkpoint: Path, out: Path, epochs: int) -> str:
    """The documented command with paths and the number of epochs filled in."""
    assert "--epochs 100" in command
    command = command.replace("--stage1_checkpoint P", f"--stage1_checkpoint {checkpoint}")
    command = command.replace("--datasets_dir D", f"--datasets_dir {world}").replace("./output_dir", str(out))
    return command.replace("--epochs 100", f"--epochs {epochs}").split("&&", 1)[1].strip()


@pytest.mark.slow
def test_the_documented_training(world: Path, stage1_checkpoint: Path, tmp_path: Path) -> None:
    """The documented command; then the same again; then with more epochs, which needs --resume."""
    command = filled(documented("## The documented command", TRAIN), world, stage1_checkpoint, tmp_path, epochs=1)
    assert "--register_token_dim 768" in command
    said = run(command, STAGE2)
    folder = tmp_path / "stage2_experiment"
    assert "[STAGE2] epoch 1/1" in said
    assert "--multi_epochs_dataloader has no effect" in said
    assert load_checkpoint(folder / "checkpoint.pth")["progress"]["epoch"] == 1
    assert "all 1 epochs are done already" in run(command, STAGE2)
    other = run(command.replace("--epochs 1 ", "--epochs 2 "), STAGE2, expect=1 if "torchrun" in command else 2)
    assert "contains a run with other settings: --epochs 2 (it has 1)" in other
    said = run(command.replace("--epochs 1 ", "--epochs 2 ") + " --resume", STAGE2)
    assert [json.loads(line)["epoch"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [0, 1]


@pytest.mark.slow
def test_the_documented_training_of_cursor(world: Path, stage1_checkpoint: Path, tmp_path: Path) -> None:
    """From its own folder, with its own flags and those of base."""
    folder = STAGE2 / "cursor"
    command = documented("**Usage**", folder / "README.md").replace(
        "--stage1_checkpoint P", f"--stage1_checkpoint {stage1_checkpoint}"
    )
    command = command.replace("--output_dir O", f"--output_dir {tmp_path}").replace("--epochs 100", "--epochs 1")
    more = (
        f"--datasets_dir {world} --register_token_dim 64 --views 1 --preservation_weight 0.5 --shuffle_text --num_workers 1"
    )
    said = run(f"{command} {more}", folder)
    assert "[CURSOR] cursor_flux_talk_register_tokens v1" in said
    assert "[CURSOR] epoch 1/1" in said
    made = json.loads((tmp_path / "cursor_flux_talk" / "config.json").read_text())
    assert made["implementation"] == {"experiment_id": "cursor_flux_talk_register_tokens", "version": "1", "tag": "CURSOR"}


@pytest.mark.slow
def test_two_processes_train_as_one(world: Path, stage1_checkpoint: Path, tmp_path: Path) -> None:
    """2 processes of 16 rows and 1 process of 32 rows give the same metrics, with an incomplete last batch too."""
    base = documented("## The documented command", TRAIN)
    rows = []
    for count, batch in ((2, 16), (1, 32)):
        command = filled(base, world, stage1_checkpoint, tmp_path, epochs=2)
        command = command.replace("--nproc_per_node=1", f"--nproc_per_node={count}")
        command = command.replace("--batch_size 64", f"--batch_size {batch}")
        command = command.replace("--find_unused_parameters", "--no_drop_last")
        command = command.replace("--register_token_dim 768", "--register_token_dim 64")
        run(command.replace("stage2_experiment", f"on{count}"), STAGE2)
        rows.append([json.loads(line) for line in (tmp_path / f"on{count}" / "metrics.jsonl").read_text().splitlines()])
    assert len({json.loads((tmp_path / f"on{p}" / "config.json").read_text())["store"] for p in (1, 2)}) == 1
    for two, one in zip(*rows, strict=True):
        for name in one:
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-3), name


@pytest.mark.slow
def test_the_two_processes_encode_what_one_encodes(world: Path, stage1_checkpoint: Path, tmp_path: Path) -> None:
    flags = f"--stage1_checkpoint {stage1_checkpoint} --datasets_dir {world} --views 1 --num_workers 1 --device cpu"
    stores = []
    for count in (1, 2):
        tool = f"torchrun --nproc_per_node={count} --no_python tvl-align" if count > 1 else "tvl-align"
        said = run(f"{tool} encode {flags} --output_dir {tmp_path}/{count}")
        stores.append(Path(said.strip().splitlines()[-1]))
    assert stores[0].name == stores[1].name
    for name, split in FeatureStore(stores[0]).splits.items():
        one, two = (FeatureStore(folder).splits[name].read(torch.arange(len(split))) for folder in stores)
        assert torch.equal(one.caption_keys, two.caption_keys)
        for modality, tokens in one.modalities.items():
            for column in ("tokens", "mask", "pooled", "present"):
                ours, theirs = (getattr(t, column).float() for t in (tokens, two.modalities[modality]))
                assert torch.allclose(ours, theirs, atol=2e-3), (name, modality)


@pytest.mark.slow
def test_a_plain_tvl_checkpoint(world: Path, stage1_checkpoint: Path, tmp_path: Path) -> None:
    """A checkpoint as released by TVL: a timm touch encoder at 224 pixels, and a Namespace without a CLIP model."""
    import timm

    touch = timm.create_model("vit_tiny_patch16_224", num_classes=128, global_pool="avg")
    model = {f"tactile_encoder.{k}": v for k, v in touch.state_dict().items()} | {"logit_scale": torch.tensor(2.6)}
    args = argparse.Namespace(tactile_model="vit_tiny_patch16_224", batch_size=256, datasets=["ssvtp", "hct"])
    torch.save({"model": model, "optimizer": {}, "epoch": 3, "scaler": {}, "args": args}, tmp_path / "tvl_enc_vittiny.pth")
    said = run(
        f"tvl-align train --stage1_checkpoint {tmp_path}/tvl_enc_vittiny.pth --clip_vision_model TVL-small "
        f"--clip_pretrain_data {stage1_checkpoint.parent}/clip.pt --datasets_dir {world} --datasets ssvtp --views 1 "
        f"--batch_size 4 --epochs 1 --register_token_dim 32 --num_heads 4 --output_dir {tmp_path} --num_workers 1"
    )
    assert "[STAGE2] epoch 1/1" in said


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "method"), [(ROOT, "cursor"), (Path("/"), "")])
def test_test_modules_from_anywhere(folder: Path, method: str) -> None:
    """All methods as documented; those that are named, from the checkout."""
    said = run(f"{sys.executable} {STAGE2 / 'test_modules.py'} {method}", folder)
    assert ", 0 failed" in said
    for name in METHODS:
        assert (f"ok  {name}: two processes" in said) == (method in ("", name))


@pytest.mark.slow
def test_documented_imports() -> None:
    code = "from experiments.stage2.tvl_stage2 import TVLStage2; from experiments.stage2.loss_stage2 import Stage2Loss"
    run(f"{sys.executable} -c {shlex.quote(code)}")


@pytest.mark.slow
def test_the_demo_in_small(tmp_path: Path) -> None:
    """The full pipeline in one command writes table, report and results; a second call reuses them."""
    command = (
        f"tvl-align demo --out {tmp_path} --train 160 --test 40 --pretrain_epochs 1 --epochs 1 --views 1 --probe_steps 20"
    )
    said = run(command)
    page = tmp_path / "runs" / "base" / "report.html"
    assert f"page: {page}" in said
    search, embed, train = (line.strip() for line in said.split("to try next:")[1].splitlines() if line.startswith("    "))
    assert len(re.findall(r"^ +[01]\.\d+  .*_rgb.jpg$", run(search), re.M)) == 5
    run(
        embed.replace("FOLDER", str(tmp_path / "world" / "ssvtp" / "images_rgb")).replace(
            "tokens.npz", str(tmp_path / "t.npz")
        )
    )
    with np.load(tmp_path / "t.npz") as tokens:
        assert len(tokens["vision.pooled"]) == len([*(tmp_path / "world" / "ssvtp" / "images_rgb").iterdir()])
    assert "TABLE.csv" in run(train, expect=2)
    for column in ("Acc@1", "Stage 1", "untrained", "oracle", "chance", "synthetic data", "tactile-vision"):
        assert column in said
    text = page.read_text()
    assert "Synthetic data" in text
    assert "http" not in text.replace("http://www.w3.org", "")
    results = json.loads((page.parent / "results.json").read_text())
    assert results["gallery"] == 40
    assert results["controls"]["shuffled_acc1"] < 15
    for numbers in results["retrieval"].values():
        assert {"acc1", "acc5", "low", "high", "chance1", "stage1_acc1", "oracle_acc1"} <= numbers.keys()
        assert numbers["untrained_acc1"] < 20
    names = {"shared_retention", "unique_retention", "joint_unique_retention", "unique_leak", "shared_leak"}
    assert set(results["summary"]) <= names
    assert [p["k"] for p in results["prefix"]] == [1, 2, 3, 4]
    assert all({"k", "acc1", "shared_retention", "reconstruction"} <= p.keys() for p in results["prefix"])
    if "shared_retention" in results["summary"]:
        assert results["prefix"][-1]["shared_retention"] == pytest.approx(results["summary"]["shared_retention"]["score"])
    assert "world:" not in run(command)
    said = run(f"tvl-align evaluate {page.parent} --split val --probe_rows 50 --probe_steps 20")
    assert said.strip().endswith("results-val.json")
    on_val = json.loads((page.parent / "results-val.json").read_text())
    assert on_val["split"] == "val"
    assert on_val["gallery"] == json.loads((page.parent / "config.json").read_text())["rows"]["val"]
    checkpoint = tmp_path / "stage1" / "checkpoint.pth"
    with torch.serialization.safe_globals([argparse.Namespace]):
        wrong = torch.load(checkpoint, weights_only=True)
    name = next(k for k, v in wrong["model"].items() if v.is_floating_point() and v.ndim > 1)
    wrong["model"][name] += 1.0
    torch.save(wrong, checkpoint)
    stores = set((tmp_path / "runs" / "features").iterdir())
    assert "Stage-1 checkpoint" in run(f"tvl-align evaluate {page.parent}", expect=2)
    assert set((tmp_path / "runs" / "features").iterdir()) == stores  # refused before anything was encoded


def called(line: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Run `tvl-align` in this process, for commands that end before training. Returns exit code and output."""
    monkeypatch.setattr(sys, "argv", ["tvl-align", *shlex.split(line)])
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    said = capfd.readouterr()
    return code, said.out + said.err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    code, said = called(f"{command} --help", monkeypatch, capfd)
    assert code == 0
    assert "default" in said
    assert command in called("--help", monkeypatch, capfd)[1]


MISTAKES = {
    "--stage1_checkpoint /none.pth": "no such checkpoint: /none.pth",
    "--tactile_model vit_base": "has the touch model vit_tiny_patch16_224, not vit_base_patch16_224",
    "--tactile_model vit_huge": "unknown touch model 'vit_huge'",
    "--clip_vision_model ViT-B-16 --clip_pretrain_data openai": "cannot be downloaded .*local weight file",
    "--num_register_tokens 3": "3 registers cannot hold 3 overlapping tokens",
    "--block_width 30": "30 is not divisible by 8 heads",
    "--method cursor --register_token_dim 30": "30 is not divisible by 8 heads",
    "--register_token_dim 3": "register width 3 is less than 4 registers",
    "--datasets_dir /proc/sys": "has no ssvtp/ or hct/",
    "--active_modality_names vision audio": "modality 'audio' is not supported",
    "--batch_size 5000": "fewer than one batch of 5000",
    "--device=gpu": "unknown device 'gpu'",
    "--method transformer": "unknown method 'transformer'",
    "--batch_sise 3": "--batch_size",
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_mistakes_get_one_sentence(
    flags: str,
    world: Path,
    stage1_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    given = {"--stage1_checkpoint": str(stage1_checkpoint), "--datasets_dir": str(world), "--output_dir": str(tmp_path)}
    rest = " ".join(f"{k} {v}" for k, v in given.items() if k not in flags)
    code, said = called(f"train {rest} --views 1 --num_workers 0 --device cpu {flags}", monkeypatch, capfd)
    assert code == 2
    assert re.search(MISTAKES[flags], " ".join(said.split())), said


@pytest.mark.slow
def test_a_mistake_in_a_real_process(tmp_path: Path) -> None:
    said = run("tvl-align train --stage1_checkpoint /none.pth --datasets_dir /none", tmp_path, expect=2)
    assert "error: no such folder: /none; --datasets_dir must contain ssvtp and hct." in said
    assert "Traceback" not in said
    assert "did you mean train?" in run("tvl-align trian", expect=2)
