"""A trained run in use: new inputs get the tokens that evaluation gives the same rows, and nothing else is accepted."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tvl_align
from tvl_align.contract import Features, Tokens
from tvl_align.data.tvl import Row, read_tvl
from tvl_align.encoders.tvl import Stage1Config, load_stage1
from tvl_align.evaluation.split_tokens import all_rows, compute_tokens
from tvl_align.features.inputs import DataConfig
from tvl_align.features.store import FeatureStore
from tvl_align.inference.registers import Embeddings, Registers, load
from tvl_align.methods.cursor import CURSOR, CursorConfig
from tvl_align.methods.mlp import MLP, MLPConfig
from tvl_align.system.console import UserError
from tvl_align.training.engine import fit
from tvl_align.training.optimisation import OptimConfig
from tvl_align.training.settings import RunConfig, Settings

CPU = torch.device("cpu")
OPTIM = OptimConfig(batch_size=16, epochs=1, warmup_epochs=0, lr=1e-3)


def inputs(world: Path, rows: list[Row]) -> dict[str, Any]:
    return {
        "vision": [world / str(row.vision) for row in rows],
        "tactile": [world / str(row.tactile) for row in rows],
        "text": [row.caption for row in rows],
    }


def of_evaluation(registers: Registers) -> Any:
    test = registers.open_store().splits["test"]
    return compute_tokens(registers.model, test, all_rows(test), CPU)


def close(one: torch.Tensor, other: torch.Tensor, share: float = 0.98) -> bool:
    """Equal to 1e-4 in nearly all numbers: encoders round, and a code of few levels jumps at a boundary."""
    return one.shape == other.shape and float(((one - other).abs() < 1e-4).float().mean()) >= share


def test_files_get_the_tokens_that_evaluation_gives_their_rows(registers: Registers, world: Path, rows: list[Row]) -> None:
    out, expected = registers.embed(**inputs(world, rows)), of_evaluation(registers)
    assert set(out.pooled) == {"vision", "tactile", "text"} and len(out) == len(rows)
    for m in out.pooled:
        assert close(out.overlapping[m], expected.overlapping[m]) and out.overlapping[m].shape[1:] == (3, 32)
        assert close(out.complementary[m], expected.complementary[m]) and out.complementary[m].shape[1:] == (1, 32)
        assert close(out.pooled[m], expected.pooled[m])
    other = registers.embed(vision=[world / str(row.vision) for row in rows])
    assert set(other.pooled) == {"vision"} and torch.equal(other.pooled["vision"], out.pooled["vision"])


def test_a_split_of_the_store_gets_the_tokens_of_evaluation(registers: Registers) -> None:
    out, expected = registers.embed_split(registers.open_store().splits["test"]), of_evaluation(registers)
    for m in out.pooled:
        assert torch.equal(out.overlapping[m], expected.overlapping[m])
        assert torch.equal(out.pooled[m], expected.pooled[m])


@pytest.mark.parametrize(("batch_size", "threads"), [(8, 4), (4, 2)])
def test_one_batch_has_all_threads(
    registers: Registers, world: Path, rows: list[Row], batch_size: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, used, encode = torch.get_num_threads(), [], registers.stage1.encode

    def recorded(*args: Any) -> Features:
        used.append(torch.get_num_threads())
        return encode(*args)

    monkeypatch.setattr(registers.stage1, "encode", recorded)
    monkeypatch.setattr("tvl_align.system.workers.MAX_LANES", 2)
    torch.set_num_threads(4)
    try:
        registers.embed(tactile=[world / str(row.tactile) for row in rows[:8]], batch_size=batch_size)
    finally:
        torch.set_num_threads(before)
    assert used == [threads] * (8 // batch_size)


def test_kinds_and_sizes_of_batches_change_nothing(registers: Registers, world: Path, rows: list[Row]) -> None:
    paths = [world / str(row.tactile) for row in rows[:5]]
    pictures = [Image.open(path).convert("RGB") for path in paths]
    arrays = [np.asarray(picture) for picture in pictures]
    expected = registers.embed(tactile=paths)
    for items in (list(map(str, paths)), pictures, arrays, [torch.from_numpy(a.copy()).permute(2, 0, 1) for a in arrays]):
        assert torch.allclose(registers.embed(tactile=items).pooled["tactile"], expected.pooled["tactile"], atol=1e-6)
    small = registers.embed(tactile=paths, batch_size=2)
    assert close(small.pooled["tactile"], expected.pooled["tactile"], 1.0)
    one = registers.embed(tactile=paths[0])
    assert one.pooled["tactile"].shape == (1, 32) and close(one.pooled["tactile"], expected.pooled["tactile"][:1], 1.0)


def test_absent_items_are_zero_and_change_no_other(registers: Registers, world: Path, rows: list[Row]) -> None:
    full = inputs(world, rows[:3])
    out, expected = (
        registers.embed(**(full | {"vision": [None, *full["vision"][1:]], "text": [*full["text"][:2], None]})),
        registers.embed(**full),
    )
    assert out.present["vision"].tolist() == [False, True, True] and out.present["text"].tolist() == [True, True, False]
    assert (
        not out.pooled["vision"][0].any() and not out.overlapping["text"][2].any() and not out.complementary["text"][2].any()
    )
    assert close(out.pooled["vision"][1:], expected.pooled["vision"][1:], 1.0)
    assert close(out.pooled["tactile"], expected.pooled["tactile"], 1.0)
    similar = registers.similarity(out)
    assert set(similar) == {"tactile_vision", "text_vision", "tactile_text"}
    assert torch.allclose(similar["tactile_vision"], out.pooled["tactile"] @ out.pooled["vision"].T)
    assert not similar["tactile_vision"][:, 0].any()
    assert registers.similarity(out, expected)["text_vision"].shape == (3, 3)


@torch.no_grad()
def test_a_prefix_is_that_of_evaluation(registers: Registers) -> None:
    test = registers.open_store().splits["test"]
    for keep in (1, 3, 4):
        out, expected = (
            registers.embed_split(test, keep=keep),
            compute_tokens(registers.model, test, all_rows(test), CPU, keep),
        )
        for m in out.pooled:
            assert torch.equal(out.overlapping[m], expected.overlapping[m]) and torch.equal(
                out.pooled[m], expected.pooled[m]
            )
            assert not out.overlapping[m][:, keep:].any() and out.overlapping[m][:, :keep].any()
            assert bool(out.complementary[m].any()) == (keep == 4)


def test_attention_is_the_slope_of_a_registers_energy_at_each_token(
    registers: Registers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By finite differences in every number of two tokens, of units that are not rounded: rounded ones move in steps."""
    monkeypatch.setattr(registers.model, "knobs", replace(registers.model.knobs, resolution=0.0))
    test = registers.open_store().splits["test"]
    features = test.read(torch.arange(2)).float()
    out = registers.embed_features(features, attention=True)
    maps, tokens = out.attention["tactile"], features.modalities["tactile"]
    assert maps.shape == (2, 4, tokens.tokens.shape[1])
    assert torch.allclose(maps.sum(-1), torch.ones(2, 4), atol=1e-5)
    width, step = tokens.tokens.shape[2], 0.1

    @torch.no_grad()
    def energies(token: int, sign: float) -> torch.Tensor:
        """(W,): the energy of the first register of row 0, each time with one number of a token changed."""
        changed = tokens.tokens[:1].repeat(width, 1, 1)
        changed[:, token] += sign * step * torch.eye(width)
        row = Tokens(
            changed, *(x[:1].repeat(width, *[1] * (x.ndim - 1)) for x in (tokens.mask, tokens.pooled, tokens.present))
        )
        output = registers.model(Features({"tactile": row}, torch.arange(width)[:, None], torch.arange(width)), joint=False)
        return output.overlapping_tokens["tactile"][:, 0].double().square().sum(1) / 2

    slopes = [float(((energies(t, 1) - energies(t, -1)) / (2 * step)).norm()) for t in (0, 1)]
    assert slopes[0] / slopes[1] == pytest.approx(float(maps[0, 0, 0] / maps[0, 0, 1]), rel=0.05)


@pytest.mark.parametrize(("method", "knobs"), [(CURSOR, CursorConfig), (MLP, MLPConfig)])
def test_other_methods_and_own_features(method: Any, knobs: Any, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    shared = torch.randn(120, 4, generator=draw)
    sides = {m: (shared @ torch.randn(4, 24, generator=draw)).view(120, 3, 8).numpy() for m in ("audio", "depth")}
    FeatureStore.from_arrays(sides, tmp_path / "store")
    own = {"hidden": 8} if method is MLP else {"num_heads": 4}
    settings = Settings(
        Stage1Config(),
        knobs(register_token_dim=32, **own),
        DataConfig(store=tmp_path / "store", probe_rows=0),
        OPTIM,
        RunConfig(tmp_path, "run", device="cpu", method="mlp" if method is MLP else "cursor"),
    )
    fit(settings, method)
    registers = tvl_align.load(tmp_path / "run", device="cpu")
    test = registers.open_store().splits["test"]
    expected = registers.embed_split(test)
    tokens = test.read(torch.arange(len(test))).modalities["audio"].tokens
    out = registers.embed_features({"audio": tokens})
    assert torch.allclose(out.pooled["audio"], expected.pooled["audio"], atol=0.01)
    with pytest.raises(UserError, match="no modality 'text'; it has audio, depth"):
        registers.embed(text=["soft"])
    with pytest.raises(UserError, match="trained on features of your own"):
        _ = registers.stage1
    with pytest.raises(UserError, match=r"audio has the shape \(2, 3, 9\), but this run takes audio \(B, 3, 8\), depth"):
        registers.embed_features({"audio": np.zeros((2, 3, 9))})
    with pytest.raises(UserError, match="not finite"):
        registers.embed_features({"audio": np.full((2, 3, 8), np.nan)})


def test_another_stage_1_is_refused_by_name(run: Path, stage1_checkpoint: Path, tmp_path: Path) -> None:
    content = torch.load(stage1_checkpoint, weights_only=False)
    weights = content["model"]
    name = next(k for k, v in weights.items() if k.startswith("tactile_encoder") and v.ndim > 1)
    weights[name] = weights[name] + 0.01
    shutil.copytree(stage1_checkpoint.parent, tmp_path / "other")
    torch.save(content, tmp_path / "other/checkpoint.pth")
    wrong = load(run, stage1_checkpoint=tmp_path / "other/checkpoint.pth", device="cpu")
    with pytest.raises(UserError, match=r"other/checkpoint\.pth has the weights \w{12}, but .*run was trained with \w{12}"):
        wrong.embed(text=["soft"])
    loaded = load(run, stage1=load_stage1(stage1_checkpoint), device="cpu")
    assert loaded.embed(text="soft").pooled["text"].shape == (1, 32)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "nothing to embed; give items of one of vision, tactile, text"),
        ({"text": []}, "nothing to embed"),
        ({"text": ["soft"], "vision": [None, None]}, "differ in their rows, {'vision': 2, 'text': 1}"),
        ({"text": ["soft", "n/a"]}, "item 1 of text is 'n/a'; give adjectives"),
        ({"text": [3]}, "item 0 of text is 3"),
        ({"vision": ["no.png"]}, r"item 0 of vision \(no.png\) cannot be used: the file is missing"),
        (
            {"vision": [np.zeros((2, 2, 3), np.uint8)]},
            r"item 0 of vision \(ndarray\) cannot be used: a side of fewer than 8",
        ),
        ({"tactile": 3}, "tactile is a int; give a list"),
        ({"text": ["soft"], "keep": 0}, "keep=0 is out of range; give 1 to 4"),
        ({"text": ["soft"], "keep": 5}, "keep=5 is out of range"),
        ({"vision": [np.zeros((64, 64, 3), np.uint8)], "dataset": "mine"}, "mine"),
    ],
)
def test_bad_input_is_one_sentence(registers: Registers, given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        registers.embed(**given)


def test_what_is_no_run_is_one_sentence(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="is not a run folder"):
        load(tmp_path)
    with pytest.raises(UserError, match="there is no folder some/name, and no model of that name could be downloaded"):
        load("some/name")
    shutil.copytree(run, tmp_path / "run")
    config = json.loads((tmp_path / "run/config.json").read_text())
    config["specs"]["vision"]["width"] += 1
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="do not fit the settings beside it"):
        load(tmp_path / "run")


def rows_are_joined_in_order() -> None:
    parts = [Embeddings(*({"a": torch.full((2, 1), float(i))} for _ in range(4))) for i in range(3)]
    assert Embeddings.joined(parts).pooled["a"].flatten().tolist() == [0, 0, 1, 1, 2, 2]


def test_five_lines_in_a_new_process(run: Path, world: Path, rows: list[Row]) -> None:
    code = (
        "import sys, tvl_align\n"
        "registers = tvl_align.load(sys.argv[1])\n"
        'out = registers.embed(vision=[sys.argv[2]], text=["soft, woven"])\n'
        'print(out.pooled["vision"].shape, float(registers.similarity(out)["text_vision"]))\n'
    )
    arguments = [str(run), str(world / str(rows[0].vision))]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("torch.Size([1, 32]) ")


def test_an_exported_run_is_loaded_from_a_folder_and_uploaded(
    run: Path, registers: Registers, stage1_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registers.save_pretrained(tmp_path / "shared")
    shared = Registers.from_pretrained(tmp_path / "shared", stage1_checkpoint=stage1_checkpoint, device="cpu")
    assert shared.key == registers.key
    assert torch.equal(shared.embed(text="soft").pooled["text"], registers.embed(text="soft").pooled["text"])
    with pytest.raises(UserError, match="stage1_checkpoint|no such checkpoint"):
        load(tmp_path / "shared", device="cpu").embed(text="soft")
    again = shared.save_pretrained(tmp_path / "again")
    assert {p.name for p in again.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    with pytest.raises(UserError, match="is not empty; give a new folder"):
        shared.save_pretrained(tmp_path / "again")
    calls: list[tuple[str, dict[str, Any], list[str]]] = []

    class Hub:
        def __init__(self, token: str | None) -> None:
            self.token = token

        def create_repo(self, repo_id: str, **options: Any) -> str:
            return f"hub/{repo_id}"

        def upload_folder(self, repo_id: str, folder_path: Path) -> None:
            calls.append((repo_id, {}, sorted(p.name for p in folder_path.iterdir())))

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert shared.push_to_hub("me/touch") == "hub/me/touch"
    assert calls == [("me/touch", {}, ["README.md", "config.json", "model.safetensors"])]


def test_a_name_of_the_hub_is_downloaded(
    registers: Registers, stage1_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registers.save_pretrained(tmp_path / "shared")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: str(tmp_path / "shared"))
    assert load("me/touch", device="cpu").modalities == ("vision", "tactile", "text")


def test_a_run_of_an_earlier_version_knows_its_features_from_its_store(
    run: Path, registers: Registers, world: Path, rows: list[Row], tmp_path: Path
) -> None:
    shutil.copytree(run.parent, tmp_path / "old")
    config = json.loads((tmp_path / "old/run/config.json").read_text())
    del config["features"], config["specs"]
    (tmp_path / "old/run/config.json").write_text(json.dumps(config))
    old, photo = load(tmp_path / "old/run", device="cpu"), world / str(rows[0].vision)
    assert torch.equal(old.embed(vision=photo).pooled["vision"], registers.embed(vision=photo).pooled["vision"])


def test_bf16_encoders_change_little(registers: Registers, world: Path, rows: list[Row]) -> None:
    photos = [world / str(row.vision) for row in rows[:8]]
    one, other = (registers.embed(vision=photos, precision=p).pooled["vision"] for p in ("float32", "bf16"))
    assert float((one * other).sum(1).min()) > 0.99 and not torch.equal(one, other)


def test_a_run_on_sentences_embeds_sentences(world: Path, stage1_checkpoint: Path, tmp_path: Path) -> None:
    """A run knows whether its texts were adjectives, which get the prompt, or sentences, which are used as they are."""
    lines = [
        f"{row.vision},{row.tactile},A piece that is {row.caption.split(',')[0]}."
        for row in read_tvl(world).train
        if row.caption
    ]
    (tmp_path / "pairs.csv").write_text("photo,touch,sentence\n" + "\n".join(lines) + "\n")
    settings = Settings(
        Stage1Config(stage1_checkpoint),
        MLPConfig(register_token_dim=32, hidden=8),
        DataConfig(world, pairs=tmp_path / "pairs.csv", views=1, num_workers=0, probe_rows=0, touch_norm="tvl"),
        OPTIM,
        RunConfig(tmp_path, "run", device="cpu", method="mlp"),
    )
    fit(settings, MLP)
    registers = load(tmp_path / "run", device="cpu")
    known = registers.embed_split(registers.open_store().splits["train"]).pooled["text"]
    sentence = lines[0].rpartition(",")[2]
    as_in_training = (known @ registers.embed(text=sentence).pooled["text"][0]).max()
    as_adjectives = (known @ registers.embed(text=sentence, sentences=False).pooled["text"][0]).max()
    assert float(as_in_training) > 1 - 1e-5 > float(as_adjectives)
