"""Flags, defaults, typos, and conversion to JSON and back."""

import json
from dataclasses import fields
from pathlib import Path

import pytest

from tvl_align.config import from_plain, ignored_flags, parse, to_plain
from tvl_align.features.inputs import DataConfig
from tvl_align.methods.base import Stage2Config
from tvl_align.system.console import UserError
from tvl_align.training.optimisation import OptimConfig
from tvl_align.training.settings import RunConfig, Settings, notes_on_ignored_flags

REQUIRED = ["--stage1_checkpoint", "P"]


def given(*flags: str) -> Settings[Stage2Config]:
    return parse(Settings[Stage2Config], [*REQUIRED, *flags])


DEFAULTS = {
    "num_register_tokens": 4, "num_overlapping_tokens": 3, "register_token_dim": 768, "num_cross_attn_layers": 1,
    "num_heads": 8, "mlp_ratio": 4.0, "drop_rate": 0.0, "attn_drop_rate": 0.0, "drop_path_rate": 0.0,
    "nested_dropout_rate": 0.5, "complementary_reg_weight": 0.01, "disable_vision_text_loss": False,
    "disable_tactile_text_loss": False, "tactile_model": "vit_tiny_patch16_224", "common_latent_dim": None,
    "batch_size": 64, "epochs": 100, "accum_iter": 1, "weight_decay": 0.05, "lr": None, "blr": 1e-3, "min_lr": 0.0,
    "warmup_epochs": 10, "datasets": ("ssvtp", "hct"), "importance_sampling": False, "use_not_contact": False,
    "percent_not_contact": 0.1, "color_jitter": False, "randomize_crop": False, "subtract_background": None,
    "shuffle_text": False, "no_text_prompt": False, "replace_synonyms": False, "keep_k_synonyms": None,
    "output_dir": Path("output_dir"), "seed": 0, "num_workers": 10, "pin_mem": True, "multi_epochs_dataloader": False,
    "active_modality_names": ("vision", "tactile", "text"), "features": "tokens", "nested_dropout_mode": "nested",
    "views": 4,
}  # fmt: skip


def flat(settings: Settings[Stage2Config]) -> dict[str, object]:
    groups = (settings.stage1, settings.knobs, settings.data, settings.optim, settings.run)
    return {f.name: getattr(group, f.name) for group in groups for f in fields(group)}


def test_documented_defaults() -> None:
    assert flat(given()) | DEFAULTS == flat(given())


def test_every_flag_is_known_and_means_itself() -> None:
    line = (
        "--lr 0.1 --log_dir L --log_name N --device cpu --resume R --start_epoch 2 --num_workers 3 --no_pin_mem "
        "--dist_eval --find_unused_parameters --enable_flash_attention2 --world_size 2 --local_rank 1 --dist_url u "
        "--clip_vision_model ViT-L-14 --clip_pretrain_data datacomp_xl_s13b_b90k --features pooled "
        "--nested_dropout_mode independent --preservation_weight 0.5 --views 2 --feature_dir F --datasets hct "
        "--subtract_background background --active_modality_names vision tactile --multi_epochs_dataloader --pin_mem"
    )
    settings = given(*line.split())
    assert settings.run.resume == "R"
    assert settings.data.datasets == ("hct",)
    assert settings.knobs.preservation_weight == 0.5
    said = notes_on_ignored_flags(settings)
    assert len(said) == 6
    assert all(line.startswith("--") and "has no effect: " in line for line in said)


def test_resume_needs_no_value() -> None:
    assert given("--resume").run.resume == "auto"
    assert given("--resume", "--seed", "1").run.resume == "auto"


def test_a_typo_is_an_error_that_names_the_nearest_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        given("--batch_sizes", "3")
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert "--batch_size" in said.err + said.out


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        given("--help")
    assert stop.value.code == 0
    said = capsys.readouterr().out
    hidden = ignored_flags(Settings[Stage2Config])
    assert set(hidden) == {
        *("enable_flash_attention2", "pin_mem", "multi_epochs_dataloader", "dist_eval"),
        *("world_size", "local_rank", "dist_url"),
    }
    shown = flat(given()).keys() - hidden.keys()
    for name in shown:
        assert f"--{name}" in said
    assert "--dist_eval" not in said
    assert said.count("(default:") + said.count("(required)") + said.count("(repeatable)") >= len(shown)
    assert "--no_no" not in said


def test_json_and_back() -> None:
    settings = given("--datasets_dir", "/d", "--output_dir", "/o", "--feature_dir", "/f", "--stage1_checkpoint", "/p")
    plain = json.loads(json.dumps(to_plain(settings)))
    assert from_plain(DataConfig, plain["data"]) == settings.data
    assert from_plain(Stage2Config, plain["knobs"]) == settings.knobs
    assert from_plain(RunConfig, plain["run"]) == settings.run
    with pytest.raises(UserError, match="unknown option 'batchsize' for OptimConfig"):
        from_plain(OptimConfig, {"batchsize": 3})


@pytest.mark.parametrize("names", [("vision", "audio"), ("thermal", "text")])
def test_unsupported_modalities(names: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="modality '(audio|thermal)' is not supported"):
        DataConfig(active_modality_names=names)


def test_one_modality_cannot_be_aligned() -> None:
    with pytest.raises(UserError, match="at least two"):
        DataConfig(active_modality_names=("vision",))
